# SPDX-License-Identifier: MIT
"""`ksmtool top`: the machine and who saves what, live.

What the keys do and what is drawn is pure; `Terminal` is the edge.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import termios
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ksmtool import facts, overview, usage
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.facts import MachineFacts, Pace
from ksmtool.kernel import ENDING, Ksm, undisturbed

# ---- What the keys do ----------------------------------------------------------------------


_ESCAPE, _RIGHT, _LEFT = "\x1b", "\x1b[C", "\x1b[D"


@dataclass(frozen=True)
class View:
    """What is asked to be seen."""

    by: str = "process"
    sort: str = "saved"
    containing: str = ""
    """The filter: what names hold."""
    typing: bool = False
    """Whether keys go into the filter."""
    left: bool = False
    """Whether to end."""


def press(view: View, key: str) -> View:
    """Return the view after a key: a character, or an escape sequence."""
    if view.typing:
        return _type(view, key)
    changes: dict[str, dict[str, Any]] = {
        "q": {"left": True},
        "s": {"sort": _after(view.sort, usage.SORTS)},
        _RIGHT: {"sort": _after(view.sort, usage.SORTS)},
        _LEFT: {"sort": _after(view.sort, usage.SORTS[::-1])},
        "g": {"by": _after(view.by, tuple(usage.BY))},
        "/": {"typing": True},
        _ESCAPE: {"containing": ""},
    }
    return replace(view, **changes.get(key, {}))


def _type(view: View, key: str) -> View:
    if key in ("\r", "\n"):
        return replace(view, typing=False)
    if key == _ESCAPE:
        return replace(view, typing=False, containing="")
    if key in ("\x7f", "\b"):
        return replace(view, containing=view.containing[:-1])
    if key == "\x15":  # Ctrl-U
        return replace(view, containing="")
    return replace(view, containing=view.containing + key) if key.isprintable() else view


def _after(one: str, among: Sequence[str]) -> str:
    return among[(among.index(one) + 1) % len(among)]


_KEY = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)


def keys(text: str) -> list[str]:
    """Return what was typed, key by key."""
    return _KEY.findall(text)


# ---- What is drawn -------------------------------------------------------------------------

_KEPT = 300
_BARS = "▁▂▃▄▅▆▇█"
_BARS_OF_ASCII = "_.:-=+*#"


@dataclass(frozen=True)
class History:
    """What has been, one for each refresh."""

    saved: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    cpu: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, machine: MachineFacts, pace: Pace) -> None:
        """Keep what is now."""
        self.saved.append(machine.profit)
        self.cpu.append(pace.cpu_percent or 0.0)


def sparkline(values: Sequence[float], width: int, bars: str = _BARS) -> str:
    """Return the last `width` values as bars from 0 to the largest of them; less than 0 is 0."""
    shown = list(values)[-width:] if width > 0 else []
    most = max(shown, default=0)
    step = most / (len(bars) - 1) if most > 0 else 1
    return "".join(bars[round(max(value, 0) / step)] for value in shown).rjust(width)


_SHORT = ("KSM", "saved", "ksmd", "opted in")
"""The lines for a screen that is not high."""


def screen(
    machine: MachineFacts,
    pace: Pace,
    history: History,
    view: View,
    size: tuple[int, int],
    bars: str = _BARS,
) -> RenderableType:
    """Return all that is to be seen on a screen of so many columns and lines."""
    width, height = size
    lines = overview.lines(machine, pace)
    if height < 24:
        lines = [line for line in lines if line.label in _SHORT]
    sparks = {"saved": history.saved, "ksmd": history.cpu}
    room = min(30, width // 4)
    drawn = []
    for label, said in lines:
        text = Text(f"{label + ':':12}", style="bold", no_wrap=True, overflow="ellipsis")
        if label in sparks:
            text.append(sparkline(sparks[label], room, bars) + "  ", style="not bold cyan")
        text.append(said, style="not bold")
        drawn.append(text)
    drawn.append(menu(view))
    # Above the rows of the table are a blank, two lines of headings, and a rule; a blank is below.
    limit = max(1, height - len(drawn) - 5)
    rows = usage.rows(machine.processes, view.by, view.sort, limit, view.containing)
    return Group(*drawn, overview.table(rows, view.by, width))


def menu(view: View) -> Text:
    """Return the line that says what the keys are for, and what is chosen."""
    shown = overview.printable(view.containing) + ("_" if view.typing else "")
    entries = [("s", f"sort: {view.sort}"), ("g", f"by: {view.by}"), ("/", f"filter: {shown}")]
    text = Text(no_wrap=True, overflow="ellipsis")
    for key, words in [*entries, ("q", "quit")]:
        text.append(f" {key} ", style="reverse")
        text.append(f" {words}  ")
    return text


# ---- The terminal --------------------------------------------------------------------------

_LFLAG, _CC = 3, 6  # of what tcgetattr returns
_SUSPEND = "\x1a"


class Terminal:
    """The terminal while `top` has it: keys as they are typed, the other screen, no cursor.

    Leaving it, in whatever way, puts back what was there.
    """

    def __init__(self) -> None:
        """Raise KsmtoolError with status 2 if there is no terminal."""
        self.console = Console()
        ends = (sys.stdin, sys.stdout)
        if any(end is None or not end.isatty() for end in ends) or self.console.is_dumb_terminal:
            raise KsmtoolError(
                "top needs a terminal.", "ksmtool status says it once.", ExitStatus.USAGE
            )
        self.ended: int | None = None
        """The signal that asks for the end."""
        self._stopping = False
        self._in = sys.stdin.fileno()
        self._found = termios.tcgetattr(self._in)
        self._opened = contextlib.ExitStack()
        self._reading, self._writing = os.pipe()

    def __enter__(self) -> Terminal:
        """Take the terminal, and let signals that end a program be told instead of acting."""
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers = {
            number: signal.signal(number, self._told)
            for number in (*ENDING, signal.SIGWINCH, signal.SIGTSTP)
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._take()
        return self

    def __exit__(self, *_error: object) -> None:
        """Give it back."""
        with undisturbed():
            self._give_back()
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._reading)
            os.close(self._writing)

    def _told(self, number: int, _frame: object) -> None:
        if number == signal.SIGTSTP:
            self._stopping = True
        elif number != signal.SIGWINCH:
            self.ended = number

    def _take(self) -> None:
        wanted = termios.tcgetattr(self._in)
        wanted[_LFLAG] &= ~(termios.ICANON | termios.ECHO)
        wanted[_CC][termios.VMIN], wanted[_CC][termios.VTIME] = 1, 0
        wanted[_CC][termios.VSUSP] = b"\0"  # comes as a key: the screen is left before we stop
        termios.tcsetattr(self._in, termios.TCSANOW, wanted)
        self._screen = self._opened.enter_context(self.console.screen(hide_cursor=True))

    def _give_back(self) -> None:
        # A terminal that is gone takes nothing more.
        try:
            with contextlib.suppress(OSError):
                self._opened.close()
        finally:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSANOW, self._found)

    def _stop(self) -> None:
        self._stopping = False
        if signal.SIGTSTP not in self._handlers:  # whoever started us has no use for it
            return
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._told)
        self._take()

    @property
    def bars(self) -> str:
        """Return the characters that sparklines can be made of."""
        return _BARS if self.console.encoding.startswith("utf") else _BARS_OF_ASCII

    def size(self) -> tuple[int, int]:
        """Return columns and lines, as they are now."""
        width, height = os.get_terminal_size(sys.stdout.fileno())
        return (width, height) if width and height else (80, 24)

    def draw(self, what: RenderableType, size: tuple[int, int]) -> None:
        """Show it."""
        self.console.size = size
        self._screen.update(what)

    def wait(self, seconds: float) -> list[str]:
        """Return the keys that are pressed, at once, or none after a signal or so many seconds."""
        ready, _, _ = select.select([self._in, self._reading], [], [], max(0.0, seconds))
        if self._reading in ready:
            os.read(self._reading, 1 << 10)
        if self._stopping:
            self._stop()
        if self._in not in ready:
            return []
        typed = os.read(self._in, 1 << 10)
        if not typed:  # the terminal is gone
            self.ended = signal.SIGHUP
        pressed = keys(typed.decode(errors="ignore"))
        if _SUSPEND in pressed:
            self._stop()
        return pressed


_SHORTEST = 0.1
"""Seconds for which ksmd has to be watched for its share of a CPU to mean something."""
_SETUP_SECONDS = 10.0
"""How long who set KSM is taken for known: to look for it takes many files."""


def run(interval: float, view: View) -> None:
    """Show it until somebody has seen enough: q or Ctrl-C.

    Raises KeyboardInterrupt for another signal that ends, KsmtoolError without a terminal.
    """
    history = History()
    with Terminal() as terminal:
        before = facts.sample(Ksm())
        machine = facts.gather()
        looked = before.at
        while True:
            pace = facts.pace(before, machine.sample, machine)
            shown_for = interval
            if pace.seconds >= _SHORTEST:
                history.add(machine, pace)
            else:  # the first one, which knows nothing of ksmd yet
                shown_for = min(interval, 5 * _SHORTEST)
            before = machine.sample
            view = _show(terminal, machine, pace, history, view, before.at + shown_for)
            if view.left or terminal.ended is not None:
                break
            known = machine.setup if before.at < looked + _SETUP_SECONDS else None
            looked = looked if known else before.at
            machine = facts.gather(setup=known)
    if terminal.ended not in (None, signal.SIGINT):
        raise KeyboardInterrupt


def _show(
    terminal: Terminal,
    machine: MachineFacts,
    pace: Pace,
    history: History,
    view: View,
    until: float,
) -> View:
    """Show it and heed keys until that time, or the end; return the view that is wanted then."""
    while True:
        size = terminal.size()
        terminal.draw(screen(machine, pace, history, view, size, terminal.bars), size)
        for key in terminal.wait(until - time.monotonic()):
            view = press(view, key)
        if view.left or terminal.ended is not None or time.monotonic() >= until:
            return view
