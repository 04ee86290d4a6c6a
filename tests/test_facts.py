# SPDX-License-Identifier: MIT
"""What is gathered: on roots of other machines, on this one, and against an independent count."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.fleet.__main__ import PROGRAMS, SYSTEM_PATH

from conftest import Tree, Victims, kept_running, need, run, wait_until
from ksmtool import facts, process, trial, usage
from ksmtool.kernel import PAGE_SIZE, Counters, Ksm
from ksmtool.process import Memory
from machines import MACHINES, Machine


@pytest.fixture(params=MACHINES)
def one(request: pytest.FixtureRequest) -> Machine:
    return MACHINES[str(request.param)]


@pytest.fixture
def root(one: Machine, tmp_path: Path) -> Path:
    return one.make(tmp_path)


def test_every_process_and_no_thread_of_the_kernel(one: Machine, root: Path) -> None:
    found = facts.gather(root)
    assert found.available
    assert found.merging
    assert found.unreadable == 0
    assert sorted(each.pid for each in found.processes) == [each.pid for each in one.processes]
    assert found.memory_total == 8000000 * 1024
    assert found.sample.cpu_seconds == 5.0


def test_who_it_is_and_where_it_belongs(one: Machine, root: Path) -> None:
    found = {each.pid: each for each in facts.gather(root).processes}
    for wanted in one.processes:
        each = found[wanted.pid]
        assert (each.name, each.executable) == (wanted.name, wanted.executable)
        assert (each.unit, each.container) == (wanted.unit, wanted.container)
        assert (each.uid, each.parent) == (wanted.uid, 1)
        assert each.user == {0: "root", 1000: "anna"}.get(wanted.uid, str(wanted.uid))
        assert each.memory.opted_in == wanted.opted_in
        assert each.memory.anonymous == wanted.anonymous * PAGE_SIZE
        assert each.memory.pss_anon == wanted.used * PAGE_SIZE


def test_what_is_saved(one: Machine, root: Path) -> None:
    """To the page, where the kernel tells: also with two containers that share less and more."""
    machine = facts.gather(root)
    found = {each.pid: each for each in machine.processes}
    for wanted in one.processes:
        each = found[wanted.pid]
        if one.kernel < (5, 19):
            assert (each.saved, each.profit) == (None, None)
        else:
            assert each.saved == pytest.approx(wanted.saved * PAGE_SIZE, abs=1)
            assert each.saved is not None
            assert each.profit == each.saved - wanted.records * 64
    known = [each.saved for each in machine.processes if each.saved is not None]
    if known:
        assert sum(known) == pytest.approx(machine.saved, abs=len(known))
    assert machine.profit <= machine.saved


def test_without_ksm_nothing_is_saved(one: Machine, root: Path) -> None:
    for file in (root / "sys/kernel/mm/ksm").iterdir():
        file.unlink()
    for file in root.glob("proc/*/ksm_*"):
        file.unlink()
    found = facts.gather(root)
    assert (found.available, found.merging, found.saved, found.profit) == (False, False, 0, 0)
    assert len(found.processes) == len(one.processes)
    assert {each.saved for each in found.processes} == {0}


# ---- Who may not be looked at, who is gone -------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, error: OSError, *paths: str) -> None:
    """Let opening these fail, as it does for users and for processes that end."""
    real = os.open

    def fail(path: object, flags: int, *more: int) -> int:
        if any(str(path).endswith(one) for one in paths):
            raise error
        return real(path, flags, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", fail)


@pytest.mark.parametrize("name", ["smaps_rollup", "ksm_stat"])
def test_those_that_may_not_be_looked_at_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = MACHINES["6.18, v2, Kubernetes"].make(tmp_path)
    refuse(monkeypatch, PermissionError(13, "no"), f"/500/{name}", f"/501/{name}")
    found = facts.gather(root)
    assert found.unreadable == 2
    assert not {500, 501} & {each.pid for each in found.processes}
    # Their part of what is saved is not given to the others.
    others = [each.saved or 0 for each in found.processes if each.memory.merging_pages]
    assert sum(others) == pytest.approx(found.saved * 8 / 10, abs=8)


@pytest.mark.parametrize("name", ["status", "smaps_rollup", "ksm_stat", "statm", "cgroup"])
@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), ProcessLookupError(3, "gone")])
def test_one_that_ends_while_being_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError
) -> None:
    root = MACHINES["6.18, v2, Kubernetes"].make(tmp_path)
    refuse(monkeypatch, error, f"/900/{name}")
    found = facts.gather(root)
    assert found.unreadable == 0
    assert 500 in {each.pid for each in found.processes}


@pytest.mark.parametrize("name", ["exe", "smaps", "smaps_rollup", "cgroup", "ksm_stat"])
def test_a_file_that_is_gone(tmp_path: Path, name: str) -> None:
    root = MACHINES["6.18, v2, Kubernetes"].make(tmp_path)
    (root / "proc/900" / name).unlink()
    found = {each.pid: each for each in facts.gather(root).processes}
    assert len(found) >= len(MACHINES["6.18, v2, Kubernetes"].processes) - 1
    if name == "exe":
        assert found[900].executable == ""


def test_one_that_gives_up_its_memory_while_being_read(tmp_path: Path) -> None:
    """Its files are there until it is reaped, and empty."""
    root = MACHINES["6.18, v2, Kubernetes"].make(tmp_path)
    for name in ("ksm_stat", "ksm_merging_pages", "smaps"):
        (root / "proc/900" / name).write_text("")
    found = {each.pid: each for each in facts.gather(root).processes}
    assert (found[900].memory.merging_pages, found[900].memory.opted_in) == (0, 0)


def test_processes_that_come_and_go_all_the_time() -> None:
    """Live: a shell that starts and ends what it can, while every process is looked at."""
    shell = "while :; do /bin/true & /bin/true & /bin/true & /bin/true & wait; done"
    with subprocess.Popen(["sh", "-c", shell], start_new_session=True) as busy:
        try:
            for _ in range(20):
                assert facts.gather().processes
        finally:
            os.killpg(busy.pid, 9)


def test_this_process() -> None:
    found = {each.pid: each for each in facts.gather().processes}
    us = found[os.getpid()]
    assert us.executable == os.path.realpath(sys.executable)
    assert (us.uid, us.parent) == (os.geteuid(), os.getppid())
    assert us.memory.anonymous > 1 << 20
    resident = re.search(
        r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    assert resident is not None
    assert us.memory.rss == pytest.approx(int(resident[1]) * 1024, rel=0.05)


def test_setup_is_looked_for_once(tmp_path: Path) -> None:
    root = MACHINES["6.12, v2, LXC"].make(tmp_path)
    state = root / "var/lib/ksm-preload/kernel.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"schema": 1, "profile": "balanced", "cpu": null, "found": {}}')
    first = facts.gather(root)
    assert first.setup.state is not None
    assert first.setup.state.profile == "balanced"
    state.write_text("{")
    assert facts.gather(root, first.setup).setup is first.setup
    damaged = facts.gather(root).setup
    assert (damaged.state, damaged.problem) == (
        None,
        "/var/lib/ksm-preload/kernel.json is damaged: what was set before is not known any more.",
    )


# ---- The share of a process ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "weights", "limits", "parts"),
    [
        (0, [], [], []),
        (10, [0, 0], [5, 5], [0, 0]),
        (30, [10, 20, 30], [99, 99, 99], [5, 10, 15]),
        # What the limit of the first cuts off goes to the others.
        (30, [10, 20, 30], [0, 99, 99], [0, 12, 18]),
        (30, [30, 20, 10], [6, 99, 3], [6, 20, 3]),
        # No more than its own mappings, and no more than all.
        (100, [10, 20], [99, 99], [10, 20]),
        (100, [10, 20], [1, 2], [1, 2]),
    ],
)
def test_shares(total: float, weights: list[int], limits: list[float], parts: list[float]) -> None:
    assert facts.shares(total, weights, limits) == pytest.approx(parts)


def process_facts(merging: int, anonymous: int, used: int, pid: int = 5) -> facts.ProcessFacts:
    memory = Memory(
        processes=1,
        anonymous=anonymous * PAGE_SIZE,
        pss_anon=used * PAGE_SIZE,
        merging_pages=merging,
        rmap_items=anonymous,
    )
    return facts.ProcessFacts(pid, 1, "x", "/x", "root", 0, "", "", memory, None, None)


def counters(shared: int, sharing: int) -> Counters:
    return Counters(1, shared, sharing, 0, 0, 0, None, 0)


def test_a_pair_is_told_from_a_crowd() -> None:
    """100 processes that have 1000 pages in common, and two that have 10000 others in common."""
    crowd = [process_facts(1000, 1000, 10, pid) for pid in range(100)]
    pair = [process_facts(10000, 10000, 5000, pid) for pid in (200, 201)]
    found = facts.apportioned([*crowd, *pair], counters(1000 + 10000, 99 * 1000 + 10000))
    saved = [(each.saved or 0) / PAGE_SIZE for each in found]
    assert saved[0] == pytest.approx(990)
    assert saved[-1] == pytest.approx(5000)
    assert sum(saved) == pytest.approx(109000)


def test_what_forks_share_counts_for_nothing() -> None:
    forked = [process_facts(0, 10000, 100, pid) for pid in range(100)]
    merged = [process_facts(1000, 1000, 500, pid) for pid in (200, 201)]
    found = facts.apportioned([*forked, *merged], counters(1000, 1000))
    assert {each.saved for each in found[:100]} == {0}
    assert {each.saved for each in found[100:]} == {500 * PAGE_SIZE}


def test_those_that_may_not_be_looked_at_keep_their_part() -> None:
    """Of 10 that have 1000 pages in common, and much more by fork, two are to be seen."""
    seen = [process_facts(1000, 10000, 100, pid) for pid in (200, 201)]
    found = facts.apportioned(seen, counters(1000, 9000))
    assert [each.saved for each in found] == [900 * PAGE_SIZE] * 2


def test_the_parts_are_no_more_than_the_whole() -> None:
    """What forked, or merged, since the counters were read has more mappings than these say."""
    seen = [process_facts(1000, 10000, 100, pid) for pid in range(4)]
    found = facts.apportioned(seen, counters(1000, 1000))
    assert sum(each.saved or 0 for each in found) == 1000 * PAGE_SIZE


def test_looking_for_nothing_is_a_loss() -> None:
    (found,) = facts.apportioned([process_facts(0, 1000, 1000)], counters(0, 0))
    assert (found.saved, found.profit) == (0, -64000)


def test_what_has_ended_counts_for_nothing_once_ksmd_is_off(tmp_path: Path) -> None:
    """The kernel still counts it; where some may not be looked at, its count is all there is."""
    machine = facts.gather(MACHINES["6.18, v2, Kubernetes"].make(tmp_path))
    alive = replace(machine, processes=machine.processes[:15])
    left = sum(each.saved or 0 for each in alive.processes)
    assert 0 < left < machine.saved
    off = replace(alive, merging=False)
    assert (alive.saved, off.saved) == (machine.saved, left)
    assert machine.profit - off.profit == machine.saved - left
    assert replace(off, unreadable=1).saved == machine.saved


@pytest.mark.ksm
def test_ended_while_ksmd_is_off(tree: Tree, victims: Victims, ksm: Ksm) -> None:
    """Live: the kernel goes on counting what two processes had, and status does not."""
    with kept_running(*[(tree.wrapper, victims("pages"), 7, 5000, 10)] * 2) as pids:
        ksm.apply({"run": "1"})
        wait_until(lambda: process.total(pids).merging_pages >= 10000, 60, "all is merged")
        ksm.apply({"run": "0"})
        before = facts.gather()
    after = facts.gather()
    assert ksm.counters().pages_sharing >= 5000
    # Some may not be looked at here even by root; they are not opted in.
    before, after = (replace(each, unreadable=0) for each in (before, after))
    assert before.saved - after.saved >= 5000 * PAGE_SIZE


# ---- ksmd's pace ---------------------------------------------------------------------------


def sample(at: float, cpu: float | None, scans: int, visited: int | None) -> facts.Sample:
    return facts.Sample(at, cpu, scans, visited)


@pytest.mark.parametrize(
    ("before", "after", "cpu", "seconds"),
    [
        # Passes completed meanwhile; pages visited; settings, with and without the time it works.
        (sample(0, 1, 10, 0), sample(2, 1.5, 14, 99), 25, 0.5),
        (sample(0, 1, 10, None), sample(2, 1.5, 12, None), 25, 1),
        # A pass that happens to end just then does not make it short.
        (sample(0, 1, 10, 0), sample(2, 1.5, 11, 3650), 25, 4),
        (sample(0, 1, 10, None), sample(2, 1.5, 11, None), 25, 7300 / 5000 / 0.75),
        (sample(0, 1, 10, 0), sample(2, 1.5, 10, 3650), 25, 4),
        (sample(0, 1, 10, None), sample(2, 1.5, 10, None), 25, 7300 / 5000 / 0.75),
        (sample(0, None, 10, None), sample(2, None, 10, None), None, 7300 / 5000),
        (sample(0, 1, 10, 50), sample(2, 1, 10, 50), 0, None),
    ],
)
def test_pace(
    tmp_path: Path,
    before: facts.Sample,
    after: facts.Sample,
    cpu: float | None,
    seconds: float | None,
) -> None:
    machine = facts.gather(MACHINES["6.1, v2, Podman"].make(tmp_path))
    machine = replace(machine, counters=replace(machine.counters, pages_shared=0, pages_sharing=0))
    pace = facts.pace(before, after, machine)
    assert pace.cpu_percent == (None if cpu is None else pytest.approx(cpu))
    assert pace.pass_seconds == (None if seconds is None else pytest.approx(seconds))
    assert facts.pace(before, after, replace(machine, merging=False)).pass_seconds is None


@pytest.mark.ksm
@pytest.mark.parametrize("smart_scan", ["0", "1"])
def test_a_pass_visits_what_there_are_records_of(ksm: Ksm, tree: Tree, smart_scan: str) -> None:
    """What the time of a pass is computed from, counted over whole passes."""
    ksm.apply({"smart_scan": smart_scan})
    code = "import os; x = os.urandom(50 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [tree.wrapper, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        ksm.apply({"pages_to_scan": "1000", "run": "1"})
        start = ksm.number("full_scans")
        wait_until(lambda: ksm.number("full_scans") >= start + 2, 60, "two passes")
        before = facts.sample(ksm)
        wait_until(lambda: ksm.number("full_scans") >= start + 6, 60, "four more passes")
        after, records = facts.sample(ksm), ksm.counters().records
        pace = facts.pace(before, after, facts.gather())
        child.kill()
    assert after.visited is not None
    assert before.visited is not None
    passes = after.full_scans - before.full_scans
    assert records > 50 << 20 >> 12
    assert (after.visited - before.visited) / passes == pytest.approx(records, rel=0.15)
    assert pace.pass_seconds == pytest.approx((after.at - before.at) / passes)


@pytest.mark.ksm
def test_a_pool_that_only_forked_saves_nothing(ksm: Ksm, tree: Tree) -> None:
    """Its memory is one sixth of what it looks like, but KSM has no part in that."""
    code = (
        "import os; x = os.urandom(30 << 20)\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0: break\n"
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [tree.wrapper, sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as child:
        assert child.stdout is not None
        try:
            for _ in range(6):
                child.stdout.readline()
            start = ksm.number("full_scans")
            ksm.apply({"run": "1"})
            wait_until(lambda: ksm.number("full_scans") >= start + 4, 60, "four passes")
            machine = facts.gather()
        finally:
            os.killpg(child.pid, 9)
    found = [each for each in machine.processes if child.pid in (each.pid, each.parent)]
    assert len(found) == 6
    for each in found:
        assert each.memory.opted_in
        assert each.memory.anonymous - each.memory.pss_anon > 20 << 20
        assert each.saved is not None
        assert each.profit is not None
        assert each.saved < each.memory.anonymous / 50
        assert each.profit < 0


# ---- Saved is saved ------------------------------------------------------------------------


def pss_anon(pids: list[int]) -> int:
    """Sum of Pss_Anon, in bytes, read by nothing of ours."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        found = re.search(r"^Pss_Anon: +(\d+) kB$", text, re.MULTILINE)
        assert found is not None
        total += int(found[1]) * 1024
    return total


@pytest.mark.ksm
@pytest.mark.slow
def test_saved_is_the_fall_of_pss_anon(ksm: Ksm, tree: Tree, tmp_path: Path) -> None:
    """The figure: within 3 % on the fleet of 20 CPython copies in a group."""
    python = "/usr/bin/python3"
    need(os.path.exists(python), f"no {python}")
    ready = f"{tmp_path}/ready-{{i}}"
    command = (python, str(PROGRAMS / "python.py"), ready)
    (arm,) = trial.arms_named(["group"], command)
    options = trial.Options(copies=20, ready_file=ready, timeout=60)
    with trial.Fleet(command, arm, 20) as fleet:
        trial.wait_ready(fleet, options)
        pids = fleet.pids()
        before = pss_anon(pids)
        ksm.apply({"pages_to_scan": "20000", "run": "1"})
        _passes, settled = trial.settle(ksm, fleet, 60)
        assert settled
        ksm.apply({"run": "0"})  # so that both see the same
        fall = before - pss_anon(pids)
        done = run([tree.ksmtool, "status", "--by", "app", "--json"], {"PATH": SYSTEM_PATH})
        machine = facts.gather()
        exactly = process.merged(pids)
        alone = not process.opted_in_elsewhere(pids)
    assert done.returncode == 0, done.stderr
    members = [each for each in machine.processes if each.pid in pids]
    (row,) = usage.rows(members, "app")
    assert row.saved is not None
    assert row.profit is not None
    shown = f"Pss_Anon fell by {fall / 1e6:.1f} MB, status says {row.saved / 1e6:.1f} MB saved"
    print(f"{shown}, {row.profit / 1e6:.1f} MB net, {machine.profit / 1e6:.1f} MB on the machine")
    assert len(members) == 20
    assert fall > 300e6
    assert row.saved == pytest.approx(fall, rel=0.03)
    assert row.profit == pytest.approx(fall, rel=0.03)
    assert exactly == pytest.approx(row.saved, rel=0.03)
    if alone:  # no virtual machine runs here, nor another test
        assert machine.saved == pytest.approx(fall, rel=0.03)
        assert machine.profit == pytest.approx(fall, rel=0.03)
