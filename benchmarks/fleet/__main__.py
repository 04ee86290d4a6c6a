# SPDX-License-Identifier: MIT
"""Fleets of equal workers in four languages: what opting them in saves and costs.

The copies of a program build the same data from the same code, as the workers of a pool do; what
keeps their pages from being equal is the language's own doing and the kernel's random addresses.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import common

from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.trial import ArmResult, Options, Trial, run

PROGRAMS = Path(__file__).parent / "programs"

# The system's own interpreters, not those of a virtual environment that happens to be active.
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Program:
    """A worker: `interpreter option... file READY_FILE`."""

    name: str
    interpreter: str
    file: str
    copies: int
    options: tuple[str, ...] = ()


FLEETS = (
    Program("CPython", "python3", "python.py", 20),
    Program("Node", "node", "node.js", 15),
    # V8 draws addresses from the seed of Math.random(), too: a group sets none (src/seed.c).
    Program("Node-seed", "node", "node.js", 15, ("--random-seed=1",)),
    # And its helper threads (garbage collection, compiling) place objects as they happen to run.
    Program("Node-single", "node", "node.js", 15, ("--random-seed=1", "--single-threaded")),
    Program("Perl", "perl", "perl.pl", 20),
    Program("PHP", "php", "php.php", 20),
)

HEAD = (
    *("Program", "Arm", "Processes", "Opted in", "Pss_Anon MB", "of plain", "saved MB", "saved %"),
    *("ksmd CPU s", "Passes", "Settled"),
)


def main() -> int:
    """Run every fleet in every arm, print the table and write the JSON; returns the status."""
    parser = common.trial_parser("fleet", __doc__)
    parser.add_argument("-n", "--copies", type=int, help="of each program (15 Node, 20 others)")
    parser.add_argument("--only", metavar="NAME,...", help="of " + ", ".join(_names()))
    parser.add_argument("--timeout", type=float, default=120, help="to settle, each arm (120 s)")
    given = parser.parse_args()
    only = given.only.lower().split(",") if given.only else _names()
    if given.copies is not None and given.copies < 1:
        parser.error("--copies has to be at least 1")
    if unknown := set(only) - set(_names()):
        parser.error(f"no program {', '.join(sorted(unknown))}: there are {', '.join(_names())}")
    trials = {}
    missing = []
    try:
        for program in FLEETS:
            interpreter = shutil.which(program.interpreter, path=SYSTEM_PATH)
            if program.name.lower() not in only:
                continue
            if interpreter is None:
                missing.append(program.name)
                continue
            trials[program.name] = _trial(program, interpreter, given)
    except KsmtoolError as error:
        print(f"fleet: {error.message}", *([error.hint] if error.hint else []), file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("fleet: stopped; KSM is as it was, no copy is left", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    print(common.markdown(HEAD, [row for name in trials for row in _rows(name, trials[name])]))
    for name in missing:
        print(f"Warning: {name} is left out: it is not installed.")
    found = {name: asdict(trial) for name, trial in trials.items()}
    common.write_json(given.json, "fleet", {"programs": found, "missing": missing})
    return ExitStatus.FAILED if missing else ExitStatus.DONE


def _names() -> list[str]:
    return [program.name.lower() for program in FLEETS]


def _trial(program: Program, interpreter: str, given: argparse.Namespace) -> Trial:
    with tempfile.TemporaryDirectory(prefix="fleet.") as folder:
        ready = f"{folder}/ready-{{i}}"
        options = Options(
            copies=given.copies or program.copies,
            ready_file=ready,
            timeout=given.timeout,
            pages_to_scan=given.pages_to_scan,
            sleep_millisecs=given.sleep_millisecs,
        )
        command = (interpreter, *program.options, str(PROGRAMS / program.file), ready)
        common.say(f"{program.name}: {options.copies} copies")
        return run(command, common.trial_arms(given, command), options)


def of_plain(arm: ArmResult, trial: Trial) -> str:
    """Return the arm's Pss_Anon as a part of plain's, "" if there is no such arm."""
    plain = [other.memory.pss_anon for other in trial.arms if other.name == "plain"]
    return f"{arm.memory.pss_anon / plain[0]:.3f}" if plain and plain[0] else ""


def _rows(name: str, trial: Trial) -> list[tuple[str, ...]]:
    return [
        (
            name,
            arm.name,
            str(arm.memory.processes),
            str(arm.memory.opted_in),
            f"{arm.memory.pss_anon / 1e6:.1f}",
            of_plain(arm, trial),
            "" if arm.saved is None else f"{arm.saved / 1e6:.1f}",
            "" if arm.saved_percent is None else f"{arm.saved_percent:.1f}",
            "?" if arm.ksmd_cpu_seconds is None else f"{arm.ksmd_cpu_seconds:.1f}",
            str(arm.passes),
            "yes" if arm.settled else "no",
        )
        for arm in trial.arms
    ]


if __name__ == "__main__":
    sys.exit(main())
