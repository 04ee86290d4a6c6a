# SPDX-License-Identifier: MIT
"""`ksmtool top`: what keys do, what is drawn, and all of it in a real terminal, through tmux."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from conftest import Tmux, Tree, need_command, run, wait_until
from ksmtool import facts, process, top, usage
from ksmtool.facts import Pace
from ksmtool.top import History, View, press
from machines import MACHINES

PACE = Pace(1.0, 3.25, 42.0)


# ---- Keys ----------------------------------------------------------------------------------


def pressed(text: str, view: View | None = None) -> View:
    view = view or View()
    for key in top.keys(text):
        view = press(view, key)
    return view


@pytest.mark.parametrize(
    ("typed", "view"),
    [
        ("", View()),
        ("q", View(left=True)),
        ("s", View(sort="profit")),
        ("ss", View(sort="merged")),
        ("s" * len(usage.SORTS), View()),
        ("\x1b[C", View(sort="profit")),
        ("\x1b[C\x1b[D", View()),
        ("\x1b[D", View(sort="name")),
        ("g", View(by="app")),
        ("g" * len(usage.BY), View()),
        ("/", View(typing=True)),
        # q is a letter there, and no key of ours is one.
        ("/sqg", View(containing="sqg", typing=True)),
        ("/sqg\r", View(containing="sqg")),
        ("/ab\x7fc\r", View(containing="ac")),
        ("/ab\x15c\r", View(containing="c")),
        ("/ab\x1b", View()),
        ("/ab\r\x1b", View()),
        ("/a\x1b[Ab\r", View(containing="ab")),
        ("/é€\r", View(containing="é€")),
        ("x\x1b[A\x00\x1bOP~", View()),
    ],
)
def test_keys(typed: str, view: View) -> None:
    assert pressed(typed) == view


# ---- Sparklines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([], 3, "   "),
        ([0, 0], 3, " ▁▁"),
        ([5], 3, "  █"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([9, 9, 0, 7], 2, "▁█"),
        ([-5, 7], 2, "▁█"),
        ([1, 2], 0, ""),
    ],
)
def test_sparkline(values: list[float], width: int, text: str) -> None:
    assert top.sparkline(values, width) == text


# ---- The screen ----------------------------------------------------------------------------


def drawn(root: Path, view: View, size: tuple[int, int], name: str = "6.18, v2, Kubernetes") -> str:
    machine = facts.gather(MACHINES[name].make(root))
    history = History()
    for profit in range(5):
        history.add(
            replace(machine, counters=replace(machine.counters, general_profit_bytes=profit)), PACE
        )
    output = io.StringIO()
    console = Console(file=output, width=size[0], height=size[1], color_system=None)
    console.print(top.screen(machine, PACE, history, view, size))
    return output.getvalue()


@pytest.mark.parametrize("size", [(100, 30), (80, 24), (60, 15), (40, 12), (200, 60)])
@pytest.mark.parametrize("by", usage.BY)
def test_it_fits_and_no_line_is_lost(tmp_path: Path, size: tuple[int, int], by: str) -> None:
    text = drawn(tmp_path, View(by=by), size)
    lines = text.splitlines()
    assert len(lines) <= size[1]
    assert max(map(len, lines)) <= size[0]
    assert "▁▃▅▆█" in text
    assert "sort: saved" in text
    if by == "process":
        assert "more" in text or size[1] >= 35


def test_the_filter_is_shown(tmp_path: Path) -> None:
    text = drawn(tmp_path, View(by="app", containing="REDIS", typing=True), (100, 30))
    assert "filter: REDIS_" in text
    assert "/usr/bin/redis-server" in text
    assert "/app/worker" not in text


# ---- A real terminal -----------------------------------------------------------------------


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    need_command("tmux")
    terminal = Tmux(tmp_path, "sh")
    try:
        yield terminal
    finally:
        terminal("kill-server")


def start(tmux: Tmux, tree: Tree, interval: str) -> None:
    command = shlex.join([str(tree.ksmtool), "top", "--interval", interval])
    tmux.command(f"stty -a >before; {command}; echo ended with $?; stty -a >after")
    tmux.until("sort: saved", "PID")


@pytest.fixture
def started(tmux: Tmux, tree: Tree) -> Tmux:
    """Return the terminal with top in it, that says when and how it ended."""
    start(tmux, tree, "0.5")
    return tmux


def pid_of_top(tmux: Tmux) -> int:
    shell = int(tmux("display-message", "-p", "#{pane_pid}"))
    found = [process.identity(pid) for pid in process.descendants(shell)]
    (pid,) = [one.pid for one in found if one is not None and one.name == "ksmtool"]
    return pid


def assert_clean(tmux: Tmux, status: int = 0) -> None:
    text = tmux.until(f"ended with {status}")
    assert "sort: saved" not in text
    assert "Traceback" not in text
    assert tmux.state() == "0 1"
    wait_until((tmux.folder / "after").exists, 10, "stty")
    tmux.command("echo still a shell")
    tmux.until("\nstill a shell")
    before = (tmux.folder / "before").read_text()
    assert (tmux.folder / "after").read_text() == before
    assert "icanon" in before


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_starts_and_q_ends_it(started: Tmux) -> None:
    text = started.until("KSM:", "saved:", "ksmd:", "opted in:", "more")
    assert started.state() == "1 0"
    assert max(map(len, text.splitlines())) <= 100
    started.type("q")
    assert_clean(started)


def test_it_is_live(started: Tmux) -> None:
    """A program that is started is there, and one that ended is not."""
    started.type("/")
    started.type("a-guest")
    started.key("Enter")
    started.until("filter: a-guest", absent="a-guest-of-this")
    code = "open('/proc/self/comm', 'w').write('a-guest-of-this'); input()"
    with subprocess.Popen(["python3", "-c", code], stdin=subprocess.PIPE) as guest:
        started.until("a-guest-of-this")
        guest.kill()
    started.until("filter: a-guest", absent="a-guest-of-this")
    started.type("q")
    assert_clean(started)


def test_it_sorts_groups_and_filters(started: Tmux) -> None:
    for sort in (*usage.SORTS[1:], usage.SORTS[0]):
        started.type("s")
        started.until(f"sort: {sort}")
    started.type("g")
    started.until("by: app", absent="PID")
    started.type("g")
    started.until("by: unit")
    started.type("ggg")
    started.until("by: process", "PID")
    started.type("/tmu")
    started.until("filter: tmu_", "tmux: server", absent=" ksmtool  ")
    started.key("BSpace")
    started.until("filter: tm_")
    started.key("Enter")
    started.until("filter: tm ")
    started.key("Escape")
    started.until("ksmtool", absent="filter: tm")
    started.type("q")
    assert_clean(started)


def test_it_follows_the_size(tmux: Tmux, tree: Tree) -> None:
    """At once, not with the next refresh; nor do keys wait for that."""
    start(tmux, tree, "600")
    for columns, lines in ((60, 15), (140, 40), (40, 12), (100, 30)):
        tmux("resize-window", "-x", columns, "-y", lines)

        def fits(columns: int = columns, lines: int = lines) -> bool:
            text = tmux.screen().splitlines()
            rule = [line for line in text if "───" in line]
            return len(text) <= lines and "KSM:" in text[0] and len(rule) == 1

        wait_until(fits, 30, f"{columns} x {lines}: {tmux.screen()}")
    tmux.until("profit", "RSS")
    tmux.type("g")
    tmux.until("by: app")
    tmux.type("q")
    assert_clean(tmux)


def test_a_terminal_of_few_characters(tmux: Tmux, tree: Tree) -> None:
    """What is cut off ends in a character that it does not have."""
    tmux("resize-window", "-x", "60", "-y", "30")
    tmux.command("export PYTHONIOENCODING=latin-1")
    start(tmux, tree, "0.5")
    wait_until(lambda: "?" in tmux.screen(), 10, "a line is cut off")
    tmux.type("q")
    assert_clean(tmux)


def test_control_c_ends_it(started: Tmux) -> None:
    started.key("C-c")
    assert_clean(started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_signals_end_it(started: Tmux, number: signal.Signals) -> None:
    os.kill(pid_of_top(started), number)
    assert_clean(started, 0 if number == signal.SIGINT else 130)


@pytest.mark.parametrize("how", ["C-z", "SIGTSTP"])
def test_control_z_leaves_the_screen_and_fg_comes_back(tmux: Tmux, tree: Tree, how: str) -> None:
    tmux.command("set -m; stty -a >before; PS1='$ '")
    tmux.command(shlex.join([str(tree.ksmtool), "top", "--interval", "0.5"]))
    tmux.until("sort: saved", "PID")
    if how == "C-z":
        tmux.key("C-z")
    else:
        os.kill(pid_of_top(tmux), signal.SIGTSTP)
    tmux.until("Stopped", absent="sort: saved")
    assert tmux.state() == "0 1"
    tmux.command("stty -a >while; fg")
    tmux.until("sort: saved", "PID")
    assert tmux.state() == "1 0"
    tmux.type("q")
    tmux.until("$", absent="sort: saved")
    tmux.command("echo ended with $?; stty -a >after")
    assert_clean(tmux)
    assert (tmux.folder / "while").read_text() == (tmux.folder / "before").read_text()


@pytest.mark.parametrize("where", ["| cat", "</dev/null", ">out", "<&-", ">&-"])
def test_without_a_terminal(tmux: Tmux, tree: Tree, where: str) -> None:
    tmux.command(f"({tree.ksmtool} top; echo ended with $? >&2) {where}")
    text = tmux.until("ended with 2")
    assert "ksmtool: top needs a terminal." in text
    assert "Traceback" not in text


def test_a_dumb_terminal(tmux: Tmux, tree: Tree) -> None:
    tmux.command(f"TERM=dumb {tree.ksmtool} top; echo ended with $?")
    assert "top needs a terminal." in tmux.until("ended with 2")


@pytest.mark.parametrize(
    "options", [["--interval", "0"], ["--interval", "nan"], ["--interval", "1e10"], ["--by", "x"]]
)
def test_usage_errors(tree: Tree, options: list[str]) -> None:
    assert run([tree.ksmtool, "top", *options]).returncode == 2
