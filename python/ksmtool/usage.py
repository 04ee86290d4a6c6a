# SPDX-License-Identifier: MIT
"""Who saves how much: processes put together by what they are a part of. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ksmtool.facts import ProcessFacts
from ksmtool.kernel import PAGE_SIZE
from ksmtool.process import Memory

BY: dict[str, Callable[[ProcessFacts], str]] = {
    "process": lambda one: one.name,
    "app": lambda one: one.executable or one.name,
    "unit": lambda one: one.unit or "no unit",
    "container": lambda one: one.container or "no container",
    "user": lambda one: one.user,
}
"""What to put together, and the name that all of it has."""

SORTS = ("saved", "profit", "merged", "anonymous", "rss", "processes", "name")


@dataclass(frozen=True)
class Row:
    """Some processes, in bytes unless the name says otherwise."""

    name: str
    pid: int | None
    """Of a row that is one process by itself."""
    processes: int
    opted_in: int
    """How many of them."""
    rss: int
    """A page that several have counts for each, as in `anonymous` and `merged`."""
    anonymous: int
    merged: int
    """Mappings of merged pages, the one copy that stays among them."""
    saved: int | None
    """None where the kernel does not tell, as `profit`."""
    profit: int | None
    rest: bool = False
    """Whether it stands for all that did not fit."""


def rows(
    processes: Iterable[ProcessFacts],
    by: str = "process",
    sort: str = "saved",
    limit: int | None = None,
    containing: str = "",
) -> list[Row]:
    """Return a row for each process, or for each app, unit, container or user.

    Numbers are sorted from the largest, names from A. Of more than `limit` rows, the last is one
    that stands for all others, so that sums stay whole; of names that do not hold `containing`, in
    whatever case, there are none.
    """
    parts: dict[tuple[str, int | None], list[ProcessFacts]] = defaultdict(list)
    for one in processes:
        parts[BY[by](one), one.pid if by == "process" else None].append(one)
    wanted = containing.casefold()
    found = [
        _row(name, pid, members)
        for (name, pid), members in parts.items()
        if wanted in name.casefold()
    ]
    found.sort(key=lambda row: (row.name, row.pid or 0))
    if sort != "name":
        # What is equal in that, such as nothing saved at all, is in the order of size.
        found.sort(key=lambda row: (_amount(row, sort), row.anonymous), reverse=True)
    return found if limit is None or len(found) <= limit else limited(found, limit)


def limited(found: Sequence[Row], limit: int) -> list[Row]:
    """Return at most `limit` rows, at least one; the last stands for those that do not fit."""
    if len(found) <= limit:
        return list(found)
    shown = max(limit, 1) - 1
    rest = found[shown:]
    return [*found[:shown], _sum(f"{len(rest)} more", rest, rest=True)]


def total(found: Sequence[Row]) -> Row:
    """Return the sum of the rows."""
    return _sum("all", found)


def _amount(row: Row, sort: str) -> float:
    value = getattr(row, sort)
    return float("-inf") if value is None else float(value)


def _row(name: str, pid: int | None, members: Sequence[ProcessFacts]) -> Row:
    memory = sum((one.memory for one in members), Memory())
    return Row(
        name=name,
        pid=pid,
        processes=memory.processes,
        opted_in=memory.opted_in,
        rss=memory.rss,
        anonymous=memory.anonymous,
        merged=memory.merging_pages * PAGE_SIZE,
        saved=_known([one.saved for one in members]),
        profit=_known([one.profit for one in members]),
    )


def _sum(name: str, found: Sequence[Row], rest: bool = False) -> Row:
    return Row(
        name=name,
        pid=None,
        processes=sum(row.processes for row in found),
        opted_in=sum(row.opted_in for row in found),
        rss=sum(row.rss for row in found),
        anonymous=sum(row.anonymous for row in found),
        merged=sum(row.merged for row in found),
        saved=_known([row.saved for row in found]),
        profit=_known([row.profit for row in found]),
        rest=rest,
    )


def _known(values: Sequence[int | None]) -> int | None:
    """Return the sum, None if one of them is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
