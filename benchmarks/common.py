# SPDX-License-Identifier: MIT
"""What every benchmark needs: what to compare, on what machine, and where the numbers go."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import distro

from ksmtool import install
from ksmtool.trial import Arm, arms_named

SCHEMA = 1
FOLDER = Path(__file__).parent


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share: --peer and --json."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="PATH.so",
        help="another preload library to put beside ours in the same run (may be repeated)",
    )
    result.add_argument("--json", metavar="FILE", help="also write all numbers to FILE")
    return result


def peers(options: argparse.Namespace) -> dict[str, str]:
    """Return name -> absolute path of the peers asked for; exit with 2 if one is not there."""
    found = {}
    for text in options.peer:
        path = Path(text).resolve()
        if not path.is_file():
            print(f"no such peer library: {text}", file=sys.stderr)
            raise SystemExit(2)
        found[f"peer {path.name}"] = str(path)
    return found


def library(name: str) -> str:
    """Return the path of one of our installed libraries."""
    return str(Path(install.wrapper()).parent.parent / "lib/ksm-preload" / name)


def build(source: Path, target: Path, *arguments: str) -> Path:
    """Compile a C file of a benchmark."""
    subprocess.run(
        [os.environ.get("CC", "cc"), "-O2", "-o", str(target), str(source), *arguments], check=True
    )
    return target


def machine() -> dict[str, str | int]:
    """Return what the numbers were measured on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "distribution": distro.name(pretty=True),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "cpu": model,
        "cpus": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def write_json(path: str | None, benchmark: str, results: dict[str, Any]) -> None:
    """Write results, machine and command line to `path`, if there is one."""
    if path is None:
        return
    document = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "command": sys.argv[1:],
        "machine": machine(),
        "results": results,
    }
    Path(path).write_text(json.dumps(document, indent=2) + "\n")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "quartile1": low, "quartile3": high}


def trial_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks, and those for arms and ksmd's rate."""
    result = parser(description)
    result.prog = f"python3 -m benchmarks.{program}"
    result.add_argument(
        "--arms",
        default="plain,wrap,group",
        metavar="ARM,...",
        help="of ksmtool try (plain,wrap,group)",
    )
    result.add_argument(
        "--pages-to-scan", type=int, default=5000, metavar="N", help="ksmd's rate (5000)"
    )
    result.add_argument(
        "--sleep-millisecs", type=int, default=20, metavar="MS", help="... every so often (20)"
    )
    return result


def trial_arms(given: argparse.Namespace, command: Sequence[str]) -> list[Arm]:
    """Return the arms asked for to run `command`, each peer as one of its own."""
    others = [
        Arm(name, prefix=("env", f"LD_PRELOAD={path}")) for name, path in peers(given).items()
    ]
    return [*arms_named(given.arms.split(","), command), *others]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table for people and for Markdown; columns of numbers stand to the right."""
    columns = list(zip(head, *rows))
    widths = [max(map(len, column)) for column in columns]
    right = [_is_numeric(column[1:]) for column in columns]
    rule = ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if r else cell.ljust(width)
            for cell, width, r in zip(line, widths, right)
        )
        + " |"
        for line in (head, rule, *rows)
    )


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(cell[:1] in ("", *"0123456789-~?") for cell in cells)


def say(text: str) -> None:
    """Tell on standard error what goes on."""
    print(text, file=sys.stderr, flush=True)
