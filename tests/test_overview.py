# SPDX-License-Identifier: MIT
"""`ksmtool status` in words, table and JSON: of roots of other machines, and live."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console
from rich.table import Table

from conftest import Tree, need_command, run
from ksmtool import cli, facts, overview, usage
from ksmtool.facts import MachineFacts, Pace
from ksmtool.owners import Owner
from machines import MACHINES

PACE = Pace(1.0, 3.25, 42.0)
LAST = "6.18, v2, Kubernetes"


@pytest.fixture
def machine(tmp_path: Path) -> MachineFacts:
    return facts.gather(MACHINES[LAST].make(tmp_path))


def said(machine: MachineFacts, pace: Pace = PACE) -> dict[str, str]:
    return dict(overview.lines(machine, pace))


def drawn(table: Table, width: int = 100, color: bool = False) -> str:
    output = io.StringIO()
    system: Literal["standard"] | None = "standard" if color else None
    console = Console(file=output, width=width, force_terminal=color, color_system=system)
    console.print(table)
    return output.getvalue()


def test_the_lines(machine: MachineFacts) -> None:
    assert said(machine) == {
        "KSM": "on, not by ksmtool kernel-enable",
        "saved": "32.5 MB (0.4 % of RAM): 33.2 MB of pages, less 0.7 MB for ksmd's records",
        "zero pages": "0.0 MB of what is saved (use_zero_pages is 0: they merge like others)",
        "pages": "900 shared by 8100 more, 7000 unique, 300 volatile",
        "ksmd": "3.2 % of a CPU, over 1.0 s",
        "full pass": "takes about 42 s, 12 done",
        "opted in": "11 of 22 processes",
    }


def test_what_is_not_known(machine: MachineFacts) -> None:
    old = replace(machine, sample=replace(machine.sample, visited=None), unreadable=3)
    lines = said(old, Pace(1.0, None, None))
    assert lines["zero pages"] == "not told by this kernel (Linux 6.6 does)"
    assert lines["ksmd"] == "its CPU time cannot be seen here"
    assert lines["full pass"] == "none under way, 12 done"
    assert (
        lines["unreadable"] == "3 more processes may not be looked at; root may look at nearly all"
    )


@pytest.mark.parametrize("name", MACHINES)
def test_at_most_ten_lines(name: str, tmp_path: Path) -> None:
    machine = replace(facts.gather(MACHINES[name].make(tmp_path)), unreadable=1)
    machine = replace(machine, setup=replace(machine.setup, problem="x is damaged."))
    assert len(overview.lines(machine, PACE)) <= 10


STATE = '{"schema": 1, "profile": "balanced", "cpu": null, "found": {}}'
KSMTUNED = Owner("ksmtuned", "sets it again and again", True)


@pytest.mark.parametrize(
    ("merging", "state", "others", "container", "words"),
    [
        (True, "", (), False, "on, not by ksmtool kernel-enable"),
        (True, STATE, (), False, "on, by ksmtool kernel-enable (profile balanced)"),
        (
            *(True, STATE.replace("null", "7"), (), False),
            "on, by ksmtool kernel-enable (profile balanced, at most 7 % of a CPU)",
        ),
        (True, "", (KSMTUNED,), False, "on, not by ksmtool kernel-enable, but by ksmtuned"),
        (
            *(True, STATE, (KSMTUNED,), False),
            "on, by ksmtool kernel-enable (profile balanced), and set by ksmtuned",
        ),
        (True, "", (), True, "on, by the host: this is a container, and KSM merges over all of"),
        (False, "", (), False, "off; what was merged stays so"),
        (False, "", (KSMTUNED,), False, "off; what was merged stays so, set by ksmtuned"),
    ],
)
def test_who_switched_it(
    tmp_path: Path,
    merging: bool,
    state: str,
    others: tuple[Owner, ...],
    container: bool,
    words: str,
) -> None:
    root = MACHINES[LAST].make(tmp_path)
    if state:
        file = root / "var/lib/ksm-preload/kernel.json"
        file.parent.mkdir(parents=True)
        file.write_text(state)
    (root / "sys/kernel/mm/ksm/run").write_text(f"{int(merging)}\n")
    if container:
        (root / ".dockerenv").write_text("")
    machine = facts.gather(root)
    machine = replace(machine, setup=replace(machine.setup, others=others))
    assert said(machine)["KSM"].startswith(words)


def test_without_ksm(machine: MachineFacts) -> None:
    (line,) = overview.lines(replace(machine, available=False), PACE)
    assert line.text.startswith("not in this kernel")


def test_the_table(machine: MachineFacts) -> None:
    text = drawn(overview.table(usage.rows(machine.processes, "app"), "app", 100))
    lines = [line.split() for line in text.splitlines()]
    assert ["/app/worker", "10", "61.4", "41.0", "36.9", "33.2", "32.5"] in lines
    assert ["/usr/bin/redis-server", "1", "6.1", "4.1", "0.0", "0.0", "-0.1"] in lines
    processes = drawn(overview.table(usage.rows(machine.processes, limit=2), "process", 100))
    assert "PID" in processes
    assert "21 more" in processes


def test_a_loss_is_red(machine: MachineFacts) -> None:
    rows = usage.rows(machine.processes, "app")
    text = drawn(overview.table(rows, "app", 100), color=True)
    assert text.count("\x1b[31m") == 1
    assert re.search(r"\x1b\[31m *-0\.1\x1b\[0m", text)


NUMBERS = {"MB", "saved", "profit", "0.0", "-0.1", "33.2", "32.5"}


@pytest.mark.parametrize("width", range(20, 121, 5))
def test_it_fits(machine: MachineFacts, width: int) -> None:
    table = overview.table(usage.rows(machine.processes, "unit"), "unit", width)
    text = drawn(table, width)
    assert max(map(len, text.splitlines())) <= width
    assert "saved" in text
    # Names are cut off, numbers are not.
    assert {line.split()[-1] for line in text.splitlines() if line.strip(" ─")} <= NUMBERS


def test_a_kernel_that_does_not_tell(tmp_path: Path) -> None:
    machine = facts.gather(MACHINES["5.10, v1, Docker"].make(tmp_path))
    rows = usage.rows(machine.processes, "container")
    assert "?" in drawn(overview.table(rows, "container", 100))
    assert overview.notes(machine, usage.total(rows)) == [
        "Note: this kernel does not count merged pages per process; Linux 5.19 and later do."
    ]


def test_what_others_save_is_said(machine: MachineFacts) -> None:
    some = replace(machine, processes=machine.processes[:15], unreadable=7)
    (note,) = overview.notes(some, usage.total(usage.rows(some.processes)))
    assert note == "Note: 13.3 MB are of processes that may not be looked at."
    assert overview.notes(machine, usage.total(usage.rows(machine.processes))) == []
    off = replace(some, merging=False)
    (note,) = overview.notes(off, usage.total(usage.rows(off.processes)))
    assert note.endswith(" may not be looked at, or that have ended since ksmd is off.")
    few = replace(machine, processes=machine.processes[:-1], unreadable=1)
    assert overview.notes(few, usage.total(usage.rows(few.processes))) == []


def test_a_pool_that_forked_has_a_note(machine: MachineFacts) -> None:
    first, *rest = (one for one in machine.processes if one.executable == "/app/worker")
    forked = [replace(one, parent=first.pid) for one in rest]
    pool = replace(machine, processes=(first, *forked))
    (note,) = overview.notes(pool, usage.total(usage.rows(pool.processes)))
    assert note.startswith(f"Note: {len(rest)} processes are forked from one that is merged, too:")
    started = [replace(one, executable="/other") for one in forked]
    pool = replace(machine, processes=(first, *started))
    assert overview.notes(pool, usage.total(usage.rows(pool.processes))) == []


def test_next_to_nothing_is_no_loss(machine: MachineFacts) -> None:
    idle = replace(machine, counters=replace(machine.counters, general_profit_bytes=-64))
    assert said(idle)["saved"].startswith("0.0 MB (0.0 % of RAM)")
    assert overview.mb(-49_000) == "0.0"


def test_hidden_processes_are_told(machine: MachineFacts) -> None:
    (note,) = overview.notes(
        replace(machine, hidden=True), usage.total(usage.rows(machine.processes))
    )
    assert "(hidepid)" in note


def test_off_though_it_should_be_on(tmp_path: Path) -> None:
    root = MACHINES[LAST].make(tmp_path)
    state = root / "var/lib/ksm-preload/kernel.json"
    state.parent.mkdir(parents=True)
    state.write_text(STATE)
    (root / "sys/kernel/mm/ksm/run").write_text("0\n")
    off = said(facts.gather(root))["KSM"]
    assert off == "off, though ksmtool kernel-enable is in force; what was merged stays so"


def test_no_name_moves_the_cursor(machine: MachineFacts) -> None:
    evil = replace(machine.processes[0], name="a\x1b[2J\n\x9bb[red]\u202e")
    text = drawn(overview.table(usage.rows([evil]), "process", 100))
    assert "a?[2J??b[red]?" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (119, "119 s"), (150, "2 min"), (9000, "2 h 30 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert overview.duration(seconds) == text


# ---- JSON ----------------------------------------------------------------------------------

SHAPE = {
    "schema": int,
    "time": float,
    "ksm": {
        "available": bool,
        "merging": bool,
        "container": bool,
        "profile": (str, type(None)),
        "others": list,
        "problem": (str, type(None)),
        "settings": dict,
        "saved": int,
        "profit": int,
        "zero_pages": int,
        "pages_shared": int,
        "pages_sharing": int,
        "pages_unshared": int,
        "pages_volatile": int,
        "full_scans": int,
    },
    "ksmd": {
        "cpu_percent": (float, type(None)),
        "cpu_seconds": (float, type(None)),
        "pass_seconds": (float, type(None)),
    },
    "memory_total": int,
    "processes": {"readable": int, "unreadable": int, "opted_in": int},
    "by": str,
    "rows": list,
}
ROW = {
    "name": str,
    "pid": (int, type(None)),
    "processes": int,
    "opted_in": int,
    "rss": int,
    "anonymous": int,
    "merged": int,
    "saved": (int, type(None)),
    "profit": (int, type(None)),
    "rest": bool,
}


def has_shape(value: object, shape: object) -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict)
        assert list(value) == list(shape)
        for name, part in shape.items():
            has_shape(value[name], part)
    else:
        assert isinstance(value, shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MACHINES)
def test_the_shape_of_the_json(name: str, tmp_path: Path) -> None:
    one = MACHINES[name]
    machine = facts.gather(one.make(tmp_path))
    rows = usage.rows(machine.processes, "unit")
    document = json.loads(overview.as_json(machine, PACE, rows, "unit"))
    has_shape(document, SHAPE)
    assert document["schema"] == 1
    for row in document["rows"]:
        has_shape(row, ROW)
    assert sum(row["processes"] for row in document["rows"]) == len(one.processes)


# ---- Live ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", usage.BY)
def test_the_command(tree: Tree, by: str) -> None:
    done = run([tree.ksmtool, "status", "--by", by, "--limit", "3"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("KSM:")
    assert by in done.stdout


def test_the_commands_json(tree: Tree) -> None:
    done = run([tree.ksmtool, "status", "--json", "--by", "app", "--sort", "rss"])
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    has_shape(document, SHAPE)
    sizes = [row["rss"] for row in document["rows"]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("options", [["--by", "x"], ["--sort", "x"], ["--limit", "0"], ["x"]])
def test_usage_errors(tree: Tree, options: list[str]) -> None:
    assert run([tree.ksmtool, "status", *options]).returncode == 2


def test_choices_are_those_that_there_are() -> None:
    """The command line names them without importing the module."""
    assert list(usage.BY) == cli._BY
    assert list(usage.SORTS) == cli._SORTS


@pytest.mark.root
def test_a_user_is_told_what_cannot_be_seen() -> None:
    """By a fork of this process: the Python that runs it need not be one that users may start."""
    facts.gather()  # so that all is imported
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            machine = facts.gather()
            words = [machine.unreadable, len(machine.processes), said(machine)]
            os.write(writing, json.dumps(words).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        unreadable, readable, lines = json.load(answer)
    assert os.waitpid(child, 0)[1] == 0
    everything = facts.gather()
    # pytest's own process at least; a process that became nobody may not look at itself, either.
    assert unreadable >= 1
    assert unreadable + readable >= len(everything.processes) - 5
    assert lines["unreadable"].endswith("may not be looked at; root may look at nearly all")
    assert "saved" in lines


@pytest.mark.root
def test_without_ksm_live(tree: Tree) -> None:
    """With an empty folder over /sys/kernel/mm, in a mount namespace."""
    need_command("unshare")
    script = 'mount -t tmpfs none /sys/kernel/mm && exec "$0" status'
    done = run(["unshare", "-m", "sh", "-c", script, tree.ksmtool])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("KSM:        not in this kernel")
