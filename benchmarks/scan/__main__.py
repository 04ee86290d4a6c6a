# SPDX-License-Identifier: MIT
"""How soon ksmd has merged what there is, and for how much CPU, at each rate.

A fleet of equal CPythons in a group is started with KSM off and everything unmerged; then one
rate is set, and the merged pages and ksmd's CPU time are read ten times a second, until nothing
more has been merged for a while. The figures are the time and the CPU seconds to 95 % of the
most that any rate came to, and to the end of --settle; and what ksmd takes afterwards, while
nothing changes.

Where ksmd has worked since boot the profiles have fixed rates (profile.py); --advisor adds what
the kernel's advisor makes of them all the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common

from ksmtool import ksmd, profile
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE, Ksm
from ksmtool.state import State
from ksmtool.trial import Fleet, Options, arms_named, wait_ready

PROGRAM = Path(__file__).parent.parent / "fleet" / "programs" / "python.py"
DEFAULT = "the kernel's defaults"
NONE = {"advisor_mode": "none"}
DEFAULTS = {
    "advisor_mode": "none",
    "pages_to_scan": "100",
    "sleep_millisecs": "20",
    "smart_scan": "1",
    "use_zero_pages": "0",
    "run": "1",
}
# ksmtuned of Debian 4.2015 for a machine of 24 GB that is short of memory: from 64 pages, 300 more
# each minute up to 1250, every 10 ms.
KSMTUNED = {**DEFAULTS, "sleep_millisecs": "10"}
KSMTUNED_MINUTE, KSMTUNED_FIRST, KSMTUNED_MORE, KSMTUNED_MOST = 60.0, 64 + 300, 300, 1250


@dataclass(frozen=True)
class Sample:
    """One look: seconds and ksmd's CPU seconds since the start, pages merged."""

    seconds: float
    cpu: float
    merged: int
    settling: bool


def main() -> int:
    """Run every rate and print the table; returns the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to FILE")
    parser.add_argument("-n", "--copies", type=int, default=20, help="of CPython (20)")
    parser.add_argument("--quiet", type=float, default=40, help="seconds without a change (40)")
    parser.add_argument("--advisor", action="store_true", help="also the kernel's advisor")
    parser.add_argument("--most", type=float, default=400, help="seconds for a rate (400)")
    parser.add_argument("--only", action="append", metavar="RATE", help="beside the defaults")
    given = parser.parse_args()
    ksm = Ksm()
    runs: dict[str, list[Sample]] = {}
    try:
        with ksm.borrowed() as found:
            for name, start in rates(ksm, found, given.advisor).items():
                if given.only and name not in (DEFAULT, *given.only):
                    continue
                common.say(name)
                runs[name] = measured(ksm, start, given)
    except KsmtoolError as error:
        print(f"scan: {error.message}", *([error.hint] if error.hint else []), file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("scan: stopped; KSM is as it was, no copy is left", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    goal = 0.95 * max(run[-1].merged for run in runs.values())
    first = reached(runs[DEFAULT], goal)
    rows = []
    for name, run in runs.items():
        there = reached(run, goal)
        rows.append(
            (
                name,
                f"{run[-1].merged * PAGE_SIZE / 1e6:.0f}",
                f"{there.seconds:.1f}" if there else "not reached",
                f"{there.cpu:.2f}" if there else "",
                f"{first.seconds / there.seconds:.1f}" if there and first else "",
                f"{settled(run).cpu:.2f}",
                f"{afterwards(run, given.quiet):.1f}",
            )
        )
    head = (
        "Rate",
        "merged MB",
        "95 % after s",
        "CPU s by then",
        "times sooner",
        "CPU s when settled",
        "% of a CPU afterwards",
    )
    print(common.markdown(head, rows))
    shape = {name: [vars(sample) for sample in run] for name, run in runs.items()}
    common.write_json(given.json, "scan", {"goal_pages": goal, "rates": shape})
    return ExitStatus.DONE


def reached(run: list[Sample], goal: float) -> Sample | None:
    """Return the first look at which as much was merged."""
    return next((sample for sample in run if sample.merged >= goal), None)


def settled(run: list[Sample]) -> Sample:
    """Return the look at which --settle ended, or else that at which nothing more was merged."""
    waiting = [sample for sample in run if sample.settling]
    if waiting:
        return waiting[-1]
    return next(sample for sample in run if sample.merged >= 0.995 * run[-1].merged)


def afterwards(run: list[Sample], quiet: float) -> float:
    """Return what ksmd took in the second half of the quiet time, in percent of a CPU."""
    last = run[-1]
    first = next(sample for sample in run if sample.seconds >= last.seconds - quiet / 2)
    return 100 * (last.cpu - first.cpu) / (last.seconds - first.seconds)


Look = Callable[[bool], None]
"""Takes whether --settle is at work."""
Start = Callable[[float, Look], None]
"""Called again and again with the seconds since the start, and what it is to call if it waits."""


def rates(ksm: Ksm, found: Mapping[str, str], advisor: bool) -> dict[str, Start]:
    """Return what sets each rate."""

    def fixed(settings: Mapping[str, str]) -> Start:
        def start(seconds: float, _look: Look) -> None:
            if seconds == 0:
                ksm.apply({name: value for name, value in settings.items() if name in found})

        return start

    def ksmtuned(seconds: float, look: Look) -> None:
        pages = KSMTUNED_FIRST + int(seconds / KSMTUNED_MINUTE) * KSMTUNED_MORE
        fixed({**KSMTUNED, "pages_to_scan": str(min(pages, KSMTUNED_MOST))})(0, look)

    def settle(seconds: float, look: Look) -> None:
        if seconds == 0:
            kept = State("balanced", None, {})
            fixed(kept.settings(ksm))(0, look)
            ksmd.settle(ksm, kept, 120, lambda _text, _done: look(True))

    def rate(name: str) -> Start:
        used = ksm.ksmd_cpu_seconds() or 0.0
        return fixed(profile.settings(profile.PROFILES[name], {**found, **NONE}, None, used))

    def by_advisor(name: str) -> Start:
        return fixed(profile.settings(profile.PROFILES[name], found, None, 0.0))

    return {
        DEFAULT: fixed(DEFAULTS),
        "ksmtuned's arithmetic": ksmtuned,
        **{name: rate(name) for name in profile.PROFILES},
        "balanced --settle": settle,
        **{f"{name}, by the advisor": by_advisor(name) for name in ("balanced", "fast") if advisor},
    }


def measured(ksm: Ksm, start: Start, given: argparse.Namespace) -> list[Sample]:
    """Return the looks at a fleet of its own."""
    interpreter = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    if interpreter is None:
        raise KsmtoolError("There is no python3.")
    ksm.write("run", 2)
    ksm.write("run", 0)
    with tempfile.TemporaryDirectory(prefix="scan.") as folder:
        ready = f"{folder}/ready-{{i}}"
        command = (interpreter, str(PROGRAM), ready)
        (arm,) = arms_named(["group"], command)
        with Fleet(command, arm, given.copies) as fleet:
            wait_ready(fleet, Options(copies=given.copies, ready_file=ready))
            return looks(ksm, start, given)


def looks(ksm: Ksm, start: Start, given: argparse.Namespace) -> list[Sample]:
    """Set the rate and look until nothing changes any more."""
    cpu = ksm.ksmd_cpu_seconds() or 0.0
    begin = time.monotonic()
    run: list[Sample] = []

    def look(settling: bool = False) -> None:
        now = time.monotonic() - begin
        used = (ksm.ksmd_cpu_seconds() or 0.0) - cpu
        run.append(Sample(now, used, ksm.counters().merged, settling))

    start(0, look)
    most, since = 0, 0.0
    while True:
        look()
        if run[-1].merged > most * 1.005:
            most, since = run[-1].merged, run[-1].seconds
        settled = most > 0 and run[-1].seconds - since > given.quiet
        if settled or run[-1].seconds > given.most:
            return run
        start(max(run[-1].seconds, 1e-9), look)
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
