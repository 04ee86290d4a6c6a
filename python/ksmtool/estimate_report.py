# SPDX-License-Identifier: MIT
"""An estimate, for people (tables and sentences) and for programs (JSON)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksmtool.estimate import Estimate, Pair, Program
from ksmtool.overview import MB, mb, printable

SCHEMA = 1
MOST_ROWS = 15
_LEAST = MB / 20  # what is shown as 0.0 is no row


def as_json(found: Estimate) -> str:
    """Return the estimate as JSON, schema 1: sizes in bytes, times in seconds."""
    return json.dumps({"schema": SCHEMA, **asdict(found)}, indent=2)


def print_tables(found: Estimate, console: Console) -> None:
    """Print a row for each program, one for each pair that shares, then what it means in words."""
    names = short_names(program.name for program in found.programs)
    console.print(_programs(found.programs, names))
    pairs = [pair for pair in found.pairs if pair.saved >= _LEAST]
    if pairs:
        console.print(_pairs(pairs, names))
    for line in sentences(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return what to call each program: its file's name, its path where two have that name."""
    every = list(dict.fromkeys(paths))
    often = Counter(map(os.path.basename, every))
    return {
        path: os.path.basename(path) if often[os.path.basename(path)] == 1 else path
        for path in every
    }


def sentences(found: Estimate) -> list[str]:
    """Return what the numbers say, then what they leave out."""
    net = found.saved - found.metadata
    percent = 100 * found.saved / found.frames if found.frames else 0.0
    said = [
        f"KSM could save {mb(found.saved)} MB ({percent:.1f} %) of the {mb(found.frames)} MB "
        f"that {_count(found.processes, 'process', 'processes')} have in RAM and KSM may merge, "
        f"{mb(found.zeros)} MB of it pages of zeros.",
        f"The kernel's records of these pages would take {mb(found.metadata)} MB: "
        + (f"{mb(net)} MB are left." if net >= 0 else f"a loss of {mb(-net)} MB."),
    ]
    if found.anonymous > found.frames:
        said.append(
            f"Note: {mb(found.anonymous - found.frames)} MB are shared already, by fork or KSM."
        )
    if found.swapped:
        said.append(
            f"Note: {mb(found.swapped)} MB are swapped out: not read, and in no other number."
        )
    if found.share < 1:
        said.append(
            f"Note: {100 * found.share:.3g} % of all contents were counted; the rest is concluded."
        )
    if not found.exact:
        said.append(
            "Note: only root is told page frames: equal pages that are shared already are taken "
            "for one."
        )
    if found.left_out:
        some = _count(found.left_out, "process", "processes")
        said.append(f"Note: {some} left out, as the policy says: ksmtool policy check.")
    if found.unreadable:
        some = _count(found.unreadable, "process", "processes")
        said.append(f"Warning: {some} may not be looked at; root may look at nearly all.")
    if found.ended:
        said.append(f"Note: {_count(found.ended, 'process', 'processes')} ended meanwhile.")
    said.append(
        f"Note: {mb(found.changing)} MB changed within {found.again:g} s: KSM does not merge "
        "that, and it is not in what is saved."
        if found.again
        else "Note: pages that a program keeps changing are not merged, but counted here; "
        "--again 30 looks twice."
    )
    return said


def _programs(programs: Sequence[Program], names: dict[str, str]) -> Table:
    table = _table("program", "pro-\ncesses", "in RAM\nMB", "saved\nMB", "saved\n%", "zeros\nMB")
    for program in programs[:MOST_ROWS]:
        percent = 100 * program.saved / program.frames if program.frames else 0.0
        table.add_row(
            Text(printable(names[program.name])),
            str(program.processes),
            mb(program.frames),
            mb(program.saved),
            f"{percent:.1f}",
            mb(program.zeros),
        )
    rest = programs[MOST_ROWS:]
    if rest:
        table.add_row(
            f"{len(rest)} more",
            str(sum(program.processes for program in rest)),
            *(
                mb(sum(sizes))
                for sizes in (
                    [program.frames for program in rest],
                    [program.saved for program in rest],
                )
            ),
            "",
            mb(sum(program.zeros for program in rest)),
        )
    table.caption = "saved: within the program alone; MB are 10^6 bytes"
    return table


def _pairs(pairs: Sequence[Pair], names: dict[str, str]) -> Table:
    table = _table("program", "shares with", "saved\nMB", words=2)
    for pair in pairs[:MOST_ROWS]:
        one, other = (Text(printable(names[path])) for path in (pair.one, pair.other))
        table.add_row(one, other, mb(pair.saved))
    more = len(pairs) - MOST_ROWS
    table.caption = "saved: beyond what each alone saves" + (f"; {more} more pairs" * (more > 0))
    return table


def _table(*headings: str, words: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(
            heading, justify="left" if number < words else "right", no_wrap=number >= words
        )
    return table


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"
