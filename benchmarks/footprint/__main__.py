# SPDX-License-Identifier: MIT
"""What a preloaded library costs each process in memory, and in mappings.

Starts copies of a program that does nothing and of python3, under no preload, an empty library,
each of ours (the one that follows malloc also forced to madvise) and the peers, in turn. When all
copies of a round wait for input, the kernel's own count of their memory is read: anonymous pages;
Pss, which also has a copy's share of the files it maps; and page tables. No library here gives
memory back, so that this is the peak as well. The figure is what a copy has more than one without
preload in the same round, in pages: the mean of a round's copies, then median and quartiles of the
rounds. What the empty library adds is ld.so's own, for any library.
"""

from __future__ import annotations

import mmap
import os
import re
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import common

from ksmtool import process

IDLE = """
#include <unistd.h>
int main(void) { char c; return write(1, "\\n", 1) != 1 || read(0, &c, 1) < 0; }
"""
PYTHON = "import sys; print(flush=True); sys.stdin.read()"
KINDS = {
    "anonymous": ("smaps_rollup", "Anonymous"),
    "Pss": ("smaps_rollup", "Pss"),
    "page tables": ("status", "VmPTE"),
}
MAPPINGS = "mappings"


def seen(pid: int) -> dict[str, float]:
    """Return what the kernel says of a process: pages of each of KINDS, and its mappings."""
    folder = process.PROC / str(pid)
    found: dict[str, float] = {}
    for kind, (file, field) in KINDS.items():
        match = re.search(rf"^{field}:\s+(\d+) kB$", (folder / file).read_text(), re.MULTILINE)
        assert match is not None, f"no {field} in {file}"
        found[kind] = int(match[1]) * 1024 / mmap.PAGESIZE
    found[MAPPINGS] = len((folder / "maps").read_text().splitlines())
    return found


def measured(command: Sequence[str], env: dict[str, str], copies: int) -> dict[str, float]:
    """Run that many copies at once; return the mean of each figure."""
    with ExitStack() as stack:
        # An end of input lets a copy end: Popen closes it at the end of this block.
        running = [
            stack.enter_context(
                subprocess.Popen(
                    command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
                )
            )
            for _ in range(copies)
        ]
        for one in running:
            assert one.stdout is not None
            if one.stdout.read(1) != b"\n":
                raise SystemExit(f"{command[0]} did not start")
        each = [seen(one.pid) for one in running]
        for one in running:
            one.communicate()
    return {kind: statistics.mean(copy[kind] for copy in each) for kind in each[0]}


def main() -> None:
    """Measure and print."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=15, help="rounds (default 15)")
    options.add_argument("-n", "--copies", type=int, default=10, help="copies at once (10)")
    options.add_argument("--quick", action="store_true", help="2 rounds of 2: does it run at all?")
    chosen = options.parse_args()
    if chosen.quick:
        chosen.rounds = chosen.copies = 2
    full = common.library("libksm_preload.so")
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty.c").write_text("")
        (folder / "idle.c").write_text(IDLE)
        shared = ("-shared", "-fPIC", "-nostdlib")
        empty = str(common.build(folder / "empty.c", folder / "empty.so", *shared))
        arms: dict[str, dict[str, str]] = {
            "no preload": {},
            "empty library": {"LD_PRELOAD": empty},
            "libksm_preload_prctl.so": {"LD_PRELOAD": common.library("libksm_preload_prctl.so")},
            "libksm_preload.so, prctl": {"LD_PRELOAD": full},
            "libksm_preload.so, madvise": {"LD_PRELOAD": full, "KSM_PRELOAD": "madvise"},
            **{name: {"LD_PRELOAD": path} for name, path in common.peers(chosen).items()},
        }
        programs = {
            "idle": [str(common.build(folder / "idle.c", folder / "idle"))],
            "python3": ["/usr/bin/python3", "-I", "-c", PYTHON],
        }
        for program, command in programs.items():
            taken: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
            for number in range(-1, chosen.rounds):  # the first one fills the page cache
                for arm, more in arms.items():
                    env = {"PATH": os.defpath, "LC_ALL": "C", **more}
                    figures = measured(command, env, chosen.copies)
                    if number >= 0:
                        taken[arm].append(figures)
            results[program] = _summary(taken)
            _show(program, results[program])
    common.write_json(chosen.json, "footprint", results)


def _summary(taken: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return arm -> kind -> what it has more than without preload; of mappings, all it has."""
    plain = taken["no preload"]
    result: dict[str, dict[str, dict[str, float]]] = {}
    for arm, rounds in taken.items():
        result[arm] = {
            kind: common.spread([this[kind] - base[kind] for this, base in zip(rounds, plain)])
            for kind in KINDS
        }
        result[arm][MAPPINGS] = common.spread([this[MAPPINGS] for this in rounds])
    return result


def _show(program: str, arms: dict[str, dict[str, dict[str, float]]]) -> None:
    print(f"{program + ', pages added':30}" + "".join(f"{kind:>22}" for kind in KINDS)
          + f"{MAPPINGS:>10}{'of plain':>10}")  # fmt: skip
    for arm, figures in arms.items():
        cells = (
            f"{figures[kind]['median']:.1f} ({figures[kind]['quartile1']:.1f} - "
            f"{figures[kind]['quartile3']:.1f})"
            for kind in KINDS
        )
        count = figures[MAPPINGS]["median"]
        ratio = count / arms["no preload"][MAPPINGS]["median"]
        print(f"{arm:30}" + "".join(f"{cell:>22}" for cell in cells)
              + f"{count:10.0f}{ratio:8.2f} x")  # fmt: skip
    print()


if __name__ == "__main__":
    main()
