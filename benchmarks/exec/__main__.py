# SPDX-License-Identifier: MIT
"""What a preloaded library costs at each program start.

Starts a trivial program with posix_spawn under no preload, an empty freestanding library, each of
ours and the peers, in turn. The figure is the time a library adds, as a multiple of what the empty
one adds: that is the floor set by ld.so. It is taken over blocks of 200 rounds (difference of the
blocks' medians), and the median of the blocks is printed with its quartiles.

Then the policy alone: how long a fresh process takes to read it, with the defaults and, in a mount
namespace, with a file and three drop-ins in /etc/ksm-preload.

The program that starts them stays on one CPU, and one page of this process is opted in meanwhile,
as on any machine where this is used: the first process of a machine that is opted in also pays for
waking ksmd, 10 us, and here each start would be that first (mm/ksm.c, __ksm_enter).
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common

from ksmtool import install

BLOCK = 200
MADV_MERGEABLE = 12
SOURCE = common.FOLDER.parent / "src"
DEFAULTS = common.FOLDER.parent / "data" / "policy"

# What stands in /etc/ksm-preload, by the name of the measurement; None: nothing.
POLICIES: dict[str, dict[str, str] | None] = {
    "the defaults": None,
    "a policy and 3 drop-ins": {
        "policy": DEFAULTS.read_text(),
        **{f"policy.d/{i}0.conf": f"deny a-program\nallow another-{i}\n" for i in range(3)},
    },
    "... with a rule that wants /proc/self/exe": {
        "policy": DEFAULTS.read_text(),
        **{f"policy.d/{i}0.conf": f"deny /opt/vendor{i}/*\n" for i in range(3)},
    },
}


def read_policy(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return the microseconds that reading each of POLICIES takes in a fresh process."""
    header = subprocess.run(
        [sys.executable, SOURCE / "policy_defaults.py", DEFAULTS],
        check=True,
        stdout=subprocess.PIPE,
    )
    (folder / "policy_defaults.h").write_bytes(header.stdout)
    source = Path(__file__).with_name("policy.c")
    program = common.build(source, folder / "policy", f"-I{SOURCE}", f"-I{folder}")
    results = {}
    for name, files in POLICIES.items():
        command = [str(program), str(rounds)]
        if os.geteuid() == 0:
            etc = folder / name.replace(" ", "-") / "etc"
            etc.mkdir(parents=True)
            shutil.copy("/etc/ld.so.cache", etc)
            for file, text in (files or {}).items():
                path = etc / "ksm-preload" / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            script = f"mount --bind '{etc}' /etc && exec \"$@\""
            command = ["unshare", "--mount", "sh", "-c", script, "sh", *command]
        elif files:
            common.say(f"{name}: needs root for a mount namespace")
            continue
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()
        results[name] = common.spread([int(line) / 1000 for line in lines])
    return results


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
        policy = read_policy(Path(folder), chosen.rounds)
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
    for name, taken in policy.items():
        print(
            f"reading the policy, {name}: {taken['median']:.1f} us "
            f"({taken['quartile1']:.1f} - {taken['quartile3']:.1f})"
        )
    document = {"rounds": len(rounds), "arms": results, "policy_us": policy}
    common.write_json(chosen.json, "exec", document)


if __name__ == "__main__":
    main()
