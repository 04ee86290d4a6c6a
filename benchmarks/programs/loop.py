# SPDX-License-Identifier: MIT
"""loop.py SCALE: a bit of what pyperformance measures: numbers, objects, text, JSON, sorting."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass


@dataclass
class Body:
    """One of the n bodies."""

    place: tuple[float, float, float]
    speed: tuple[float, float, float]
    mass: float


def bodies(steps: int) -> float:
    """Move five bodies about each other."""
    all_ = [Body((i, i * 0.7, -i), (0.1 * i, 0.0, -0.1 * i), 1.0 + i) for i in range(5)]
    for _ in range(steps):
        for one in all_:
            pull = [0.0, 0.0, 0.0]
            for other in all_:
                if other is one:
                    continue
                apart = [b - a for a, b in zip(one.place, other.place)]
                strength = other.mass / (sum(x * x for x in apart) ** 1.5 + 0.01)
                pull = [p + strength * x for p, x in zip(pull, apart)]
            x, y, z = (s + 0.001 * p for s, p in zip(one.speed, pull))
            one.speed = (x, y, z)
            x, y, z = (p + 0.001 * s for p, s in zip(one.place, one.speed))
            one.place = (x, y, z)
    return all_[0].place[0]


def words(count: int) -> int:
    """Split, count and sort words; what is gone is freed all the time."""
    text = " ".join(f"word{number * 7919 % 5003} {number}," for number in range(count))
    seen: dict[str, int] = {}
    for word in re.findall(r"[a-z0-9]+", text):
        seen[word] = seen.get(word, 0) + 1
    return len(sorted(seen.items(), key=lambda item: (-item[1], item[0])))


def documents(count: int) -> int:
    """Write and read JSON with lists, numbers and text in it."""
    table = {f"key {i}": {"id": i, "list": list(range(i % 20)), "x": "x" * i} for i in range(200)}
    return sum(len(json.loads(json.dumps(table))) for _ in range(count))


def tree(depth: int) -> int:
    """Make and count a binary tree of tuples."""
    made = made_tree(depth)
    return counted(made)


def made_tree(depth: int) -> tuple[object, ...]:
    """Return a tree of that depth."""
    return (made_tree(depth - 1), made_tree(depth - 1)) if depth else ()


def counted(node: tuple[object, ...]) -> int:
    """Return the number of nodes."""
    return 1 + sum(counted(child) for child in node if isinstance(child, tuple))


def main() -> None:
    """Do all, several times over."""
    scale = int(sys.argv[1])
    for _ in range(scale):
        print(bodies(250), words(8000), documents(15), tree(13))


if __name__ == "__main__":
    main()
