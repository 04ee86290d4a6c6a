# SPDX-License-Identifier: MIT
"""ksm-wrapper --group: one secret layout for its members, and nothing else that they notice."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pty
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from conftest import (
    AS_NOBODY,
    SOURCE,
    Tree,
    Victims,
    facts,
    need,
    need_command,
    opted_in,
    run,
    wait_until,
    without_us,
)
from test_wrapper import GIVEN, UNSUPPORTED, USAGE, not_runnable, refused, script

pytestmark = pytest.mark.ksm

ROOTS_GROUPS = Path("/run/ksm-preload/groups")
SECRET_SIZE = 128
NOBODY = 65534
PR_SET_MM = 35
CAP_SYS_RESOURCE = 24
PR_SET_CHILD_SUBREAPER = 36

# Where everything lies for who knows `setarch -R`, and up to where it may lie else.
PROGRAMS = 0x555555554000
TOP = 0x7FFFFFFFF000
TERABYTE = 1 << 40

REGIONS = ("program", "loader", "libc", "vdso", "heap", "stack")


def own_helpers(wrapper: Path) -> list[int]:
    """Return the PIDs of the processes that run this very file."""
    found = []
    for entry in os.listdir("/proc"):
        # A process may end at any time.
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.path.samefile(f"/proc/{entry}/exe", wrapper):
                found.append(int(entry))
    return found


def names() -> Iterator[str]:
    for number in itertools.count():
        yield f"test-{os.getpid()}-{number}"


NAMES = names()


@pytest.fixture
def group() -> Iterator[str]:
    """Return the name of a new group of root's, which is forgotten afterwards."""
    name = next(NAMES)
    yield name
    (ROOTS_GROUPS / name).unlink(missing_ok=True)
    for folder in (ROOTS_GROUPS, ROOTS_GROUPS.parent):
        with contextlib.suppress(OSError):  # others are in it
            folder.rmdir()


@pytest.fixture
def runtime_dir(public: Path) -> Iterator[Path]:
    """Return a folder that nobody may take for XDG_RUNTIME_DIR."""
    folder = public / next(NAMES)
    folder.mkdir(0o700)
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def where(report: dict[str, list[str]]) -> dict[str, int]:
    """Return region -> address."""
    return {
        name: int(value, 16) for name, _, value in (one.partition(" ") for one in report["where"])
    }


def sound(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """Return what `place` printed; all that it checks has to be right."""
    report = facts(done)
    assert report["wrong"] == [], done.stdout
    return report


def elsewhere(report: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return what `place` printed but the addresses."""
    differs = {"where", "wrong"}
    if report["limit"][3].startswith("3 -1"):
        differs.add("stack_size")  # then it is the distance to the next mapping
    return {key: values for key, values in report.items() if key not in differs}


def in_group(tree: Tree, group: str, *options: str) -> list[object]:
    """Return the command prefix for a member that has to have the layout."""
    return [tree.wrapper, "--group", group, "--group-required", *options]


def assert_ordinary(report: dict[str, list[str]], of_group: dict[str, int]) -> None:
    """Assert that the layout is neither the group's nor the one without randomization."""
    for region, address in where(report).items():
        assert address != of_group.get(region) or address == 0, region
    assert where(report)["program"] != PROGRAMS
    assert where(report)["loader"] < TOP - (4 << 20) or where(report)["loader"] == 0


# --- one layout ---


def test_members_share_a_layout_and_groups_do_not(
    public_tree: Tree, victims: Victims, group: str
) -> None:
    other = next(NAMES)
    place = victims("place")
    try:
        ours = [where(sound(run([*in_group(public_tree, group), place]))) for _ in range(3)]
        theirs = where(sound(run([*in_group(public_tree, other), place])))
    finally:
        (ROOTS_GROUPS / other).unlink()
    fixed = where(sound(run(["setarch", "-R", place])))
    assert set(ours[0]) == set(REGIONS)
    assert ours[0] == ours[1] == ours[2]
    for region in REGIONS:
        assert len({ours[0][region], theirs[region], fixed[region]}) == 3, region


def test_layout_lies_where_the_kernel_would_put_it(
    public_tree: Tree, victims: Victims, group: str
) -> None:
    """So that sanitizers and other programs that count on that work."""
    found = where(sound(run([*in_group(public_tree, group), victims("place")])))
    assert PROGRAMS < found["program"] < PROGRAMS + 2 * TERABYTE
    assert 0 < found["heap"] - found["program"] < 2 << 30
    assert TOP - 2 * TERABYTE < found["libc"] < found["vdso"] < found["loader"]
    # The stack may grow by gigabytes before it meets a mapping.
    assert found["loader"] + (8 << 30) < found["stack"] < TOP


@pytest.mark.parametrize(
    ("options", "regions"),
    [
        (["-no-pie"], {"loader", "libc", "vdso", "heap", "stack"}),
        (["-static-pie"], {"program", "vdso", "heap", "stack"}),
        (["-Wl,-z,now"], set(REGIONS)),
        (["-Wl,-z,execstack"], set(REGIONS)),
        (["-Wl,-z,max-page-size=0x200000"], set(REGIONS)),
        (["-Wl,-z,noseparate-code"], set(REGIONS)),
        (["-DBSS=67108864"], set(REGIONS)),
        (["-DTLS=16777216"], set(REGIONS)),
        (["-fsanitize=address", "-fno-omit-frame-pointer"], {"program", "loader", "stack"}),
        (["-fsanitize=undefined"], {"program", "loader", "stack"}),
        (["-fsanitize=thread"], {"program", "loader", "stack"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_kinds_of_programs(
    public_tree: Tree, victims: Victims, group: str, options: list[str], regions: set[str]
) -> None:
    place = victims.variant("place", *options)
    # AddressSanitizer's run-time has to come first.
    wrapper = in_group(public_tree, group, "--no-preload")
    plain = sound(run([place]))
    ours = [sound(run([*wrapper, place])) for _ in range(2)]
    first, second = (where(one) for one in ours)
    assert {name: first[name] for name in regions} == {name: second[name] for name in regions}
    assert all(first[name] != where(plain)[name] for name in regions)
    assert elsewhere(ours[0]) == elsewhere(ours[1]) == elsewhere(plain)
    for arguments in (["--threads", "20"], ["--heap", "64"]):
        done = run([*wrapper, place, *arguments])
        assert (done.returncode, done.stderr) == (0, "")


def test_musl(public_tree: Tree, victims: Victims, group: str) -> None:
    place = victims("place", "musl")
    plain, *ours = (
        sound(run([*wrapper, place]))
        for wrapper in ([], in_group(public_tree, group), in_group(public_tree, group))
    )
    assert where(ours[0]) == where(ours[1]) != where(plain)
    assert elsewhere(ours[0]) == elsewhere(plain)


def test_alignment_of_the_program_is_kept(public_tree: Tree, victims: Victims, group: str) -> None:
    place = victims.variant("place", "-Wl,-z,max-page-size=0x200000")
    found = where(sound(run([*in_group(public_tree, group), place])))
    assert found["program"] % (2 << 20) == 0


@pytest.mark.parametrize("name", ["a [stack]", "[stack]", "b[heap]", "c) S 1 (d", "e\nf"])
def test_names_that_are_like_the_kernels_words(
    public_tree: Tree, victims: Victims, group: str, public: Path, name: str
) -> None:
    program = public / name
    shutil.copy(victims("report"), program)
    done = run([*in_group(public_tree, group), program])
    assert (done.returncode, done.stderr) == (0, "")


# --- nothing else is different ---

MORE_GIVEN: dict[str, list[str]] = {
    "SIGCHLD ignored": ["env", "--ignore-signal=CHLD"],
    "SIGTRAP ignored and blocked": ["env", "--ignore-signal=TRAP", "--block-signal=TRAP"],
    "all signals blocked": ["env", "--block-signal"],
    "all closed": ["sh", "-c", 'exec "$@" <&- 2>&-', "sh"],
    "six descriptors allowed": ["sh", "-c", 'ulimit -n 9; exec "$@"', "sh"],
    "a small stack": ["sh", "-c", 'ulimit -Ss 512; exec "$@"', "sh"],
    "a stack without limit": ["sh", "-c", 'ulimit -Ss unlimited; exec "$@"', "sh"],
    "no address-space randomization": ["setarch", "-R"],
    "another personality": ["setarch", "--sticky-timeouts", "--whole-seconds"],
    "nobody": list(AS_NOBODY),
}


@pytest.mark.parametrize("given", [*GIVEN, *MORE_GIVEN])
def test_program_finds_what_was_given(
    public_tree: Tree, victims: Victims, group: str, runtime_dir: Path, given: str
) -> None:
    prefix = {**GIVEN, **MORE_GIVEN}[given]
    arguments = ["", "a b", "--", "-x", "\n", "\udcff"]
    environment = {"XDG_RUNTIME_DIR": str(runtime_dir)}
    wrapper = in_group(public_tree, group, "--no-hash-seed", "--no-preload")
    alone = [public_tree.wrapper, "--no-preload"]

    # Only opted in, and opted in and in the group.
    plain, ours = (
        run([*prefix, *us, victims("place"), *arguments], environment) for us in (alone, wrapper)
    )
    assert elsewhere(sound(ours)) == elsewhere(sound(plain))
    assert ours.stderr == plain.stderr == ""
    assert where(facts(ours)) == where(
        facts(run([*prefix, *wrapper, victims("place"), *arguments], environment))
    )

    plain, ours = (
        run([*prefix, *us, victims("report"), *arguments], environment) for us in (alone, wrapper)
    )
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert opted_in(facts(ours)) == opted_in(facts(plain)) == "prctl"


def test_same_process(public_tree: Tree, victims: Victims, group: str) -> None:
    shell = ["sh", "-c", 'echo shell $$ $PPID; exec "$@"', "sh"]
    report = facts(run([*shell, *in_group(public_tree, group), victims("report")]))
    assert report["shell"] == [f"{report['pid'][0]} {report['ppid'][0]}"]


def test_nothing_is_left(public_tree: Tree, victims: Victims, group: str) -> None:
    report = sound(run([*in_group(public_tree, group), victims("place")]))
    assert report["children"] == [""]
    assert report["wait"] == [f"-1 {errno.ECHILD}"]
    assert report["tracer"] == ["0"]
    assert report["pending"] == []
    wait_until(lambda: not own_helpers(public_tree.wrapper), 10, "the helper ends")


def test_children_are_the_programs_own(public_tree: Tree, group: str) -> None:
    """A child that the shell had before it became ksm-wrapper is still there, and no other."""
    look = 'read -r children </proc/$$/task/$$/children; echo $children; kill "$1"'
    command = 'sleep 100 & echo $!; exec "$@" $!'
    wrapper = in_group(public_tree, group)
    done = run(["sh", "-c", command, "sh", *wrapper, "sh", "-c", look, "sh"])
    child, children = done.stdout.splitlines()
    assert child == children


def test_subreaper_gets_no_child(public_tree: Tree, victims: Victims, group: str) -> None:
    become = (
        "import ctypes, os, sys; "
        f"ctypes.CDLL(None).prctl({PR_SET_CHILD_SUBREAPER}, 1, 0, 0, 0); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", become, *in_group(public_tree, group), victims("place")]
    report = sound(run(command))
    assert report["subreaper"] == ["1"]
    assert report["children"] == [""]
    assert report["wait"] == [f"-1 {errno.ECHILD}"]


def test_subreaper_above_gets_the_helper_only_after_its_end(
    public_tree: Tree, victims: Victims, group: str
) -> None:
    """systemd --user, tini -s: they reap what they do not know."""
    watch = (
        "import ctypes, os, sys; "
        f"ctypes.CDLL(None).prctl({PR_SET_CHILD_SUBREAPER}, 1, 0, 0, 0); "
        "child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)\n"
        "ended = {}\n"
        "try:\n"
        "  while True:\n"
        "    pid, status = os.wait()\n"
        "    ended[pid] = status\n"
        "except ChildProcessError:\n"
        "  pass\n"
        "assert ended.pop(child) == 0\n"
        "assert list(ended.values()) == [0], ended\n"
    )
    command = [sys.executable, "-c", watch, *in_group(public_tree, group), victims("place")]
    sound(run(command))


def test_descendants_have_ordinary_layouts(public_tree: Tree, victims: Victims, group: str) -> None:
    place = victims("place")
    of_group = where(sound(run([*in_group(public_tree, group), place])))
    seen = [of_group]
    for depth in (1, 2, 3):
        done = run([*in_group(public_tree, group), *[place, "--spawn"] * depth, place])
        assert_ordinary(sound(done), of_group)
        seen.append(where(facts(done)))
    for region in REGIONS:
        assert len({layout[region] for layout in seen}) == len(seen), region
    # exec in the same process, too.
    done = run([*in_group(public_tree, group), "sh", "-c", 'exec "$0"', place])
    assert_ordinary(sound(done), of_group)
    assert facts(done)["personality"] == ["0"]


def test_forks_keep_it(public_tree: Tree, group: str) -> None:
    show = "cat /proc/self/maps >/dev/null; (read -r first </proc/self/maps; echo $first); "
    show += "read -r first </proc/$$/maps; echo $first"
    child, parent = run([*in_group(public_tree, group), "sh", "-c", show]).stdout.splitlines()
    assert child == parent


@pytest.mark.parametrize("size", [0, 100_000, 1_500_000], ids=["none", "100 kB", "1.5 MB"])
def test_arguments_and_environment(
    public_tree: Tree, victims: Victims, group: str, size: int
) -> None:
    arguments = ["x" * 100 + str(i) for i in range(size // 200)]
    variables = [f"V{i}=" + "y" * 90 for i in range(size // 200)]
    wrapper = in_group(public_tree, group, "--no-preload", "--no-hash-seed")
    done = run(["env", "-i", *variables, *wrapper, victims("place"), *arguments])
    assert sound(done)["execfn"] == [str(victims("place"))]
    report = facts(run(["env", "-i", *variables, *wrapper, victims("report"), *arguments]))
    assert report["argv"][1:] == arguments
    assert report["env"] == variables


def test_mergeable_as_without_a_group(public_tree: Tree, group: str) -> None:
    """Moving a mapping loses no flag."""
    seen = []
    for wrapper in ([public_tree.wrapper], in_group(public_tree, group)):
        smaps = run([*wrapper, "cat", "/proc/self/smaps"]).stdout
        heads = re.findall(r"^[0-9a-f]+-[0-9a-f]+ (.*)\n", smaps, re.MULTILINE)
        seen.append((heads, re.findall(r"^VmFlags: (.*)", smaps, re.MULTILINE)))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == len(seen[0][1]) > 10


# --- scripts, and what cannot be run ---


def test_scripts(public_tree: Tree, victims: Victims, group: str, public: Path) -> None:
    place = victims("place")
    inner = script(public / "inner", f"#!{place} one\n")
    outer = script(public / "outer", f"#!{inner}\n")
    wrapper = in_group(public_tree, group, "--no-preload", "--no-hash-seed")
    of_group = where(sound(run([*wrapper, place])))
    for command in (inner, outer):
        plain, ours = (sound(run([*us, command, "x"], cwd=public)) for us in ([], wrapper))
        assert elsewhere(ours) == elsewhere(plain)
        found = where(ours)
        assert {name: found[name] for name in REGIONS[:-1]} == {
            name: of_group[name] for name in REGIONS[:-1]
        }


def test_script_without_an_interpreter_line(public_tree: Tree, group: str, tmp_path: Path) -> None:
    text = "read -r first </proc/$$/maps; echo $1 ${first%%-*}; exit 5\n"
    file = script(tmp_path / "script", text)
    first, second = (run([*in_group(public_tree, group), file, "x"]) for _ in range(2))
    assert first.stdout == second.stdout
    assert first.stdout.startswith("x ")
    assert (first.returncode, first.stderr) == (5, "")


def test_found_through_path(public_tree: Tree, victims: Victims, group: str, public: Path) -> None:
    """Past what cannot be run there: another's, a folder, a link to nothing."""
    before = public / "before"
    before.mkdir()
    (before / "place-dynamic").mkdir()
    path = f"/nowhere:{before}:{victims('place').parent}:/usr/bin:/bin"
    report = sound(run([*in_group(public_tree, group), "place-dynamic"], {"PATH": path}))
    assert report["execfn"] == [str(victims("place"))]


@pytest.mark.parametrize("required", [False, True])
def test_statuses_of_a_shell_for_what_cannot_be_run(
    public_tree: Tree, group: str, tmp_path: Path, required: bool
) -> None:
    for program, status, error in not_runnable(tmp_path):
        options = ["--group-required"] if required else []
        done = run([public_tree.wrapper, "--group", group, *options, program])
        refused(done, status, f"cannot run {program}: ", os.strerror(error), hint=False)
    wait_until(lambda: not own_helpers(public_tree.wrapper), 10, "the helpers end")


# --- signals ---


def start(
    command: Sequence[object],
    env: dict[str, str] | None = None,
    new_session: bool = False,
    new_group: bool = False,
) -> subprocess.Popen[str]:
    """Start a command whose output a test reads, with a short environment.

    The group of a new group's process is not orphaned: we are in its session, in another group.
    """
    return subprocess.Popen(
        [str(part) for part in command],
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
        # Popen's process_group= is in Python 3.11 only, and a launcher in between would take longer
        # than the moments that the signals are to hit. No thread of the tests runs meanwhile.
        preexec_fn=os.setpgrp if new_group else None,  # noqa: PLW1509
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGTRAP])
def test_ended_by_a_signal_or_whole(
    public_tree: Tree, victims: Victims, group: str, number: signal.Signals
) -> None:
    command = [*in_group(public_tree, group), victims("place")]
    of_group = where(sound(run(command)))
    ended = set()
    for attempt in range(150):
        process = start(command)
        for _ in range(attempt * 150):  # from the start to about the end of it
            pass
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode in {0, -number}
        assert errors == ""
        ended.add(process.returncode)
        if process.returncode == 0:
            done = subprocess.CompletedProcess((), 0, output, errors)
            assert where(sound(done)) == of_group
            assert elsewhere(facts(done))["limit"][3].startswith("3 ")
    assert -number in ended
    wait_until(lambda: not own_helpers(public_tree.wrapper), 10, "the helpers end")


def is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGTRAP, signal.SIGKILL])
def test_signal_while_the_program_is_looked_for(
    public_tree: Tree, victims: Victims, group: str, number: signal.Signals
) -> None:
    """It is traced already then, but has not become the program."""
    command = [*in_group(public_tree, group), victims("place").name]
    path = "/n:" * 40000 + f"{victims('place').parent}:/usr/bin:/bin"
    of_group = where(sound(run(command, {"PATH": path})))
    met = 0
    for _ in range(20):
        process = start(command, {"PATH": path})
        with contextlib.suppress(OSError):
            while process.poll() is None and not is_traced(process.pid):
                pass
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert errors == ""
        if process.returncode == 0:
            done = subprocess.CompletedProcess((), 0, output, errors)
            assert where(sound(done)) == of_group
        else:
            assert (process.returncode, output) == (-number, "")
            met += 1
    assert met > 0
    wait_until(lambda: not own_helpers(public_tree.wrapper), 10, "the helpers end")


def wait_stopped(pid: int) -> bool:
    """Wait until the child is stopped or has ended, and return which."""
    info = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert info is not None
    return info.si_code == os.CLD_STOPPED


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP])
def test_stopped_and_continued(
    public_tree: Tree, victims: Victims, group: str, number: signal.Signals
) -> None:
    command = [*in_group(public_tree, group), victims("place")]
    of_group = where(sound(run(command)))
    stops = 0
    for attempt in range(100):
        # SIGTSTP stops nobody in an orphaned process group, and ours may be one.
        process = start(command, new_group=True)
        for _ in range(attempt * 150):
            pass
        os.kill(process.pid, number)  # send_signal() would reap one that has ended already
        if wait_stopped(process.pid):
            stops += 1
            process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        done = subprocess.CompletedProcess((), 0, output, errors)
        assert where(sound(done)) == of_group
    assert stops > 0


def test_stopped_group_of_processes(public_tree: Tree, victims: Victims, group: str) -> None:
    """As a shell's `kill -STOP %1` and then `kill -CONT PID`: the helper is not of that group."""
    command = [*in_group(public_tree, group), victims("place")]
    for attempt in range(50):
        process = start(command, new_session=True)
        for _ in range(attempt * 300):
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGSTOP)
        if wait_stopped(process.pid):
            process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize("running", [False, True], ids=["at once", "when it runs"])
def test_control_c_in_a_terminal(
    public_tree: Tree, victims: Victims, group: str, running: bool
) -> None:
    command = [str(part) for part in (*in_group(public_tree, group), victims("place"), "--wait")]
    own_name = comm(os.getpid())
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    output = b""
    while running and b"ready" not in output:
        output += os.read(terminal, 1000)
    # Not Python any more, which would take the signal.
    wait_until(lambda: comm(pid) != own_name, 10, "it is exec'ed")
    os.write(terminal, b"\x03")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


# --- tools find everything ---


@contextlib.contextmanager
def ready(command: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """Start a victim and wait until it says so; end it afterwards."""
    with start(command) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("options", [[], ["-no-pie"], ["-static-pie"]], ids=" ".join)
def test_debugger(public_tree: Tree, victims: Victims, group: str, options: list[str]) -> None:
    gdb = need_command("gdb")
    place = victims.variant("place", *options) if options else victims("place")
    with ready([*in_group(public_tree, group), place, "--wait"]) as process:
        commands = ["-ex", "bt", "-ex", "print/x a_variable"]
        done = run([gdb, "-nx", "-batch", *commands, "-p", process.pid])
    assert re.search(r"wait_in_here \(\) at .*place\.c:\d+", done.stdout), done.stdout
    assert re.search(r" main \(argc=", done.stdout)
    assert "$1 = 0x12345678" in done.stdout


def test_core_dump(public_tree: Tree, victims: Victims, group: str, tmp_path: Path) -> None:
    gdb = need_command("gdb")
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    need(re.fullmatch(r"[\w.%]+", pattern), "core dumps go elsewhere")
    command = [*in_group(public_tree, group), victims("place"), "--crash"]
    done = run(["sh", "-c", 'ulimit -c unlimited; exec "$@"', "sh", *command], cwd=tmp_path)
    assert done.returncode == -signal.SIGABRT
    (core,) = tmp_path.iterdir()
    commands = ["-ex", "bt", "-ex", "print/x a_variable", "-ex", "info auxv"]
    done = run([gdb, "-nx", "-batch", *commands, victims("place"), core])
    assert "crash_in_here" in done.stdout
    assert "$1 = 0x12345678" in done.stdout
    of_group = where(sound(run([*in_group(public_tree, group), victims("place")])))
    assert re.search(rf"AT_BASE .*{of_group['loader']:#x}", done.stdout)


def perf() -> str:
    """Return perf, or skip where it cannot record."""
    command = need_command("perf")
    probe = run([command, "record", "-q", "-e", "cpu-clock", "-o", "/dev/null", "true"])
    need(probe.returncode == 0, "perf cannot record here")
    return command


def share_of(symbol: str, command: str, data: Path) -> float:
    """Return the percentage of the samples that perf attributes to a symbol of `place`."""
    report = run([command, "report", "-i", data, "--stdio", "--sort", "dso,symbol"]).stdout
    lines = [line for line in report.splitlines() if symbol in line and "place" in line]
    return max((float(line.split("%")[0]) for line in lines), default=0.0)


def test_perf_from_the_start(
    public_tree: Tree, victims: Victims, group: str, tmp_path: Path
) -> None:
    command, data = perf(), tmp_path / "data"
    program = [*in_group(public_tree, group), victims("place"), "--spin", "200000000"]
    run([command, "record", "-q", "-e", "cpu-clock", "-o", data, *program])
    assert share_of("spin_in_here", command, data) > 50


def test_perf_attached(public_tree: Tree, victims: Victims, group: str, tmp_path: Path) -> None:
    command, data = perf(), tmp_path / "data"
    with ready([*in_group(public_tree, group), victims("place"), "--spin"]) as process:
        options = ["-q", "-e", "cpu-clock", "-F", "5000", "-o", data, "-p", process.pid]
        recorder = start([command, "record", *options])
        wait_until(
            lambda: data.exists() and data.stat().st_size > 30_000, 30, "perf has some samples"
        )
        process.kill()
        assert recorder.wait(60) == 0
        recorder.communicate()
    assert share_of("spin_in_here", command, data) > 50


# --- stacks, heap, threads ---


def test_stack_is_as_large_as_ever(public_tree: Tree, victims: Victims, group: str) -> None:
    wrapper = in_group(public_tree, group)
    small = ["sh", "-c", 'ulimit -Ss 8192; exec "$@"', "sh", *wrapper]
    assert run([*small, victims("place"), "--deep"]).stdout == "deep 1\n"
    assert run([*small, victims("place"), "--overflow"]).returncode == -signal.SIGSEGV
    report = sound(run([*small, victims("place")]))
    assert report["stack_size"] == ["32"]
    assert report["thread_stack_size"] == [str(8 << 20)]


def test_heap_grows(public_tree: Tree, victims: Victims, group: str) -> None:
    done = run([*in_group(public_tree, group), victims("place"), "--heap", "400"])
    assert (done.returncode, done.stdout) == (0, "heap [heap]\n")


def test_thousand_threads(public_tree: Tree, victims: Victims, group: str) -> None:
    done = run([*in_group(public_tree, group), victims("place"), "--threads", "1000"])
    assert (done.returncode, done.stdout) == (0, "threads 1000\n")


# --- when it cannot ---


def assert_explained(command: Sequence[object], reason: str, env: dict[str, str]) -> None:
    """Assert that a prefix ending in `--group NAME` says one line and the program runs."""
    prefix, program = command[:-1], command[-1]
    assert prefix[-2] == "--group"
    plain = run([*prefix[:-2], program], env)
    done = run(command, env)
    assert done.returncode == plain.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ksm-wrapper: {program} runs with an ordinary layout: ")
    assert reason in line
    assert facts(done).keys() == facts(plain).keys()

    done = run([*prefix, "--group-required", program], env)
    assert (done.returncode, done.stdout) == (UNSUPPORTED, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ksm-wrapper: {program} ")
    assert reason in line


def special(public: Path, victims: Victims, kind: str) -> Path:
    """Return a program that cannot be in a group."""
    if kind in {"static", "i386"}:
        return victims("report", kind)
    path = public / f"place-{kind.replace(' ', '-')}"
    shutil.copy(victims("report"), path)
    if kind == "set-uid":
        path.chmod(0o4755)
    elif kind == "set-gid":
        path.chmod(0o2755)
    elif kind == "capabilities":
        setcap = need_command("setcap")
        need(run([setcap, "cap_net_raw=ep", path]).returncode == 0, "no file capabilities here")
    elif kind == "unreadable":
        path.chmod(0o711)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("static", "it is static and not position-independent"),
        ("i386", "it is of another architecture"),
        ("set-uid", "it is set-uid or set-gid"),
        ("set-gid", "it is set-uid or set-gid"),
        ("capabilities", "it has file capabilities"),
        ("unreadable", "its file cannot be read"),
    ],
)
def test_programs_that_cannot(
    public_tree: Tree, victims: Victims, public: Path, runtime_dir: Path, kind: str, reason: str
) -> None:
    program = special(public, victims, kind)
    environment = {"XDG_RUNTIME_DIR": str(runtime_dir)}
    # An i386 loader would complain of our library.
    wrapper = [*AS_NOBODY, public_tree.wrapper, "--no-preload", "--group", "g"]
    assert_explained([*wrapper, program], reason, environment)
    # Also as the interpreter of a script.
    as_script = script(public / f"script-{kind}", f"#!{program}\n")
    assert_explained([*wrapper, as_script], reason, environment)


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("personality", "personality(2) is forbidden"),
        (PR_SET_MM, "PR_SET_MM_MAP"),
        ("mremap", "moving the program failed"),
        ("ptrace", "a helper cannot trace it"),
        ("prlimit64", "the stack limit"),
        ("pipe2", "a helper cannot trace it"),
        ("clone", "a helper cannot trace it"),
    ],
)
def test_calls_that_a_container_forbids(
    public_tree: Tree, victims: Victims, group: str, what: object, reason: str, error: int
) -> None:
    prefix = [victims("refuse"), what, error, public_tree.wrapper, "--group", group]
    assert_explained([*prefix, victims("place")], reason, {})


def test_helper_killed_by_a_filter(public_tree: Tree, victims: Victims, group: str) -> None:
    prefix = [victims("refuse"), "ptrace", 0, public_tree.wrapper, "--group", group]
    assert_explained([*prefix, victims("place")], "it was killed", {})


def test_hard_limit_of_who_may_lift_it(
    public_tree: Tree, victims: Victims, group: str, runtime_dir: Path
) -> None:
    prefix = ["sh", "-c", 'ulimit -Hs 16384; exec "$@"', "sh"]
    powers = int(re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
    if powers >> CAP_SYS_RESOURCE & 1 == 0:
        command = [*prefix, public_tree.wrapper, "--group", group, victims("place")]
        assert_explained(command, "the hard limit on the stack is 16777216 bytes", {})
        return
    plain, ours = (
        sound(run([*prefix, *us, victims("place")]))
        for us in ([public_tree.wrapper], in_group(public_tree, group, "--no-hash-seed"))
    )
    assert elsewhere(plain) == elsewhere(ours)


HARD_LIMIT = ["sh", "-c", 'ulimit -Hs 16384; exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("prefix", "reason"),
    [
        ([*HARD_LIMIT, *AS_NOBODY], "the hard limit on the stack is 16777216 bytes"),
        (["setarch", "--addr-compat-layout", *AS_NOBODY], "legacy memory layout"),
        ([*AS_NOBODY, "strace", "-f", "-qqq", "-o", "/dev/null"], "it is traced already"),
        (["unshare", "--pid", "--fork"], "PID 1"),
    ],
    ids=["hard limit", "legacy layout", "strace", "PID 1"],
)
def test_places_where_it_cannot(
    public_tree: Tree,
    victims: Victims,
    group: str,
    runtime_dir: Path,
    prefix: list[str],
    reason: str,
) -> None:
    environment = {"XDG_RUNTIME_DIR": str(runtime_dir)}
    command = [*prefix, public_tree.wrapper, "--group", group, victims("report")]
    assert_explained(command, reason, environment)


def test_few_processes_allowed(public_tree: Tree, victims: Victims, runtime_dir: Path) -> None:
    """As nobody else runs here, one process is the wrapper itself."""
    wrapper = [public_tree.wrapper, "--group", "g", victims("report")]
    command = [*AS_NOBODY, "prlimit", "--nproc=1", *wrapper]
    assert_explained(command, os.strerror(errno.EAGAIN), {"XDG_RUNTIME_DIR": str(runtime_dir)})


def test_without_proc(public_tree: Tree, victims: Victims, group: str) -> None:
    no_proc = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    program = victims("end")
    for options, status in (([], 7), (["--group-required"], UNSUPPORTED)):
        wrapper = [public_tree.wrapper, "--group", group, *options]
        done = run([*no_proc, *wrapper, program, "exit", "7"])
        assert done.returncode == status
        assert len(done.stderr.splitlines()) == 1
        assert "/proc/self" in done.stderr


def test_proc_of_another_pid_namespace(public_tree: Tree, victims: Victims, group: str) -> None:
    """There the PID names another process, which is not to be touched."""
    place = victims("place")
    command = ["unshare", "--pid", "--fork", "sh", "-c", '"$@"; exit $?', "sh"]
    ours = run([*command, *in_group(public_tree, group), place])
    assert where(facts(ours)) == where(sound(run([*in_group(public_tree, group), place])))


def test_debugger_that_runs_the_wrapper(public_tree: Tree, victims: Victims, group: str) -> None:
    gdb = need_command("gdb")
    command = [public_tree.wrapper, "--group", group, victims("place")]
    done = run([gdb, "-nx", "-batch", "-ex", "run", "--args", *command])
    assert "runs with an ordinary layout: it is traced already" in done.stdout + done.stderr
    assert "exited normally" in done.stdout


# --- a failure at every step ---


@pytest.fixture(scope="module")
def faulty(public_tree: Tree, public: Path) -> Tree:
    """Return the wrapper built with -DKSM_FAULTS, in an installation of its own."""
    tree = public_tree.copy_to(public / "faulty")
    include = public / "faulty-include"
    include.mkdir()
    (include / "config.h").write_text(
        '#define KSM_VERSION "0"\n#define KSM_BINDIR "/"\n'
        '#define KSM_LIBDIR_FROM_BINDIR "../lib/ksm-preload"\n'
    )
    tree.wrapper.unlink()
    others = ("ksm_preload", "ksm_rescue", "preload_file", "start")
    sources = [path for path in SOURCE.glob("*.c") if not path.name.startswith(others)]
    options = ["-std=gnu11", "-O1", "-g", "-Wall", "-DKSM_FAULTS", f"-I{include}"]
    done = run(["gcc", *options, "-o", tree.wrapper, *sources])
    assert done.returncode == 0, done.stderr
    return tree


MOST_STEPS = 200

# Before there is a helper.
STEPS_OF_THE_WRAPPER = 3


def failures(
    tree: Tree, options: Sequence[object], of_group: dict[str, int]
) -> Iterator[tuple[int, subprocess.CompletedProcess[str]]]:
    """Yield each step that can fail, and what comes of it."""
    for step in range(1, MOST_STEPS):
        done = run([tree.wrapper, *options], {"KSM_FAIL_AT": str(step)})
        if done.returncode == 0 and not done.stderr:
            assert where(sound(done)) == of_group
            assert step > 25
            return
        yield step, done
    raise AssertionError("fails for ever")


@pytest.fixture(scope="module")
def count_of_steps(faulty: Tree, victims: Victims) -> int:
    name = next(NAMES)
    options = ["--group", name, victims("place")]
    try:
        of_group = where(sound(run([faulty.wrapper, *options])))
        return sum(1 for _ in failures(faulty, options, of_group))
    finally:
        (ROOTS_GROUPS / name).unlink()


@pytest.mark.parametrize("kind", ["place", "script"])
def test_failing_step_leaves_an_ordinary_program(
    faulty: Tree, victims: Victims, group: str, public: Path, kind: str
) -> None:
    program = victims("place")
    if kind == "script":
        program = script(public / "faulty-script", f"#!{program} one\n")
    options = ["--no-preload", "--no-hash-seed", "--group", group, program, "two"]
    of_group = where(sound(run([faulty.wrapper, *options])))
    plain = run([faulty.wrapper, "--no-preload", program, "two"])
    differs = {"execfn"}  # the second exec is by the path of the file
    seen: list[int] = []
    for step, done in failures(faulty, options, of_group):
        report = sound(done)
        assert_ordinary(report, of_group)
        expected = {k: v for k, v in elsewhere(sound(plain)).items() if k not in differs}
        assert {k: v for k, v in elsewhere(report).items() if k not in differs} == expected, step
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"ksm-wrapper: {program} runs with an ordinary layout: "), step
        seen.append(where(report)["program"])
    assert len(set(seen)) == len(seen)
    wait_until(lambda: not own_helpers(faulty.wrapper), 10, "the helpers end")


def test_failing_step_runs_nothing_if_the_group_is_required(
    faulty: Tree, victims: Victims, group: str
) -> None:
    options = ["--group", group, "--group-required", victims("place")]
    of_group = where(sound(run([faulty.wrapper, *options])))
    for step, done in failures(faulty, options, of_group):
        assert (done.returncode, done.stdout) == (UNSUPPORTED, ""), step
        assert len(done.stderr.splitlines()) == 1


def test_helper_killed_at_every_step(
    faulty: Tree, victims: Victims, group: str, count_of_steps: int
) -> None:
    options = ["--group", group, victims("place")]
    killed = 0
    of_group = where(sound(run([faulty.wrapper, *options])))
    for step in range(1, count_of_steps + 1):
        done = run([faulty.wrapper, *options], {"KSM_DIE_AT": str(step)})
        if done.returncode == 0:
            assert_ordinary(sound(done), of_group)
            assert len(done.stderr.splitlines()) == 1
        else:
            assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), step
            killed += 1
    assert killed > 20


@pytest.mark.parametrize(
    ("signals", "ended_by"),
    [
        ([signal.SIGTERM], signal.SIGTERM),
        ([signal.SIGKILL], signal.SIGKILL),
        ([signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT], signal.SIGTERM),
        ([signal.SIGTSTP, signal.SIGKILL], signal.SIGKILL),
        ([signal.SIGSTOP, signal.SIGCONT], None),
        ([signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH], None),
    ],
    ids=lambda value: "-".join(one.name for one in value) if isinstance(value, list) else "",
)
def test_signals_at_every_step(
    faulty: Tree,
    victims: Victims,
    group: str,
    count_of_steps: int,
    signals: list[signal.Signals],
    ended_by: signal.Signals | None,
) -> None:
    """All at one step, and each at another."""
    options = ["--group", group, victims("place")]
    of_group = where(sound(run([faulty.wrapper, *options])))
    for first, distance in itertools.product(
        range(STEPS_OF_THE_WRAPPER + 1, count_of_steps), (0, 1, 5)
    ):
        if first == STEPS_OF_THE_WRAPPER + 1 and distance > 0:
            continue  # not traced yet: a process that is stopped then comes to no other step
        at = (min(first + i * distance, count_of_steps - 1) for i in range(len(signals)))
        sent = ",".join(f"{step}:{int(one)}" for step, one in zip(at, signals))
        done = run([faulty.wrapper, *options], {"KSM_SIGNALS": sent})
        assert done.stderr == "", sent
        if ended_by is None:
            report = sound(done)
            assert where(report) == of_group
            assert report["pending"] == []
        else:
            assert (done.returncode, done.stdout) == (-ended_by, ""), sent
    wait_until(lambda: not own_helpers(faulty.wrapper), 10, "the helpers end")


def test_stop_at_every_step_stops(
    faulty: Tree, victims: Victims, group: str, count_of_steps: int
) -> None:
    command = [faulty.wrapper, "--group", group, victims("place")]
    of_group = where(sound(run(command)))
    for number, step in itertools.product(
        (signal.SIGSTOP, signal.SIGTSTP), range(STEPS_OF_THE_WRAPPER + 1, count_of_steps)
    ):
        process = start(["env", f"KSM_SIGNALS={step}:{int(number)}", *command])
        # The kernel drops a SIGTSTP where there is no shell to continue what it stops.
        stopped = wait_stopped(process.pid)
        assert stopped or number == signal.SIGTSTP, step
        if stopped:
            process.send_signal(signal.SIGCONT)
        output, errors = process.communicate(timeout=60)
        done = subprocess.CompletedProcess((), process.returncode, output, errors)
        assert errors == ""
        assert where(sound(done)) == of_group


def test_blocked_signal_stays_pending(
    faulty: Tree, victims: Victims, group: str, count_of_steps: int
) -> None:
    env = {"KSM_SIGNALS": f"{count_of_steps - 2}:{int(signal.SIGUSR1)}"}
    wrapper = ["env", "--block-signal=USR1", faulty.wrapper, "--group", group]
    report = sound(run([*wrapper, victims("place")], env))
    assert report["pending"] == [str(int(signal.SIGUSR1))]


# --- the secret ---


def test_processes_at_once_agree(public_tree: Tree, victims: Victims, group: str) -> None:
    command = [*in_group(public_tree, group), victims("place")]
    for _ in range(3):
        processes = [start(command) for _ in range(50)]
        layouts = set()
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, errors) == (0, "")
            report = facts(subprocess.CompletedProcess((), 0, output, errors))
            layouts.add(tuple(sorted(where(report).items())))
        assert len(layouts) == 1
        assert not [file for file in ROOTS_GROUPS.iterdir() if file.name.startswith(".new")]
        (ROOTS_GROUPS / group).unlink()


@pytest.mark.parametrize("umask", ["022", "0", "777"])
def test_files_of_root(public_tree: Tree, umask: str) -> None:
    look = 'mount -t tmpfs -o mode=755 none /run && umask "$0" && "$@" && '
    look += "stat -c %a:%u:%s:%n /run/ksm-preload /run/ksm-preload/groups/*"
    in_own_run = ["unshare", "--mount", "sh", "-c", look, umask]
    done = run([*in_own_run, *in_group(public_tree, "g"), "true"])
    folder, file = done.stdout.splitlines()
    assert folder.startswith("755:0:"), done.stderr
    assert file == f"600:0:{SECRET_SIZE}:/run/ksm-preload/groups/g"


def nobodys(tree: Tree, runtime_dir: Path | str | None, *command: object) -> list[object]:
    """Return a command that runs as nobody, in group g."""
    setting = [] if runtime_dir is None else [f"XDG_RUNTIME_DIR={runtime_dir}"]
    return [*AS_NOBODY, "env", *setting, tree.wrapper, "--group", "g", *command]


def test_files_of_others(public_tree: Tree, victims: Victims, runtime_dir: Path) -> None:
    command = nobodys(public_tree, runtime_dir, "--group-required", victims("place"))
    first = where(sound(run(["sh", "-c", 'umask 0; exec "$@"', "sh", *command])))
    folder = runtime_dir / "ksm-preload"
    for path, mode in (
        (folder, 0o40700),
        (folder / "groups", 0o40700),
        (folder / "groups" / "g", 0o100600),
    ):
        info = path.stat()
        assert (info.st_mode, info.st_uid) == (mode, NOBODY)
    assert [file.name for file in (folder / "groups").iterdir()] == ["g"]
    secret = (folder / "groups" / "g").read_bytes()
    assert len(secret) == SECRET_SIZE
    assert len(set(secret)) > 60  # 128 random bytes have 101 different values on average

    assert where(sound(run(command))) == first
    (folder / "groups" / "g").unlink()
    assert where(sound(run(command))) != first


def declined(command: Sequence[object], reason: str) -> None:
    """Assert that a command that echoes `run` does so, in no group, and not at all if it has to."""
    done = run(command)
    assert (done.returncode, done.stdout) == (0, "run\n"), done.stderr
    assert re.fullmatch(r"ksm-wrapper: echo runs with an ordinary layout: .*\n", done.stderr), (
        done.stderr
    )
    assert reason in done.stderr
    required = list(command)
    required.insert(required.index("--group"), "--group-required")
    refused(run(required), UNSUPPORTED, "layout of group g: ", reason, hint=False)


@pytest.mark.parametrize(
    "damage",
    ["mode", "owner", "link", "short", "empty", "folder", "fifo", "unreadable"],
)
def test_secret_that_cannot_be_trusted(public_tree: Tree, runtime_dir: Path, damage: str) -> None:
    command = nobodys(public_tree, runtime_dir, "echo", "run")
    assert run(command).stdout == "run\n"
    file = runtime_dir / "ksm-preload" / "groups" / "g"
    content = file.read_bytes()
    if damage == "mode":
        file.chmod(0o640)
    elif damage == "owner":
        os.chown(file, 1, 1)
    elif damage == "link":
        file.rename(file.with_name("target"))
        file.symlink_to("target")
    elif damage in {"short", "empty"}:
        file.write_bytes(content[: SECRET_SIZE - 1] if damage == "short" else b"")
    elif damage == "unreadable":
        file.chmod(0)
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir(0o700)
        else:
            os.mkfifo(file, 0o600)
        os.chown(file, NOBODY, NOBODY)
    declined(command, str(file))


@pytest.mark.parametrize("which", ["ksm-preload", "ksm-preload/groups"])
@pytest.mark.parametrize("damage", ["mode", "owner", "link", "file"])
def test_folder_that_cannot_be_trusted(
    public_tree: Tree, runtime_dir: Path, which: str, damage: str
) -> None:
    command = nobodys(public_tree, runtime_dir, "echo", "run")
    assert run(command).stdout == "run\n"
    folder = runtime_dir / which
    if damage == "mode":
        folder.chmod(0o750)
    elif damage == "owner":
        os.chown(folder, 1, 1)
        folder.chmod(0o777)
    else:
        target = folder.with_name("target")
        folder.rename(target)
        if damage == "link":
            folder.symlink_to("target")
        else:
            folder.touch()
    declined(command, str(folder))


@pytest.mark.parametrize("kind", ["unset", "empty", "relative", "missing", "foreign", "open"])
def test_runtime_dir_that_does_not_count(
    public_tree: Tree, victims: Victims, public: Path, runtime_dir: Path, kind: str
) -> None:
    """Then it is a folder of the user's in /tmp."""
    need(not Path(f"/run/user/{NOBODY}").exists(), "nobody has a session")
    given: Path | str | None = {
        "unset": None,
        "empty": "",
        "relative": runtime_dir.name,
        "missing": runtime_dir / "missing",
        "foreign": public,
        "open": runtime_dir,
    }[kind]
    if kind == "open":
        runtime_dir.chmod(0o777)
    folder = Path(f"/tmp/ksm-preload-{NOBODY}")
    existed = folder.exists()
    name = next(NAMES)
    command = [
        name if part == "g" else part
        for part in nobodys(public_tree, given, "--group-required", victims("place"))
    ]
    try:
        sound(run(command, cwd=public))
        info = (folder / "groups" / name).stat()
        assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o600, NOBODY)
        assert not any(runtime_dir.iterdir())
        assert not (public / "ksm-preload").exists()
    finally:
        (folder / "groups" / name).unlink(missing_ok=True)
        if not existed:
            (folder / "groups").rmdir()
            folder.rmdir()


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        ("mount -t tmpfs -o ro,mode=755 none /run", os.strerror(errno.EROFS)),
        (
            "mount -t tmpfs -o size=4k,mode=755 none /run && echo full >/run/file",
            os.strerror(errno.ENOSPC),
        ),
        ("mount -t tmpfs -o mode=777 none /run", "/run is not this user's own, or open to others"),
        ("mount -t tmpfs -o uid=1 none /run", "/run is not this user's own, or open to others"),
    ],
    ids=["read-only", "full", "open", "another's"],
)
def test_places_where_no_secret_can_be_kept(public_tree: Tree, mount: str, reason: str) -> None:
    wrapper = [public_tree.wrapper, "--group", "g", "echo", "run"]
    declined(["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *wrapper], reason)


def test_groups_lists_the_files(public_tree: Tree, group: str, runtime_dir: Path) -> None:
    run([*in_group(public_tree, group), "true"])
    done = run([public_tree.wrapper, "--groups"])
    assert done.returncode == 0
    assert str(ROOTS_GROUPS / group) in done.stdout.splitlines()

    run(nobodys(public_tree, runtime_dir, "true"))
    groups = runtime_dir / "ksm-preload" / "groups"
    for name in (".new-1", ".g", "a b"):
        (groups / name).touch()
    done = run(nobodys(public_tree, runtime_dir, "--groups"))
    assert done.stdout == f"{groups / 'g'}\n"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../g", "/", "/g", "a/b", ".g", "-g", "_g", "a b", "a\t", "ä", "a" * 65, "a:b"],
)
def test_names_that_are_refused(public_tree: Tree, name: str) -> None:
    refused(run([public_tree.wrapper, f"--group={name}", "echo", "run"]), USAGE, "no group can")


@pytest.mark.parametrize("name", ["a", "9", "php@8.2-fpm_x+y", "a" * 64, "a..", "a--"])
def test_names_that_are_taken(public_tree: Tree, runtime_dir: Path, name: str) -> None:
    command = [name if part == "g" else part for part in nobodys(public_tree, runtime_dir, "true")]
    assert run(command).returncode == 0
    assert (runtime_dir / "ksm-preload" / "groups" / name).exists()


# --- seeds ---

SEEDS = ("PYTHONHASHSEED", "PERL_HASH_SEED", "PERL_PERTURB_KEYS")


def seeds(wrapper: Sequence[object], env: dict[str, str] | None = None) -> dict[str, str]:
    pairs = (line.partition("=") for line in run([*wrapper, "env"], env).stdout.splitlines())
    return {name: value for name, _, value in pairs if name in SEEDS}


def test_seeds_are_the_groups(public_tree: Tree, group: str) -> None:
    wrapper = in_group(public_tree, group)
    first = seeds(wrapper)
    assert set(first) == set(SEEDS)
    assert first["PERL_PERTURB_KEYS"] == "0"
    assert 0 < int(first["PYTHONHASHSEED"]) < 1 << 32
    assert seeds(wrapper) == first
    assert seeds([*wrapper, "--no-hash-seed"]) == {}
    (ROOTS_GROUPS / group).unlink()
    other = seeds(wrapper)
    assert other["PYTHONHASHSEED"] != first["PYTHONHASHSEED"]
    assert other["PERL_HASH_SEED"] != first["PERL_HASH_SEED"]


@pytest.mark.parametrize(
    "given",
    [
        {"PYTHONHASHSEED": "0"},
        {"PYTHONHASHSEED": "random"},
        {"PERL_HASH_SEED": "5"},
        {"PERL_PERTURB_KEYS": "2"},
        {"PYTHONHASHSEED": "", "PERL_HASH_SEED": ""},
    ],
    ids=str,
)
def test_what_the_user_set_stays(public_tree: Tree, group: str, given: dict[str, str]) -> None:
    found = seeds(in_group(public_tree, group), given)
    assert {name: found[name] for name in given} == given
    if "PERL_HASH_SEED" in given:
        assert "PERL_PERTURB_KEYS" not in found


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-c", "print(hash('ksm'), list({str(i) for i in range(50)}))"],
        ["perl", "-e", 'my %h = map { $_ => 1 } 1 .. 50; print join(",", keys %h), "\\n"'],
        ["node", "-e", "console.log(process.execArgv.join())"],
    ],
    ids=["python", "perl", "node's options"],
)
def test_runtimes_take_them(public_tree: Tree, group: str, command: list[str]) -> None:
    need_command(command[0])
    wrapper = in_group(public_tree, group)
    first, second = (run([*wrapper, *command]) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout != ""
    without = run([*wrapper, "--no-hash-seed", *command])
    assert without.stdout != first.stdout


def test_show_says_what_is_set(public_tree: Tree, group: str) -> None:
    done = run([*in_group(public_tree, group, "--show"), "node", "x.js"])
    assert done.returncode == 0
    told = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seed ")]
    assert sorted(told) == sorted([*SEEDS, "--hash-seed"])


@pytest.mark.parametrize("setting", ["PYTHONHASHSEED", "PERL_HASH_SEED"])
def test_seed_of_another_group_does_not_count_as_the_users(
    public_tree: Tree, group: str, setting: str
) -> None:
    inner = [public_tree.wrapper, "--group", f"{group}.b", "env"]
    outer = in_group(public_tree, group)
    try:
        within, alone = (run([*prefix, *inner]).stdout for prefix in (outer, []))
        pattern = re.compile(f"^{setting}=(.*)$", re.MULTILINE)
        first = pattern.search(run([*outer, "env"]).stdout)
        found = [pattern.search(text) for text in (within, alone)]
        assert first is not None
        assert found[0] is not None
        assert found[1] is not None
        assert found[0][1] == found[1][1] != first[1]
    finally:
        for line in run([public_tree.wrapper, "--groups"]).stdout.splitlines():
            if line.endswith(f"/{group}.b"):
                Path(line).unlink()


@pytest.mark.parametrize("filtered", [False, True])
def test_where_memory_may_not_become_executable(
    public_tree: Tree, victims: Victims, group: str, filtered: bool
) -> None:
    """MemoryDenyWriteExecute=: the kernel's own switch, or a filter of mprotect(PROT_EXEC)."""
    launcher = (
        [victims("refuse"), "mprotect", errno.EPERM]
        if filtered
        else [victims("deny_write_execute")]
    )
    done = run([*launcher, *in_group(public_tree, group, "--group-required"), "echo", "run"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\n", "")


@pytest.mark.parametrize("option", ["--groups", "--members"])
def test_options_that_run_nothing_take_no_command(
    public_tree: Tree, group: str, option: str
) -> None:
    done = run([public_tree.wrapper, "--group", group, option, "true"])
    refused(done, USAGE, option, "'true'", hint=False)


def test_off_and_required_is_refused(public_tree: Tree, group: str) -> None:
    command = in_group(public_tree, group, "--group-required")
    done = run([*command, "echo", "run"], {"KSM_PRELOAD": "off"})
    refused(done, UNSUPPORTED, "KSM_PRELOAD=off", hint=False)


def test_listing_makes_nothing(public_tree: Tree, runtime_dir: Path) -> None:
    command = [*AS_NOBODY, public_tree.wrapper, "--groups"]
    done = run(command, {"XDG_RUNTIME_DIR": str(runtime_dir)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not any(runtime_dir.iterdir())


def test_members_are_found_below_a_gap(public_tree: Tree, victims: Victims) -> None:
    """Since Linux 6.10 a static PIE lies where its alignment allows: seldom right at the limit."""
    program = victims.variant("pages", "-static-pie", "-Wl,-z,max-page-size=0x10000")
    with contextlib.ExitStack() as stack:
        for name in itertools.islice(NAMES, 12):
            stack.callback((ROOTS_GROUPS / name).unlink, missing_ok=True)
            command = in_group(public_tree, name)
            member = subprocess.Popen(
                [str(part) for part in (*command, program, 1, 1, 1)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.enter_context(member)
            stack.callback(member.communicate)
            assert member.stdout is not None
            assert member.stdout.readline() == b"ready\n"
            found = run([*command, "--members"]).stdout.split()
            assert found == [str(member.pid)]
