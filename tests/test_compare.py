# SPDX-License-Identifier: MIT
"""Two processes page by page: what is equal, and what a group would make equal."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from conftest import Tree, Victims, kept_running
from ksmtool import estimate, group
from ksmtool.compare import Comparison, Layout
from ksmtool.kernel import PAGE_SIZE
from ksmtool.pages import Mapping
from test_pages import EXCLUSIVE, PRESENT, of_byte, smaps_of

WORDS = PAGE_SIZE // 8


def mapping(first: int, pages: int, name: str = "") -> Mapping:
    return Mapping(first * PAGE_SIZE, (first + pages) * PAGE_SIZE, name, 4096, 0, frozenset())


def test_addresses_in_words_of_any_layout() -> None:
    high, higher, top = 5 << 32, 7 << 32, mapping(1 << 50, 1, "[vsyscall]")

    def layout(file: int, heap: int, memory: int, stack: int, far: int) -> Layout:
        return Layout([
            mapping(file, 2, "/p"), mapping(heap, 6, "[heap]"), mapping(memory, 9),
            mapping(stack, 9, "[stack]"), mapping(far, 9), top,
        ])  # fmt: skip

    one, other = layout(10, 20, 100, 200, high), layout(5, 9, 50, 300, higher)

    def same(here: int, there: int) -> bool:
        words = (array("Q", [7, address] + [1] * (WORDS - 2)) for address in (here, there))
        mine, yours = (memoryview(page).cast("B") for page in words)
        return one.plain(high, mine) == other.plain(higher, yours)

    def at(page: int, byte: int = 8) -> int:
        return page * PAGE_SIZE + byte

    assert same(at(11), at(6))  # a file
    assert not same(at(11), at(5))
    assert same(at(20), at(9))  # the heap
    assert not same(at(20), at(9, 16))
    assert not same(at(20), at(52))
    assert same(at(101), at(52))  # mmap's
    assert same(at(201, 8), at(301, 1000))
    assert same(at(16), at(16))  # no address
    assert not same(at(16), at(17))
    assert same(at(high, 16) ^ at(high) >> 12, at(higher, 16) ^ at(higher) >> 12)  # PROTECT_PTR
    assert not same(at(high, 16) ^ at(high) >> 12, at(higher, 24) ^ at(higher) >> 12)


def processes(root: Path, *sides: tuple[int, dict[int, bytes]]) -> Path:
    """Write processes 5, 6 with a mapping of 16 pages that starts at that page."""
    for pid, (first, memory) in enumerate(sides, 5):
        folder = root / str(pid)
        folder.mkdir()
        (folder / "smaps").write_text(smaps_of((first, "", "")))
        with (folder / "pagemap").open("wb") as file:
            for page in memory:
                file.seek(8 * (first + page))
                file.write(array("Q", [PRESENT | EXCLUSIVE | 1]).tobytes())
            file.truncate(8 * 256)
        with (folder / "mem").open("wb") as file:
            for page, content in memory.items():
                file.seek((first + page) * PAGE_SIZE)
                file.write(content)
    return root


def page_of(*words: int) -> bytes:
    return array("Q", [*words, *[7] * (WORDS - len(words))]).tobytes()


def test_the_verdicts(tmp_path: Path) -> None:
    def side(first: int, number: int) -> tuple[int, dict[int, bytes]]:
        begin = first * PAGE_SIZE
        return first, {
            0: of_byte(1),
            1: bytes(PAGE_SIZE),
            2: page_of(begin + 40, 5),  # an address
            3: page_of(begin + 40, 6, *[100 + number] * 16),  # and a few words that are none
            4: page_of(begin + 40, 7, *[100 + number] * 17),  # and more
            5: page_of(8, *[200 + number] * 300),
            **({6: of_byte(2)} if number == 1 else {9: of_byte(2)}),  # elsewhere
            **({7: of_byte(3)} if number == 1 else {}),
        }

    proc = processes(tmp_path, side(32, 1), side(100, 2))
    found = estimate.compare(5, 6, proc=proc)
    assert found == Comparison(pages=8, equal=3, zeros=1, pointers=1, nearly=1)
    assert (found.equal_share, found.group_share) == (0.375, 0.625)
    assert estimate.compare(5, 5, proc=proc) == Comparison(8, 8, 1, 0, 0)


def test_a_sample_is_spread_out(tmp_path: Path) -> None:
    memory = {page: of_byte(page + 1) for page in range(16)}
    proc = processes(tmp_path, (32, memory), (64, {**memory, 4: of_byte(99), 5: of_byte(98)}))
    assert estimate.compare(5, 6, most=4, proc=proc) == Comparison(4, 4, 0, 0, 0)
    assert estimate.compare(5, 6, most=8, proc=proc) == Comparison(8, 8, 0, 0, 0)
    assert estimate.compare(5, 6, most=16, proc=proc) == Comparison(16, 14, 0, 0, 0)


def test_one_that_has_ended_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert estimate.compare(os.getpid(), child.pid) is None
    assert Comparison(0, 0, 0, 0, 0).group_share == 0


PYTHON = [
    sys.executable,
    "-c",
    "import asyncio, email, json, logging, unittest, xml.dom.minidom\nprint(flush=True); input()",
]


@pytest.fixture
def name() -> Iterator[str]:
    unique = f"compare-{os.getpid()}"
    group.discard(unique)
    yield unique
    group.discard(unique)


def in_a_group(tree: Tree, name: str, command: Sequence[object]) -> list[object]:
    return [tree.wrapper, "--group", name, "--group-required", "--", *command]


@pytest.mark.parametrize(
    ("what", "least"),
    [
        ("pointers", 0.95),
        # What it computes from addresses is not seen, and only one of four is aligned alike.
        ("python3", 0.1),
    ],
)
def test_what_a_group_would_save_comes_true(
    tree: Tree,
    victims: Victims,
    name: str,
    measured: Callable[[str], None],
    what: str,
    least: float,
) -> None:
    """Two processes started plain, beside the same in a group: what is said is the least."""
    command: Sequence[object] = PYTHON if what == "python3" else [victims(what), 2000]
    seed = {"PYTHONHASHSEED": "1"}
    with kept_running(command, command, env={**os.environ, **seed}) as pids:
        plain = estimate.compare(pids[0], pids[1])
    member = in_a_group(tree, name, command)
    with kept_running(member, member, env=seed) as pids:
        grouped = estimate.compare(pids[0], pids[1])
    assert plain is not None
    assert grouped is not None
    measured(
        f"{what}, {plain.pages} pages: plain {plain.equal_share:.3f} equal, at least "
        f"{plain.group_share:.3f} in a group, where {grouped.equal_share:.3f} are"
    )
    assert plain.equal_share < 0.1
    assert grouped.equal_share > 0.9
    assert least < plain.group_share < grouped.equal_share + 0.05
