# SPDX-License-Identifier: MIT
"""The libraries: every victim without us, with each of them, and through ksm-wrapper."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import (
    AS_NOBODY,
    PR_GET_AUXV,
    PR_SET_MEMORY_MERGE,
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
from ksmtool import process
from ksmtool.kernel import PAGE_SIZE, Ksm

OPTED_IN_LINE = "ksm_preload: opted in (prctl)\n"


@dataclass(frozen=True)
class Way:
    """A way of starting a program: a command in front of it, or variables."""

    prefix: tuple[object, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    method: str = "prctl"
    """How a program is opted in by it."""

    def run(
        self, command: Sequence[object], env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` in this way."""
        return run([*self.prefix, *command], {**self.env, **(env or {})})


PLAIN = Way(method="no")


def ways(tree: Tree) -> dict[str, Way]:
    return {
        "prctl library": Way(env={"LD_PRELOAD": str(tree.prctl_library)}),
        "madvise library": Way(env={"LD_PRELOAD": str(tree.madvise_library)}),
        "ksm-wrapper": Way((tree.wrapper,)),
        "ksm-wrapper --no-preload": Way((tree.wrapper, "--no-preload")),
        "ksm-wrapper --method madvise": Way(
            (tree.wrapper, "--method", "madvise"), method="madvise"
        ),
    }


@pytest.fixture(
    params=["prctl library", "madvise library", "ksm-wrapper", "ksm-wrapper --method madvise"]
)
def way(request: pytest.FixtureRequest, tree: Tree) -> Way:
    return ways(tree)[request.param]


@pytest.fixture(params=["prctl library", "madvise library"])
def library(request: pytest.FixtureRequest, tree: Tree) -> Path:
    return tree.prctl_library if request.param == "prctl library" else tree.madvise_library


# --- opted in, whatever kind of program ---

ANY_PRELOAD = [
    "prctl library",
    "madvise library",
    "ksm-wrapper",
    "ksm-wrapper --no-preload",
    "ksm-wrapper --method madvise",
]

KINDS = {
    "dynamic": ANY_PRELOAD,
    "no-pie": ANY_PRELOAD,
    # No loader, no library: the kernel's flag is inherited.
    "static": ["ksm-wrapper", "ksm-wrapper --no-preload"],
    "static-pie": ["ksm-wrapper", "ksm-wrapper --no-preload"],
    "musl-static": ["ksm-wrapper", "ksm-wrapper --no-preload"],
    # The other library is made for glibc.
    "musl": ["prctl library", "ksm-wrapper", "ksm-wrapper --no-preload"],
    # AddressSanitizer refuses to run with a library before its own.
    "asan": ["ksm-wrapper --no-preload"],
}


@pytest.mark.ksm
@pytest.mark.parametrize("kind", KINDS)
def test_without_us_nothing_is_opted_in(victims: Victims, kind: str) -> None:
    assert opted_in(facts(PLAIN.run([victims("report", kind)]))) == "no"


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names]
)
def test_program_is_opted_in_and_sees_nothing_else(
    tree: Tree, victims: Victims, kind: str, name: str
) -> None:
    way, program = ways(tree)[name], victims("report", kind)
    plain, ours = PLAIN.run([program]), way.run([program])
    assert opted_in(facts(ours)) == way.method
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == plain.stderr == ""


@pytest.mark.ksm
@pytest.mark.parametrize("where", ["--fork", "--thread"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("dynamic", "static", "musl") for name in KINDS[kind]],
)
def test_forks_and_threads_are_opted_in(
    tree: Tree, victims: Victims, kind: str, name: str, where: str
) -> None:
    way, command = ways(tree)[name], [victims("report", kind), where]
    plain, ours = facts(PLAIN.run(command)), facts(way.run(command))
    assert (opted_in(plain), opted_in(ours)) == ("no", way.method)
    assert without_us(plain) == without_us(ours)


@pytest.mark.ksm
@pytest.mark.parametrize("how", ["fork", "vfork", "spawn", "system", "daemon"])
def test_children_are_opted_in(victims: Victims, way: Way, how: str) -> None:
    command = [victims("start"), how, victims("report")]
    plain, ours = facts(PLAIN.run(command)), facts(way.run(command))
    assert (opted_in(plain), plain["parent"]) == ("no", ["0"])
    assert (opted_in(ours), ours["parent"]) == (way.method, ["1" if way.method == "prctl" else "0"])
    assert without_us(plain) | {"parent": []} == without_us(ours) | {"parent": []}


@pytest.mark.ksm
def test_chain_of_execs_is_opted_in(victims: Victims, way: Way) -> None:
    links = [victims("start", "dynamic"), "exec", victims("start", "static"), "exec"] * 3
    command = [*links, victims("report")]
    assert opted_in(facts(PLAIN.run(command))) == "no"
    assert opted_in(facts(way.run(command))) == way.method


@pytest.mark.ksm
def test_flag_outlives_an_emptied_environment_and_marks_do_not(victims: Victims, way: Way) -> None:
    report = facts(way.run([victims("start"), "bare", victims("report")]))
    assert opted_in(report) == ("prctl" if way.method == "prctl" else "no")
    assert report["env"] == []
    assert not any("libksm_preload" in file for file in report["file"])


@pytest.mark.ksm
@pytest.mark.parametrize("how", ["fork", "vfork", "spawn"])
def test_left_out_child_leaves_its_parent_in(victims: Victims, way: Way, how: str) -> None:
    """After vfork parent and child share one memory: clearing there would clear the parent."""
    off = ["/usr/bin/env", "KSM_PRELOAD=off", victims("report")]
    report = facts(way.run([victims("start"), how, *off]))
    assert opted_in(report) == "no"
    assert report["parent"] == ["1" if way.method == "prctl" else "0"]


@pytest.mark.ksm
def test_loader_called_by_hand(victims: Victims, library: Path) -> None:
    """Then the executable is the loader, so that the policy leaves out what it cannot know."""
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    need(loader.exists(), f"no {loader}")
    by_hand = [loader, "--preload", library, victims("report")]
    done = PLAIN.run(by_hand, {"KSM_PRELOAD_VERBOSE": "1"})
    assert opted_in(facts(done)) == "no"
    assert done.stderr == "ksm_preload: left out: the policy\n"
    off = PLAIN.run(by_hand, {"KSM_PRELOAD": "off", "KSM_PRELOAD_VERBOSE": "1"})
    assert opted_in(facts(off)) == "no"
    assert off.stderr == "ksm_preload: left out: KSM_PRELOAD=off\n"


@pytest.mark.ksm
def test_loaded_into_a_running_program(tree: Tree) -> None:
    script = f"""if True:
        import ctypes, os
        get = lambda: ctypes.CDLL(None).prctl(68, 0, 0, 0, 0)
        before = get()
        ctypes.CDLL({str(tree.prctl_library)!r})
        print(before, get())"""
    assert PLAIN.run([sys.executable, "-c", script]).stdout == "0 1\n"
    off = script.replace("before =", "os.environ['KSM_PRELOAD'] = 'off'; before =")
    assert PLAIN.run([sys.executable, "-c", off]).stdout == "0 0\n"


# --- really merged ---


@contextmanager
def holding(commands: Sequence[tuple[Way, Sequence[object]]]) -> Iterator[list[int]]:
    """Start `pages` victims, wait until each is ready, yield their PIDs, end them."""
    running = [
        subprocess.Popen(
            [*map(str, way.prefix), *map(str, command)],
            env=way.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way, command in commands
    ]
    try:
        for one in running:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        yield [one.pid for one in running]
    finally:
        for one in running:
            one.communicate()
    assert [one.returncode for one in running] == [0] * len(running)


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("dynamic", "static", "musl") for name in KINDS[kind]],
)
def test_equal_pages_merge_and_pss_falls(
    tree: Tree, victims: Victims, kind: str, name: str, ksm: Ksm
) -> None:
    copies, equal, unique = 4, 1000, 250
    way = ways(tree)[name]
    command, numbers = victims("pages", kind), (equal, unique)
    ours_and_plain = [(way, [command, secrets.randbits(62), *numbers])] * copies
    ours_and_plain += [(PLAIN, [command, secrets.randbits(62), *numbers])] * copies

    with holding(ours_and_plain) as pids:
        ours, plain = pids[:copies], pids[copies:]
        assert [process.opted_in(pid) for pid in pids] == [True] * copies + [False] * copies
        before = process.total(ours), process.total(plain)

        ksm.write("run", 1)
        wait_until(
            lambda: process.total(ours).merging_pages >= copies * equal, 60, "all copies merged"
        )
        # Once more past everything, so that what should not merge had its chance.
        scans = ksm.counters().full_scans
        wait_until(lambda: ksm.counters().full_scans >= scans + 2, 60, "two whole scans")
        after = process.total(ours), process.total(plain)

    # Of each equal page one copy stays; unique pages stay all.
    saved = (before[0].pss_anon - after[0].pss_anon) / PAGE_SIZE
    assert (copies - 1) * equal <= saved < (copies - 1) * equal + copies * unique / 2
    assert before[0].pss - after[0].pss >= (copies - 1) * equal * PAGE_SIZE * 0.98

    assert after[1].merging_pages == after[1].opted_in == 0
    assert after[1].pss_anon >= before[1].pss_anon >= copies * (equal + unique) * PAGE_SIZE


# --- told to leave it ---


@pytest.fixture(params=["prctl library", "prctl library in musl", "madvise library"])
def loaded(request: pytest.FixtureRequest, tree: Tree, victims: Victims) -> tuple[Path, Path]:
    """Return a library, and the program `report` for a libc that it works with."""
    kind = "musl" if "musl" in request.param else "dynamic"
    madvise = request.param == "madvise library"
    return tree.madvise_library if madvise else tree.prctl_library, victims("report", kind)


@pytest.mark.ksm
def test_off_in_the_environment(loaded: tuple[Path, Path]) -> None:
    library, program = loaded
    way = Way(env={"LD_PRELOAD": str(library), "KSM_PRELOAD": "off"})
    plain, ours = PLAIN.run([program]), way.run([program])
    assert opted_in(facts(ours)) == "no"
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == ""


@pytest.mark.ksm
def test_off_clears_an_inherited_flag(tree: Tree, loaded: tuple[Path, Path]) -> None:
    library, program = loaded
    flagged = [tree.wrapper, "--no-preload", "/usr/bin/env"]
    assert opted_in(facts(run([*flagged, program]))) == "prctl"
    left_out = [*flagged, "KSM_PRELOAD=off", f"LD_PRELOAD={library}", program]
    assert opted_in(facts(run(left_out))) == "no"


@pytest.mark.ksm
@pytest.mark.parametrize("value", ["", "of", "off ", "OFF", "offf", "0"])
def test_other_values_do_not_mean_off(victims: Victims, library: Path, value: str) -> None:
    way = Way(env={"LD_PRELOAD": str(library), "KSM_PRELOAD": value})
    assert opted_in(facts(way.run([victims("report")]))) == "prctl"


@pytest.mark.ksm
def test_prctl_library_leaves_madvise_to_the_other(tree: Tree, victims: Victims) -> None:
    way = Way((tree.wrapper,), {"KSM_PRELOAD_VERBOSE": "1"})
    env = ["/usr/bin/env", f"LD_PRELOAD={tree.prctl_library}", "KSM_PRELOAD=madvise"]
    done = way.run([*env, victims("report")])
    assert opted_in(facts(done)) == "no"
    # `env` itself came first.
    assert done.stderr.startswith(OPTED_IN_LINE)
    assert "KSM_PRELOAD=madvise" in done.stderr


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"KSM_PRELOAD_VERBOSE": "1"}, OPTED_IN_LINE),
        (
            {"KSM_PRELOAD_VERBOSE": "1", "KSM_PRELOAD": "off"},
            "ksm_preload: left out: KSM_PRELOAD=off\n",
        ),
        ({"KSM_PRELOAD_VERBOSE": "0"}, ""),
        ({"KSM_PRELOAD_VERBOSE": ""}, ""),
        ({"KSM_PRELOAD_VERBOSE": "10"}, ""),
        ({"KSM_PRELOAD": "off"}, ""),
    ],
    ids=["opted in", "left out", "verbose is 0", "verbose is empty", "verbose is 10", "just off"],
)
def test_says_one_line_when_asked(
    loaded: tuple[Path, Path], env: dict[str, str], line: str
) -> None:
    library, program = loaded
    done = Way(env={"LD_PRELOAD": str(library)}).run([program], env)
    assert done.stderr == line
    assert without_us(facts(done)) == without_us(facts(PLAIN.run([program])))


@pytest.mark.ksm
def test_verbose_with_stderr_closed(loaded: tuple[Path, Path]) -> None:
    library, program = loaded
    env = [f"LD_PRELOAD={library}", "KSM_PRELOAD_VERBOSE=1"]
    report = facts(PLAIN.run(["sh", "-c", 'exec env "$@" 2>&-', "sh", *env, program]))
    assert opted_in(report) == "prctl"
    assert report["errno_in_constructor"] == report["errno_at_start"] == ["0"]


# --- the kernel refuses ---

REFUSALS = {"EPERM": 1, "EINTR": 4, "ENOMEM": 12, "EINVAL": 22, "ENOSYS": 38}


@pytest.mark.ksm
@pytest.mark.parametrize("error", REFUSALS)
def test_refused_prctl_leaves_no_trace(
    tree: Tree, victims: Victims, loaded: tuple[Path, Path], error: str
) -> None:
    library, program = loaded
    refuse = [victims("refuse"), PR_SET_MEMORY_MERGE, REFUSALS[error]]
    plain = PLAIN.run([*refuse, program])
    ours = PLAIN.run([*refuse, "/usr/bin/env", f"LD_PRELOAD={library}", program])
    instead = "madvise" if library == tree.madvise_library else "no"
    assert opted_in(facts(ours)) == instead
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == ""


@pytest.mark.ksm
def test_kernel_without_ksm_leaves_no_trace(victims: Victims, loaded: tuple[Path, Path]) -> None:
    library, program = loaded
    refuse = [victims("refuse"), PR_SET_MEMORY_MERGE, "22", victims("refuse"), "madvise", "22"]
    for where in ([], ["--fork"], ["--thread"]):
        plain = PLAIN.run([*refuse, program, *where])
        ours = PLAIN.run([*refuse, "/usr/bin/env", f"LD_PRELOAD={library}", program, *where])
        assert opted_in(facts(ours)) == "no"
        assert without_us(facts(ours)) == without_us(facts(plain))
        assert ours.stderr == ""


@pytest.mark.ksm
def test_refused_prctl_is_told_when_asked(tree: Tree, victims: Victims) -> None:
    refuse = [victims("refuse"), PR_SET_MEMORY_MERGE, "22", "/usr/bin/env"]
    env = [f"LD_PRELOAD={tree.prctl_library}", "KSM_PRELOAD_VERBOSE=1"]
    done = PLAIN.run([*refuse, *env, victims("report")])
    assert done.stderr == "ksm_preload: not opted in: the kernel refused the prctl\n"


@pytest.mark.ksm
def test_program_that_may_be_privileged_is_left_alone(tree: Tree, victims: Victims) -> None:
    """Without PR_GET_AUXV the library cannot know, so it neither opts in nor speaks."""
    refuse = [victims("refuse"), PR_GET_AUXV, "22", "/usr/bin/env"]
    env = [f"LD_PRELOAD={tree.prctl_library}", "KSM_PRELOAD_VERBOSE=1"]
    done = PLAIN.run([*refuse, *env, victims("report")])
    assert opted_in(facts(done)) == "no"
    assert done.stderr == ""


# --- privileged programs ---


def set_uid(program: Path) -> None:
    os.chown(program, 0, 0)
    program.chmod(0o4755)


def set_capability(program: Path) -> None:
    # struct vfs_cap_data, revision 2, effective; CAP_NET_RAW. As `setcap cap_net_raw+ep`.
    data = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    try:
        os.setxattr(program, "security.capability", data)
    except OSError as error:
        need(False, f"no file capabilities on {program.parent}: {error.strerror}")


@pytest.fixture(params=[set_uid, set_capability], ids=["set-uid", "file capability"])
def privileged(request: pytest.FixtureRequest, victims: Victims, public: Path) -> Path:
    need(os.geteuid() == 0, "needs root")
    need(not os.statvfs(public).f_flag & os.ST_NOSUID, f"{public} is mounted nosuid")
    need_command("setpriv")
    program = public / f"privileged-{request.param.__name__}"
    if not program.exists():
        shutil.copy(victims("report"), program)
        request.param(program)
    return program


def merge_and_secure(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    report = facts(done)
    return report["merge"][0], report["secure"][0]


@pytest.mark.ksm
def test_loader_drops_us_from_a_privileged_program(privileged: Path, library: Path) -> None:
    done = run([*AS_NOBODY, "env", f"LD_PRELOAD={library}", "KSM_PRELOAD_VERBOSE=1", privileged])
    assert merge_and_secure(done) == ("0", "1")
    # What `setpriv` starts is `env`, which is not privileged and has us not.
    assert done.stderr == ""


@pytest.mark.ksm
def test_privileged_program_keeps_a_flag_it_inherits(public_tree: Tree, privileged: Path) -> None:
    """The kernel's doing, and why the manual warns of it: no library is there to clear it."""
    done = run([*AS_NOBODY, public_tree.wrapper, privileged])
    assert merge_and_secure(done) == ("1", "1")
    assert not any("libksm_preload" in file for file in facts(done)["file"])


@pytest.fixture(params=["prctl library", "madvise library"])
def preloaded_etc(
    request: pytest.FixtureRequest, public_tree: Tree, tmp_path: Path
) -> Iterator[list[str]]:
    """Return a command prefix: what follows it sees an /etc/ld.so.preload that names a library.

    The machine's own /etc is never written: a copy of it with that file in it is bind-mounted over
    /etc in a private mount namespace.
    """
    need_command("unshare")
    real = Path("/etc/ld.so.preload")
    before = real.read_bytes() if real.exists() else None
    library = (
        public_tree.prctl_library
        if request.param == "prctl library"
        else public_tree.madvise_library
    )

    etc = tmp_path / "etc"
    etc.mkdir()
    for name in ("ld.so.cache", "passwd", "group", "nsswitch.conf"):
        if Path("/etc", name).exists():
            shutil.copy(Path("/etc", name), etc)
    (etc / "ld.so.preload").write_text(f"{library}\n")
    script = f"mount --bind '{etc}' /etc && exec \"$@\""
    yield ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    assert before == (real.read_bytes() if real.exists() else None)


@pytest.mark.ksm
def test_privileged_program_is_cleared_from_ld_so_preload(
    public_tree: Tree, privileged: Path, preloaded_etc: list[str]
) -> None:
    verbose = ["env", "KSM_PRELOAD_VERBOSE=1"]
    flagged = [*preloaded_etc, *AS_NOBODY, public_tree.wrapper, "--no-preload", *verbose]
    done = run([*flagged, privileged])
    assert merge_and_secure(done) == ("0", "1")
    assert any("libksm_preload" in file for file in facts(done)["file"])
    # Silent in it, though its environment asks for a word; errno as it would be.
    assert done.stderr == ""
    assert facts(done)["errno_in_constructor"] == facts(done)["errno_at_start"] == ["0"]


@pytest.mark.ksm
def test_ld_so_preload_opts_in_every_other_program(
    victims: Victims, preloaded_etc: list[str]
) -> None:
    for command in ([victims("report")], [*AS_NOBODY, victims("report")]):
        done = run([*preloaded_etc, *command])
        assert merge_and_secure(done) == ("1", "0")
        assert done.stderr == ""
    assert merge_and_secure(run([*preloaded_etc, "env", "KSM_PRELOAD=off", victims("report")])) == (
        "0",
        "0",
    )


# --- other architectures ---


@pytest.mark.ksm
def test_i386_library_opts_in_i386_programs(tree: Tree, victims: Victims) -> None:
    program = victims("report", "i386")
    need(Path("/lib/ld-linux.so.2").exists(), "no 32-bit loader (libc6-i386)")
    shim = victims.shim("i386")
    plain = PLAIN.run([program])
    ours = Way(env={"LD_PRELOAD": str(shim), "KSM_PRELOAD_VERBOSE": "1"}).run([program])
    assert (opted_in(facts(plain)), opted_in(facts(ours))) == ("no", "prctl")
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == OPTED_IN_LINE

    flagged = [tree.wrapper, "--no-preload", "/usr/bin/env", f"LD_PRELOAD={shim}"]
    off = PLAIN.run([*flagged, "KSM_PRELOAD=off", program])
    assert opted_in(facts(off)) == "no"


@pytest.mark.ksm
def test_program_of_another_architecture_inherits_the_flag(tree: Tree, victims: Victims) -> None:
    """The loader says that the library is not for it and goes on; the flag is there anyway."""
    program = victims("report", "i386")
    need(Path("/lib/ld-linux.so.2").exists(), "no 32-bit loader (libc6-i386)")
    done = ways(tree)["ksm-wrapper"].run([program])
    assert opted_in(facts(done)) == "prctl"
    assert "wrong ELF class" in done.stderr
    assert done.stderr.count("\n") == 1


def test_aarch64_library_in_an_emulator(victims: Victims) -> None:
    """QEMU's user mode knows neither prctl: the library asks, is refused, and leaves no trace."""
    emulator = [need_command("qemu-aarch64"), "-L", "/usr/aarch64-linux-gnu"]
    program, shim = victims("report", "aarch64"), victims.shim("aarch64")
    asked = f"prctl({PR_GET_AUXV},"
    plain = PLAIN.run([*emulator, "-strace", program])
    ours = PLAIN.run([*emulator, "-strace", "-E", f"LD_PRELOAD={shim}", program])
    assert asked not in plain.stderr
    assert asked in ours.stderr
    assert facts(ours)["errno_at_start"] == ["0"]
    assert without_us(facts(ours)) == without_us(facts(plain))


# --- what the file itself is ---


def dynamic_section(library: Path) -> str:
    return run([need_command("readelf"), "-Wd", library]).stdout


@pytest.fixture(params=["dynamic", "i386", "aarch64"])
def built(request: pytest.FixtureRequest, tree: Tree, victims: Victims) -> Path:
    """Return the prctl library: the installed one, and built for other architectures."""
    return tree.prctl_library if request.param == "dynamic" else victims.shim(request.param)


def test_prctl_library_needs_and_exports_nothing(built: Path) -> None:
    dynamic = dynamic_section(built)
    assert "INIT_ARRAY" in dynamic
    for unwanted in ("NEEDED", "TEXTREL", "FINI", "RPATH", "RUNPATH", "JMPREL"):
        assert f"({unwanted}" not in dynamic
    names = run([need_command("nm"), "-D", built]).stdout.split("\n")
    assert [line.split() for line in names if line] == [["w", "__environ"]]


def test_madvise_library_exports_what_its_map_says(tree: Tree) -> None:
    text = (SOURCE / "ksm_preload.map").read_text()
    expected = re.findall(r"\w+", text.partition("global:")[2].partition("local:")[0])
    names = run([need_command("nm"), "-D", "--defined-only", tree.madvise_library]).stdout
    assert sorted(line.split()[-1] for line in names.splitlines()) == sorted(expected)


@pytest.mark.parametrize("name", ["prctl library", "madvise library", "i386", "aarch64"])
def test_no_memory_is_writable_and_executable(tree: Tree, victims: Victims, name: str) -> None:
    libraries = {"prctl library": tree.prctl_library, "madvise library": tree.madvise_library}
    library = libraries.get(name) or victims.shim(name)
    headers = run([need_command("readelf"), "-Wl", library]).stdout
    flags = re.findall(r"^ +(LOAD|GNU_STACK)(?: +0x[0-9a-f]+){5} ([RWE ]{3})", headers, re.M)
    kinds = [kind for kind, _ in flags]
    assert "LOAD" in kinds
    assert kinds.count("GNU_STACK") == 1
    assert all(not ("W" in flag and "E" in flag) for _, flag in flags)
    assert "TEXTREL" not in dynamic_section(library)


# --- programs people run ---

EVERYDAY = {
    "python3": [sys.executable, "-c", "print(sum(range(10**5)), hash(1.5)); raise SystemExit(3)"],
    "sh": ["sh", "-c", "echo $# $0; kill -TERM $$", "name", "one"],
    "perl": ["perl", "-e", "print join ',', map {$_ ** 2} 1..9; exit 7"],
    "sort": ["sort", "--parallel=2", "-r", __file__],
    "find": ["find", "/etc", "-maxdepth", "1", "-name", "p*", "-ls"],
}


@pytest.mark.ksm
@pytest.mark.parametrize("name", EVERYDAY)
def test_everyday_programs_do_the_same(way: Way, name: str) -> None:
    need_command(EVERYDAY[name][0])
    plain, ours = PLAIN.run(EVERYDAY[name]), way.run(EVERYDAY[name])
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        plain.returncode,
        plain.stdout,
        plain.stderr,
    )


@pytest.mark.ksm
def test_valgrind_finds_no_fault(victims: Victims, library: Path) -> None:
    valgrind = [need_command("valgrind"), "--quiet", "--error-exitcode=9", "--leak-check=full"]
    command = [*valgrind, victims("report")]
    plain, ours = PLAIN.run(command), Way(env={"LD_PRELOAD": str(library)}).run(command)
    assert ours.stderr == plain.stderr == ""
    assert opted_in(facts(ours)) == "prctl"


@pytest.mark.ksm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE])
def test_death_by_signal_is_the_same(victims: Victims, way: Way, number: signal.Signals) -> None:
    command = [victims("end"), "signal", str(int(number))]
    assert way.run(command).returncode == PLAIN.run(command).returncode == -number


@pytest.mark.parametrize("method", ["prctl", "madvise"])
def test_the_full_library_does_not_stop_a_musl_program(
    tree: Tree, victims: Victims, method: str
) -> None:
    """There a symbol or library that musl lacks is fatal, unlike in glibc."""
    env = {"LD_PRELOAD": str(tree.madvise_library), "KSM_PRELOAD": method}
    done = run([victims("end", "musl"), "exit", "7"], env)
    assert (done.returncode, done.stderr) == (7, "")
