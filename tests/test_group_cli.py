# SPDX-License-Identifier: MIT
"""Groups as ksmtool shows them: wrap --group, group list and forget, and try's arm group."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conftest import Tree, need, run, wait_until
from ksmtool import cli, group, process, trial
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.group import Wanted
from ksmtool.kernel import Ksm
from ksmtool.wrap import Plan, in_group

Victims = Callable[..., Path]

MIB = 1 << 20
STATIC = Plan(("--method", "prctl", "--no-preload"), "a static program loads no library")
LEFT_ALONE = Plan((), "it is setuid and left alone", alone=True, warn=True)

# Where its libraries are: the same for all members of a group.
LAYOUT = ["grep", "-m1", "ld-linux", "/proc/self/maps"]


@pytest.fixture
def name() -> Iterator[str]:
    """Return the name of a group that is not there before and after the test."""
    unique = f"test-{os.getpid()}"
    group.discard(unique)
    yield unique
    group.discard(unique)


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        (Wanted("g"), ("--group", "g")),
        (Wanted("g", required=True), ("--group", "g", "--group-required")),
        (Wanted("g", hash_seed=False), ("--group", "g", "--no-hash-seed")),
        (Wanted("g", follow=True), ("--group", "g", "--follow")),
    ],
)
def test_what_is_passed_on(wanted: Wanted, options: tuple[str, ...]) -> None:
    plan = in_group(Plan(("--method", "prctl"), "it was asked for"), "/p", wanted)
    assert plan == Plan(("--method", "prctl", *options), "it was asked for")


def test_follow_is_not_passed_on_where_no_library_can_be() -> None:
    plan = in_group(STATIC, "/p", Wanted("g", follow=True))
    assert plan.options == (*STATIC.options, "--group", "g")
    assert plan.note.startswith("--follow does not reach what /p starts")
    assert in_group(STATIC, "/p", Wanted("g")).note == ""


def test_what_is_left_alone_is_in_no_group() -> None:
    plan = in_group(LEFT_ALONE, "/p", Wanted("g"))
    assert plan.options == ()
    assert plan.why == "it is setuid and left alone; so it is not in group g"
    with pytest.raises(KsmtoolError) as caught:
        in_group(LEFT_ALONE, "/p", Wanted("g", required=True))
    assert caught.value.status is ExitStatus.UNSUPPORTED
    assert "/p cannot have the layout of group g" in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["a", "A.b_c@d+e-f", "0", "a" * 64, "", ".a", "-a", "a/b", "a b", "a\n", "é", "a" * 65, ".."],
)
def test_names_are_those_that_the_wrapper_takes(tree: Tree, text: str) -> None:
    def is_taken_by_us() -> bool:
        try:
            group.require_valid(text)
        except KsmtoolError:
            return False
        return True

    was_there = text in group.files()
    done = run([tree.wrapper, "--group", text, "--show"])
    if not was_there:
        group.discard(text)
    assert done.returncode in (0, 2)
    assert is_taken_by_us() == (done.returncode == 0)


@pytest.mark.parametrize("option", ["--group-required", "--no-hash-seed", "--follow"])
def test_an_option_about_a_group_without_one_is_usage(tree: Tree, option: str) -> None:
    done = run([tree.ksmtool, "wrap", option, "true"])
    assert done.returncode == 2
    assert f"{option} is about a group: it takes --group NAME, too." in done.stderr


@pytest.mark.parametrize(
    "command", [["wrap", "--group", "a/b", "true"], ["group", "forget", "a/b"]]
)
def test_a_bad_name_is_usage(tree: Tree, command: list[str]) -> None:
    done = run([tree.ksmtool, *command])
    assert done.returncode == 2
    assert done.stderr.startswith("ksmtool: No group can be called 'a/b'.\nhint: At most 64")


def test_members_have_one_layout(tree: Tree, name: str) -> None:
    def layout(*options: str) -> str:
        done = run([tree.ksmtool, "wrap", "-q", *options, *LAYOUT])
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    assert layout("--group", name) == layout("--group", name)
    assert layout("--group", name) != layout()


def test_explain_names_the_group_and_the_seeds_but_no_value(tree: Tree, name: str) -> None:
    done = run([tree.ksmtool, "wrap", "--explain", "--group", name, "env"])
    seed = re.search(r"^PYTHONHASHSEED=(\d+)$", done.stdout, re.MULTILINE)
    assert seed
    assert re.search(
        rf"^ksmtool: group:   the layout of {name}, hash seeds .*PYTHONHASHSEED", done.stderr, re.M
    )
    assert seed[1] not in done.stderr
    without = run([tree.ksmtool, "wrap", "--explain", "--group", name, "--no-hash-seed", "env"])
    assert f"group:   the layout of {name}, no hash seed" in without.stderr
    assert "PYTHONHASHSEED" not in without.stdout


def test_explain_says_why_there_is_no_layout(tree: Tree, name: str, public: Path) -> None:
    need(os.getuid() == 0, "needs root: to others a set-uid program of root is left alone")
    program = public / "setuid-root-true"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(stat.S_ISUID | 0o755)
    done = run([tree.ksmtool, "wrap", "--explain", "--group", name, program])
    assert done.returncode == 0
    assert f"ksmtool: group:   not {name}: it is set-uid or set-gid\n" in done.stderr
    required = run([tree.ksmtool, "wrap", "-q", "--group", name, "--group-required", program])
    assert required.returncode == ExitStatus.UNSUPPORTED


def test_a_setuid_program_that_has_to_be_in_a_group_is_not_run(
    tree: Tree, name: str, public: Path
) -> None:
    need(os.getuid() == 0, "needs root to make a setuid program")
    program = public / "setuid-echo"
    program.write_bytes(Path("/bin/echo").read_bytes())
    os.chown(program, 65534, 65534)
    program.chmod(stat.S_ISUID | 0o755)
    done = run([tree.ksmtool, "wrap", "-q", "--group", name, "--group-required", program, "ran"])
    assert (done.returncode, done.stdout) == (ExitStatus.UNSUPPORTED, "")
    assert f"{program} cannot have the layout of group {name}" in done.stderr
    told = run([tree.ksmtool, "wrap", "--group", name, program, "ran"])
    assert told.stdout == "ran\n"
    assert f"so it is not in group {name}" in told.stderr


def test_follow_and_a_static_program_is_one_line(tree: Tree, name: str, victims: Victims) -> None:
    command = [tree.ksmtool, "wrap", "--group", name, "--follow", victims("report", "static")]
    done = run(command)
    assert done.returncode == 0
    said = [line for line in done.stderr.splitlines() if "--follow" in line]
    assert said == [
        f"ksmtool: --follow does not reach what {victims('report', 'static')} starts: "
        "it takes a library in LD_PRELOAD"
    ]


def test_follow_reaches_what_the_program_starts(tree: Tree, name: str) -> None:
    script = ["sh", "-c", f"{' '.join(LAYOUT)}; :"]
    wrap = [tree.ksmtool, "wrap", "-q", "--group", name]
    member = run([*wrap, *LAYOUT]).stdout
    assert run([*wrap, "--follow", *script]).stdout == member
    assert run([*wrap, *script]).stdout != member


def test_ksm_preload_off_is_no_member(tree: Tree, name: str) -> None:
    done = run([tree.ksmtool, "wrap", "--group", name, *LAYOUT], env={"KSM_PRELOAD": "off"})
    assert done.returncode == 0
    assert name not in group.files()


def test_a_group_that_cannot_be_opened_is_explained(tree: Tree, name: str) -> None:
    run([tree.wrapper, "--group", name, "true"])
    group.files()[name].chmod(0o644)
    done = run([tree.ksmtool, "wrap", "--explain", "--group", name, "echo", "ran"])
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert re.search(rf"group: +not {name}: .* open to others", done.stderr), done.stderr


class Members:
    """Programs running in a group, and forks of theirs; ended when left."""

    def __init__(self, tree: Tree, name: str) -> None:
        self._start = [str(tree.wrapper), "--group", name, "--group-required"]
        self._stack = ExitStack()

    def __enter__(self) -> Members:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, *command: object) -> int:
        """Start one more, which has to print a line when it is ready; return its PID."""
        child = subprocess.Popen(
            [*self._start, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._stack.callback(child.wait, 20)
        assert child.stdin
        assert child.stdout
        self._stack.callback(child.stdout.close)
        self._stack.callback(child.stdin.close)
        self._stack.callback(child.terminate)
        assert child.stdout.readline()
        return child.pid


READY = "import sys; print(flush=True); sys.stdin.read()"
FORKING = (
    "import os, sys; b = bytearray(os.urandom(16 << 20)); pid = os.fork() or print(flush=True); "
    "sys.stdin.read()"
)


def listed(tree: Tree, name: str) -> dict[str, Any]:
    done = run([tree.ksmtool, "group", "list", "--json", name])
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"schema", "groups"}
    assert document["schema"] == 1
    (found,) = [one for one in document["groups"] if one["name"] == name]
    return dict(found)


def test_list_counts_members_and_their_memory(tree: Tree, name: str) -> None:
    with Members(tree, name) as members:
        pids = [members.add(sys.executable, "-c", READY) for _ in range(2)]
        assert group.members(name) == pids or sorted(group.members(name)) == sorted(pids)
        found = listed(tree, name)
        assert set(found) == {
            "name", "members", "unreadable", "anonymous", "pss_anon", "saved", "exact",
        }  # fmt: skip
        assert (found["members"], found["unreadable"]) == (2, 0)
        assert found["anonymous"] == pytest.approx(process.total(pids).anonymous, rel=0.02)
        table = run([tree.ksmtool, "group", "list", name])
        assert re.search(rf"^ {name} +2 +[\d.]+ +[\d.]+ ", table.stdout, re.MULTILINE)
    assert listed(tree, name)["members"] == 0


def test_an_empty_list_says_how_to_make_a_group(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(group, "files", dict)
    cli.cli.main(["group", "list"], standalone_mode=False)
    assert "This user has no group: ksmtool wrap --group NAME" in capsys.readouterr().out


@pytest.mark.ksm
def test_saved_is_what_ksm_merged_not_what_forks_share(
    tree: Tree, name: str, victims: Victims, ksm: Ksm
) -> None:
    with Members(tree, name) as members:
        members.add(sys.executable, "-c", FORKING)
        found = listed(tree, name)
        assert found["members"] == 2
        assert found["exact"]
        assert found["anonymous"] - found["pss_anon"] > 15 * MIB  # the fork's
        assert found["saved"] == 0  # KSM is off
    pages = 16 * MIB // os.sysconf("SC_PAGE_SIZE")
    with Members(tree, name) as members:
        pids = [members.add(victims("pages"), 7, pages, 100) for _ in range(3)]
        ksm.write("run", 1)
        wait_until(lambda: process.total(pids).merging_pages >= 3 * pages, 60, "all is merged")
        ksm.write("run", 0)
        found = listed(tree, name)
        shared = found["anonymous"] - found["pss_anon"]
        assert 2 * 16 * MIB <= found["saved"] <= shared + MIB
        assert found["saved"] < sum(process.total([pid]).merging_pages for pid in pids) * 4096
        # What one who may not see page frames is told: the same here, where nothing has forked.
        least = group.measure(name, pids)
        assert least.exact
        assert min(shared, 3 * 16 * MIB) >= least.saved


def test_without_root_saved_is_a_bound(tree: Tree) -> None:
    need(os.getuid() == 0, "is nobody already")
    code = (
        "import os, subprocess; from ksmtool import group, process; os.setgid(65534); "
        "os.setuid(65534); child = subprocess.Popen(['cat'], stdin=subprocess.PIPE); "
        "print(group.measure('x', [child.pid, 1])); child.communicate()"
    )
    done = run([sys.executable, "-c", code])
    assert re.search(r"members=2, unreadable=1, anonymous=[1-9].* exact=False", done.stdout), done


def test_members_that_may_not_be_looked_at_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_pid: int) -> None:
        raise PermissionError

    monkeypatch.setattr(group, "files", lambda: {"g": Path("/g")})
    monkeypatch.setattr(group, "members", lambda _name: [1, 2])
    monkeypatch.setattr(process, "memory", refuse)
    cli.cli.main(["group", "list"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "Warning: 2 of the 2 members of g may not be looked at" in said


def test_forget(tree: Tree, name: str) -> None:
    first = run([tree.wrapper, "--group", name, *LAYOUT]).stdout
    with Members(tree, name) as members:
        pid = members.add(sys.executable, "-c", READY)
        done = run([tree.ksmtool, "group", "forget", name])
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            f"Forgot group {name}: the next program started in it draws a new layout.",
            "1 process keeps the old one until it ends.",
        ]
        assert name not in group.files()
        assert process.opted_in(pid)
        assert run([tree.wrapper, "--group", name, *LAYOUT]).stdout != first
        assert group.members(name) == []
    assert run([tree.ksmtool, "group", "forget", name]).returncode == 0
    for verb in ("forget", "list"):
        again = run([tree.ksmtool, "group", verb, name])
        assert again.returncode == ExitStatus.FAILED
        assert again.stderr.startswith(f"ksmtool: There is no group {name}.\nhint: ")


@pytest.mark.ksm
def test_try_compares_three_ways(tree: Tree) -> None:
    """Pages full of pointers: equal only where the layout is."""
    code = "x = [(i, [i]) for i in range(200_000)]; import time; time.sleep(600)"
    with subprocess.Popen(
        [tree.ksmtool, "try", "--json", "-n", "3", "--arms", "plain,wrap,group",
         "--pages-to-scan", "20000", "--", sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        said, complaint = child.communicate(timeout=170)
    assert child.returncode == 0, complaint
    arms = {arm["name"]: arm for arm in json.loads(said)["arms"]}
    assert list(arms) == ["plain", "wrap", "group"]
    assert [arm["members"] for arm in arms.values()] == [None, None, 3]
    assert [arm["memory"]["processes"] for arm in arms.values()] == [3, 3, 3]
    assert arms["group"]["memory"]["pss_anon"] < 0.6 * arms["wrap"]["memory"]["pss_anon"]
    assert arms["plain"]["seconds"] >= max(arms["group"]["seconds"], arms["wrap"]["seconds"]) - 0.1
    assert f"try-{child.pid}" not in group.files()


def test_copies_differ_in_nothing_that_they_are_told(tmp_path: Path) -> None:
    """Another length of $KSMTOOL_COPY would put all of a program's memory elsewhere."""
    assert trial.copy_text(7, 9) == "7"
    assert [trial.copy_text(number, 10) for number in (1, 9, 10)] == ["01", "09", "10"]
    ready = str(tmp_path / "ready-{i}")
    script = 'touch "$0-$KSMTOOL_COPY"; exec sleep 600'
    options = trial.Options(copies=10, ready_file=ready, timeout=20)
    with trial.Fleet(["sh", "-c", script, str(tmp_path / "ready")], trial.plain_arm(), 10) as fleet:
        trial.wait_ready(fleet, options)
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == [
        f"{number:02}" for number in range(1, 11)
    ]


@pytest.mark.ksm
@pytest.mark.parametrize(("follow", "members"), [([], 1), (["--follow"], 2)])
def test_try_says_what_is_not_in_the_group(tree: Tree, follow: list[str], members: int) -> None:
    script = ["sh", "-c", "sleep 600; :"]
    arguments = ["try", "-n", "1", "--arms", "group", *follow]
    done = run([tree.ksmtool, *arguments, *script])
    assert done.returncode == 0, done.stderr
    warning = f"Warning: only {members} of the 2 processes of arm group have its layout"
    assert (warning in done.stdout) == (members < 2)


def test_try_says_why_there_can_be_no_group(tree: Tree, public: Path) -> None:
    need(os.getuid() == 0, "needs root to own a setuid program")
    program = public / "setuid-sleep"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(stat.S_ISUID | 0o755)
    before = set(group.files())
    done = run([tree.ksmtool, "try", "-n", 1, "--arms", "wrap,group", program, 600])
    assert done.returncode == ExitStatus.UNSUPPORTED
    assert done.stderr == (
        f"ksmtool: {program} cannot have the layout of a group: it is set-uid or set-gid.\n"
        "hint: Leave the arm group away.\n"
    )
    assert not {name for name in set(group.files()) - before if name.startswith("try-")}


@pytest.mark.ksm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_trial_forgets_its_group(
    tree: Tree, tmp_path: Path, number: signal.Signals
) -> None:
    ready = tmp_path / "ready"
    with subprocess.Popen(
        [tree.ksmtool, "try", "-n", "1", "--arms", "group", "--ready-file", ready,
         "--pages-to-scan", "1", "--", "sh", "-c", f"touch {ready}; sleep 600; :"],
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        wait_until(ready.exists, 60, "it runs")
        assert f"try-{child.pid}" in group.files()
        child.send_signal(number)
        child.communicate(timeout=30)
    assert child.returncode == ExitStatus.INTERRUPTED
    assert f"try-{child.pid}" not in group.files()


def test_a_trials_helpers_are_collected_and_not_counted(tree: Tree) -> None:
    """Orphans, whose subreaper the trial is."""
    arm = trial.group_arm(["sleep"])
    with trial.Fleet(["sleep", "600"], arm, 3) as fleet:
        wait_until(lambda: fleet.members() == 3, 20, "all are in the group")
        wait_until(lambda: _collected(fleet) == 3, 20, "no zombie, no helper")
        assert fleet.memory().processes == 3


def _collected(fleet: trial.Fleet) -> int:
    fleet.check()
    return len(process.descendants(os.getpid()))


def test_without_an_arm_group_follow_is_usage(tree: Tree) -> None:
    done = run([tree.ksmtool, "try", "--follow", "--arms", "plain,wrap", "true"])
    assert done.returncode == 2
    assert "--follow is about the arm group." in done.stderr
