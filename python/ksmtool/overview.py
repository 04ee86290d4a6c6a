# SPDX-License-Identifier: MIT
"""The machine and who saves what, for people (lines and a table) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from ksmtool.facts import MachineFacts, Pace, ProcessFacts, Setup
from ksmtool.kernel import PAGE_SIZE
from ksmtool.usage import Row

if TYPE_CHECKING:  # rich takes 80 ms to start, which --json does without
    from rich.table import Table

SCHEMA = 1
MB = 1e6


class Line(NamedTuple):
    """A line on the machine: what it is about, and what is so."""

    label: str
    text: str


def lines(machine: MachineFacts, pace: Pace) -> list[Line]:
    """Return what to know of the machine."""
    if not machine.available:
        said = "not in this kernel (CONFIG_KSM), or /sys is not mounted: nothing is merged"
        return [Line("KSM", said)]
    counters = machine.counters
    share = ""
    if machine.memory_total:
        share = f" ({_short(100 * machine.profit / machine.memory_total)} % of RAM)"
    return [
        Line("KSM", _state(machine)),
        *([Line("problem", machine.setup.problem)] if machine.setup.problem else []),
        Line(
            "saved",
            f"{mb(machine.profit)} MB{share}: {mb(machine.saved)} "
            f"MB of pages, less {mb(machine.saved - machine.profit)} MB for ksmd's records",
        ),
        Line("zero pages", _zero_pages(machine)),
        Line(
            "pages",
            f"{counters.pages_shared} shared by {counters.pages_sharing} more, "
            f"{counters.pages_unshared} unique, {counters.pages_volatile} volatile",
        ),
        Line("ksmd", _cpu(pace)),
        Line("full pass", _pass(machine, pace)),
        Line("opted in", _opted_in(machine)),
        *([Line("unreadable", _unreadable(machine))] if machine.unreadable else []),
    ]


def _state(machine: MachineFacts) -> str:
    setup = machine.setup
    if not machine.merging:
        stays = "; what was merged stays so" if machine.saved else ""
        asked = ", though ksmtool kernel-enable is in force" if setup.state else ""
        return f"off{asked}{stays}{_also(setup, 'set by')}"
    if setup.container:
        return "on, by the host: this is a container, and KSM merges over all of them"
    if setup.state is None:
        return f"on, not by ksmtool kernel-enable{_also(setup, 'but by')}"
    limit = "" if setup.state.cpu is None else f", at most {setup.state.cpu} % of a CPU"
    ours = f"on, by ksmtool kernel-enable (profile {setup.state.profile}{limit})"
    return f"{ours}{_also(setup, 'and set by')}"


def _also(setup: Setup, words: str) -> str:
    names = " and ".join(printable(owner.name) for owner in setup.others)
    return f", {words} {names}" if names else ""


def _zero_pages(machine: MachineFacts) -> str:
    if machine.sample.visited is None:
        return "not told by this kernel (Linux 6.6 does)"
    said = f"{mb(machine.counters.zero_pages * PAGE_SIZE)} MB of what is saved"
    off = machine.settings.get("use_zero_pages") == "0"
    return f"{said} (use_zero_pages is 0: they merge like others)" if off else said


def _cpu(pace: Pace) -> str:
    if pace.cpu_percent is None:
        return "its CPU time cannot be seen here"
    return f"{pace.cpu_percent:.1f} % of a CPU, over {pace.seconds:.1f} s"


def _pass(machine: MachineFacts, pace: Pace) -> str:
    done = f"{machine.counters.full_scans} done"
    if pace.pass_seconds is None:
        return f"none under way, {done}"
    return f"takes about {duration(pace.pass_seconds)}, {done}"


def _opted_in(machine: MachineFacts) -> str:
    return f"{machine.opted_in} of {len(machine.processes)} processes"


def _unreadable(machine: MachineFacts) -> str:
    some = "1 more process" if machine.unreadable == 1 else f"{machine.unreadable} more processes"
    return f"{some} may not be looked at; root may look at nearly all"


def notes(machine: MachineFacts, shown: Row) -> list[str]:
    """Return what the table does not say; `shown` is the sum of its rows."""
    said = []
    if shown.saved is None:
        said.append(
            "Note: this kernel does not count merged pages per process; Linux 5.19 and later do."
        )
        return said
    # What merged while they were looked at makes a difference, too.
    missing = machine.saved - shown.saved
    if missing >= max(MB, machine.saved / 50) and (machine.unreadable or machine.hidden):
        ended = "" if machine.merging else ", or that have ended since ksmd is off"
        said.append(f"Note: {mb(missing)} MB are of processes that may not be looked at{ended}.")
    if machine.hidden:
        said.append("Note: /proc hides the processes of others (hidepid): they are in no number.")
    forked = sum(_is_forked(one, machine) for one in machine.processes)
    if forked:
        some = "1 process is" if forked == 1 else f"{forked} processes are"
        said.append(
            f"Note: {some} forked from one that is merged, too: what they share by that alone may "
            "be in what is saved (docs/status.md)."
        )
    return said


def _is_forked(one: ProcessFacts, machine: MachineFacts) -> bool:
    """Whether it has pages merged that its parent may have had so before it."""
    parent = machine.by_pid.get(one.parent)
    return (
        one.memory.merging_pages * PAGE_SIZE >= MB
        and parent is not None
        and parent.executable == one.executable
        and parent.memory.merging_pages * PAGE_SIZE >= MB
    )


# ---- The table -----------------------------------------------------------------------------

_NAME_WIDTH, _NUMBER_WIDTH = 20, 9

_COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    # Heading, rank of what is left out first on a narrow screen, and how it looks.
    ("PID", 4, lambda row: "" if row.pid is None else str(row.pid)),
    ("pro-\ncess.", 4, lambda row: str(row.processes)),
    ("RSS\nMB", 1, lambda row: _size(row.rss)),
    ("anon.\nMB", 3, lambda row: _size(row.anonymous)),
    ("merged\nMB", 2, lambda row: _size(row.merged)),
    ("saved\nMB", 9, lambda row: _size(row.saved)),
    ("profit\nMB", 5, lambda row: _size(row.profit)),
)


def table(rows: Sequence[Row], by: str, width: int) -> Table:
    """Return the table, with the columns that have room."""
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [one for one in _COLUMNS if one[0] != ("pro-\ncess." if by == "process" else "PID")]
    while len(shown) > 1 and _NAME_WIDTH + _NUMBER_WIDTH * len(shown) > width:
        shown.remove(min(shown, key=lambda one: one[1]))
    cells = [[look(row) for row in rows] for _heading, _rank, look in shown]
    sizes = [
        max(map(len, [*heading.split("\n"), *column]))
        for (heading, _rank, _look), column in zip(shown, cells)
    ]
    # A long name is cut off, a number never; each column has a blank and a border.
    name_width = max(_NAME_WIDTH // 2, width - sum(sizes) - 2 * len(sizes) - 4)
    result.add_column(by, no_wrap=True, overflow="ellipsis", max_width=name_width)
    for (heading, _rank, _look), size in zip(shown, sizes):
        result.add_column(heading, justify="right", no_wrap=True, width=size)
    for row, *numbers in zip(rows, *cells):
        name = Text(printable(row.name), style="italic" if row.rest else "")
        result.add_row(name, *(Text(one, "red" if one[:1] == "-" else "") for one in numbers))
    return result


def _size(size: int | None) -> str:
    return "?" if size is None else mb(size)


def printable(text: str) -> str:
    """Return a name as it may go to a terminal: a process can call itself what it likes."""
    return "".join(one if one.isprintable() else "?" for one in text)


def mb(size: float) -> str:
    """Return bytes as MB of 10^6 bytes."""
    return _short(size / MB)


def _short(number: float) -> str:
    return f"{round(number, 1) + 0.0:.1f}"  # never -0.0


def duration(seconds: float) -> str:
    """Return a time in one or two units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# ---- JSON ----------------------------------------------------------------------------------


def as_json(machine: MachineFacts, pace: Pace, rows: Sequence[Row], by: str) -> str:
    """Return all of it as JSON, schema 1: sizes in bytes, times in seconds."""
    counters, state = machine.counters, machine.setup.state
    document = {
        "schema": SCHEMA,
        "time": machine.time,
        "ksm": {
            "available": machine.available,
            "merging": machine.merging,
            "container": machine.setup.container,
            "profile": state.profile if state else None,
            "others": [owner.name for owner in machine.setup.others],
            "problem": machine.setup.problem or None,
            "settings": dict(machine.settings),
            "saved": machine.saved,
            "profit": machine.profit,
            "zero_pages": counters.zero_pages,
            "pages_shared": counters.pages_shared,
            "pages_sharing": counters.pages_sharing,
            "pages_unshared": counters.pages_unshared,
            "pages_volatile": counters.pages_volatile,
            "full_scans": counters.full_scans,
        },
        "ksmd": {
            "cpu_percent": pace.cpu_percent,
            "cpu_seconds": machine.sample.cpu_seconds,
            "pass_seconds": pace.pass_seconds,
        },
        "memory_total": machine.memory_total,
        "processes": {
            "readable": len(machine.processes),
            "unreadable": machine.unreadable,
            "opted_in": machine.opted_in,
        },
        "by": by,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(document, indent=2)
