# SPDX-License-Identifier: MIT
"""What a preloaded library costs in malloc and free.

Runs the tight and the random-size loop of loop.c under no preload, each of ours (the one that
follows malloc also forced to madvise) and the peers, in turn, and prints the median of the ratios.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from benchmarks import common


def main() -> None:
    """Measure and print."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=31, help="runs of each (default 31)")
    options.add_argument("--seconds", type=float, default=0.1, help="of one run (default 0.1)")
    chosen = options.parse_args()

    full = common.library("libksm_preload.so")
    arms: dict[str, dict[str, str]] = {
        "no preload": {},
        "libksm_preload_prctl.so": {"LD_PRELOAD": common.library("libksm_preload_prctl.so")},
        "libksm_preload.so, prctl": {"LD_PRELOAD": full},
        "libksm_preload.so, madvise": {"LD_PRELOAD": full, "KSM_PRELOAD": "madvise"},
        **{name: {"LD_PRELOAD": path} for name, path in common.peers(chosen).items()},
    }
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        loop = common.build(Path(__file__).with_name("loop.c"), Path(folder) / "loop")
        for kind in ("tight", "random"):
            taken: dict[str, list[float]] = {name: [] for name in arms}
            for _ in range(chosen.rounds):
                for name, env in arms.items():
                    run = subprocess.run(
                        [str(loop), kind, str(chosen.seconds)],
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                        env={**os.environ, **env},
                    )
                    taken[name].append(float(run.stdout))
            print(f"{kind:28}{'one pair':>11}   of no preload")
            results[kind] = {}
            for name, times in taken.items():
                ratio = common.spread(
                    [this / plain for this, plain in zip(times, taken["no preload"])]
                )
                results[kind][name] = {"ns": statistics.median(times), **ratio}
                print(
                    f"{name:28}{statistics.median(times):8.2f} ns   {ratio['median']:.3f} x "
                    f"({ratio['quartile1']:.3f} - {ratio['quartile3']:.3f})"
                )
            print()
    common.write_json(chosen.json, "malloc", results)


if __name__ == "__main__":
    main()
