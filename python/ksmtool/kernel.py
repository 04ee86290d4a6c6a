# SPDX-License-Identifier: MIT
"""The kernel's side of KSM: /sys/kernel/mm/ksm and the ksmd thread.

Formulas and write rules are those of mm/ksm.c and Documentation/admin-guide/mm/ksm.rst.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ksmtool.errors import ExitStatus, KsmtoolError

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
RECORD_BYTES = 64
"""Of each page that ksmd looks at: sizeof(struct ksm_rmap_item) on 64-bit machines, mm/ksm.c."""

# The order in which the kernel accepts them: pages_to_scan is EINVAL while the advisor runs and is
# reset by a change of advisor_mode; run comes last: ksmd never works with half of the settings.
SETTINGS = (
    "advisor_mode",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "pages_to_scan",
    "sleep_millisecs",
    "max_page_sharing",
    "merge_across_nodes",
    "stable_node_chains_prune_millisecs",
    "use_zero_pages",
    "smart_scan",
    "run",
)


@dataclass(frozen=True)
class Counters:
    """The counters of /sys/kernel/mm/ksm at one moment, in pages unless the name says otherwise."""

    full_scans: int
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    zero_pages: int
    """Since Linux 6.6; 0 before."""
    pages_scanned: int | None
    """Since Linux 6.6."""
    general_profit_bytes: int
    """Signed; before Linux 6.4 computed from the counters with 64 bytes for each page looked at."""

    @property
    def records(self) -> int:
        """Pages ksmd keeps a record of, about: those of zero pages are not counted."""
        return self.pages_shared + self.pages_sharing + self.pages_unshared + self.pages_volatile

    @property
    def merged(self) -> int:
        """Page frames that are not needed: duplicates of a kept page, and zero pages."""
        return self.pages_sharing + self.zero_pages


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals by which people and systems end a program in good order."""


@contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a run as Ctrl-C does, with everything put back.

    Only the first counts: timeout(1) sends two, and people press Ctrl-C more than once.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in old:
            signal.signal(number, _no_more)
        raise KeyboardInterrupt

    old = _handlers()
    for number in old:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold back the ending signals: a second Ctrl-C must not cut the cleaning up short.

    They are not blocked: another thread would take them, and Python acts on them in this one. What
    is started inside is ended by them.
    """
    came: list[int] = []
    old = _handlers()
    for number in old:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _no_more(_number: int, _frame: FrameType | None) -> None:
    """Do nothing, but not by SIG_IGN: what is started would inherit that."""


def _handlers() -> dict[signal.Signals, Any]:
    """Return who handles the ending signals; what is ignored stays so: under nohup SIGHUP is."""
    handlers = {number: signal.getsignal(number) for number in ENDING}
    return {number: old for number, old in handlers.items() if old is not signal.SIG_IGN}


class Ksm:
    """KSM as seen below `root` (a fixture in tests)."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Only keeps the paths; nothing is read yet."""
        self.root = root
        self.folder = root / "sys/kernel/mm/ksm"

    def available(self) -> bool:
        """Whether this kernel was built with CONFIG_KSM."""
        return (self.folder / "run").exists()

    def require(self, hint: str = "") -> None:
        """Raise KsmtoolError with status 4 if this kernel has no KSM; `hint` says what to do."""
        if not self.available():
            raise KsmtoolError(
                "This kernel has no KSM: /sys/kernel/mm/ksm is missing.",
                hint or "It was built without CONFIG_KSM, or /sys is not mounted here.",
                ExitStatus.UNSUPPORTED,
            )

    def read(self, name: str) -> str:
        """Return the text of a file of the folder; for advisor_mode only the chosen word."""
        text = (self.folder / name).read_text().strip()
        if "[" in text:
            text = text[text.index("[") + 1 : text.index("]")]
        return text

    def number(self, name: str, default: int = 0) -> int:
        """Return a counter, or `default` where this kernel does not have it."""
        try:
            return int(self.read(name))
        except FileNotFoundError:
            return default

    def running(self) -> bool:
        """Whether ksmd merges now; run can carry 4 during memory hot-remove (KSM_RUN_OFFLINE)."""
        return self.number("run") & 3 == 1

    def counters(self) -> Counters:
        """Read every counter once."""
        shared, sharing, unshared, volatile = (
            self.number(f"pages_{kind}") for kind in ("shared", "sharing", "unshared", "volatile")
        )
        zero = max(0, self.number("ksm_zero_pages"))  # Linux 6.18 can count to -1
        # Before 6.4 the kernel did not say.
        seen = shared + sharing + unshared + volatile
        computed = (sharing + zero) * PAGE_SIZE - seen * RECORD_BYTES
        scanned = self.number("pages_scanned", -1)
        return Counters(
            full_scans=self.number("full_scans"),
            pages_shared=shared,
            pages_sharing=sharing,
            pages_unshared=unshared,
            pages_volatile=volatile,
            zero_pages=zero,
            pages_scanned=None if scanned < 0 else scanned,
            general_profit_bytes=self.number("general_profit", computed),
        )

    def settings(self) -> dict[str, str]:
        """Return every setting that this kernel has, in the order to write them."""
        return {name: self.read(name) for name in SETTINGS if (self.folder / name).exists()}

    def write(self, name: str, value: str | int) -> None:
        """Write a setting and read it back.

        Raises KsmtoolError: status 3 for EACCES and EPERM, 4 for EROFS (a container's /sys) and a
        missing file, 1 for EBUSY, EINVAL and a value that did not stay.
        """
        try:
            (self.folder / name).write_text(f"{value}\n")
        except OSError as error:
            raise _refused(name, value, error) from error
        found = self.read(name)
        if found != str(value):
            raise KsmtoolError(
                f"KSM setting {name} is {found} after {value} was written.",
                "Another program sets KSM too (ksmtuned, MOM, virt-handler?).",
            )

    def apply(self, wanted: dict[str, str]) -> None:
        """Write those of `wanted` that differ, in the only order the kernel accepts."""
        for name in SETTINGS:
            # The advisor owns pages_to_scan while it runs, and a change of mode resets it.
            if name == "pages_to_scan" and self._advisor_runs():
                continue
            if name in wanted and self.read(name) != wanted[name]:
                self.write(name, wanted[name])

    def _restore(self, found: dict[str, str]) -> None:
        """Put back all that can be, then raise what went wrong first."""
        failure: Exception | None = None
        for name, value in found.items():
            try:
                self.apply({name: value})
            except (KsmtoolError, OSError) as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _advisor_runs(self) -> bool:
        try:
            return self.read("advisor_mode") != "none"
        except FileNotFoundError:
            return False

    @contextmanager
    def borrowed(self) -> Iterator[dict[str, str]]:
        """Have KSM to oneself and put every setting back at the end, come what may.

        Yields the settings found. Raises KsmtoolError as `locked` does.
        """
        with self.locked():
            found = self.settings()
            try:
                yield found
            finally:
                with undisturbed():
                    self._restore(found)

    @contextmanager
    def locked(self, seconds: float = 600) -> Iterator[None]:
        """Have KSM to oneself: those who borrow it put back what they found.

        The lock is an flock(2) on the file `run` itself: it needs no file of ours and ends with the
        process. Raises KsmtoolError if it is held for `seconds`: any user can do that.
        """
        self.require()
        with (self.folder / "run").open() as file:
            _lock(file.fileno(), seconds)
            yield

    def ksmd_cpu_seconds(self) -> float | None:
        """Return the CPU time ksmd used since boot; None where it cannot be seen (a container)."""
        for entry in (self.root / "proc").iterdir():
            try:
                # A kernel thread has no command line; a program may call itself ksmd.
                named = (entry / "comm").read_bytes() == b"ksmd\n"
                if named and not (entry / "cmdline").read_bytes():
                    return _cpu_seconds(entry)
            except OSError:
                continue
        return None


def _cpu_seconds(entry: Path) -> float | None:
    """CPU seconds of the task at /proc/PID: schedstat counts nanoseconds, stat only ticks."""
    try:
        return int((entry / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        pass
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _lock(descriptor: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    told = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise KsmtoolError(
                    "Another run of ksmtool try (or a test, or a benchmark) has KSM to itself.",
                    "Wait for it to end; `lsof /sys/kernel/mm/ksm/run` names it.",
                ) from None
            if not told and sys.stderr is not None:
                print("ksmtool: waiting for another run that has KSM to itself", file=sys.stderr)
            told = True
            time.sleep(0.2)


def _refused(name: str, value: str | int, error: OSError) -> KsmtoolError:
    what = f"Cannot set KSM's {name} to {value}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return KsmtoolError(f"{what}: only root may.", "Run it with sudo.", ExitStatus.NEEDS_ROOT)
    if error.errno == errno.EROFS:
        return KsmtoolError(
            f"{what}: /sys is read-only here.",
            "In a container KSM is the host's to set: run ksmtool there.",
            ExitStatus.UNSUPPORTED,
        )
    if error.errno == errno.ENOENT:
        return KsmtoolError(f"{what}: this kernel does not have it.", None, ExitStatus.UNSUPPORTED)
    if error.errno == errno.EBUSY:
        return KsmtoolError(
            f"{what}: pages are merged now.",
            "Unmerge them first: echo 2 | sudo tee /sys/kernel/mm/ksm/run",
        )
    return KsmtoolError(f"{what}: {error.strerror}.")
