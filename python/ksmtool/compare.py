# SPDX-License-Identifier: MIT
"""Two processes of one program, page by page: what is equal, and what would be in a group.

In a group both have one layout, so that a pointer to the same thing is the same number. So pages
are compared a second time with each address in them put in words that hold for any layout.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import ne
from pathlib import Path

from ksmtool import pages
from ksmtool.kernel import PAGE_SIZE
from ksmtool.pages import Mapping, Reader
from ksmtool.process import PROC

SAMPLE_PAGES = 2000
_BLOCK_PAGES = 250
_SLACK_PAGES = 128
"""How far from its place an equal page of the other is looked for."""
_ALIGNED_PAGES = 3
"""... and one that is nearly equal: CPython aligns what it gets from mmap to 16 KiB."""
_FEW_WORDS = 16

_MASK = PAGE_SIZE - 1
_SHIFT = _MASK.bit_length()
_WORD = (1 << 64) - 1


Place = tuple[str, int, int]
"""Name and number of a mapping, and pages from where it begins to grow."""


@dataclass(frozen=True)
class Comparison:
    """Of a sample of the anonymous pages of one process: which of them another process has, too."""

    pages: int
    equal: int
    """Equal byte for byte, so that KSM would merge them as they are; zeros are in it."""
    zeros: int
    pointers: int
    """Different only in addresses of the same things: they would be equal in a group.
"""
    nearly: int
    """Different in a few words besides, which mostly are what is left of addresses: in padding, in
    freed memory. These are equal in a group, too, as a rule.
    """

    @property
    def equal_share(self) -> float:
        """Return the part of the pages that KSM would merge as they are, 0 to 1."""
        return self.equal / self.pages if self.pages else 0.0

    @property
    def group_share(self) -> float:
        """Return the part that it would merge in a group, 0 to 1: the least, as a rule.

        What hash seeds make different, and a group makes equal, is not in it.
        """
        all_equal = self.equal + self.pointers + self.nearly
        return all_equal / self.pages if self.pages else 0.0


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

    def plain(self, page: int, content: memoryview) -> array[int]:
        """Return the words of a page with its addresses in words that hold in any layout."""
        lowest, end = self.lowest, self.end
        return array(
            "Q",
            [
                word if word < lowest or word >= end else self._word(word, page, at)
                for at, word in enumerate(content.cast("Q"))
            ],
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
        return (number + (word & bits)) & _WORD


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
            known = _Known(function, right, theirs, _near(sample, list(_places(right, theirs))))
            found: Counter[str] = Counter()
            for place, page in sample:
                content = left.content(page)
                if content is not None:
                    found[known.verdict(place, content, ours.plain(page, content))] += 1
    except pages.ENDED:
        return None
    return Comparison(
        pages=sum(found.values()),
        equal=found["equal"] + found["zeros"],
        zeros=found["zeros"],
        pointers=found["pointers"],
        nearly=found["nearly"],
    )


class _Known:
    """The pages of the other process that are near those of the sample."""

    def __init__(
        self,
        function: pages.Digest,
        reader: Reader,
        layout: Layout,
        near: Sequence[tuple[Place, int]],
    ) -> None:
        self._hash = function
        self._zero = function(memoryview(bytes(PAGE_SIZE)))
        self._equal: set[int] = set()
        self._plain: set[bytes] = set()
        self._at: dict[Place, array[int]] = {}
        for place, page in near:
            content = reader.content(page)
            if content is not None:
                self._equal.add(function(content))
                self._at[place] = layout.plain(page, content)
                self._plain.add(self._at[place].tobytes())

    def verdict(self, place: Place, content: memoryview, plain: array[int]) -> str:
        """Return what a page is beside those."""
        hashed = self._hash(content)
        if hashed in self._equal:
            return "zeros" if hashed == self._zero else "equal"
        if plain.tobytes() in self._plain:
            return "pointers"
        name, number, at = place
        for near in range(at - _ALIGNED_PAGES, at + _ALIGNED_PAGES + 1):
            other = self._at.get((name, number, near))
            if other is not None and sum(map(ne, plain, other)) <= _FEW_WORDS:
                return "nearly"
        return "different"


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


def _near(
    sample: Sequence[tuple[Place, int]], every: Sequence[tuple[Place, int]]
) -> list[tuple[Place, int]]:
    """Return the pages of the other process that are at the places of the sample, or near."""
    wanted: set[Place] = set()
    for (name, number, at), _ in sample:
        # In steps of the slack: with the one before and the one after, it is at least that far.
        step = at // _SLACK_PAGES
        wanted.update((name, number, near) for near in (step - 1, step, step + 1))
    return [
        ((name, number, at), page)
        for (name, number, at), page in every
        if (name, number, at // _SLACK_PAGES) in wanted
    ]
