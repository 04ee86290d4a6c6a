# SPDX-License-Identifier: MIT
"""Print a policy file as a C header, sorted, without its comments: policy_defaults.py FILE."""

from __future__ import annotations

import sys


def header(text: str) -> str:
    """Return policy_defaults.h: the rules, and where those begin whose pattern begins with a byte.

    Each program asks for its own byte alone. So each rule has to be a `deny` whose first byte is
    known and which needs no more than the base name. Raises ValueError on another.
    """
    lines = [line.strip() for line in text.split("\n")]
    rules = [line for line in lines if line and not line.startswith("#")]
    for rule in rules:
        pattern = rule.removeprefix("deny ")
        if pattern == rule or "/" in pattern or pattern[0] in "*?[ \t" or not rule.isascii():
            raise ValueError(f"cannot be a default, which is found by its first byte: {rule}")
    rules.sort(key=lambda rule: rule[5])  # stable
    place = 0
    places = []
    for byte in range(128):
        places.append(place)
        place += sum(len(rule) + 1 for rule in rules if ord(rule[5]) == byte)
    places.append(place)
    quoted = [rule.replace("\\", "\\\\").replace('"', '\\"') for rule in rules]
    literal = "\n".join(f'    "{rule}\\n"' for rule in quoted)
    return (
        "/* Made of data/policy by src/policy_defaults.py. */\n"
        f"static const char policy_defaults[] =\n{literal};\n"
        f"static const unsigned short policy_defaults_from[] = {{{', '.join(map(str, places))}}};\n"
    )


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        sys.stdout.write(header(file.read()))
