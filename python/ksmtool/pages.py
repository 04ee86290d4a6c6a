# SPDX-License-Identifier: MIT
"""The pages of one process that KSM could merge: found in pagemap, read from its memory, hashed.

Nothing of the process is changed, and nothing is brought into memory: only what pagemap says is
there is read, so not what is swapped out. The kernel takes that for a use of the page, no more.
Not by process_vm_readv(2), which could read scattered pages at once: since Linux 5.19 it gives a
process a copy of its own of each page that it shares by fork or KSM (gup_must_unshare(), mm/gup.c).
"""

from __future__ import annotations

import os
import re
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE
from ksmtool.process import PROC

ENDED = (FileNotFoundError, ProcessLookupError)
"""What reading a process that has ended raises."""

# Documentation/admin-guide/mm/pagemap.rst
_PRESENT, _FILE_OR_SHARED, _EXCLUSIVE, _FRAME = 1 << 63, 1 << 61, 1 << 56, (1 << 55) - 1
_KIND = _PRESENT | _FILE_OR_SHARED | _EXCLUSIVE
_OWN, _SHARED = _PRESENT | _EXCLUSIVE, _PRESENT
_KPF_ZERO_PAGE = 1 << 24

# ksm_compatible() of mm/ksm.c: shared, hugetlb, droppable, and VM_SPECIAL.
_NEVER = frozenset(("sh", "ms", "ht", "dp", "io", "de", "pf", "mm"))

_CHUNK_PAGES = 1 << 14
_NOTHING = bytes(8 * _CHUNK_PAGES)
_RUN_PAGES = 64  # 256 KiB: what was read is still in the CPU's cache when it is hashed

Digest = Callable[[memoryview], int]


def digest() -> Digest:
    """Return the hash of a page, of 64 bits: any two of 10^9 contents agree with a chance of 3 %.

    Raises KsmtoolError if the library is missing.
    """
    try:
        from xxhash import xxh3_64_intdigest  # noqa: PLC0415 - other commands do without
    except ImportError as error:
        raise KsmtoolError(
            "This takes the Python module xxhash (2.0 or newer), which is not installed.",
            "Debian, Ubuntu, Fedora: package python3-xxhash; or pip install xxhash.",
            ExitStatus.UNSUPPORTED,
        ) from error
    function: Digest = xxh3_64_intdigest
    return function


@dataclass(frozen=True)
class Mapping:
    """One line of smaps; addresses and sizes are in bytes."""

    start: int
    end: int
    name: str
    anonymous: int
    """Private memory in RAM; each page counts in full, also if it is shared by fork or merged."""
    swapped: int
    flags: frozenset[str]

    @property
    def may_merge(self) -> bool:
        """Whether KSM would look at it in a program that is opted in as `ksmtool wrap` does it.

        The stack is made before the inherited flag counts, and is mergeable only in a process that
        has called the prctl by itself.
        """
        return not self.flags & _NEVER and (self.name != "[stack]" or "mg" in self.flags)


_LINE = re.compile(
    rb"^(?:([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *([^\n]*)"
    rb"|Anonymous: +(\d+) kB|Swap: +(\d+) kB|VmFlags:([^\n]*))$",
    re.MULTILINE,
)


def mappings(pid: int, proc: Path = PROC) -> list[Mapping]:
    """Return the mappings of a process; none for a kernel thread and a zombie.

    Raises PermissionError, and what is in ENDED.
    """
    found = []
    start = end = anonymous = swapped = 0
    name = ""
    for line in _LINE.finditer((proc / str(pid) / "smaps").read_bytes()):
        if line[1]:
            start, end, name = int(line[1], 16), int(line[2], 16), os.fsdecode(line[3])
            anonymous = swapped = 0
        elif line[4]:
            anonymous = int(line[4]) * 1024
        elif line[5]:
            swapped = int(line[5]) * 1024
        else:
            flags = frozenset(line[6].decode().split())
            found.append(Mapping(start, end, name, anonymous, swapped, flags))
    return found


@dataclass(frozen=True)
class Chunk:
    """Anonymous pages in RAM of a part of a mapping, as page numbers: addresses / PAGE_SIZE."""

    own: list[int]
    """Mapped here and nowhere else."""
    shared: list[int]
    """Mapped elsewhere, too: shared by fork, merged, or the kernel's page of zeros."""
    frames: list[int]
    """The page frame of each of `shared`; 0 without CAP_SYS_ADMIN, to whom it is not told."""


class Reader:
    """Reads the pages of one process; made and used in a `with`.

    Raises PermissionError where ptrace(2) would be refused, and what is in ENDED.
    """

    def __init__(self, pid: int, hash_page: Digest, proc: Path = PROC) -> None:
        """Open what is read; it stays that process's if the PID is given to another."""
        self._hash = hash_page
        self._pagemap = os.open(proc / str(pid) / "pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._memory = os.open(proc / str(pid) / "mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(self._pagemap)
            raise
        self._buffer = bytearray(_RUN_PAGES * PAGE_SIZE)
        whole = memoryview(self._buffer)
        # Made once: to slice for each page would take as long as to hash it.
        self._pages = [
            whole[at : at + PAGE_SIZE] for at in range(0, _RUN_PAGES * PAGE_SIZE, PAGE_SIZE)
        ]

    def __enter__(self) -> Reader:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        os.close(self._pagemap)
        os.close(self._memory)

    def chunks(self, mapping: Mapping) -> Iterator[Chunk]:
        """Yield what is in RAM of a mapping; a process that has ended has nothing there."""
        end = mapping.end // PAGE_SIZE
        for first in range(mapping.start // PAGE_SIZE, end, _CHUNK_PAGES):
            data = os.pread(self._pagemap, 8 * min(_CHUNK_PAGES, end - first), 8 * first)
            # Reservations of terabytes hold nothing: only what does is looked at.
            if data == _NOTHING[: len(data)]:
                continue
            entries = array("Q", data[: len(data) // 8 * 8])
            own = [page for page, entry in enumerate(entries, first) if entry & _KIND == _OWN]
            shared = []
            if len(own) < len(entries):
                shared = [
                    page for page, entry in enumerate(entries, first) if entry & _KIND == _SHARED
                ]
            yield Chunk(own, shared, [entries[page - first] & _FRAME for page in shared])

    def hashes(self, pages: Sequence[int]) -> tuple[Sequence[int], list[int]]:
        """Read and hash pages, in ascending order; return those that were there, and their hashes.

        What a process has freed meanwhile is left out.
        """
        hashed: list[int] = []
        gone: set[int] = set()
        for start, length in _runs(pages):
            at, end = start, start + length
            while at < end:
                got = self._read(pages[at], end - at)
                hashed += map(self._hash, self._pages[:got])
                at += got
                if at < end:
                    gone.add(pages[at])
                    at += 1
        if gone:
            return [page for page in pages if page not in gone], hashed
        return pages, hashed

    def content(self, page: int) -> memoryview | None:
        """Return the bytes of one page until the next is read, None if it is not there."""
        return self._pages[0] if self._read(page, 1) == 1 else None

    def _read(self, page: int, length: int) -> int:
        """Read that many pages into the buffer and return how many came before one was missing."""
        buffer = memoryview(self._buffer)[: length * PAGE_SIZE]
        try:
            return os.preadv(self._memory, [buffer], page * PAGE_SIZE) // PAGE_SIZE
        except OSError:  # EIO: the first of them is not there any more
            return 0


def _runs(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield place and length of runs of neighbours in ascending page numbers.

    Each is looked for at twice the length of the one before, then at half of that, and so on.
    """
    at = length = 0
    while at < len(pages):
        length = min(max(2 * length, 1), _RUN_PAGES, len(pages) - at)
        while pages[at + length - 1] - pages[at] != length - 1:
            length //= 2
        yield at, length
        at += length


def is_zero_page(frame: int, proc: Path = PROC) -> bool:
    """Whether a page frame is the kernel's page of zeros, which is nobody's memory."""
    try:
        with (proc / "kpageflags").open("rb", buffering=0) as flags:
            word = os.pread(flags.fileno(), 8, 8 * frame)
    except OSError:
        return False
    return bool(int.from_bytes(word, sys.byteorder) & _KPF_ZERO_PAGE)
