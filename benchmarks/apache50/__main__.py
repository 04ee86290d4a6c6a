# SPDX-License-Identifier: MIT
"""The experiment this project descends from: N Apaches, idle, serving files, serving PHP.

Every arm takes the same sites, written anew, through the same three situations. The classic columns
(Deduplicated, Uniques, Volatiles) are the growth of the kernel's counters since before the arm.
What was saved is measured: Pss_Anon over all processes, against plain in the same situation.

A situation with a siege is measured twice: while a second siege of the same kind goes on, and when
the load is over and ksmd had a little time. ksmd runs at nice 5: where the siege takes all
processors (--concurrency), it merges next to nothing until then.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks import common
from benchmarks.apache50.servers import Siege, end_on_sigterm, fetch_all, running
from benchmarks.apache50.sites import Load, Site, make_sites

from ksmtool import process
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE, Counters, Ksm
from ksmtool.process import Memory
from ksmtool.trial import Arm, Fleet, settle

SITUATIONS = {"static": "Static pages under siege", "php": "DokuWiki under siege"}
NO_LOAD = "No load"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to run it; times are in seconds."""

    sites: int
    first_port: int
    seconds: float
    concurrency: int
    pages_to_scan: int
    sleep_millisecs: int
    settle: float
    """At most, before "No load" is measured."""
    settle_after: float
    """At most, after a siege."""


@dataclass(frozen=True)
class Moment:
    """What was measured in one situation at one time. Sizes are bytes, counts of pages say so."""

    situation: str
    time: str
    """idle, load (a siege goes on) or after it."""
    memory: Memory
    others_opted_in: int
    """Processes that are not ours; their pages are in the counters too."""
    deduplicated_pages: int
    unique_pages: int
    volatile_pages: int
    zero_pages: int
    profit: int
    ksmd_cpu_seconds: float | None
    """Since the moment before this one, without what was spent on measuring it."""
    passes: int | None = None
    settled: bool | None = None
    """Both of the waiting before the measurement; none under load."""
    load: Load | None = None
    saved: int | None = None
    """Pss_Anon of the plain arm at the same moment less that of this one."""
    saved_percent: float | None = None


@dataclass(frozen=True)
class ArmResult:
    """One arm, its moments in order."""

    name: str
    moments: tuple[Moment, ...]


class Meter:
    """Takes the moments of one arm."""

    def __init__(self, ksm: Ksm, fleet: Fleet, before: Counters) -> None:
        """Keep what to measure; ksmd's CPU time counts from here."""
        self._ksm = ksm
        self._settings = ksm.settings()
        self._fleet = fleet
        self._before = before
        self._cpu = ksm.ksmd_cpu_seconds()

    def take(self, situation: str, when: str, timeout: float) -> Moment:
        """Measure now; ksmd gets up to `timeout` seconds to tell unique from volatile pages."""
        cpu_before, cpu = self._cpu, self._ksm.ksmd_cpu_seconds()
        if self._ksm.settings() != self._settings:
            raise KsmtoolError("Somebody else changed KSM's settings during the run.")
        memory = self._fleet.memory()
        if memory.opted_in:
            self._classify(timeout)
        now = self._ksm.counters()
        self._cpu = self._ksm.ksmd_cpu_seconds()
        return Moment(
            situation=situation,
            time=when,
            memory=memory,
            others_opted_in=_others_opted_in(self._fleet),
            deduplicated_pages=now.pages_sharing - self._before.pages_sharing,
            unique_pages=now.pages_unshared - self._before.pages_unshared,
            volatile_pages=now.pages_volatile - self._before.pages_volatile,
            zero_pages=now.zero_pages - self._before.zero_pages,
            profit=now.general_profit_bytes - self._before.general_profit_bytes,
            ksmd_cpu_seconds=None if cpu is None or cpu_before is None else cpu - cpu_before,
        )

    def restart(self) -> None:
        """Count ksmd's CPU time from now."""
        self._cpu = self._ksm.ksmd_cpu_seconds()

    def _classify(self, timeout: float) -> None:
        """Let ksmd look at every page again.

        smart_scan (Linux 6.7) passes over pages that did not merge, and the counters then take
        those for volatile; the ancestor's kernel had no such thing.
        """
        found = self._ksm.settings().get("smart_scan")
        if found is not None:
            self._ksm.apply({"smart_scan": "0"})
        target = self._ksm.number("full_scans") + 2
        deadline = time.monotonic() + timeout
        while self._ksm.number("full_scans") < target and time.monotonic() < deadline:
            time.sleep(0.02)
        if found is not None:
            self._ksm.apply({"smart_scan": found})


def _others_opted_in(fleet: Fleet) -> int:
    ours = set(fleet.pids())
    pids = (int(entry.name) for entry in process.PROC.iterdir() if entry.name.isdigit())
    return sum(process.opted_in(pid) for pid in pids if pid not in ours)


def _turn_on(ksm: Ksm, options: Options) -> None:
    """Let ksmd run at the rate asked for, whatever it did before."""
    if "advisor_mode" in ksm.settings():
        ksm.apply({"advisor_mode": "none"})
    ksm.apply(
        {
            "pages_to_scan": str(options.pages_to_scan),
            "sleep_millisecs": str(options.sleep_millisecs),
            "run": "1",
        }
    )


def run_arm(arm: Arm, folder: Path, options: Options, ksm: Ksm, say: Say) -> ArmResult:
    """Take one arm through all situations; KSM is borrowed and on."""
    say(f"{arm.name}: writing {options.sites} sites")
    shutil.rmtree(folder, ignore_errors=True)
    sites = make_sites(folder, options.sites, options.first_port)
    _forget_ended(ksm)
    before = ksm.counters()
    arm = replace(arm, env={**arm.env, "LANG": "C"})
    with running(sites, arm) as fleet:
        meter = Meter(ksm, fleet, before)
        say(f"{arm.name}: {NO_LOAD}")
        passes, settled = settle(ksm, fleet, options.settle)
        idle = meter.take(NO_LOAD, "idle", options.settle)
        moments = [replace(idle, passes=passes, settled=settled)]
        for kind in SITUATIONS:
            moments += _besiege(kind, sites, fleet, meter, options, ksm, say)
        fleet.check()
        say(f"{arm.name}: ending")
    return ArmResult(arm.name, tuple(moments))


def _besiege(
    kind: str,
    sites: Sequence[Site],
    fleet: Fleet,
    meter: Meter,
    options: Options,
    ksm: Ksm,
    say: Say,
) -> list[Moment]:
    situation = SITUATIONS[kind]
    say(f"{fleet.arm.name}: {situation}")
    fetch_all(sites, kind)
    meter.restart()
    with Siege(fleet, sites, kind, options.seconds, options.concurrency) as siege:
        load = siege.result()
    say(f"{fleet.arm.name}: measuring")
    patience = 2 * options.settle
    with Siege(fleet, sites, kind, 2 * patience, options.concurrency) as siege:
        under_load = meter.take(situation, "load", patience)
        if not siege.going_on():
            raise KsmtoolError("The siege was over before all was measured.")
    passes, settled = settle(ksm, fleet, options.settle_after)
    after = meter.take(situation, "after", patience)
    return [
        replace(under_load, load=load),
        replace(after, passes=passes, settled=settled),
    ]


def _forget_ended(ksm: Ksm, seconds: float = 30.0) -> None:
    """Let ksmd forget processes that have ended, which it does when it passes by."""
    target = ksm.number("full_scans") + 2
    deadline = time.monotonic() + seconds
    while ksm.counters().records and time.monotonic() < deadline:
        if ksm.number("full_scans") >= target:
            return
        time.sleep(0.05)


def compared(results: Sequence[ArmResult]) -> list[ArmResult]:
    """Fill in what every arm saved against plain, moment by moment."""
    plain = next((result for result in results if result.name == "plain"), None)
    if plain is None:
        return list(results)
    return [
        replace(
            result,
            moments=tuple(_against(mine, its) for mine, its in zip(result.moments, plain.moments)),
        )
        for result in results
    ]


def _against(moment: Moment, plain: Moment) -> Moment:
    whole = plain.memory.pss_anon
    saved = whole - moment.memory.pss_anon
    return replace(moment, saved=saved, saved_percent=100 * saved / whole)


CLASSIC = ("Situation", "Deduplicated", "Uniques", "Volatiles", "Spared memory")
MEASURED = (
    *("Arm", "Situation", "Processes", "Opted in", "Pss_Anon MB", "saved MB", "saved %"),
    *("requests/s", "ksmd CPU s"),
)


COMPARED = (
    *("Arm", "Situation", "Pss_Anon MB", "of plain", "of best other arm"),
    *("requests/s", "of plain", "ksmd CPU s, all"),
)


def comparison(results: Sequence[ArmResult]) -> list[tuple[str, ...]]:
    """Return one row for each arm: PHP under siege and after it, requests/s of the longer siege."""
    plain = [result for result in results if result.name == "plain"]
    memory = plain[0].moments[-1].memory.pss_anon if plain else None
    rate = _rate_of(plain[0]) if plain else None
    rows: list[tuple[str, ...]] = []
    for result in results:
        last = result.moments[-1]
        others = [
            other.moments[-1].memory.pss_anon
            for other in results
            if other.name not in ("plain", "group", result.name)
        ]
        load = _rate_of(result)
        spent = [moment.ksmd_cpu_seconds for moment in result.moments]
        rows.append(
            (
                result.name,
                _when(last),
                _mb(last.memory.pss_anon),
                _part(last.memory.pss_anon, memory),
                _part(last.memory.pss_anon, min(others, default=None)),
                "" if load is None else f"{load:.0f}",
                _part(load, rate),
                "?" if None in spent else f"{sum(second or 0 for second in spent):.1f}",
            )
        )
    return rows


def _rate_of(result: ArmResult) -> float | None:
    loads = [moment.load for moment in result.moments if moment.load is not None]
    return loads[-1].per_second if loads else None


def _part(value: float | None, whole: float | None) -> str:
    return "" if value is None or not whole else f"{value / whole:.3f}"


def tables(results: Sequence[ArmResult]) -> list[str]:
    """Return Markdown: the classic table of each arm, what was measured of all, and notes."""
    parts = []
    for result in results:
        rows = [_classic(moment) for moment in result.moments]
        parts.append(f"{result.name}\n\n{common.markdown(CLASSIC, rows)}")
    measured = [_measured(result.name, moment) for result in results for moment in result.moments]
    return [
        *parts,
        common.markdown(MEASURED, measured),
        common.markdown(COMPARED, comparison(results)),
        *notes(results),
    ]


def _classic(moment: Moment) -> tuple[str, ...]:
    return (
        _when(moment),
        str(moment.deduplicated_pages),
        str(moment.unique_pages),
        str(moment.volatile_pages),
        f"~{moment.deduplicated_pages * PAGE_SIZE / 1e6:.0f} MB",
    )


def _measured(arm: str, moment: Moment) -> tuple[str, ...]:
    of_plain = moment.saved is None or arm == "plain"
    return (
        arm,
        _when(moment),
        str(moment.memory.processes),
        str(moment.memory.opted_in),
        _mb(moment.memory.pss_anon),
        "" if of_plain else _mb(moment.saved or 0),
        "" if of_plain else f"{moment.saved_percent:.1f}",
        "" if moment.load is None else f"{moment.load.per_second:.0f}",
        "?" if moment.ksmd_cpu_seconds is None else f"{moment.ksmd_cpu_seconds:.1f}",
    )


def _when(moment: Moment) -> str:
    return moment.situation + (", after it" if moment.time == "after" else "")


def notes(results: Sequence[ArmResult]) -> list[str]:
    """Return what a reader has to know to judge the numbers."""
    said = []
    for result in results:
        for moment in result.moments:
            what = f"{result.name}, {moment.situation}"
            if moment.load is not None and moment.load.failed:
                of = f"{moment.load.failed} of {moment.load.transactions + moment.load.failed}"
                said.append(f"Warning: {what}: {of} requests failed.")
            if moment.settled is False:
                said.append(
                    f"Note: {what} ({moment.time}): still merging after {moment.passes} passes."
                )
        others = max(moment.others_opted_in for moment in result.moments)
        if others:
            said.append(
                f"Warning: {result.name}: up to {others} processes of others were opted in; "
                "their pages are in the classic columns, and ksmd's CPU time is theirs too."
            )
        opted_in = [moment.memory.opted_in for moment in result.moments]
        if result.name == "plain" and any(opted_in):
            said.append("Warning: processes of the plain arm were opted in.")
        if result.name != "plain" and not all(opted_in):
            said.append(f"Warning: no process of arm {result.name} was opted in.")
    return said


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def main() -> int:
    """Run all arms, print the tables and write the JSON; returns the exit status."""
    parser = common.trial_parser("apache50", __doc__)
    parser.add_argument("-n", "--sites", type=int, default=50, help="Apaches (50)")
    parser.add_argument("--seconds", type=float, default=30, help="of each siege (30)")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=max(1, (os.cpu_count() or 1) // 2),
        help="siege's users (half as many as processors)",
    )
    parser.add_argument("--first-port", type=int, default=18000)
    parser.add_argument("--settle", type=float, default=60, help="seconds at most, idle (60)")
    parser.add_argument("--settle-after", type=float, default=15, help="... after a siege (15)")
    given = parser.parse_args()
    if min(given.sites, given.seconds, given.concurrency) < 1:
        parser.error("--sites, --seconds and --concurrency have to be at least 1")
    options = Options(
        sites=given.sites,
        first_port=given.first_port,
        seconds=given.seconds,
        concurrency=given.concurrency,
        pages_to_scan=given.pages_to_scan,
        sleep_millisecs=given.sleep_millisecs,
        settle=given.settle,
        settle_after=given.settle_after,
    )
    end_on_sigterm()
    ksm = Ksm()
    results = []
    try:
        arms = common.trial_arms(given, ["apache2"])
        with tempfile.TemporaryDirectory(prefix="apache50.") as folder, ksm.borrowed():
            Path(folder).chmod(0o711)  # Apache's workers are not root
            _turn_on(ksm, options)
            settings = ksm.settings()
            for arm in arms:
                results.append(run_arm(arm, Path(folder) / "sites", options, ksm, common.say))
        print("\n\n".join(tables(compared(results))))
        common.write_json(
            given.json,
            "apache50",
            {
                "options": asdict(options),
                "ksm": settings,
                "arms": [asdict(result) for result in compared(results)],
            },
        )
    except KsmtoolError as error:
        print(f"apache50: {error.message}", *([error.hint] if error.hint else []), file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"apache50: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    except KeyboardInterrupt:
        print("apache50: stopped; KSM is as it was, no Apache is left", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
