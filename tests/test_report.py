# SPDX-License-Identifier: MIT
"""A trial in words, table and picture: of numbers given, so that each sentence can be checked."""

from __future__ import annotations

import io
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console

from conftest import need
from ksmtool import plot, report
from ksmtool.errors import KsmtoolError
from ksmtool.process import Memory
from ksmtool.trial import ArmResult, Trial

PLAIN = ArmResult(
    name="plain",
    memory=Memory(processes=3, pss_anon=300_000_000),
    anon_huge_before=0,
    deduplicated_pages=0,
    unique_pages=0,
    volatile_pages=0,
    zero_pages=0,
    profit=0,
    ksmd_cpu_seconds=0.0,
    passes=0,
    settled=True,
    opted_in=False,
)
WRAP = replace(
    PLAIN,
    name="wrap",
    memory=Memory(processes=3, pss_anon=100_000_000, rmap_items=75_000, opted_in=3),
    deduplicated_pages=48_828,
    ksmd_cpu_seconds=1.25,
    passes=5,
    opted_in=True,
    saved=200_000_000,
    saved_percent=66.666,
)


def of(*arms: ArmResult, was_on: bool = False) -> Trial:
    return Trial(("python3", "-c", "x = 1\nwait()"), 3, arms, "5000 pages every 20 ms", was_on)


def test_the_sentence() -> None:
    assert report.sentences(of(PLAIN, WRAP)) == [
        "wrap: 100.0 MB of anonymous memory instead of 300.0 MB, 200.0 MB (66.7 %) saved, "
        "for 1.2 s of ksmd's CPU time and 4.8 MB of kernel memory for its records."
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settled": False}, "was still merging when the time was up, after 5 passes"),
        ({"opted_in": False}, "no process of arm wrap was opted in"),
        ({"drive_status": 2}, "the drive command ended with 2"),
        ({"anon_huge_before": 2_100_000}, "2.1 MB of huge pages were split"),
        ({"zero_pages": 1000}, "4.1 MB of arm wrap were pages of zeros"),
        ({"saved": -1_000_000, "saved_percent": -0.3}, "1.0 MB (0.3 %) lost"),
        ({"saved": 1_000_000, "saved_percent": 0.3}, "for its records, more than it saved."),
        ({"saved": 2_000_000, "saved_percent": 0.6}, "in common: --arms plain,wrap,group."),
        ({"others_opted_in": 3}, "3 other processes of this machine were opted in"),
    ],
)
def test_what_has_to_be_said_besides(change: dict[str, object], words: str) -> None:
    said = "\n".join(report.sentences(of(PLAIN, replace(WRAP, **change))))  # type: ignore[arg-type]
    assert words in said


def test_without_plain_the_kernels_account_counts() -> None:
    said = report.sentences(of(replace(WRAP, saved_percent=None)))
    assert said[0].startswith("wrap: 200.0 MB saved by the kernel's own account, for")


def test_other_users_of_ksm_are_mentioned() -> None:
    assert "KSM was on already" in report.sentences(of(PLAIN, WRAP, was_on=True))[-1]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(width: int) -> None:
    output = io.StringIO()
    console = Console(file=output, width=width)
    huge = Memory(processes=10_000, pss_anon=98_765_000_000, opted_in=1)
    big = replace(
        WRAP, memory=huge, saved=87_654_000_000, unique_pages=9_876_543, volatile_pages=9_876_543,
        deduplicated_pages=21_400_000, ksmd_cpu_seconds=1234.5,
    )  # fmt: skip
    report.print_table(of(PLAIN, WRAP, replace(big, name="group")), console)
    text = output.getvalue()
    assert "…" not in text
    assert "98765.0" in text
    assert "1234.5" in text
    assert "3 x python3 -c x = 1 wait()" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["wrap"])
    assert row.split() == ["wrap", "3", "100.0", "200.0", "66.7", "48828", "0", "0", "1.2"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plot(tmp_path: Path, kind: str) -> None:
    need(find_spec("matplotlib"), "matplotlib is not installed")
    path = tmp_path / f"bars.{kind}"
    plot.save(of(PLAIN, WRAP), path)
    head = path.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if kind == "png" else b"<svg" in path.read_bytes()


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(KsmtoolError, match="Cannot write"):
        plot.save(of(PLAIN, WRAP), tmp_path / "no" / "bars.png")
