# SPDX-License-Identifier: MIT
"""Every benchmark runs, small, and writes what it measured: so that none rots. No times here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from benchmarks.apache50.servers import Siege
from benchmarks.apache50.sites import Site
from benchmarks.entropy.__main__ import spread_of

from conftest import Tree, need
from ksmtool import group
from ksmtool.errors import KsmtoolError
from ksmtool.trial import Fleet

ROOT = Path(__file__).parent.parent


def measure(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "out.json"
    with subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:], "--json", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        try:
            said, _ = running.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            running.terminate()  # not killed: it ends what it has started, and sets KSM back
            raise
    assert running.returncode == 0, said
    document = json.loads(file.read_text())
    assert document["schema"] == 1
    assert document["benchmark"] == arguments[0]
    assert document["machine"]["kernel"] == os.uname().release
    results: dict[str, Any] = document["results"]
    return results


@pytest.mark.slow
def test_exec_with_a_peer(tmp_path: Path, tree: Tree) -> None:
    arguments = ["--rounds", "400", "--peer", str(tree.madvise_library)]
    results = measure(tmp_path, "exec", *arguments)
    arms = results["arms"]
    assert arms["empty library"]["ratio"]["median"] == 1
    assert "peer libksm_preload.so" in arms
    assert arms["libksm_preload_prctl.so"]["added_us"]["median"] > 0
    need(os.geteuid() == 0, "needs root for policies in a mount namespace")
    assert len(results["policy_us"]) == 3


@pytest.mark.slow
def test_malloc(tmp_path: Path) -> None:
    results = measure(tmp_path, "malloc", "--rounds", "3", "--seconds", "0.01")
    assert set(results) == {"tight", "random"}
    assert results["tight"]["no preload"]["median"] == 1


@pytest.mark.slow
def test_programs(tmp_path: Path) -> None:
    results = measure(tmp_path, "programs", "--quick")
    for program in ("sort", "sqlite3", "python", "redis"):
        need(program in results, f"{program} is not installed")
        assert results[program]["no preload"]["median"] == 1
        assert results[program]["libksm_preload.so, madvise"]["seconds"] > 0


@pytest.mark.slow
@pytest.mark.ksm
def test_footprint(tmp_path: Path) -> None:
    """Pages are counted, not timed: a library that writes to one page more is found here."""
    results = measure(tmp_path, "footprint", "--rounds", "15")
    for arms in results.values():
        empty = arms["empty library"]
        plain = arms["no preload"]["mappings"]["median"]
        assert 0 < empty["anonymous"]["median"] < 5
        for name in ("libksm_preload.so, prctl", "libksm_preload.so, madvise"):
            ours = arms[name]
            for kind in ("anonymous", "page tables"):
                assert ours[kind]["median"] < empty[kind]["median"] + 0.75, (name, kind)
            assert ours["mappings"]["median"] <= 1.1 * plain + 10


@pytest.mark.slow
@pytest.mark.ksm
def test_fleet(tmp_path: Path) -> None:
    (trial,) = measure(tmp_path, "fleet", "-n", "2", "--only", "perl")["programs"].values()
    assert [arm["name"] for arm in trial["arms"]] == ["plain", "wrap", "group"]
    assert [arm["memory"]["opted_in"] for arm in trial["arms"]] == [0, 2, 2]
    assert [arm["members"] for arm in trial["arms"]] == [None, None, 2]


@pytest.mark.slow
@pytest.mark.ksm
def test_apache50(tmp_path: Path) -> None:
    results = measure(tmp_path, "apache50", "-n", "2", "--seconds", "3")
    assert [arm["name"] for arm in results["arms"]] == ["plain", "wrap", "group"]
    processes = {moment["memory"]["processes"] for moment in results["arms"][2]["moments"]}
    assert processes == {moment["memory"]["opted_in"] for moment in results["arms"][2]["moments"]}


class NoFleet:
    """Stands in for a fleet: a siege only tells it what it has started."""

    def __init__(self) -> None:
        self.left_out: list[int] = []

    def leave_out(self, pid: int) -> None:
        self.left_out.append(pid)


@pytest.mark.parametrize("crashes", [1, 2])
def test_a_siege_that_crashes_runs_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashes: int
) -> None:
    keys = "transactions successful_transactions failed_transactions availability transaction_rate"
    result = json.dumps(dict.fromkeys(keys.split(), 7))
    siege = tmp_path / "siege"
    siege.write_text(
        f"#!/bin/sh\ncd {tmp_path}; echo >>runs\n"
        f"[ $(wc -l <runs) -gt {crashes} ] || kill -SEGV $$\necho '{result}'\n"
    )
    siege.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    site = Site(1, 1, tmp_path / "sites" / "site-1", (), "", (), ())
    site.folder.mkdir(parents=True)
    fleet = NoFleet()
    with Siege(cast(Fleet, fleet), [site], "static", 1, 1) as running:
        if crashes == 1:
            assert running.result().transactions == 7
        else:
            with pytest.raises(KsmtoolError, match=r"printed no result: '' \(status -?\d+\)"):
                running.result()
    assert len(fleet.left_out) == 2


def test_entropy(tmp_path: Path) -> None:
    before = set(group.files())
    results = measure(tmp_path, "entropy", "--starts", "30", "--twice", "5")
    assert (results["again"], results["differing"]) == (5, 0)
    for way in ("plain", "group"):
        for region in ("program", "mmap (loader)", "heap", "stack", "vdso"):
            assert results[way][region]["varying"] >= 28, (way, region)
            assert 26 < results[way][region]["entropy"] < 32, (way, region)
    assert not [name for name in set(group.files()) - before if name.startswith("entropy-")]


def test_spread_of_what_is_known() -> None:
    fixed = spread_of([4096] * 10)
    assert (fixed.varying, fixed.equal_pairs, fixed.entropy) == (0, 45, 0)
    few = spread_of([4096 * (number % 16) for number in range(16_000)])
    assert (few.varying, few.step) == (4, 4096)
    assert few.entropy == pytest.approx(4, abs=0.01)
    many = spread_of([(number * 2654435761 % (1 << 28)) << 12 for number in range(4096)])
    assert (many.varying, many.equal_pairs) == (28, 0)
    assert many.entropy == pytest.approx(28, abs=0.1)
    lopsided = spread_of([0] * 1000 + [1 << 40])
    assert lopsided.entropy < 40 - 5


def test_estimate(tmp_path: Path) -> None:
    results = measure(tmp_path, "estimate", "--rounds", "2", "--mb", "20")
    memory = results["memory"]
    assert memory["all different"]["bytes"] >= 20_000_000
    assert memory["all different"]["saved"] < 2_000_000
    assert memory["equal in pairs"]["saved"] == pytest.approx(10_000_000, abs=2_000_000)
    assert memory["zeros"]["saved"] > 19_000_000
    assert memory["every second page"]["bytes"] >= 20_000_000
    assert results["max_rss"] < 100_000_000


def test_start(tmp_path: Path) -> None:
    before = set(group.files())
    results = measure(tmp_path, "start", "--rounds", "2")
    assert set(results) == {
        "median_ms", "wrapper_adds_ms", "group_adds_ms", "follow_adds_ms", "wrap_of_import_click",
    }  # fmt: skip
    assert not [name for name in set(group.files()) - before if name.startswith("start-")]


@pytest.mark.slow
@pytest.mark.ksm
def test_coverage(tmp_path: Path) -> None:
    """The figure: 95 % of what the prctl reaches; and the memory of a program that does nothing."""
    results = measure(tmp_path, "coverage")
    for program in ("CPython", "PHP", "Perl", "Node", "Redis", "PostgreSQL", "C, 16 threads"):
        need(program in results, f"{program} is not installed")
        assert results[program]["madvise"]["of_prctl"] >= 0.95, program


def test_a_peer_that_is_not_there_is_status_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.malloc", "--peer", "/no/such.so"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "no such peer library: /no/such.so\n"


@pytest.mark.slow
def test_status(tmp_path: Path) -> None:
    results = measure(tmp_path, "status", "--processes", "20", "--rounds", "2")
    assert set(results["times"]) == {
        "a refresh of top",
        "status --json",
        "... without the second",
    }
    assert results["seen"]["opted_in"] >= 20
    assert all(one["peak_rss"] < 60e6 for one in results["times"].values())
