# SPDX-License-Identifier: MIT
"""Processes and their memory, from /proc. One that ends while being read is never an error."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Memory:
    """Physical memory of one process or a sum over several, in bytes unless the name says pages."""

    processes: int = 0
    rss: int = 0
    pss: int = 0
    pss_anon: int = 0
    """Anonymous memory, each page shared by n processes counted as 1/n: what KSM lowers."""
    anonymous: int = 0
    """Anonymous memory, each page counted in full in each process: as if none were shared."""
    anon_huge: int = 0
    """Transparent huge pages (AnonHugePages): KSM splits one to merge a part of it."""
    swap_pss: int = 0
    merging_pages: int = 0
    """Mappings of merged pages (ksm_merging_pages); the one copy that stays is counted too."""
    zero_pages: int = 0
    """Mappings of the kernel's zero page that KSM made (ksm_zero_pages, Linux 6.6)."""
    rmap_items: int = 0
    """Pages ksmd keeps a record of, at 64 bytes each."""
    opted_in: int = 0
    """Processes with the kernel's flag or a mergeable mapping."""

    def __add__(self, other: Memory) -> Memory:
        """Return the sum, field by field."""
        return Memory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def memory(pid: int, proc: Path = PROC, resident: int | None = None) -> Memory | None:
    """Return the memory of process `pid`, or None if it has ended (a zombie has none either).

    `resident` is its VmRSS in bytes, if that has just been read. Raises PermissionError for a
    process of another user: smaps_rollup and ksm_stat are 0400.

    Before Linux 6.14 only smaps says whether a process is opted in. What the prctl has opted in
    says so in its first mappings, and no more is read; of others all of smaps is.
    """
    folder = f"{proc}/{pid}"
    try:
        sizes = _rollup(folder, resident)
        stat = _ksm_stat(folder)
        mergeable = _is_opted_in(folder, stat)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "Rss" not in sizes:
        return None
    return Memory(
        processes=1,
        rss=sizes["Rss"],
        pss=sizes["Pss"],
        # Linux 5.4 (ee2ad71b0756); before it, what is not file-backed cannot be told from Pss.
        pss_anon=sizes.get("Pss_Anon", sizes["Pss"]),
        anonymous=sizes.get("Anonymous", 0),
        anon_huge=sizes.get("AnonHugePages", 0),
        swap_pss=sizes.get("SwapPss", 0),
        merging_pages=int(stat.get("ksm_merging_pages", 0)),
        zero_pages=max(0, int(stat.get("ksm_zero_pages", 0))),
        rmap_items=int(stat.get("ksm_rmap_items", 0)),
        opted_in=int(mergeable),
    )


def opted_in(pid: int, proc: Path = PROC) -> bool:
    """Whether KSM may merge memory of process `pid`; False if it has ended."""
    folder = f"{proc}/{pid}"
    try:
        return _is_opted_in(folder, _ksm_stat(folder))
    except (FileNotFoundError, ProcessLookupError):
        return False


def total(pids: Iterable[int], proc: Path = PROC) -> Memory:
    """Return the sum over those of `pids` that still run."""
    result = Memory()
    for pid in pids:
        one = memory(pid, proc)
        if one is not None:
            result += one
    return result


_PRESENT, _FILE_OR_SHARED, _FRAME = 1 << 63, 1 << 61, (1 << 55) - 1  # admin-guide/mm/pagemap.rst
_KPF_KSM = 1 << 21


def merged(pids: Iterable[int], proc: Path = PROC) -> int | None:
    """Return the bytes that merging spares these processes, None where only root can tell.

    Mappings of pages that KSM has merged, less one page for each page of memory behind them; so
    neither what forks share nor the copy that stays is counted. Takes about 1 s for 100 processes.
    """
    frames: Counter[int] = Counter()
    for pid in pids:
        try:
            frames.update(_anonymous_frames(proc / str(pid)))
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            return None
    if 0 in frames:  # without CAP_SYS_ADMIN every frame is said to be 0
        return None
    spared = 0
    try:
        with (proc / "kpageflags").open("rb", buffering=0) as flags:
            for frame, count in frames.items():
                if count > 1:
                    word = os.pread(flags.fileno(), 8, 8 * frame)
                    if int.from_bytes(word, sys.byteorder) & _KPF_KSM:
                        spared += count - 1
    except OSError:
        return None
    return spared * os.sysconf("SC_PAGE_SIZE")


_RANGE_OR_ANONYMOUS = re.compile(rb"^(?:([0-9a-f]+)-([0-9a-f]+) |Anonymous: +([1-9]\d*) )", re.M)


def _anonymous_frames(folder: Path) -> list[int]:
    """Return the frame number of each anonymous page in RAM, 0 if it may not be known."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = end = 0
    frames: list[int] = []
    with (folder / "pagemap").open("rb", buffering=0) as pagemap:
        for found in _RANGE_OR_ANONYMOUS.finditer((folder / "smaps").read_bytes()):
            if found[1]:
                start, end = int(found[1], 16) // page, int(found[2], 16) // page
                continue
            # Reservations of terabytes hold nothing: only what does is read.
            for at in range(start, end, 1 << 16):
                entries = array("Q")
                entries.frombytes(os.pread(pagemap.fileno(), 8 * min(end - at, 1 << 16), 8 * at))
                frames += [
                    entry & _FRAME
                    for entry in entries
                    if entry & (_PRESENT | _FILE_OR_SHARED) == _PRESENT
                ]
    return frames


@dataclass(frozen=True)
class Identity:
    """Who a process is: what every user may read of every process."""

    pid: int
    parent: int
    name: str
    """Of the thread group's leader, at most 15 characters: comm."""
    uid: int
    """The effective one."""
    resident: int
    """VmRSS, in bytes."""


def identity(pid: int, proc: Path = PROC) -> Identity | None:
    """Return who `pid` is, None if it has ended, is a zombie, or a thread of the kernel.

    The last two have no memory of their own, so their status has no VmRSS. Nor has a process of
    which the first thread has ended and others run: PermissionError, so that it is counted, since
    nothing here looks at a process by another thread.
    """
    try:
        status = _content(f"{proc}/{pid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Line by line, not by a pattern for the whole: that takes 60 us, more than the reading.
    resident = _field(status, b"\nVmRSS:")
    if not resident:
        zombie = _field(status, b"\nState:").split()[:1] == [b"Z"]
        if zombie and int(_field(status, b"\nThreads:") or 1) > 1:
            raise PermissionError(f"the first thread of process {pid} has ended")
        return None
    return Identity(
        pid=pid,
        parent=int(_field(status, b"\nPPid:")),
        name=status[len(b"Name:\t") : status.index(b"\n")].decode(errors="replace"),
        uid=int(_field(status, b"\nUid:").split()[1]),
        resident=int(resident.split()[0]) * 1024,
    )


def _field(status: bytes, start: bytes) -> bytes:
    """Return the rest of the line that begins so, b"" if there is none; no name has a newline."""
    at = status.find(start)
    return status[at + len(start) : status.find(b"\n", at + 1)] if at >= 0 else b""


def pids(proc: Path = PROC) -> list[int]:
    """Return the PIDs of all that runs, threads of the kernel too."""
    return [int(name) for name in os.listdir(proc) if name.isdigit()]


_HIDEPID = re.compile(rb" / /proc .*\bhidepid=(?:2|4|invisible|ptraceable)\b")


def hides(proc: Path = PROC) -> bool:
    """Whether `proc` is mounted so that users see no processes but their own; root sees all."""
    try:
        mounts = _content(f"{proc}/self/mountinfo")
    except OSError:
        return False
    return os.geteuid() != 0 and _HIDEPID.search(mounts) is not None


def executable(pid: int, proc: Path = PROC) -> str:
    """Return the path of the program, "" if it is not to be known: it has ended, or may not be."""
    try:
        return os.readlink(f"{proc}/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return ""


def cgroup_of(pid: int, proc: Path = PROC) -> str:
    """Return the text of its cgroup file, "" if it has ended or the kernel has no cgroups."""
    try:
        return os.fsdecode(_content(f"{proc}/{pid}/cgroup"))
    except (FileNotFoundError, ProcessLookupError):
        return ""


def command_line(pid: int, proc: Path = PROC) -> list[bytes]:
    """Return the words of its command line, [b""] if it has none or has ended."""
    try:
        return _content(f"{proc}/{pid}/cmdline").split(b"\0")
    except OSError:
        return [b""]


def any_has(name: str, pids: Iterable[int], proc: Path = PROC) -> bool:
    """Whether this kernel has the file `name` for one of the processes, at least."""
    return any(os.path.exists(f"{proc}/{pid}/{name}") for pid in pids)


def stat(pid: int, proc: Path = PROC) -> list[str]:
    """Return the fields of its stat from the state on, which is proc(5)'s number 3.

    The name before it may hold any byte. Raises FileNotFoundError or ProcessLookupError once it has
    ended.
    """
    return _content(f"{proc}/{pid}/stat").rpartition(b")")[2].decode().split()


def descendants(pid: int, proc: Path = PROC, without: Iterable[int] = ()) -> list[int]:
    """Return the PIDs of all descendants of `pid`, parents before children.

    Those in `without` are left out with all their own descendants.
    """
    left_out = set(without)
    children: dict[int, list[int]] = defaultdict(list)
    for entry in proc.iterdir():
        if entry.name.isdigit() and int(entry.name) not in left_out:
            parent = parent_of(int(entry.name), proc)
            if parent is not None:
                children[parent].append(int(entry.name))
    found = list(children[pid])
    for child in found:
        found.extend(children[child])
    return found


def ancestors(pid: int, proc: Path = PROC) -> set[int]:
    """Return the PIDs of the parent of `pid`, of its parent, and so on."""
    found: set[int] = set()
    parent = parent_of(pid, proc)
    while parent:  # that of PID 1, and of what has come from outside, is 0
        found.add(parent)
        parent = parent_of(parent, proc)
    return found


def parent_of(pid: int, proc: Path = PROC) -> int | None:
    """Return the parent's PID, None if `pid` has ended."""
    try:
        return int(stat(pid, proc)[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def session_of(pid: int, proc: Path = PROC) -> int | None:
    """Return the session's ID, None if `pid` has ended."""
    try:
        return int(stat(pid, proc)[3])
    except (FileNotFoundError, ProcessLookupError):
        return None


def opted_in_elsewhere(ours: Iterable[int], proc: Path = PROC) -> int:
    """Count opted-in processes that are not in `ours`, as far as we may look at them."""
    left_out = set(ours)
    count = 0
    for entry in proc.iterdir():
        if entry.name.isdigit() and int(entry.name) not in left_out:
            try:
                count += opted_in(int(entry.name), proc)
            except PermissionError:
                continue
    return count


def control(option: int, value: int) -> None:
    """Call prctl(2) on this process and ignore failure: what is missing cannot be switched off."""
    import ctypes  # noqa: PLC0415 - 5 ms that most runs do without

    ctypes.CDLL(None, use_errno=True).prctl(
        ctypes.c_int(option), *(ctypes.c_ulong(number) for number in (value, 0, 0, 0))
    )


def clear_merge_flag() -> None:
    """Take back this process's own opt-in, which what it starts would inherit."""
    control(67, 0)  # PR_SET_MEMORY_MERGE


def _content(path: str) -> bytes:
    """Return a file of /proc; Path.read_text() takes several times as long (76 us, 12 us)."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = part = os.read(file, 1 << 16)
        while part:
            part = os.read(file, 1 << 16)
            content += part
    finally:
        os.close(file)
    return content


def _ksm_stat(folder: str) -> dict[str, str]:
    """ksm_stat (Linux 6.1) as name -> text, with ksm_merging_pages (5.19; part of it since 6.4)."""
    try:
        lines = _content(f"{folder}/ksm_stat").decode().splitlines()
    except FileNotFoundError:
        lines = []
    found = {name.rstrip(":"): value for name, value in (line.split(maxsplit=1) for line in lines)}
    if "ksm_merging_pages" not in found:
        with contextlib.suppress(FileNotFoundError):
            # "" once it has given up its memory, as ksm_stat is then.
            pages = _content(f"{folder}/ksm_merging_pages").decode().strip()
            found["ksm_merging_pages"] = pages or "0"
    return found


_MERGEABLE = re.compile(rb"^VmFlags:.* mg", re.MULTILINE)


def _is_opted_in(folder: str, stat: dict[str, str]) -> bool:
    if "ksm_mergeable" in stat:  # Linux 6.14
        return "yes" in (stat["ksm_mergeable"], stat["ksm_merge_any"])
    with open(f"{folder}/smaps", "rb", buffering=0) as smaps:
        rest = b""
        while part := smaps.read(1 << 16):  # the kernel gives whole mappings, about 4 KiB of them
            rest = rest[rest.rfind(b"\n") + 1 :] + part
            if _MERGEABLE.search(rest):
                return True
    return False


_SIZE = re.compile(
    rb"^(Rss|Pss|Pss_Anon|Anonymous|AnonHugePages|SwapPss): +(\d+) kB$", re.MULTILINE
)
_READINGS = 20
"""The most for one process: on Linux 6.1 one of five was short beside a thread that only maps."""


def _rollup(folder: str, resident: int | None = None) -> dict[str, int]:
    """Return smaps_rollup, in bytes.

    Linux 6.0 to 6.9 leave a mapping out when another wants the lock meanwhile, such as khugepaged
    or a thread's mmap (6d065f507d82, also in 6.6.34): then it is less than what statm counts, and
    is read again. statm itself is off by some pages for each CPU or thread.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    for _ in range(_READINGS):
        if resident is None:
            resident = int(_content(f"{folder}/statm").split()[1]) * page
        found = _SIZE.findall(_content(f"{folder}/smaps_rollup"))
        sizes = {name.decode(): int(value) * 1024 for name, value in found}
        if sizes.get("Rss", 0) >= resident - max(resident // 50, 1 << 20):
            break
        resident = None
    return sizes
