# SPDX-License-Identifier: MIT
"""What a preloaded library costs at each program start.

Starts a trivial program with posix_spawn under no preload, an empty freestanding library, each of
ours and the peers, in turn. The figure is the time a library adds, as a multiple of what the empty
one adds: that is the floor set by ld.so. It is taken over blocks of 200 rounds (difference of the
blocks' medians), and the median of the blocks is printed with its quartiles.

The program that starts them stays on one CPU, and one page of this process is opted in meanwhile,
as on any machine where this is used: the first process of a machine that is opted in also pays for
waking ksmd, 10 us, and here each start would be that first (mm/ksm.c, __ksm_enter).
"""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks import common

from ksmtool import install

BLOCK = 200
MADV_MERGEABLE = 12


def main() -> None:
    """Measure and print."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=6000, help="rounds (default 6000)")
    options.add_argument("--program", default="/bin/true", help="what to start")
    chosen = options.parse_args()

    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page[0] = 1
    page.madvise(MADV_MERGEABLE)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.c"
        empty.write_text("")
        arms = {
            "no preload": "-",
            "empty library": str(
                common.build(empty, Path(folder) / "empty.so", "-shared", "-fPIC", "-nostdlib")
            ),
            "libksm_preload_prctl.so": common.library("libksm_preload_prctl.so"),
            "libksm_preload.so": common.library("libksm_preload.so"),
            "ksm-wrapper": "!" + install.wrapper(),
            **common.peers(chosen),
        }
        spawn = common.build(Path(__file__).with_name("spawn.c"), Path(folder) / "spawn")
        lines = subprocess.run(
            [str(spawn), str(chosen.rounds), *arms.values(), "--", chosen.program],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.splitlines()
    page.close()

    rounds = [[int(word) for word in line.split()] for line in lines]
    blocks = [rounds[at : at + BLOCK] for at in range(0, len(rounds) - BLOCK + 1, BLOCK)]
    results = {}
    print(f"{'':28}{'start':>10}{'added':>10}   added, as a multiple of the empty library's")
    for column, name in enumerate(arms):
        added = []
        ratios = []
        for block in blocks:
            plain, floor, this = (
                statistics.median(row[which] for row in block) for which in (0, 1, column)
            )
            added.append((this - plain) / 1000)
            ratios.append((this - plain) / (floor - plain))
        start = statistics.median(row[column] for row in rounds) / 1000
        ratio = common.spread(ratios)
        results[name] = {"start_us": start, "added_us": common.spread(added), "ratio": ratio}
        print(
            f"{name:28}{start:7.1f} us{statistics.median(added):7.1f} us   {ratio['median']:.2f} x "
            f"({ratio['quartile1']:.2f} - {ratio['quartile3']:.2f})"
        )
    common.write_json(chosen.json, "exec", {"rounds": len(rounds), "arms": results})


if __name__ == "__main__":
    main()
