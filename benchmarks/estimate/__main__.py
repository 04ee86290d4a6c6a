# SPDX-License-Identifier: MIT
"""How fast `ksmtool estimate` is, on one core: gigabytes of anonymous memory a second.

A process holds memory of a known kind, and is looked at again and again, from the list of its
mappings to the result: pages that are all different, pages that are equal in pairs, zeros, every
second page of a range, and the heap of a Python. Also the memory that looking takes. Seconds are
those of CPU time, the kernel's too: reading takes no other, and what else runs does not count.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

from benchmarks import common

from ksmtool import estimate
from ksmtool.kernel import PAGE_SIZE

# Each prints a line when its memory is there, and holds it until stdin ends. {mb} is 10^6 bytes.
HOLDERS = {
    "all different": "import os; b = bytearray(os.urandom({mb} * 10**6))",
    "equal in pairs": "import os; b = bytearray(os.urandom({mb} * 122 * 4096) * 2)",
    "zeros": "b = bytearray({mb} * 10**6); b[::4096] = bytes(len(b[::4096]))",
    "every second page": (
        "import mmap; b = mmap.mmap(-1, {mb} * 2 * 10**6, flags=mmap.MAP_PRIVATE)\n"
        "for at in range(0, len(b), 8192): b[at : at + 8] = at.to_bytes(8, 'little')"
    ),
    "a Python's heap": "b = [{{'number': str(n), 'square': n * n}} for n in range({mb} * 2700)]",
}
HOLD = "\nprint(flush=True); input()"


def main() -> None:
    """Measure and print."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7, help="looks at each (default 7)")
    options.add_argument("--mb", type=int, default=1000, help="of memory (default 1000)")
    options.add_argument(
        "--sample", type=float, default=1.0, help="the part of the contents (default 1)"
    )
    chosen = options.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results = {}
    print(f"{'memory':20}{'MB':>8}{'GB/s':>8}  (quartiles)    {'us a page':>10}")
    for name, code in HOLDERS.items():
        found, taken = _looks(code.format(mb=chosen.mb), chosen.rounds, chosen.sample)
        speed = common.spread([found.anonymous / 1e9 / seconds for seconds in taken])
        page = statistics.median(taken) / (found.anonymous / PAGE_SIZE) * 1e6
        print(
            f"{name:20}{found.anonymous / 1e6:8.0f}{speed['median']:8.2f}  "
            f"({speed['quartile1']:.2f} - {speed['quartile3']:.2f}) {page:10.2f}"
        )
        results[name] = {
            "bytes": found.anonymous,
            "saved": found.saved,
            "gb_per_second": speed,
            "us_per_page": page,
        }
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"at most {most / 1e6:.0f} MB in RAM for it")
    common.write_json(chosen.json, "estimate", {"memory": results, "max_rss": most})


def _looks(code: str, rounds: int, share: float) -> tuple[estimate.Estimate, list[float]]:
    """Return the last result and the CPU seconds that each look took."""
    with subprocess.Popen(
        [sys.executable, "-c", code + HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        taken = []
        try:
            for _ in range(rounds):
                start = time.process_time()
                found = estimate.measure([holder.pid], share=share)
                taken.append(time.process_time() - start)
        finally:
            holder.kill()
    return found, taken


if __name__ == "__main__":
    main()
