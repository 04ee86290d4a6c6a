# SPDX-License-Identifier: MIT
"""Processes put together, sorted and cut off: sums stay whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ksmtool import usage
from ksmtool.facts import ProcessFacts
from ksmtool.kernel import PAGE_SIZE
from ksmtool.process import Memory


def one(pid: int, name: str, saved: int | None = 0, **more: object) -> ProcessFacts:
    memory = Memory(
        processes=1, rss=pid * 100, anonymous=pid * 10, merging_pages=pid, opted_in=pid % 2
    )
    made = ProcessFacts(
        *(pid, 1, name, f"/usr/bin/{name}", "anna", 1000, "", "", memory),
        saved=saved,
        profit=None if saved is None else saved - 50,
    )
    return replace(made, **more)  # type: ignore[arg-type]


ALL = [
    one(1, "init", executable="", user="root"),
    one(2, "web", 700, unit="web.service", container="docker:1"),
    one(3, "web", 100, unit="web.service", container="docker:2"),
    one(4, "db", 10, unit="db.service", user="root"),
    one(5, "idle", 0, executable=""),
]


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("process", ["web", "web", "db", "idle", "init"]),
        ("app", ["/usr/bin/web", "/usr/bin/db", "idle", "init"]),
        ("unit", ["web.service", "db.service", "no unit"]),
        ("container", ["docker:1", "docker:2", "no container"]),
        ("user", ["anna", "root"]),
    ],
)
def test_by(by: str, names: list[str]) -> None:
    found = usage.rows(ALL, by)
    assert [row.name for row in found] == names
    assert sum(row.processes for row in found) == 5
    assert sum(row.saved or 0 for row in found) == 810
    assert sum(row.anonymous for row in found) == 150
    assert all((row.pid is not None) == (by == "process") for row in found)


def test_a_row_is_a_sum() -> None:
    row = usage.rows(ALL, "app")[0]
    assert row == usage.Row(
        name="/usr/bin/web",
        pid=None,
        processes=2,
        opted_in=1,
        rss=500,
        anonymous=50,
        merged=5 * PAGE_SIZE,
        saved=800,
        profit=700,
    )


@pytest.mark.parametrize("sort", usage.SORTS)
def test_sorts(sort: str) -> None:
    found = usage.rows(ALL, "process", sort)
    values = [getattr(row, sort) for row in found]
    assert values == sorted(values, reverse=sort != "name")
    # In the same order whatever order they come in.
    assert usage.rows(reversed(ALL), "process", sort) == found


@pytest.mark.parametrize("limit", range(1, 8))
def test_a_limit_keeps_the_sum(limit: int) -> None:
    whole = usage.total(usage.rows(ALL))
    found = usage.rows(ALL, limit=limit)
    assert len(found) == min(limit, 5)
    assert usage.total(found) == whole
    assert found[-1].rest == (limit < 5)
    if limit < 5:
        assert found[-1].name == f"{5 - limit + 1} more"


def test_what_the_kernel_does_not_tell_is_not_nothing() -> None:
    unknown = [one(7, "a", None), *ALL]
    (row,) = usage.rows([replace(each, unit="u") for each in unknown], "unit")
    assert (row.saved, row.profit) == (None, None)
    assert usage.total(usage.rows(unknown)).saved is None
    assert usage.rows(unknown)[-1].name == "a"


def test_containing() -> None:
    assert [row.name for row in usage.rows(ALL, "app", containing="WEB")] == ["/usr/bin/web"]
    assert usage.rows(ALL, "app", containing="[") == []


def test_nothing_at_all() -> None:
    assert usage.rows([]) == []
    assert usage.total([]).saved == 0
    assert usage.rows([], limit=1) == []
