# SPDX-License-Identifier: MIT
"""What `ksmtool status` and a refresh of `ksmtool top` take beside many processes.

Starts small processes, opted in, then runs in turn: the work of one refresh of `top` (look at every
process, put together, sort, draw) in a process that has started; `ksmtool status --json` from start
to end as people run it, of which a second is that for which it watches ksmd; and the same without
that second. Times are wall time; memory is the most that the process had resident.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks import common

from ksmtool import facts, install, process

REFRESH = """
import io, sys, time
from rich.console import Console
from ksmtool import facts, top
from ksmtool.kernel import Ksm
before, history, setup, times = facts.sample(Ksm()), top.History(), None, []
console = Console(file=io.StringIO(), width=120, height=40)
for _ in range(int(sys.argv[1]) + 1):
    start = time.perf_counter()
    machine = facts.gather(setup=setup)
    pace = facts.pace(before, machine.sample, machine)
    history.add(machine, pace)
    console.print(top.screen(machine, pace, history, top.View(), (120, 40)))
    times.append(time.perf_counter() - start)
    before, setup = machine.sample, machine.setup
print(*times[1:])  # the first also looks for who set KSM, which top does once
"""
UNWATCHED = """
import sys
from ksmtool import cli
cli._WATCHED_SECONDS = 0
sys.argv = ["ksmtool", "status", *sys.argv[1:]]
cli.main()
"""


class Run(NamedTuple):
    """A run of a program: seconds, the most resident bytes, and what it printed."""

    seconds: float
    resident: int
    output: str


def run(*command: str) -> Run:
    """Run it to its end."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        _pid, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command[:3])} ended with {child.returncode}")
    return Run(time.perf_counter() - start, used.ru_maxrss * 1024, output)


def start(stack: ExitStack, count: int) -> None:
    """Start opted-in processes that wait for the end of their input: ours, however that comes."""
    reading, writing = os.pipe()
    stack.callback(os.close, reading)
    command = [install.wrapper(), "--", "cat"]
    children = [subprocess.Popen(command, stdin=reading) for _ in range(count)]

    def end() -> None:
        os.close(writing)
        for child in children:
            child.wait()

    stack.callback(end)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{one.pid}/comm").read_text() != "cat\n" for one in children):
        if time.monotonic() > deadline:
            raise SystemExit("not all processes started within a minute")
        time.sleep(0.05)


def main() -> None:
    """Measure and print."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("-n", "--processes", type=int, default=1000, help="to start (1000)")
    options.add_argument("--rounds", type=int, default=7, help="of each (7)")
    given = options.parse_args()
    if not 1 <= given.processes <= 5000 or given.rounds < 2:
        options.error("at least 1 and at most 5000 processes, and at least 2 rounds")
    status = (install.ksmtool(), "status", "--json", "--by", "app")
    with ExitStack() as stack:
        start(stack, given.processes)
        found = facts.gather()
        threads = len(process.pids()) - len(found.processes) - found.unreadable
        refresh = run(sys.executable, "-c", REFRESH, str(given.rounds))
        whole = [run(*status) for _ in range(given.rounds)]
        unwatched = [run(sys.executable, "-c", UNWATCHED, *status[2:]) for _ in range(given.rounds)]
    times = {
        "a refresh of top": ([float(one) for one in refresh.output.split()], refresh.resident),
        "status --json": ([one.seconds for one in whole], max(one.resident for one in whole)),
        "... without the second": (
            [one.seconds for one in unwatched],
            max(one.resident for one in unwatched),
        ),
    }
    rows = [
        (name, f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}", f"{most / 1e6:.1f}")
        for name, (seconds, most) in times.items()
    ]
    print(common.markdown(("of", "median s", "most s", "peak RSS MB"), rows))
    print(
        f"Beside {len(found.processes)} processes ({found.opted_in} opted in), {found.unreadable} "
        f"that may not be looked at, and {threads} threads of the kernel."
    )
    results = {
        name: {**common.spread(seconds), "most": max(seconds), "peak_rss": most}
        for name, (seconds, most) in times.items()
    }
    seen = {"processes": len(found.processes), "opted_in": found.opted_in, "kernel": threads}
    common.write_json(given.json, "status", {"times": results, "seen": seen})


if __name__ == "__main__":
    main()
