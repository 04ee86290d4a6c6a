# SPDX-License-Identifier: MIT
"""What the launchers cost at a program's start.

`ksm-wrapper true`, also in a group, beside `true`; a shell in a group that starts ten programs,
without and with --follow; `ksmtool wrap true` beside a Python that imports click. In turn; medians,
and the median of the differences and ratios of a round.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import common

from ksmtool import group, install


def main() -> None:
    """Measure and print."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=60, help="runs of each (default 60)")
    chosen = options.parse_args()
    ksmtool = str(Path(sys.executable).parent / "ksmtool")
    name = f"start-{os.getpid()}"
    in_group = [install.wrapper(), "--group", name, "--group-required"]
    shell = ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do /bin/true; done"]
    commands = {
        "true": ["true"],
        "ksm-wrapper true": [install.wrapper(), "true"],
        "ksm-wrapper --group true": [*in_group, "true"],
        "ksm-wrapper --group sh": [*in_group, *shell],
        "ksm-wrapper --follow sh": [*in_group, "--follow", *shell],
        "python3 -c 'import click'": [sys.executable, "-c", "import click"],
        "ksmtool wrap true": [ksmtool, "wrap", "-q", "true"],
    }
    try:
        taken = _taken(commands, chosen.rounds)
    finally:
        group.discard(name)
    true, wrapper, member, alone, followed, click, wrap = taken.values()
    results = {
        "median_ms": {name: statistics.median(times) for name, times in taken.items()},
        "wrapper_adds_ms": statistics.median(b - a for a, b in zip(true, wrapper)),
        "group_adds_ms": statistics.median(b - a for a, b in zip(true, member)),
        "follow_adds_ms": statistics.median((b - a) / 10 for a, b in zip(alone, followed)),
        "wrap_of_import_click": statistics.median(b / a for a, b in zip(click, wrap)),
    }
    for name, times in taken.items():
        print(f"{name:28}{statistics.median(times):8.2f} ms")
    print(f"ksm-wrapper adds {results['wrapper_adds_ms']:.2f} ms")
    print(f"ksm-wrapper --group adds {results['group_adds_ms']:.2f} ms")
    print(f"--follow adds {results['follow_adds_ms']:.2f} ms to each program started in the group")
    print(f"ksmtool wrap is {results['wrap_of_import_click']:.2f} x import click")
    common.write_json(chosen.json, "start", results)


def _taken(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Run all commands in turn and return the milliseconds that each run of each took."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True)
            taken[name].append((time.perf_counter() - start) * 1000)
    return taken


if __name__ == "__main__":
    main()
