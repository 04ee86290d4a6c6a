# SPDX-License-Identifier: MIT
"""Two processes page by page: what is equal, and what a group would make equal."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from conftest import Tree
from ksmtool import estimate, group
from ksmtool.compare import Comparison, _Layout
from ksmtool.kernel import PAGE_SIZE
from ksmtool.pages import Mapping
from test_pages import EXCLUSIVE, PRESENT, of_byte, smaps_of

Victims = Callable[..., Path]

WORDS = PAGE_SIZE // 8


def mapping(first: int, pages: int, name: str = "") -> Mapping:
    return Mapping(first * PAGE_SIZE, (first + pages) * PAGE_SIZE, name, 4096, 0, frozenset())


def test_places_are_those_of_another_layout() -> None:
    one = _Layout(
        [mapping(10, 2, "/p"), mapping(20, 4, "[heap]"), mapping(100, 8), mapping(120, 4)]
    )
    other = _Layout([mapping(5, 2, "/p"), mapping(9, 6, "[heap]"), mapping(50, 9), mapping(77, 4)])

    def at(page: int, byte: int = 0) -> int:
        return page * PAGE_SIZE + byte

    assert one.place(at(11, 8)) == other.place(at(6, 8))
    assert one.place(at(20, 16)) == other.place(at(9, 16))  # the heap, from its start
    assert one.place(at(107, 24)) == other.place(at(58, 24))  # mmap's, from the end
    assert one.place(at(100, 24)) == other.place(at(51, 24))
    assert one.place(at(121)) == other.place(at(78))
    assert one.place(at(108)) == other.place(at(59))  # the end is a place, too
    assert one.place(at(121)) != other.place(at(79))
    assert one.place(at(121)) != one.place(at(101))
    for nowhere in (0, 1, at(9), at(13), at(124, 1), 1 << 63):
        assert one.place(nowhere) is None


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
    def side(first: int, other: int) -> tuple[int, dict[int, bytes]]:
        begin = first * PAGE_SIZE
        free = begin + 6 * PAGE_SIZE
        return first, {
            0: of_byte(1),
            1: bytes(PAGE_SIZE),
            2: page_of(begin + 40, 5),  # the same place
            3: page_of(begin + 40 * other, 5),  # not the same
            4: page_of(begin + 40, other),  # and a word that is no address
            5: page_of(begin + 40 | 1 << 60),
            6: page_of((begin + 80) ^ free >> 12),  # glibc's, between free blocks
            **({7: of_byte(2)} if other == 1 else {}),
        }

    proc = processes(tmp_path, side(32, 1), side(100, 2))
    found = estimate.compare(5, 6, proc=proc)
    assert found == Comparison(pages=8, equal=2, zeros=1, pointers=2)
    assert (found.equal_share, found.group_share) == (0.25, 0.5)
    assert estimate.compare(5, 5, proc=proc) == Comparison(8, 8, 1, 0)


def test_a_sample_is_spread_out(tmp_path: Path) -> None:
    memory = {page: of_byte(page + 1) for page in range(16)}
    proc = processes(tmp_path, (32, memory), (64, {**memory, 0: of_byte(99), 1: of_byte(98)}))
    assert estimate.compare(5, 6, most=8, proc=proc) == Comparison(8, 7, 0, 0)


def test_one_that_has_ended_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert estimate.compare(os.getpid(), child.pid) is None
    assert Comparison(0, 0, 0, 0).group_share == 0


@contextmanager
def running(*commands: Sequence[object], env: dict[str, str] | None = None) -> Iterator[list[int]]:
    with ExitStack() as stack:
        children = []
        for command in commands:
            child = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **(env or {})},
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline()
        yield [child.pid for child in children]


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


def test_what_a_group_would_save_comes_true(
    tree: Tree, victims: Victims, name: str, measured: Callable[[str], None]
) -> None:
    """C and Python, started plain, beside the same in a group."""
    seed = {"PYTHONHASHSEED": "1"}
    for what, command in (("pointers.c", [victims("pointers"), 2000]), ("python3", PYTHON)):
        with running(command, command, env=seed) as pids:
            plain = estimate.compare(*pids)
        member = in_a_group(tree, name, command)
        with running(member, member, env=seed) as pids:
            grouped = estimate.compare(*pids)
        assert plain is not None
        assert grouped is not None
        measured(
            f"{what}, {plain.pages} pages: plain {plain.equal_share:.3f} equal, "
            f"{plain.group_share:.3f} would be in a group, where {grouped.equal_share:.3f} are"
        )
        assert plain.equal_share < 0.3
        assert grouped.equal_share > 0.9
        assert plain.group_share == pytest.approx(grouped.equal_share, abs=0.1)
