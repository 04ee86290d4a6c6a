# SPDX-License-Identifier: MIT
"""`ksmtool estimate`: what KSM would save of running processes as they are; they are only read.

Pages are counted by their content: KSM keeps one of each that is equal byte for byte. A page frame
that is shared already, by fork or by KSM, counts once. docs/estimate.md has the method.
"""

from __future__ import annotations

import os
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ksmtool import pages, policy, process
from ksmtool.compare import Comparison, compare
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE, RECORD_BYTES, Ksm
from ksmtool.pages import ENDED, Digest, Reader
from ksmtool.process import PROC

__all__ = ["Comparison", "Estimate", "Pair", "Program", "Tally", "compare", "measure"]

MOST_CONTENTS = 1 << 20
"""Contents kept in memory, at about 110 bytes each."""

_ALL = 1 << 64

Say = Callable[[str, float], None]


def _silent(_text: str, _done: float) -> None:
    """Say nothing."""


class Tally:
    """How often each content occurs, by program.

    Of more than `most` contents half are forgotten, those with the greater hashes: what stays is a
    random part of the contents, each with all its pages (adaptive sampling, Flajolet 1990, after
    Wegman). `share` is that part from the start. Pages of zeros are counted apart, and all of them.
    """

    def __init__(self, zero: int, share: float = 1.0, most: int = MOST_CONTENTS) -> None:
        """Begin with nothing; `zero` is the hash of a page of zeros."""
        self._zero = zero
        self._bound = max(1, round(share * _ALL))
        self._most = most
        self.contents: dict[str, Counter[int]] = defaultdict(Counter)
        """By program: hash -> page frames of that content."""
        self.frames: Counter[str] = Counter()
        """By program: page frames of any content but zeros, also of contents not kept."""
        self.zeros: Counter[str] = Counter()

    @property
    def share(self) -> float:
        """Return the part of all contents that is kept, 0 to 1."""
        return self._bound / _ALL

    def add(self, program: str, hashes: Sequence[int]) -> None:
        """Count page frames of a program."""
        zeros = hashes.count(self._zero)
        self.zeros[program] += zeros
        self.frames[program] += len(hashes) - zeros
        if self._bound < _ALL:
            hashes = [one for one in hashes if one < self._bound]
        contents = self.contents[program]
        contents.update(hashes)
        contents.pop(self._zero, None)
        while sum(map(len, self.contents.values())) > self._most:
            self._bound //= 2
            for name, kept in self.contents.items():
                few = {one: count for one, count in kept.items() if one < self._bound}
                self.contents[name] = Counter(few)


def spared(counts: Collection[int], frames: int, share: float) -> float:
    """Return how many of `frames` page frames merging gives back: all but one for each content.

    `counts` are the frames of each content in a sample, which is `share` of all contents. Of the
    two unbiased ways to go from the sample to all, the one with the smaller variance is taken:
    to scale up the duplicates that were seen, or to take all contents there are from all frames.
    """
    if share == 1:
        return frames - len(counts)
    duplicates = sum(counts) - len(counts)
    if sum((count - 1) ** 2 for count in counts) <= len(counts):
        return duplicates / share
    return max(0.0, frames - len(counts) / share)


@dataclass(frozen=True)
class Program:
    """What was found of the processes of one program, in bytes."""

    name: str
    """The path of its executable."""
    processes: int
    anonymous: int
    """Memory that KSM may merge; each page counts in full in each process."""
    frames: int
    """The physical memory behind that, where not of a program named before."""
    saved: int
    """What merging would spare within this program alone; pages of zeros are in it."""
    zeros: int
    """Pages of zeros."""


@dataclass(frozen=True)
class Pair:
    """Two programs with equal pages."""

    one: str
    other: str
    saved: int
    """Bytes that merging the two spares beyond what it spares in each alone."""


@dataclass(frozen=True)
class Estimate:
    """What KSM would save if all that was looked at were opted in; sizes are in bytes."""

    processes: int
    unreadable: int
    """Processes that may not be looked at; they are in no other number."""
    ended: int
    """Processes that ended before they were read."""
    left_out: int
    """Processes that the policy leaves out."""
    anonymous: int
    """Memory that KSM may merge; each page counts in full in each process."""
    frames: int
    """The physical memory behind that: fork and KSM share the rest already."""
    saved: int
    """Of `frames`, what merging would spare; pages of zeros are in it."""
    zeros: int
    """The part of `saved` that is pages of zeros."""
    metadata: int
    """Kernel memory for ksmd's records, to be taken off `saved`."""
    swapped: int
    """Memory that is swapped out: not read, so not known."""
    changing: int
    """The part of `frames` that changed between the two looks, if there were two: not saved."""
    again: float
    """Seconds from the first look to the second; 0 if there was one."""
    share: float
    """The part of all contents that was counted, 0 to 1; the rest is concluded from it."""
    exact: bool
    """Whether page frames were told; else pages that are shared and equal are taken for one."""
    seconds: float
    programs: tuple[Program, ...]
    """Those that save most first."""
    pairs: tuple[Pair, ...]
    """Those that save most first."""


def named(pids: Iterable[int], proc: Path = PROC) -> list[int]:
    """Return the processes `pids`, each once, by the PID of its first thread.

    Those that have ended are among them, and count as that. Raises KsmtoolError if all have.
    """
    asked = list(dict.fromkeys(pids))
    leaders = {pid: leader(pid, proc) for pid in asked}
    if not any(leaders.values()):
        some = ", ".join(map(str, asked))
        raise KsmtoolError(f"There is no process {some} that has memory of its own.")
    return list(dict.fromkeys(leaders[pid] or pid for pid in asked))


def leader(pid: int, proc: Path = PROC) -> int | None:
    """Return the PID of the first thread of the process that `pid` is a thread of.

    None if it has ended, or has no memory of its own.
    """
    try:
        status = (proc / str(pid) / "status").read_text(errors="replace").splitlines()
    except PermissionError:
        return pid
    except ENDED:
        return None
    found = next((int(line.split()[1]) for line in status if line.startswith("Tgid:")), pid)
    return found if has_memory(found, proc) else None


def of_program(name: str, proc: Path = PROC) -> list[int]:
    """Return the processes of a program: its path, its file's name, or the name it gave itself.

    Raises KsmtoolError if none runs.
    """
    found = []
    for pid in everything(proc):
        try:
            names = {os.fsdecode((proc / str(pid) / "comm").read_bytes()).rstrip("\n")}
            path = executable(pid, proc)
        except PermissionError:
            path = ""  # it counts as unreadable if it has the name by its own account
        except ENDED:
            continue
        if name in names | {path, os.path.basename(path)}:
            found.append(pid)
    if not found:
        raise KsmtoolError(
            f"No process of {name} runs.", "NAME is as in `ps -e`, or the path of its executable."
        )
    return found


def everything(proc: Path = PROC) -> list[int]:
    """Return the PIDs of all processes that have memory, but for this one."""
    pids = sorted(process.pids(proc))
    return [pid for pid in pids if pid != os.getpid() and has_memory(pid, proc)]


def has_memory(pid: int, proc: Path = PROC) -> bool:
    """Whether it is a process that runs, no thread of the kernel and no zombie."""
    try:
        return process.identity(pid, proc) is not None
    except PermissionError:  # it runs, and is counted as one that may not be looked at
        return True


def executable(pid: int, proc: Path = PROC) -> str:
    """Return the path of what a process runs. Raises PermissionError, and what is in ENDED."""
    return os.readlink(proc / str(pid) / "exe").removesuffix(" (deleted)")


def measure(
    pids: Sequence[int],
    rules: policy.Policy | None = None,
    share: float = 1.0,
    again: float = 0.0,
    say: Say = _silent,
    root: Path = Path("/"),
) -> Estimate:
    """Look at the processes and return what KSM would save of them.

    Those that `rules` leave out are left out. If `again` is not 0, they are looked at a second time
    that many seconds after the first, and only pages that have not changed count as saved; that
    takes 16 bytes for each page. Raises KsmtoolError if none may be looked at.
    """
    start = time.monotonic()
    proc = root / "proc"
    look = _Look(proc, share)
    if again:
        for number, pid in enumerate(pids):
            say("first look", number / len(pids))
            look.remember(pid)
        while (left := start + again - time.monotonic()) > 0:
            say(f"second look in {left:.0f} s", 1.0)
            time.sleep(min(left, 0.5))
    sizes = {pid: _resident(pid, proc) for pid in pids}
    whole = max(sum(sizes.values()), 1)
    done = 0
    for pid in pids:
        look.at(pid, rules, lambda read, name: say(name, min(1.0, (done + read) / whole)))  # noqa: B023
        done += sizes[pid]
    if look.unreadable and not look.processes:
        raise KsmtoolError(
            "None of these processes may be looked at.",
            "Other users' memory is root's to read: run it with sudo. Where "
            "kernel.yama.ptrace_scope is not 0, so is that of your own.",
            ExitStatus.NEEDS_ROOT,
        )
    zeros_too = Ksm(root).number("use_zero_pages") == 1
    return look.result(zeros_too, time.monotonic() - start, again)


class _Look:
    """What has been found so far."""

    def __init__(self, proc: Path, share: float) -> None:
        self.proc = proc
        self.hash: Digest = pages.digest()
        self.zero = self.hash(memoryview(bytes(PAGE_SIZE)))
        self.tally = Tally(self.zero, share)
        self.unreadable = self.ended = self.left_out = 0
        self.swapped = 0
        self.processes: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        """By program: pages that no other process maps."""
        self.mapped: dict[str, Counter[int]] = defaultdict(Counter)
        """By program: frame -> mappings of pages that several processes may map."""
        self.known: set[int] = set()
        """The frames in all of `mapped`."""
        self.alike: dict[str, Counter[int]] = defaultdict(Counter)
        """The same where frames are not told, with the hash of the content in their place."""
        self.seen: set[int] = set()
        self.nobodys: set[int] = set()
        """Frames and hashes of the kernel's page of zeros."""
        self.before: dict[int, tuple[array[int], array[int]]] | None = None
        """By process: pages and their hashes at the first look, if there was one."""
        self.changing: Counter[str] = Counter()

    def remember(self, pid: int) -> None:
        """Look at one process for the first of two times; one that cannot be read has no pages."""
        self.before = self.before or {}
        seen = self.before[pid] = array("Q"), array("Q")
        with suppress(PermissionError, *ENDED):
            found = [one for one in pages.mappings(pid, self.proc) if one.may_merge]
            with Reader(pid, self.hash, self.proc) as reader:
                for mapping in found:
                    for chunk in reader.chunks(mapping) if mapping.anonymous else ():
                        for more, kept in zip(reader.hashes(chunk.own), seen):
                            kept.extend(more)

    def _unchanged(
        self, program: str, before: Mapping[int, int], there: Sequence[int], hashes: list[int]
    ) -> list[int]:
        """Return the hashes of the pages that are as they were at the first look."""
        same = [one for page, one in zip(there, hashes) if before.get(page) == one]
        self.changing[program] += len(hashes) - len(same)
        return same

    def at(self, pid: int, rules: policy.Policy | None, say: Callable[[int, str], None]) -> None:
        """Look at one process; `say` is told the bytes read of it, and its program."""
        try:
            program = executable(pid, self.proc)
            if rules is not None and not rules.verdict(program).allowed:
                self.left_out += 1
                return
            say(0, os.path.basename(program))
            self._read(pid, program, say)
        except PermissionError:
            self.unreadable += 1
        except ENDED:
            self.ended += 1

    def _read(self, pid: int, program: str, say: Callable[[int, str], None]) -> None:
        found = [one for one in pages.mappings(pid, self.proc) if one.may_merge]
        read = 0
        before = None if self.before is None else dict(zip(*self.before[pid]))
        with Reader(pid, self.hash, self.proc) as reader:
            self.processes[program] += 1
            for mapping in found:
                self.swapped += mapping.swapped
                if not mapping.anonymous:
                    continue
                for chunk in reader.chunks(mapping):
                    there, hashes = reader.hashes(chunk.own)
                    self.own[program] += len(hashes)
                    if before is not None:
                        hashes = self._unchanged(program, before, there, hashes)
                    self.tally.add(program, hashes)
                    if chunk.shared:
                        self._add_shared(reader, program, chunk)
                    read += len(chunk.own) + len(chunk.shared)
                    say(read * PAGE_SIZE, os.path.basename(program))

    def _add_shared(self, reader: Reader, program: str, chunk: pages.Chunk) -> None:
        """Count pages that other processes map, too, each frame once."""
        if 0 in chunk.frames:
            _, hashes = reader.hashes(chunk.shared)
            # Of zeros: most likely the kernel's own page.
            self.nobodys.add(self.zero)
            fresh = list(dict.fromkeys(one for one in hashes if one not in self.seen))
            self.seen.update(fresh)
            self.alike[program].update(hashes)
            self.tally.add(program, [one for one in fresh if one != self.zero])
            return
        first: dict[int, int] = {}
        for page, frame in zip(chunk.shared, chunk.frames):
            if frame not in self.known:
                first.setdefault(page, frame)
                self.known.add(frame)
        there, hashes = reader.hashes(list(first))
        frames = [first[page] for page in there]
        self.nobodys.update(
            frame
            for frame, one in zip(frames, hashes)
            if one == self.zero and pages.is_zero_page(frame, self.proc)
        )
        self.mapped[program].update(chunk.frames)
        self.tally.add(
            program, [one for frame, one in zip(frames, hashes) if frame not in self.nobodys]
        )

    def _anonymous(self, program: str) -> int:
        """Return the program's pages, each counted in each process."""
        shared = self.mapped[program], self.alike[program]
        return self.own[program] + sum(
            count for counter in shared for key, count in counter.items() if key not in self.nobodys
        )

    def result(self, zeros_too: bool, seconds: float, again: float = 0.0) -> Estimate:
        """Return it all; `zeros_too`: of zeros not even one page is kept (use_zero_pages)."""
        tally = self.tally
        share = tally.share
        programs = [
            Program(
                name=name,
                processes=count,
                anonymous=self._anonymous(name) * PAGE_SIZE,
                frames=(tally.frames[name] + tally.zeros[name] + self.changing[name]) * PAGE_SIZE,
                saved=_bytes(
                    spared(tally.contents[name].values(), tally.frames[name], share)
                    + _without_kept(tally.zeros[name], zeros_too)
                ),
                zeros=tally.zeros[name] * PAGE_SIZE,
            )
            for name, count in self.processes.items()
        ]
        counts, owners = _together(tally.contents)
        zeros = _without_kept(sum(tally.zeros.values()), zeros_too)
        anonymous = sum(program.anonymous for program in programs)
        return Estimate(
            processes=sum(self.processes.values()),
            unreadable=self.unreadable,
            ended=self.ended,
            left_out=self.left_out,
            anonymous=anonymous,
            frames=sum(program.frames for program in programs),
            saved=_bytes(spared(counts.values(), sum(tally.frames.values()), share) + zeros),
            zeros=zeros * PAGE_SIZE,
            metadata=anonymous // PAGE_SIZE * RECORD_BYTES,
            swapped=self.swapped,
            changing=sum(self.changing.values()) * PAGE_SIZE,
            again=again,
            share=share,
            exact=not self.seen,
            seconds=seconds,
            programs=tuple(sorted(programs, key=lambda one: (-one.saved, one.name))),
            pairs=_pairs(list(tally.contents), owners, share),
        )


def _resident(pid: int, proc: Path) -> int:
    """Return the anonymous memory of a process as everybody may know it; 0 if it has ended."""
    try:
        text = (proc / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _bytes(count: float) -> int:
    return round(count) * PAGE_SIZE


def _without_kept(zeros: int, zeros_too: bool) -> int:
    return zeros if zeros_too else max(0, zeros - 1)


def _together(
    contents: Mapping[str, Counter[int]],
) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """Return hash -> frames in all programs, and hash -> a bit for each program that has it."""
    if len(contents) == 1:
        return next(iter(contents.values())), {}
    counts: Counter[int] = Counter()
    owners: dict[int, int] = {}
    for number, counter in enumerate(contents.values()):
        counts.update(counter)
        bit = 1 << number
        for one in counter:
            owners[one] = owners.get(one, 0) | bit
    return counts, owners


def _pairs(names: Sequence[str], owners: Mapping[int, int], share: float) -> tuple[Pair, ...]:
    """Return the programs that have contents in common: one page of each can be spared."""
    common: Counter[tuple[int, int]] = Counter()
    for bits, count in Counter(owners.values()).items():
        if bits & (bits - 1):
            having = [number for number in range(len(names)) if bits >> number & 1]
            common.update(dict.fromkeys(combinations(having, 2), count))
    found = []
    for (one, other), count in common.items():
        first, second = sorted((names[one], names[other]))
        found.append(Pair(first, second, _bytes(count / share)))
    return tuple(sorted(found, key=lambda pair: (-pair.saved, pair.one, pair.other)))
