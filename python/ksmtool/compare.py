# SPDX-License-Identifier: MIT
"""Two processes of one program, page by page: what is equal, and what would be in a group.

In a group both have one layout, so that a pointer to the same place is the same number. So two
words are taken for equal if each is an address in its own process, and of the same place.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtool import pages
from ksmtool.kernel import PAGE_SIZE
from ksmtool.pages import Mapping, Reader
from ksmtool.process import PROC

SAMPLE_PAGES = 2000

Place = tuple[str, int, int]
"""A mapping's name, its number among those of that name from the top, and bytes into it."""


@dataclass(frozen=True)
class Comparison:
    """Of a sample of the anonymous pages of one process, beside the other's at the same places."""

    pages: int
    equal: int
    """Equal byte for byte, so that KSM would merge them as they are; zeros are in it."""
    zeros: int
    pointers: int
    """Different only where both hold an address of the same place: equal in a group, too.

    The least that can be said: what hash seeds make different, and a group makes equal, is not in
    it.
    """

    @property
    def equal_share(self) -> float:
        """Return the part of the pages that KSM would merge as they are, 0 to 1."""
        return self.equal / self.pages if self.pages else 0.0

    @property
    def group_share(self) -> float:
        """Return the part that it would merge in a group, 0 to 1."""
        return (self.equal + self.pointers) / self.pages if self.pages else 0.0


class _Layout:
    """Where the mappings of a process are, in words that hold for another layout, too."""

    def __init__(self, mappings: Sequence[Mapping]) -> None:
        self.mappings = sorted(mappings, key=lambda one: one.start)
        self._starts = [one.start for one in self.mappings]
        number: Counter[str] = Counter()
        self._numbers: list[int] = []
        for one in reversed(self.mappings):
            self._numbers.append(number[one.name])
            number[one.name] += 1
        self._numbers.reverse()

    def place(self, address: int) -> Place | None:
        """Return the place of an address, the end of a mapping too; None if it is in none."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address > self.mappings[at].end:
            return None
        one = self.mappings[at]
        if one.name == "[stack]":  # there even the last bits of an address are random
            return one.name, 0, 0
        # The heap grows upwards; what mmap gives, downwards, and joins what is above it.
        begin = one.start if one.name == "[heap]" else one.end
        return one.name, self._numbers[at], address - begin


def compare(one: int, other: int, most: int = SAMPLE_PAGES, proc: Path = PROC) -> Comparison | None:
    """Compare at most `most` pages of two processes of one program; None if one has ended.

    Raises PermissionError where ptrace(2) would be refused, and KsmtoolError without xxhash.
    """
    try:
        maps = pages.mappings(one, proc), pages.mappings(other, proc)
        layouts = _Layout(maps[0]), _Layout(maps[1])
        hash_page = pages.digest()
        with Reader(one, hash_page, proc) as left, Reader(other, hash_page, proc) as right:
            here = _anonymous(left, layouts[0])
            there = _anonymous(right, layouts[1])
            every = -(-len(here) // most) or 1
            sample = list(itertools.islice(here.items(), every // 2, None, every))
            found: Counter[str] = Counter()
            for place, page in sample:
                found[_verdict(left, right, page, there.get(place), layouts)] += 1
    except pages.ENDED:
        return None
    equal = found["equal"] + found["zeros"]
    return Comparison(len(sample), equal, found["zeros"], found["pointers"])


def _anonymous(reader: Reader, layout: _Layout) -> dict[Place, int]:
    """Return the page numbers of what KSM may merge, by place, in ascending order."""
    found: dict[Place, int] = {}
    for mapping in layout.mappings:
        if mapping.may_merge and mapping.anonymous:
            for chunk in reader.chunks(mapping):
                for page in sorted(chunk.own + chunk.shared):
                    place = layout.place(page * PAGE_SIZE)
                    if place is not None:
                        found[place] = page
    return found


def _verdict(
    left: Reader, right: Reader, page: int, partner: int | None, layouts: tuple[_Layout, _Layout]
) -> str:
    ours = left.content(page)
    theirs = None if partner is None else right.content(partner)
    if ours is None or theirs is None or partner is None:
        return "missing"
    if ours == theirs:
        return "equal" if any(ours) else "zeros"
    addresses = page * PAGE_SIZE, partner * PAGE_SIZE
    same = all(
        mine == yours or _same_place(mine, yours, at, addresses, layouts)
        for at, (mine, yours) in enumerate(zip(ours.cast("Q"), theirs.cast("Q")))
    )
    return "pointers" if same else "different"


def _same_place(
    mine: int, yours: int, at: int, addresses: tuple[int, int], layouts: tuple[_Layout, _Layout]
) -> bool:
    place = layouts[0].place(mine)
    if place is not None and place == layouts[1].place(yours):
        return True
    # glibc (2.32) mixes the pointers between free blocks with where they stand: PROTECT_PTR.
    mine ^= (addresses[0] + 8 * at) >> 12
    yours ^= (addresses[1] + 8 * at) >> 12
    place = layouts[0].place(mine)
    return place is not None and place == layouts[1].place(yours)
