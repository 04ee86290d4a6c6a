# SPDX-License-Identifier: MIT
"""The pages of a process: of fixture trees, and of live processes whose pages are known."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import wait_until
from ksmtool import pages
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE
from ksmtool.pages import Mapping, Reader

ENTRY = """{start:x}-{end:x} rw-p 00000000 00:00 0 {name}
Size:                 64 kB
Rss:                  16 kB
Anonymous:            12 kB
AnonHugePages:         0 kB
Swap:                  8 kB
SwapPss:               8 kB
THPeligible:           0
VmFlags: rd wr mr mw me ac {flags}
"""
MAP_NORESERVE = 0x4000  # in mmap since Python 3.13
PRESENT, SWAPPED, FILE, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 61, 1 << 56


def smaps_of(*mappings: tuple[int, str, str]) -> str:
    return "".join(
        ENTRY.format(start=first * PAGE_SIZE, end=(first + 16) * PAGE_SIZE, name=name, flags=flags)
        for first, name, flags in mappings
    )


def fixture(root: Path, smaps: str, entries: dict[int, int], memory: dict[int, bytes]) -> Path:
    """Write a process 5 with these entries and pages, by page number."""
    folder = root / "5"
    folder.mkdir()
    (folder / "smaps").write_text(smaps)
    with (folder / "pagemap").open("wb") as file:
        for page, entry in entries.items():
            file.seek(8 * page)
            file.write(array("Q", [entry]).tobytes())
        file.truncate(8 * 64)
    with (folder / "mem").open("wb") as file:
        for page, content in memory.items():
            file.seek(page * PAGE_SIZE)
            file.write(content)
    return root


def of_byte(byte: int) -> bytes:
    return bytes([byte]) * PAGE_SIZE


def first_byte(page: memoryview) -> int:
    return page[0]


def test_mappings(tmp_path: Path) -> None:
    smaps = smaps_of((16, "", "mg"), (32, "        /a b/c (deleted)", ""))
    assert pages.mappings(5, fixture(tmp_path, smaps, {}, {})) == [
        Mapping(16 * PAGE_SIZE, 32 * PAGE_SIZE, "", 12 * 1024, 8 * 1024, FLAGS | {"mg"}),
        Mapping(32 * PAGE_SIZE, 48 * PAGE_SIZE, "/a b/c (deleted)", 12 * 1024, 8 * 1024, FLAGS),
    ]


FLAGS = frozenset(("rd", "wr", "mr", "mw", "me", "ac"))


@pytest.mark.parametrize(
    ("flags", "name", "may_merge"),
    [
        ("", "", True),
        ("lo dd wf dc um", "[heap]", True),  # mlocked, MADV_DONTDUMP, ...: facts of mm/ksm.c
        ("", "[stack]", False),
        ("mg", "[stack]", True),
        ("sh ms", "/dev/zero (deleted)", False),
        ("ms", "/memfd:x (deleted)", False),
        ("ht", "", False),
        ("de", "[vdso]", False),
        ("io", "", False),
        ("pf", "", False),
        ("mm", "", False),
        ("dp", "", False),
    ],
)
def test_what_ksm_looks_at(tmp_path: Path, flags: str, name: str, may_merge: bool) -> None:
    (mapping,) = pages.mappings(5, fixture(tmp_path, smaps_of((16, name, flags)), {}, {}))
    assert mapping.may_merge is may_merge


def test_only_anonymous_pages_in_ram_are_read(tmp_path: Path) -> None:
    entries = {
        16: PRESENT | EXCLUSIVE | 100,
        17: PRESENT | EXCLUSIVE | 101,
        18: PRESENT | FILE | EXCLUSIVE | 102,
        19: SWAPPED | 103,
        # 20 was never touched
        21: PRESENT | 104,
        22: PRESENT | EXCLUSIVE | 105,
        31: PRESENT | EXCLUSIVE | 106,
        32: PRESENT | EXCLUSIVE | 107,  # of the next mapping
    }
    memory = {page: of_byte(page) for page in range(16, 33)}
    proc = fixture(tmp_path, smaps_of((16, "", "")), entries, memory)
    (mapping,) = pages.mappings(5, proc)
    with Reader(5, first_byte, proc) as reader:
        (chunk,) = reader.chunks(mapping)
        assert (chunk.own, chunk.shared, chunk.frames) == ([16, 17, 22, 31], [21], [104])
        assert reader.hashes(chunk.own) == ([16, 17, 22, 31], [16, 17, 22, 31])
        content = reader.content(21)
        assert content is not None
        assert bytes(content) == of_byte(21)


def test_what_was_freed_meanwhile_is_left_out(tmp_path: Path) -> None:
    """The file ends after page 18: as if what follows were no longer there."""
    proc = fixture(tmp_path, "", {}, {page: of_byte(page) for page in (16, 17, 18)})
    with Reader(5, first_byte, proc) as reader:
        assert reader.hashes([16, 18, 19, 20]) == ([16, 18], [16, 18])
        assert reader.content(19) is None


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [7],
        list(range(1000)),
        list(range(0, 300, 2)),
        [1, 2, 3, 5, 6, 10, 11, 12, 13, 900],
        [*range(63), *range(64, 128), *range(200, 1000, 3)],
    ],
)
def test_runs_cover_all_and_are_of_neighbours(numbers: list[int]) -> None:
    seen = []
    for at, length in pages._runs(numbers):
        run = numbers[at : at + length]
        assert run == list(range(run[0], run[0] + length))
        seen += run
    assert seen == numbers


def test_a_hole_of_terabytes_takes_no_time(tmp_path: Path) -> None:
    """64 GB of nothing: passed over without a look at each page."""
    chunks = 0
    with Private(1 << 36, MAP_NORESERVE) as (memory, address):
        memory[1 << 35] = 1
        mapping = Mapping(address, address + (1 << 36), "", 4096, 0, frozenset())
        with Reader(os.getpid(), first_byte) as reader:
            for chunk in reader.chunks(mapping):
                chunks += 1
                assert [page * PAGE_SIZE - address for page in chunk.own] == [1 << 35]
    assert chunks == 1


class Private:
    """Private memory, without huge pages, and its address."""

    def __init__(self, size: int, flags: int = 0) -> None:
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)

    def __enter__(self) -> tuple[mmap.mmap, int]:
        self._held = ctypes.c_char.from_buffer(self.memory)
        return self.memory, ctypes.addressof(self._held)

    def __exit__(self, *_: object) -> None:
        del self._held
        self.memory.close()


def live(code: str) -> subprocess.Popen[str]:
    """Run Python code that prints a line and then waits."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def hashed(pid: int, function: Callable[[memoryview], int] = hash) -> list[int]:
    """Read all pages of a process."""
    found = []
    with Reader(pid, function) as reader:
        for mapping in pages.mappings(pid):
            if mapping.may_merge and mapping.anonymous:
                for chunk in reader.chunks(mapping):
                    found += reader.hashes(chunk.own)[1] + reader.hashes(chunk.shared)[1]
    return found


def word(page: memoryview) -> int:
    return int.from_bytes(page[:8], sys.byteorder)


def test_nothing_is_brought_into_memory() -> None:
    """Of 64 MB mapped, 1000 pages are used; reading all that is there adds none."""
    code = (
        "import mmap; b = mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "b.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "for at in range(0, 4096000, 4096): b[at : at + 8] = (77 << 32 | at).to_bytes(8, 'little')"
    )
    with live(code) as child:
        assert child.stdout is not None
        child.stdout.readline()
        # What it does between its line and its sleep would be taken for what we have done.
        wait_until(lambda: asleep(child.pid), 10, "the child waits")
        before = resident(child.pid)
        words = hashed(child.pid, word)
        assert sum(number >> 32 == 77 for number in words) == 1000
        assert resident(child.pid) == before
        child.kill()


def asleep(pid: int) -> bool:
    """Whether it is in read(2): only then its number is the first word there."""
    read = {"x86_64": "0", "aarch64": "63", "riscv64": "63"}.get(os.uname().machine)
    words = Path(f"/proc/{pid}/syscall").read_text().split()
    return words[0] == read if read else words[0] != "running"


def resident(pid: int) -> Sequence[str]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return [line for line in lines if line.startswith(("Rss:", "Anonymous:"))]


def test_without_the_library_it_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(KsmtoolError) as caught:
        pages.digest()
    assert caught.value.status == ExitStatus.UNSUPPORTED
    assert "python3-xxhash" in str(caught.value.hint)


def test_the_hash_tells_pages_apart() -> None:
    one, other = bytearray(PAGE_SIZE), bytearray(PAGE_SIZE)
    other[-1] = 1
    function = pages.digest()
    assert function(memoryview(one)) != function(memoryview(other))
    assert 0 <= function(memoryview(one)) < 1 << 64


@pytest.mark.root
def test_the_kernels_page_of_zeros() -> None:
    """Pages that were only read are the kernel's one page of zeros; those written to are not."""
    with Private(1 << 20) as (memory, address):
        memory[0:4096] = b"x" * 4096
        memory[4096:8192] = bytes(4096)
        assert memory[8192:16384] == bytes(8192)
        mapping = Mapping(address, address + (1 << 20), "", 8192, 0, frozenset())
        with Reader(os.getpid(), first_byte) as reader:
            (chunk,) = reader.chunks(mapping)
        assert [page * PAGE_SIZE - address for page in chunk.own] == [0, 4096]
        assert [page * PAGE_SIZE - address for page in chunk.shared] == [8192, 12288]
        assert len(set(chunk.frames)) == 1
        assert pages.is_zero_page(chunk.frames[0])
