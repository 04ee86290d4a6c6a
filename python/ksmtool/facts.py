# SPDX-License-Identifier: MIT
"""What is so on this machine: processes, their memory and what KSM saves of it. Others render it.

The one module that gathers. Everything hangs off `root`, so that trees of other machines (tests/
machines.py) are read by the code that runs live.
"""

from __future__ import annotations

import contextlib
import pwd
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ksmtool import cgroup, ksmd, owners, process
from ksmtool import state as kept
from ksmtool.errors import KsmtoolError
from ksmtool.kernel import PAGE_SIZE, RECORD_BYTES, Counters, Ksm
from ksmtool.process import Memory
from ksmtool.state import State

_ROOT = Path("/")

COPIES = ("cow_ksm", "ksm_swpin_copy")
"""Merged pages copied again: since they were written to (Linux 5.19), or swapped in (5.18)."""


@dataclass(frozen=True)
class ProcessFacts:
    """One process whose memory we may look at."""

    pid: int
    parent: int
    name: str
    """The kernel's short one (comm); it may hold any character but NUL."""
    executable: str
    """Its path, without " (deleted)"; "" if we may not know it."""
    user: str
    """Name of the effective user, or the number of one that has none."""
    uid: int
    unit: str
    """As in cgroup.Place; "" for none."""
    container: str
    """As in cgroup.Place; "" for none."""
    memory: Memory
    saved: int | None
    """Its part of the bytes that merging spares (see `apportioned`); None if the kernel does not
    count merged pages per process: before Linux 5.19."""
    profit: int | None
    """`saved` less the kernel's memory for ksmd's records of it; None if either is not known: the
    records are counted since Linux 6.1. The kernel's own ksm_process_profit counts the copy that
    stays as saved, in every process."""


@dataclass(frozen=True)
class Sample:
    """ksmd at one moment; two of them tell how fast it is."""

    at: float
    """Seconds of the monotonic clock."""
    cpu_seconds: float | None
    """Since boot; None where it cannot be seen: in a container, or without KSM."""
    full_scans: int
    visited: int | None
    """Pages looked at or skipped since boot; None before Linux 6.6."""


@dataclass(frozen=True)
class Pace:
    """How fast ksmd is."""

    seconds: float
    """Over how long that was seen."""
    cpu_percent: float | None
    """Of one CPU; None where it cannot be seen."""
    pass_seconds: float | None
    """What one pass over all opted-in memory takes, about; None if there is none to look at, or
    ksmd does not run."""


@dataclass(frozen=True)
class Setup:
    """Who set KSM: what hardly changes, and takes a look at many files."""

    state: State | None
    """What `ksmtool kernel-enable` was asked for."""
    problem: str
    """What is wrong with our own file, "" for nothing."""
    others: tuple[owners.Owner, ...]
    container: bool
    """Whether this is a container, whose KSM is the host's."""


@dataclass(frozen=True)
class MachineFacts:
    """The machine at one moment."""

    time: float
    """Seconds since 1970."""
    available: bool
    """Whether this kernel has KSM; without it, there is nothing in what follows."""
    merging: bool
    """Whether ksmd runs."""
    settings: Mapping[str, str]
    counters: Counters
    sample: Sample
    memory_total: int
    """Bytes of RAM; 0 if that is not known."""
    setup: Setup
    processes: tuple[ProcessFacts, ...]
    """Those that we may look at, kernel threads and zombies left out."""
    unreadable: int
    """How many more there are that we may not look at."""
    hidden: bool
    """Whether /proc hides the processes of others, which are in no number then: hidepid=2."""
    copied: Mapping[str, int]
    """What /proc/vmstat counts of COPIES since boot, as far as this kernel does."""

    @property
    def opted_in(self) -> int:
        """Count the opted-in processes among `processes`."""
        return sum(one.memory.opted_in for one in self.processes)

    @property
    def saved(self) -> int:
        """Bytes of page frames that are not needed, the kernel's records not taken off.

        Processes that have ended stay in the kernel's count until ksmd comes by. While it is off,
        it never does: what the processes have counts then, if all of them can be looked at.
        """
        return self._counted - self._ended

    @property
    def profit(self) -> int:
        """`saved` less the kernel's records, by its own account: general_profit."""
        return self.counters.general_profit_bytes - self._ended

    @cached_property
    def by_pid(self) -> Mapping[int, ProcessFacts]:
        """Return the processes by PID."""
        return {one.pid: one for one in self.processes}

    @property
    def _counted(self) -> int:
        return self.counters.merged * PAGE_SIZE

    @property
    def _ended(self) -> int:
        known = [one.saved for one in self.processes if one.saved is not None]
        if self.merging or self.unreadable or len(known) < len(self.processes):
            return 0
        return max(0, self._counted - sum(known))


def gather(root: Path = _ROOT, setup: Setup | None = None) -> MachineFacts:
    """Look at the machine, and at every process once.

    `setup` is what is known of that from before; without it, it is looked for.
    """
    ksm = Ksm(root)
    found, unreadable = _processes(root)
    counters = ksm.counters()
    # Linux 5.19 has the first, 6.1 the second; where there is no KSM, nothing is saved.
    proc, available = root / "proc", ksm.available()
    if not available or process.any_has("ksm_merging_pages", (one.pid for one in found), proc):
        records = not available or process.any_has("ksm_stat", (one.pid for one in found), proc)
        found = apportioned(found, counters, records)
    return MachineFacts(
        time=time.time(),
        available=available,
        merging=ksm.running(),
        settings=ksm.settings(),
        counters=counters,
        sample=sample(ksm),
        memory_total=_memory_total(root),
        setup=setup or look_at_setup(root),
        processes=tuple(found),
        unreadable=unreadable,
        hidden=process.hides(proc),
        copied=_copied(root),
    )


def look_at_setup(root: Path = _ROOT) -> Setup:
    """Return who set KSM. A damaged file of ours is told, and no error."""
    state, problem = None, ""
    try:
        state = kept.read(root)
    except KsmtoolError as error:
        problem = error.message
    others = tuple(owners.found(root))
    return Setup(state, problem, others, ksmd.in_container(root))


def sample(ksm: Ksm) -> Sample:
    """Look at ksmd now."""
    scanned = ksm.number("pages_scanned", -1)
    return Sample(
        at=time.monotonic(),
        cpu_seconds=ksm.ksmd_cpu_seconds() if ksm.available() else None,
        full_scans=ksm.number("full_scans"),
        visited=None if scanned < 0 else scanned + ksm.number("pages_skipped"),
    )


def pace(before: Sample, after: Sample, machine: MachineFacts) -> Pace:
    """Return how fast ksmd was between two moments.

    A pass visits each page that ksmd keeps a record of. Where several were completed meanwhile,
    they tell; else the pages visited meanwhile, with those that smart_scan skipped; else, before
    Linux 6.6, the settings: pages_to_scan, then a rest of sleep_millisecs, of which ksmd's CPU time
    says how much of the whole it is.
    """
    seconds = max(after.at - before.at, 1e-9)
    busy = None
    if before.cpu_seconds is not None and after.cpu_seconds is not None:
        busy = max(0.0, after.cpu_seconds - before.cpu_seconds) / seconds
    return Pace(
        seconds=seconds,
        cpu_percent=None if busy is None else 100 * busy,
        pass_seconds=_pass_seconds(before, after, machine, busy),
    )


def _pass_seconds(
    before: Sample, after: Sample, machine: MachineFacts, busy: float | None
) -> float | None:
    records = machine.counters.records
    if not machine.merging or not records:
        return None
    seconds = after.at - before.at
    passes = after.full_scans - before.full_scans
    if passes > 1:  # the end of one alone says nothing of its length
        return seconds / passes
    if before.visited is not None and after.visited is not None:
        visited = after.visited - before.visited
        return records * seconds / visited if visited > 0 else None
    rest = int(machine.settings.get("sleep_millisecs", 20)) / 1000
    rate = int(machine.settings.get("pages_to_scan", 100)) / rest if rest else 0
    rate *= 1 - min(busy or 0.0, 0.99)
    return records / rate if rate else None


def apportioned(
    found: Sequence[ProcessFacts], counters: Counters, records: bool = True
) -> list[ProcessFacts]:
    """Return the processes with `saved`, and with `profit` where `records` are counted.

    What merging spares is a number of the machine: pages_sharing, the page frames that are not
    needed. The kernel only says how many mappings of merged pages a process has, and the one copy
    that stays is among them; all of these make pages_sharing + pages_shared. So pages_sharing is
    shared out in proportion to them, but to no process more than Pss allows: anonymous memory less
    Pss_Anon, which is what each page that n processes have saves it, (n - 1)/n of a page. What is
    cut off by that is shared out among the others. So the parts make a whole, two processes that
    have all in common with a hundred others are told from two that are equal only to each other,
    and what forks share without merging counts for nothing.

    Zero pages that KSM made are the process's own, and are not in its anonymous memory.
    """
    mappings = [one.memory.merging_pages for one in found]
    limits = [max(0, one.memory.anonymous - one.memory.pss_anon) / PAGE_SIZE for one in found]
    # Those that we may not look at have the rest; what forked meanwhile may be counted twice.
    whole = max(counters.pages_sharing + counters.pages_shared, sum(mappings), 1)
    parts = shares(counters.pages_sharing * sum(mappings) / whole, mappings, limits)
    result = []
    for one, part in zip(found, parts):
        saved = round((part + one.memory.zero_pages) * PAGE_SIZE)
        profit = saved - one.memory.rmap_items * RECORD_BYTES if records else None
        result.append(replace(one, saved=saved, profit=profit))
    return result


def shares(total: float, weights: Sequence[int], limits: Sequence[float]) -> list[float]:
    """Share out `total` in proportion to `weights`, to none more than its limit or its weight.

    What a limit cuts off goes to the others. If the limits are less than `total`, all reach them.
    """
    parts = [0.0] * len(weights)
    most = [min(pair) for pair in zip(limits, weights)]
    left, weight = total, sum(weights)
    wanting = [at for at, one in enumerate(weights) if one > 0]
    for at in sorted(wanting, key=lambda at: most[at] / weights[at]):
        parts[at] = min(most[at], left * weights[at] / weight)
        left -= parts[at]
        weight -= weights[at]
    return parts


def _processes(root: Path) -> tuple[list[ProcessFacts], int]:
    """Return those that we may look at, and how many more there are."""
    proc = root / "proc"
    users = _Users(root)
    found, unreadable = [], 0
    for pid in process.pids(proc):
        try:
            one = _one(pid, proc, users)
        except PermissionError:
            unreadable += 1
            continue
        if one is not None:
            found.append(one)
    return found, unreadable


def _one(pid: int, proc: Path, users: _Users) -> ProcessFacts | None:
    """Return the facts of one process, None if it has ended or has no memory of its own."""
    who = process.identity(pid, proc)
    memory = process.memory(pid, proc, who.resident) if who else None
    if who is None or memory is None:
        return None
    place = cgroup.place(process.cgroup_of(pid, proc))
    return ProcessFacts(
        pid=pid,
        parent=who.parent,
        name=who.name,
        executable=process.executable(pid, proc),
        user=users[who.uid],
        uid=who.uid,
        unit=place.unit,
        container=place.container,
        memory=memory,
        saved=None,
        profit=None,
    )


class _Users(dict[int, str]):
    """The names of users, each looked up once."""

    def __init__(self, root: Path) -> None:
        self.live = root == _ROOT
        with contextlib.suppress(OSError):
            for line in (root / "etc/passwd").read_text(errors="replace").splitlines():
                name, _, number = line.split(":")[:3] if line.count(":") >= 3 else ("", "", "")
                if number.isdecimal():
                    self.setdefault(int(number), name)

    def __missing__(self, uid: int) -> str:
        name = str(uid)
        if self.live:  # those that are in no file: LDAP, systemd's dynamic ones
            with contextlib.suppress(KeyError):
                name = pwd.getpwuid(uid).pw_name
        self[uid] = name
        return name


def _memory_total(root: Path) -> int:
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return 0
    found = re.search(r"^MemTotal: +(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _copied(root: Path) -> dict[str, int]:
    try:
        text = (root / "proc/vmstat").read_text()
    except OSError:
        return {}
    found = re.findall(rf"^({'|'.join(COPIES)}) (\d+)$", text, re.MULTILINE)
    return {name: int(number) for name, number in found}
