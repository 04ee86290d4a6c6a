# SPDX-License-Identifier: MIT
"""What has to hold on a real kernel, without the prctl or with it. test_vm.py runs this in QEMU."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import AS_NOBODY, Tree, Victims, facts, opted_in, run, wait_until, without_us
from ksmtool import process, profile
from ksmtool.kernel import PAGE_SIZE, Ksm
from test_malloc import (  # noqa: F401 - tests and fixtures that run here as they are
    by_madvise,
    contracts,
    test_again_after_it_was_given_back,
    test_break_of_a_program_without_malloc,
    test_contracts_of_malloc,
    test_mappings_below_the_heap,
    test_threshold_leaves_small_mappings_out,
    test_what_the_program_took_out_stays_out,
    test_which_memory_is_marked,
)
from test_shim import (  # noqa: F401
    PLAIN,
    Way,
    holding,
    preloaded_etc,
    privileged,
    test_chain_of_execs_is_opted_in,
    test_death_by_signal_is_the_same,
    test_everyday_programs_do_the_same,
    test_flag_outlives_an_emptied_environment_and_marks_do_not,
)

METHOD = os.environ["KSM_TEST_METHOD"]
"""How this kernel opts in by itself: told, not asked, since the asking is tested too."""
HAS_PRCTL = METHOD == "prctl"
KERNEL = tuple(int(part) for part in os.environ["KSM_TEST_KERNEL"].split("."))

UNSUPPORTED = 4


@pytest.fixture(scope="session")
def reason_against_ksm() -> None:
    """Every kernel here has KSM: conftest asks for the prctl too."""


def ways(tree: Tree) -> dict[str, Way]:
    """Return every way to opt in, and what it comes to on this kernel."""
    madvise, prctl = (
        {"LD_PRELOAD": str(tree.madvise_library)},
        {"LD_PRELOAD": str(tree.prctl_library)},
    )
    forced = ("--method", "madvise")
    return {
        "libksm_preload.so": Way(env=madvise, method=METHOD),
        "libksm_preload.so, madvise": Way(
            env={**madvise, "KSM_PRELOAD": "madvise"}, method="madvise"
        ),
        "libksm_preload_prctl.so": Way(env=prctl, method="prctl" if HAS_PRCTL else "no"),
        "ksm-wrapper": Way((tree.wrapper,), method=METHOD),
        "ksm-wrapper, madvise": Way((tree.wrapper, *forced), method="madvise"),
        "ksmtool wrap": Way((tree.ksmtool, "wrap"), method=METHOD),
        "ksmtool wrap, madvise": Way((tree.ksmtool, "wrap", *forced), method="madvise"),
    }


# The last is ksmtool's start and the one before it.
WAYS = list(ways(Tree.below(Path("/usr"))))[:-1]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tree: Tree) -> Way:
    return ways(tree)[request.param]


@pytest.fixture(params=list(dict.fromkeys((METHOD, "madvise"))))
def preloaded(request: pytest.FixtureRequest, tree: Tree) -> dict[str, str]:
    """Return the environment for libksm_preload.so by a method that this kernel has."""
    return {"LD_PRELOAD": str(tree.madvise_library), "KSM_PRELOAD": request.param}


def test_kernel_is_the_one_that_was_meant() -> None:
    assert platform.release().startswith(os.environ["KSM_TEST_KERNEL"] + ".")


def test_probe(tree: Tree) -> None:
    answers = ("yes", "yes", "yes") if HAS_PRCTL else ("no", "yes", "no")
    expected = "prctl {}\nmadvise {}\ninherit {}\n".format(*answers)
    done = run([tree.wrapper, "--probe"])
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


# --- opted in, and nothing else is changed ---


@pytest.mark.parametrize(
    ("kind", "where"),
    [("dynamic", ""), ("dynamic", "--fork"), ("dynamic", "--thread"), ("no-pie", "")],
)
def test_program_is_opted_in_and_sees_nothing_else(
    victims: Victims, way: Way, kind: str, where: str
) -> None:
    command = [victims("report", kind), *([where] if where else [])]
    plain, ours = PLAIN.run(command), way.run(command)
    assert (opted_in(facts(plain)), opted_in(facts(ours))) == ("no", way.method)
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == plain.stderr == ""


@pytest.mark.parametrize("how", ["fork", "vfork", "spawn", "system", "daemon"])
def test_children_are_opted_in(victims: Victims, way: Way, how: str) -> None:
    ours = facts(way.run([victims("start"), how, victims("report")]))
    assert opted_in(ours) == way.method
    kernel_says = "0" if HAS_PRCTL else "-1"
    assert ours["parent"] == ["1" if way.method == "prctl" else kernel_says]


def test_exit_status_is_the_programs(victims: Victims, way: Way) -> None:
    for status in (0, 1, 4, 255):
        assert way.run([victims("end"), "exit", status]).returncode == status


def test_off_in_the_environment(victims: Victims, way: Way) -> None:
    off = {"KSM_PRELOAD": "off"}
    plain, ours = PLAIN.run([victims("report")], off), way.run([victims("report")], off)
    assert opted_in(facts(ours)) == "no"
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == ""


def test_says_one_line_when_asked(victims: Victims, tree: Tree) -> None:
    verbose = {"KSM_PRELOAD_VERBOSE": "1"}
    done = run([victims("report")], {"LD_PRELOAD": str(tree.madvise_library), **verbose})
    assert done.stderr == f"ksm_preload: opted in ({METHOD})\n"
    # Before Linux 6.4 the other cannot know that the program is not privileged, and is silent.
    done = run([victims("report")], {"LD_PRELOAD": str(tree.prctl_library), **verbose})
    assert done.stderr == ("ksm_preload: opted in (prctl)\n" if HAS_PRCTL else "")


def test_madvise_can_be_forced(tree: Tree, victims: Victims) -> None:
    way = ways(tree)["ksmtool wrap, madvise"]
    plain, ours = (each.run([victims("report")]) for each in (PLAIN, way))
    assert opted_in(facts(ours)) == "madvise"
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == ""


# --- what this kernel cannot do ---


@pytest.mark.parametrize("by", ["ksm-wrapper", "ksmtool wrap"])
def test_forced_prctl_works_or_is_refused(tree: Tree, victims: Victims, by: str) -> None:
    forced = Way((*ways(tree)[by].prefix, "--method", "prctl"))
    if HAS_PRCTL:
        assert opted_in(facts(forced.run([victims("report")]))) == "prctl"
        return
    done = forced.run(["echo", "run"])
    assert (done.returncode, done.stdout) == (UNSUPPORTED, "")
    assert "PR_SET_MEMORY_MERGE" in done.stderr
    assert "--method madvise" in done.stderr


@pytest.mark.parametrize("kind", ["static", "static-pie"])
def test_static_program(tree: Tree, victims: Victims, kind: str) -> None:
    program = victims("report", kind)
    plain = facts(PLAIN.run([program]))
    for name in ("ksm-wrapper", "ksmtool wrap"):
        done = ways(tree)[name].run([program])
        assert opted_in(facts(done)) == ("prctl" if HAS_PRCTL else "no")
        assert without_us(facts(done)) == without_us(plain)
        says = (
            ""
            if HAS_PRCTL or name == "ksm-wrapper"
            else (
                f"ksmtool: {program} is not opted in: a static program loads no library, and this "
                "kernel lacks the prctl\n"
            )
        )
        assert done.stderr == says

    done = ways(tree)["ksmtool wrap, madvise"].run([program])
    assert (done.returncode, done.stdout) == (UNSUPPORTED, "")
    assert "a static program loads no library" in done.stderr


def test_from_ld_so_preload_all_are_opted_in_but_the_privileged(
    victims: Victims,
    privileged: Path,  # noqa: F811
    preloaded_etc: list[str],  # noqa: F811
    request: pytest.FixtureRequest,
) -> None:
    expected = METHOD
    if "prctl library" in request.node.name and not HAS_PRCTL:
        expected = "no"
    for as_user in ((), AS_NOBODY):
        done = run([*preloaded_etc, *as_user, victims("report")])
        assert (opted_in(facts(done)), done.stderr) == (expected, "")
    verbose = ["env", "KSM_PRELOAD_VERBOSE=1"]
    done = run([*preloaded_etc, *AS_NOBODY, *verbose, privileged])
    assert opted_in(facts(done)) == "no"
    assert facts(done)["secure"] == ["1"]
    assert any("libksm_preload" in file for file in facts(done)["file"])
    assert done.stderr == ""


# --- how much of the memory ---


@dataclass
class Mappings:
    """The anonymous memory of some processes, which is what KSM can merge. In KiB."""

    anonymous: int = 0
    """Without the stacks."""
    marked: int = 0
    """Of that, what carries `mg`."""
    count: int = 0
    """Mappings, and how many of them are the stack of a thread."""
    stacks: int = 0
    stacks_marked: int = 0
    unmarked: str = ""

    def add(self, pid: int) -> None:
        """Add those of one process."""
        pointers = _stack_pointers(pid)
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if bounds:
                start, end = (int(bound, 16) for bound in bounds.groups())
                here, stack = line, any(start <= pointer < end for pointer in pointers)
                self.count += 1
                self.stacks += stack
            elif line.startswith("Anonymous:"):
                anonymous = int(line.split()[1])
            elif line.startswith("VmFlags:"):
                marked = " mg" in line
                if stack:
                    self.stacks_marked += marked
                    continue
                self.anonymous += anonymous
                self.marked += anonymous * marked
                if anonymous and not marked:
                    self.unmarked += f"{anonymous:8} KiB  {here}\n"


def _stack_pointers(pid: int) -> list[int]:
    """Return those of the threads of a process, once all wait in a system call."""
    calls: list[list[str]] = []

    def all_wait() -> bool:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        calls[:] = [(task / "syscall").read_text().split() for task in tasks]
        return all(call != ["running"] for call in calls)

    wait_until(all_wait, 10, "all threads wait")
    return [int(call[-2], 16) for call in calls]


def mappings(pid: int) -> Mappings:
    """Return those of a process and its descendants."""
    result = Mappings()
    for one in [pid, *process.descendants(pid)]:
        result.add(one)
    return result


PYTHON = """
import argparse, asyncio, ctypes, decimal, email, http.client, json, sqlite3, ssl, sys, threading
table = {number: str(number) for number in range(200_000)}
print("ready", flush=True)
sys.stdin.read()
"""
PERL = '$table{$_} = "value $_" for 1..100_000; $| = 1; print "ready\n"; <STDIN>;'
PHP = 'for ($i = 0; $i < 200000; $i++) $table[] = "value $i"; echo "ready\n"; fgets(STDIN);'
REDIS = """
redis-server --port 0 --unixsocket $0/redis --save '' --dir $0 >$0/log & server=$!
until redis-cli -s $0/redis ping >$0/pong 2>&1; do sleep 0.1; done
redis-cli -s $0/redis eval 'for i = 1, 100000 do redis.call("set", i, "value " .. i) end' 0 >$0/pong
echo ready
read line
kill $server
wait
"""


@pytest.fixture(params=["python3", "perl", "php", "redis", "16 threads"])
def program(request: pytest.FixtureRequest, victims: Victims, tmp_path: Path) -> Sequence[object]:
    """Return a command that fills its memory, prints `ready`, and keeps it until stdin ends."""
    commands: dict[str, Sequence[object]] = {
        "python3": [sys.executable, "-c", PYTHON],
        "perl": ["/usr/bin/perl", "-e", PERL],
        "php": ["/usr/bin/php", "-n", "-r", PHP],
        "redis": ["/bin/sh", "-c", REDIS, tmp_path],
        "16 threads": [victims("threads"), 16, 2],
    }
    return commands[request.param]


def test_anonymous_memory_is_marked(
    tree: Tree,
    program: Sequence[object],
    measured: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    with holding([(PLAIN, program)]) as (pid,):
        plain = mappings(pid)
    assert plain.marked == 0
    for method in dict.fromkeys((METHOD, "madvise")):
        with holding([(Way((tree.wrapper, "--method", method)), program)]) as (pid,):
            ours = mappings(pid)
        measured(
            f"{name}, {method}: {ours.marked / ours.anonymous:.1%} of {ours.anonymous / 1024:.1f} "
            f"MiB marked; {ours.count} mappings, plain {plain.count}"
        )
        print(ours.unmarked)
        assert ours.anonymous > 4096
        assert ours.marked >= 0.95 * ours.anonymous
        # The kernel's own flag keeps mappings apart that would be one (before Linux 6.17).
        if method == "madvise":
            # A stack stays unmarked, and apart from what would join it.
            # Big blocks of malloc stay apart, too: the threads have many of them (RESULTS.md).
            factor = 1.4 if "threads" in name else 1.1
            assert ours.count <= factor * plain.count + 10 + ours.stacks
            assert ours.stacks_marked == 0


# --- really merged ---


@pytest.mark.parametrize("name", ["libksm_preload.so", "ksm-wrapper", "ksm-wrapper, madvise"])
def test_equal_pages_merge_and_pss_falls(
    tree: Tree, victims: Victims, name: str, ksm: Ksm, measured: Callable[[str], None]
) -> None:
    copies, equal, unique = 4, 1000, 250
    expected = (copies - 1) * equal
    command = victims("pages")
    tags = secrets.randbits(62), secrets.randbits(62)
    started = [(ways(tree)[name], [command, tags[0], equal, unique])] * copies
    started += [(PLAIN, [command, tags[1], equal, unique])] * copies

    with holding(started) as pids:
        ours, plain = pids[:copies], pids[copies:]
        assert [process.opted_in(pid) for pid in pids] == [True] * copies + [False] * copies
        before = process.total(ours), process.total(plain)
        # Nothing left of what ksmd merged before.
        ksm.write("run", 2)
        wait_until(lambda: ksm.counters().pages_sharing == 0, 60, "nothing merged")
        ksm.write("run", 1)
        wait_until(lambda: ksm.counters().pages_sharing >= expected, 60, "equal pages merged")
        scans = ksm.counters().full_scans
        wait_until(lambda: ksm.counters().full_scans >= scans + 2, 60, "two whole scans")
        after, merged = (process.total(ours), process.total(plain)), ksm.counters()

    saved = (before[0].pss_anon - after[0].pss_anon) / PAGE_SIZE
    measured(f"{name}: {merged.pages_sharing} pages sharing, Pss_Anon {saved:.0f} pages lower")
    assert expected <= merged.pages_sharing < expected + copies * unique / 2
    assert expected <= saved < expected + copies * unique / 2
    # What is equal in the others but not opted in stays.
    assert after[1].pss_anon >= before[1].pss_anon >= copies * (equal + unique) * PAGE_SIZE


def test_status_estimate_and_doctor_of_this_kernel(
    tree: Tree, victims: Victims, ksm: Ksm, measured: Callable[[str], None]
) -> None:
    """What each tells of its processes: nothing (5.10), mappings and records (6.1), all (6.4)."""
    copies, equal, unique = 4, 5000, 250
    command = [victims("pages"), secrets.randbits(62), equal, unique]
    started: list[tuple[Way, Sequence[object]]] = [(Way((tree.wrapper,)), command)] * copies
    with holding([*started, (PLAIN, ["sh", "-c", "echo ready; cat"])]) as (*ours, plain):
        before = process.total(ours)
        guessed = run([tree.ksmtool, "estimate", "--json", *ours])
        ksm.apply({"pages_to_scan": "10000", "run": "1"})
        wait_until(
            lambda: ksm.counters().pages_sharing >= (copies - 1) * equal, 60, "all is merged"
        )
        scans = ksm.counters().full_scans
        wait_until(lambda: ksm.counters().full_scans >= scans + 3, 60, "three whole scans")
        done = run([tree.ksmtool, "status", "--json", "--by", "process"])
        fall = before.pss_anon - process.total(ours).pss_anon
        table = run([tree.ksmtool, "status", "--limit", "5"])
        opted = run([tree.ksmtool, "doctor", "--json", ours[0]])
        left = run([tree.ksmtool, "doctor", "--json", plain])
    assert (done.returncode, done.stderr, guessed.stderr) == (0, "", "")
    status = json.loads(done.stdout)
    rows = {row["pid"]: row for row in status["rows"]}
    assert [rows[pid]["opted_in"] for pid in (*ours, plain)] == [1] * copies + [0]
    assert status["ksm"]["saved"] == pytest.approx(fall, rel=0.03)
    assert 0 < status["ksm"]["profit"] < status["ksm"]["saved"]
    assert json.loads(guessed.stdout)["saved"] == pytest.approx(fall, rel=0.1)
    counted = KERNEL >= (5, 19)
    assert all((row["saved"] is not None) == counted for row in rows.values())
    assert all((row["profit"] is not None) == (KERNEL >= (6, 1)) for row in rows.values())
    if counted:
        saved = sum(rows[pid]["saved"] for pid in ours)
        measured(f"status: {saved / 1e6:.2f} MB saved, Pss_Anon {fall / 1e6:.2f} MB lower")
        assert saved == pytest.approx(fall, rel=0.03)
        assert rows[plain]["saved"] == 0
    assert (table.returncode, table.stderr) == (0, "")
    assert ("does not count merged pages per process" in table.stdout) == (not counted)

    found = [{one["id"] for one in json.loads(said.stdout)["findings"]} for said in (opted, left)]
    assert "not-opted-in" not in found[0]
    assert "not-opted-in" in found[1]
    assert left.returncode == 1


# --- few mappings left ---


@contextmanager
def max_map_count(most: int) -> Iterator[None]:
    """Lower vm.max_map_count for what is started inside."""
    setting = Path("/proc/sys/vm/max_map_count")
    before = setting.read_text()
    setting.write_text(str(most))
    try:
        yield
    finally:
        setting.write_text(before)


# In blocks of malloc not by the prctl: before Linux 6.17 that keeps them apart by itself.
@pytest.mark.parametrize(
    ("name", "pieces", "most"),
    [
        ("libksm_preload.so", "pages", 400),
        ("ksm-wrapper, madvise", "pages", 400),
        ("ksm-wrapper, madvise", "blocks", 20_000),
    ],
)
def test_program_gets_as_many_mappings_as_without_us(
    tree: Tree,
    victims: Victims,
    name: str,
    pieces: str,
    most: int,
    measured: Callable[[str], None],
) -> None:
    """A mark can cost a mapping; where there are none left, the marking ends, not the program."""
    way = ways(tree)[name]
    command = [victims("maps"), pieces, most + 5000]
    with max_map_count(most):
        plain, ours = facts(PLAIN.run(command)), facts(way.run(command))
    got = int(ours["got"][0]), int(plain["got"][0])
    measured(f"{name} under vm.max_map_count={most}: {got[0]} {pieces}, plain {got[1]}")
    if pieces == "blocks":
        assert got[1] == most + 5000
    assert got[0] >= got[1] - 10
    assert (ours["little"], ours["much"]) == (plain["little"], plain["much"]) == (["1"], ["1"])


def test_the_kernels_advisor_once_ksmd_has_worked(
    tree: Tree, victims: Victims, ksm: Ksm, measured: Callable[[str], None]
) -> None:
    """Linux takes all of ksmd's CPU time since boot for the first pass: profile.py does without."""
    found, fast = ksm.settings(), profile.PROFILES["fast"]
    if "advisor_mode" not in found:
        assert not HAS_PRCTL
        return
    with holding([(Way((tree.wrapper,)), [victims("pages"), 1, 1000, 1000])] * 2):
        ksm.write("run", 1)
        wait_until(lambda: (ksm.ksmd_cpu_seconds() or 0) > 6, 120, "ksmd has worked")
        used = ksm.ksmd_cpu_seconds()
        assert used is not None
        assert profile.settings(fast, found, None, used)["advisor_mode"] == "none"
        ksm.write("run", 2)  # the next pass begins anew
        ksm.apply(profile.settings(fast, found))
        first = ksm.read("pages_to_scan")
        wait_until(lambda: ksm.read("pages_to_scan") != first, 60, "the advisor after a pass")
        rate = ksm.read("pages_to_scan")
    measured(f"after {used:.1f} s of ksmd the advisor goes from {first} pages to {rate}")


# 64 MiB, and a thread that wants the lock of the mappings all the time.
BUSY = """
import mmap, sys, threading
kept = [mmap.mmap(-1, 1 << 22, mmap.MAP_PRIVATE) for _ in range(16)]
for one in kept:
    one[::4096] = b"x" * 1024
def map_and_unmap():
    while True:
        mmap.mmap(-1, 4096).close()
threading.Thread(target=map_and_unmap, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


def test_memory_is_whole_while_mappings_come_and_go(measured: Callable[[str], None]) -> None:
    """smaps_rollup leaves mappings out here (Linux 6.0 to 6.9); what we say of it does not."""
    short = 0
    with holding([(PLAIN, [sys.executable, "-c", BUSY])]) as (pid,):
        for _ in range(300):
            (line,) = re.findall(
                r"^Pss_Anon: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
            )
            short += int(line) * 1024 < 16 << 22
            memory = process.memory(pid)
            assert memory is not None
            assert memory.pss_anon >= 16 << 22
    measured(f"smaps_rollup was short {short} times of 300")
