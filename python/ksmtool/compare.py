# SPDX-License-Identifier: MIT
"""Two processes of one program, page by page: what is equal, and what would be in a group.

In a group both have one layout, so that a pointer to the same thing is the same number. So pages
are compared a second time with each address in them put in words that hold for any layout.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtool import pages
from ksmtool.kernel import PAGE_SIZE
from ksmtool.pages import Mapping, Reader
from ksmtool.process import PROC

SAMPLE_PAGES = 2000
_BLOCK_PAGES = 250
_SLACK_PAGES = 128
"""How far from its place a page of the other is looked for.

CPython aligns what it gets from mmap to 16 KiB, so that all behind that can be pages away.
"""

_MASK = PAGE_SIZE - 1
_SHIFT = _MASK.bit_length()


@dataclass(frozen=True)
class Comparison:
    """Of a sample of the anonymous pages of one process: which of them another process has, too."""

    pages: int
    equal: int
    """Equal byte for byte, so that KSM would merge them as they are; zeros are in it."""
    zeros: int
    pointers: int
    """Different only in addresses of the same things: they would be equal in a group.

    What hash seeds make different, and a group makes equal, is not in it, nor what a program
    computes from addresses: it is the least that a group would add.
    """

    @property
    def equal_share(self) -> float:
        """Return the part of the pages that KSM would merge as they are, 0 to 1."""
        return self.equal / self.pages if self.pages else 0.0

    @property
    def group_share(self) -> float:
        """Return the part that it would merge in a group, 0 to 1."""
        return (self.equal + self.pointers) / self.pages if self.pages else 0.0


class Layout(dict[int, tuple[int, int]]):
    """The layout of a process: page number -> what an address in that page means in any layout.

    That is a number for the page and the bits of the address to add to it; (0, 0) for no mapping.
    A page of a file's mapping is known by name and place; of other memory only the name is taken,
    since by its place two processes may differ. In the stack even the last bits are random.
    """

    def __init__(self, mappings: Sequence[Mapping]) -> None:
        """Keep the mappings; pages are looked up when they are asked for."""
        super().__init__()
        self.mappings = sorted(mappings, key=lambda one: one.start)
        self._starts = [one.start for one in self.mappings]
        self.lowest = self._starts[0] if self.mappings else 0
        self.end = self.mappings[-1].end if self.mappings else 0
        number: Counter[str] = Counter()
        self.keys_of: list[tuple[str, int]] = []
        """Name, and number from the top of those with that name: mmap goes downwards."""
        for one in reversed(self.mappings):
            self.keys_of.insert(0, (one.name, number[one.name]))
            number[one.name] += 1

    def __missing__(self, page: int) -> tuple[int, int]:
        """Look for the mapping of a page that was not asked for before."""
        at = bisect_right(self._starts, page * PAGE_SIZE) - 1
        meaning = 0, 0
        if at >= 0 and page * PAGE_SIZE < self.mappings[at].end:
            one, key = self.mappings[at], self.keys_of[at]
            if one.name == "[stack]":
                meaning = _number("[stack]"), 0
            elif one.name.startswith("/"):
                meaning = _number(key, page - one.start // PAGE_SIZE), _MASK
            else:
                meaning = _number(one.name), _MASK
        self[page] = meaning
        return meaning

    def plain(self, page: int, content: memoryview) -> int:
        """Return a hash of a page's content with addresses in words that hold in any layout."""
        lowest, end = self.lowest, self.end
        return hash(
            tuple(
                word if word < lowest or word >= end else self._word(word, page, at)
                for at, word in enumerate(content.cast("Q"))
            )
        )

    def _word(self, word: int, page: int, at: int) -> int:
        number, bits = self[word >> _SHIFT]
        if number == 0:
            # glibc (2.32) mixes pointers between free blocks with where they stand (PROTECT_PTR).
            pointer = word ^ (page * PAGE_SIZE + 8 * at) >> 12
            number, bits = self[pointer >> _SHIFT]
            if number == 0:
                return word
            word = pointer
        return number + (word & bits)


def _number(*what: object) -> int:
    return hash(what) or 1  # 0 means no mapping


def compare(one: int, other: int, most: int = SAMPLE_PAGES, proc: Path = PROC) -> Comparison | None:
    """Look at about `most` pages of process `one`, and for them in process `other`.

    Returns None if one of them has ended. Raises PermissionError where ptrace(2) would be refused,
    and KsmtoolError without xxhash.
    """
    try:
        ours = Layout(pages.mappings(one, proc))
        theirs = Layout(pages.mappings(other, proc))
        function = pages.digest()
        with Reader(one, function, proc) as left, Reader(other, function, proc) as right:
            sample = _sample(list(_places(left, ours)), most)
            near = _near(sample, list(_places(right, theirs)))
            equal, in_group = set(), set()
            for page in near:
                content = right.content(page)
                if content is not None:
                    equal.add(function(content))
                    in_group.add(theirs.plain(page, content))
            found: Counter[str] = Counter()
            zero = function(memoryview(bytes(PAGE_SIZE)))
            for _, page in sample:
                content = left.content(page)
                if content is None:
                    found["gone"] += 1
                elif (hashed := function(content)) in equal:
                    found["zeros" if hashed == zero else "equal"] += 1
                elif ours.plain(page, content) in in_group:
                    found["pointers"] += 1
    except pages.ENDED:
        return None
    return Comparison(
        pages=len(sample) - found["gone"],
        equal=found["equal"] + found["zeros"],
        zeros=found["zeros"],
        pointers=found["pointers"],
    )


Place = tuple[str, int, int]
"""Name and number of a mapping, and pages from where it begins to grow."""


def _places(reader: Reader, layout: Layout) -> Iterator[tuple[Place, int]]:
    """Yield place and number of each page that KSM may merge, in ascending order."""
    for mapping, (name, number) in zip(layout.mappings, layout.keys_of):
        if mapping.may_merge and mapping.anonymous:
            # The heap grows upwards; what mmap gives, downwards, and joins what is above it.
            begin = (mapping.start if name == "[heap]" else mapping.end) // PAGE_SIZE
            for chunk in reader.chunks(mapping):
                for page in sorted(chunk.own + chunk.shared):
                    yield (name, number, page - begin), page


def _sample(every: Sequence[tuple[Place, int]], most: int) -> list[tuple[Place, int]]:
    """Return blocks of neighbours, spread over all."""
    size = min(_BLOCK_PAGES, most)
    blocks = [every[at : at + size] for at in range(0, len(every), size)]
    step = max(1, -(-len(blocks) * size // most))
    return [page for block in blocks[step // 2 :: step] for page in block]


def _near(sample: Sequence[tuple[Place, int]], every: Sequence[tuple[Place, int]]) -> list[int]:
    """Return the pages of the other process that are at the places of the sample, or near."""
    wanted = set()
    for (name, number, at), _ in sample:
        # In steps of the slack: with the one before and the one after, it is at least that far.
        step = at // _SLACK_PAGES
        wanted.update((name, number, near) for near in (step - 1, step, step + 1))
    return [
        page for (name, number, at), page in every if (name, number, at // _SLACK_PAGES) in wanted
    ]
