# SPDX-License-Identifier: MIT
"""Print a policy file as a C header, without its comments: policy_defaults.py FILE."""

from __future__ import annotations

import sys


def header(text: str) -> str:
    """Return the text of policy_defaults.h."""
    lines = [line.strip() for line in text.split("\n")]
    rules = [line for line in lines if line and not line.startswith("#")]
    quoted = [rule.replace("\\", "\\\\").replace('"', '\\"') for rule in rules]
    literal = "\n".join(f'    "{rule}\\n"' for rule in quoted)
    return (
        "/* Made of data/policy by src/policy_defaults.py. */\n"
        f"static const char policy_defaults[] =\n{literal};\n"
    )


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        sys.stdout.write(header(file.read()))
