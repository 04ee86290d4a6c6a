# SPDX-License-Identifier: MIT
"""What kinds of memory a process has, as far as KSM goes: from one reading of its smaps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ksmtool.pages import ENDED, Mapping
from ksmtool.process import PROC

_LINE = re.compile(
    rb"^(?:[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *([^\n]*)"
    rb"|(Rss|Anonymous|AnonHugePages|Shared_Hugetlb|Private_Hugetlb|Swap): +(\d+) kB"
    rb"|VmFlags:([^\n]*))$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Kinds:
    """Memory in RAM by kind, in bytes; each page counts in full."""

    mappings: int = 0
    """How many there are: the kernel allows vm.max_map_count."""
    mergeable: int = 0
    """Anonymous memory that KSM may merge once the process is opted in."""
    marked: int = 0
    """The part of that in mappings that are opted in."""
    huge: int = 0
    """The part of `mergeable` in transparent huge pages: KSM splits one to merge a part of it."""
    never: int = 0
    """Anonymous memory that KSM leaves alone: locked to a device, droppable, the stack."""
    shared: int = 0
    """Shared memory and shared files: MAP_SHARED, tmpfs, System V; not files that are only read."""
    hugetlb: int = 0
    """Huge pages of hugetlbfs, private or shared."""
    file: int = 0
    """Mappings of files, as far as they are not written to: the page cache."""
    swapped: int = 0

    @property
    def resident(self) -> int:
        """Return all that is in RAM."""
        return self.mergeable + self.never + self.shared + self.hugetlb + self.file


def of_process(pid: int, proc: Path = PROC) -> Kinds | None:
    """Return what a process has, None if it has ended. Raises PermissionError."""
    try:
        return parse((proc / str(pid) / "smaps").read_bytes())
    except ENDED:
        return None


def parse(smaps: bytes) -> Kinds:
    """Return what the text of a /proc/PID/smaps says."""
    count = 0
    sums = dict.fromkeys(
        ("mergeable", "marked", "huge", "never", "shared", "hugetlb", "file", "swapped"), 0
    )
    name, sizes = "", dict[bytes, int]()
    for line in _LINE.finditer(smaps):
        if line[2]:
            sizes[line[2]] = int(line[3]) * 1024
        elif line[4] is None:
            name, sizes = line[1].decode(errors="replace"), {}
            count += 1
        else:
            _add(sums, name, sizes, frozenset(line[4].decode().split()))
    return Kinds(mappings=count, **sums)


def _add(sums: dict[str, int], name: str, sizes: dict[bytes, int], flags: frozenset[str]) -> None:
    """Add one mapping."""
    rss, anonymous = sizes.get(b"Rss", 0), sizes.get(b"Anonymous", 0)
    sums["swapped"] += sizes.get(b"Swap", 0)
    # Rss does not count them.
    sums["hugetlb"] += sizes.get(b"Shared_Hugetlb", 0) + sizes.get(b"Private_Hugetlb", 0)
    if "ht" in flags:
        return
    if "sh" in flags or "ms" in flags:
        read_only = "wr" not in flags and name.startswith("/")
        # Not /dev/zero, /dev/shm and devices; what is not in a folder has these names.
        cached = read_only and not name.startswith(("/memfd:", "/SYSV", "/dev/"))
        sums["file" if cached else "shared"] += rss
        return
    sums["file"] += max(0, rss - anonymous)
    if Mapping(0, 0, name, anonymous, 0, flags).may_merge:
        sums["mergeable"] += anonymous
        sums["marked"] += anonymous if "mg" in flags else 0
        sums["huge"] += sizes.get(b"AnonHugePages", 0)
    else:
        sums["never"] += anonymous


def mappings(pid: int, proc: Path = PROC) -> int:
    """Return how many mappings a process has, 0 if it has ended or may not be looked at."""
    try:
        return (proc / str(pid) / "maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def most_mappings(proc: Path = PROC) -> int:
    """Return how many a process may have (vm.max_map_count), 0 if that cannot be known."""
    try:
        return int((proc / "sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 0
