# SPDX-License-Identifier: MIT
"""How random the layouts of groups are, beside the kernel's own randomization.

A program that prints where it lies is started in as many groups as there are starts, and as often
plain. For each region: the bits of its address that were seen both as 0 and as 1, how often two
starts had the same address, and an estimate of the entropy.

The estimate is that of a histogram with 64 bins over the range seen, corrected after Miller and
Madow, plus the logarithm of the places in a bin; the places are multiples of the greatest common
divisor of all distances. It cannot tell a generator that is predictable from one that is not: that
the secrets come from getrandom(2) is in src/group.c.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import common

from ksmtool import group, install

BINS = 64

REGIONS = ("program", "mmap (loader)", "heap", "stack", "vdso")
DISTANCES = {"heap above program": (2, 0), "vdso above loader": (4, 1)}

HEAD = ("Region", "Way", "Bits that vary", "Equal pairs", "Step", "Entropy in bits")


@dataclass(frozen=True)
class Spread:
    """How the addresses of one region lie."""

    varying: int
    """Bits that were seen as 0 and as 1."""
    equal_pairs: int
    """Pairs of starts with the same address."""
    step: int
    """Bytes: the greatest common divisor of all distances, 0 if there are none."""
    entropy: float
    """Estimated, in bits."""


def spread_of(addresses: Sequence[int]) -> Spread:
    """Return how `addresses` lie."""
    low, high = min(addresses), max(addresses)
    step = math.gcd(*(address - low for address in addresses))
    ones = zeros = 0
    for address in addresses:
        ones |= address
        zeros |= ~address
    pairs = sum(count * (count - 1) // 2 for count in Counter(addresses).values())
    entropy = 0.0
    if step:
        places = (high - low) // step + 1
        bins = min(BINS, places)
        hits = Counter((address - low) // step * bins // places for address in addresses)
        total = len(addresses)
        entropy = -sum(n / total * math.log2(n / total) for n in hits.values())
        entropy += (len(hits) - 1) / (2 * total * math.log(2)) + math.log2(places / bins)
    return Spread(bin(ones & zeros).count("1"), pairs, step, entropy)


def starts(commands: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """Run each command once and return where it says it lay."""
    # The stack holds the environment: equal ones, or its size would be what varies.
    env = {"PATH": "/usr/bin:/bin"}
    return [
        tuple(
            int(word, 16)
            for word in subprocess.run(
                words, env=env, check=True, stdout=subprocess.PIPE, text=True
            ).stdout.split()
        )
        for words in commands
    ]


def spreads(found: Sequence[tuple[int, ...]]) -> dict[str, Spread]:
    """Return how each region lies, and how two of them lie to each other."""
    places = dict(zip(REGIONS, zip(*found)))
    columns = list(zip(*found))
    for name, (one, other) in DISTANCES.items():
        places[name] = tuple(a - b for a, b in zip(columns[one], columns[other]))
    return {name: spread_of(addresses) for name, addresses in places.items()}


def main() -> int:
    """Measure, print the table and write the JSON; status 1 if the members of a group differ."""
    parser = common.parser(__doc__)
    parser.prog = "python3 -m benchmarks.entropy"
    parser.add_argument("--starts", type=int, default=2000, metavar="N", help="of each way (2000)")
    parser.add_argument("--twice", type=int, default=50, metavar="N", help="groups looked at twice")
    given = parser.parse_args()
    if given.starts < 2:
        parser.error("--starts has to be at least 2")
    names = [f"entropy-{os.getpid()}-{number:07}" for number in range(given.starts)]
    with tempfile.TemporaryDirectory() as folder:
        where = str(common.build(Path(__file__).with_name("where.c"), Path(folder) / "where"))
        wrapper = (install.wrapper(), "--no-preload", "--no-hash-seed", "--group-required")
        try:
            common.say(f"{given.starts} plain starts")
            plain = starts([(where,)] * given.starts)
            common.say(f"{given.starts} groups")
            groups = starts([(*wrapper, "--group", name, where) for name in names])
            again = starts([(*wrapper, "--group", name, where) for name in names[: given.twice]])
        finally:
            group.discard(*names)
    found = {"plain": spreads(plain), "group": spreads(groups)}
    rows = [
        (
            name,
            way,
            str(spread.varying),
            str(spread.equal_pairs),
            str(spread.step),
            f"{spread.entropy:.1f}",
        )
        for name in found["plain"]
        for way, spread in ((way, found[way][name]) for way in found)
    ]
    print(common.markdown(HEAD, rows))
    differing = sum(one != other for one, other in zip(groups, again))
    print(f"\n{len(again)} groups started once more: {differing} members lay elsewhere.")
    common.write_json(
        given.json,
        "entropy",
        {
            "starts": given.starts,
            "again": len(again),
            "differing": differing,
            **{
                way: {name: asdict(spread) for name, spread in regions.items()}
                for way, regions in found.items()
            },
        },
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
