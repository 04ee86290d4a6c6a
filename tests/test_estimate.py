# SPDX-License-Identifier: MIT
"""`ksmtool estimate`: the counting, live processes of known content, and what merging saves."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from conftest import AS_NOBODY, Tree, Victims, kept_running, need, need_command, run, wait_until
from ksmtool import cli, estimate, estimate_report, policy, process, trial
from ksmtool.errors import ExitStatus
from ksmtool.estimate import Estimate, Pair, Program, Tally
from ksmtool.kernel import PAGE_SIZE, Ksm

ZERO = 12345


# The counting.


def test_a_tally_of_known_contents() -> None:
    tally = Tally(ZERO)
    tally.add("a", [1, 2, 2, ZERO])
    tally.add("a", [2, 3, ZERO, ZERO])
    tally.add("b", [3, 4])
    assert tally.contents == {"a": {1: 1, 2: 3, 3: 1}, "b": {3: 1, 4: 1}}
    assert (tally.frames, tally.zeros) == ({"a": 5, "b": 2}, {"a": 3, "b": 0})
    assert tally.share == 1


def test_of_too_many_contents_a_random_part_is_kept() -> None:
    """Of 50,000 contents, each four times, at most 2000 are kept: from them the 50,000 is told."""
    numbers = random.Random(1)
    contents = [numbers.getrandbits(64) for _ in range(50_000)]
    tally = Tally(ZERO, most=2000)
    for _ in range(4):
        numbers.shuffle(contents)
        for at in range(0, len(contents), 1000):
            tally.add("a", contents[at : at + 1000])
            assert len(tally.contents["a"]) <= 2000
    assert tally.share == pytest.approx(1 / 32)
    assert set(tally.contents["a"].values()) == {4}
    saved = estimate.spared(tally.contents["a"].values(), tally.frames["a"], tally.share)
    assert saved == pytest.approx(150_000, rel=0.03)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("copies", [1, 2, 20])
def test_a_sample_is_not_off_to_one_side(share: float, copies: int) -> None:
    """The mean over many samples of 2000 contents comes near to what is so."""
    numbers = random.Random(2)
    told = []
    for _ in range(200):
        tally = Tally(ZERO, share)
        for content in (numbers.getrandbits(64) for _ in range(200)):
            tally.add("a", [content] * copies)
        told.append(estimate.spared(tally.contents["a"].values(), tally.frames["a"], tally.share))
    assert sum(told) / len(told) == pytest.approx(200 * (copies - 1), rel=0.05)


def test_what_pairs_have_in_common() -> None:
    look = look_at({"a": [1, 2, 2, 3], "b": [2, 3, 3], "c": [3, 9], "d": [8]})
    assert look.pairs == (
        Pair("a", "b", 2 * PAGE_SIZE),
        Pair("a", "c", PAGE_SIZE),
        Pair("b", "c", PAGE_SIZE),
    )
    assert {program.name: program.saved // PAGE_SIZE for program in look.programs} == {
        "a": 1, "b": 1, "c": 0, "d": 0,
    }  # fmt: skip
    assert look.saved == 5 * PAGE_SIZE  # ten frames, of five contents


def test_of_zeros_one_page_is_kept_unless_the_kernel_has_its_own() -> None:
    contents = {"a": [ZERO, ZERO, 1], "b": [ZERO]}
    kept, none = look_at(contents), look_at(contents, zeros_too=True)
    assert (kept.saved, kept.zeros) == (2 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert (none.saved, none.zeros) == (3 * PAGE_SIZE, 3 * PAGE_SIZE)


def look_at(contents: dict[str, list[int]], zeros_too: bool = False) -> Estimate:
    look = estimate._Look(Path("/proc"), 1.0)
    look.tally = Tally(ZERO)
    for name, hashes in contents.items():
        look.processes[name] = 1
        look.own[name] = len(hashes)
        look.tally.add(name, hashes)
    return look.result(zeros_too, 0.0)


# Live processes.


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"{code}\nprint(flush=True); input()"]


def test_equal_pages_of_several_processes(victims: Victims) -> None:
    """Three times 500 equal pages: two of three can be spared; of the 300 unique ones none."""
    with kept_running(*[(victims("pages"), 7, 500, 300)] * 3) as pids:
        found = estimate.measure(pids)
        one = estimate.measure(pids[:1])
    assert found.processes == 3
    # And some of libc's and the loader's data.
    assert 1000 <= found.saved / PAGE_SIZE < 1000 + 40
    assert 2400 <= found.anonymous / PAGE_SIZE < 2400 + 120
    assert found.metadata == found.anonymous // PAGE_SIZE * 64
    assert one.saved / PAGE_SIZE < 10
    assert [program.name for program in found.programs] == [str(victims("pages"))]
    assert found.pairs == ()


def test_zeros_are_told_apart() -> None:
    code = (
        "import mmap; b = mmap.mmap(-1, 4096000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "b.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "for at in range(0, len(b), 4096): b[at] = 0"
    )
    with kept_running(python("pass")) as without, kept_running(python(code)) as pids:
        before, after = estimate.measure(without), estimate.measure(pids)
    assert after.zeros - before.zeros == pytest.approx(1000 * PAGE_SIZE, abs=10 * PAGE_SIZE)
    assert after.saved - before.saved == pytest.approx(1000 * PAGE_SIZE, abs=20 * PAGE_SIZE)


@pytest.mark.root
def test_the_kernels_zeros_are_nobodys_memory() -> None:
    """1000 pages that were only read: no memory of the process, and no saving."""
    code = (
        "import mmap; b = mmap.mmap(-1, 4096000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "b.madvise(mmap.MADV_NOHUGEPAGE); b[0] = 1\n"
        "assert not any(b[at] for at in range(4096, len(b), 4096))"
    )
    with kept_running(python("import mmap")) as without, kept_running(python(code)) as pids:
        before, after = estimate.measure(without), estimate.measure(pids)
    assert after.anonymous == pytest.approx(before.anonymous, abs=100 * PAGE_SIZE)
    assert after.zeros == pytest.approx(before.zeros, abs=100 * PAGE_SIZE)


def test_what_changes_is_not_saved() -> None:
    """Of 600 equal pages of two processes, 200 get another value all the time."""
    code = (
        "import mmap, threading\n"
        "b = mmap.mmap(-1, 600 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "b.madvise(mmap.MADV_NOHUGEPAGE)\n"
        "def fill(pages, value):\n"
        "    for at in range(pages):\n"
        "        b[at * 4096 : at * 4096 + 8] = (at << 40 | value).to_bytes(8, 'little')\n"
        "def change():\n"
        "    value = 1\n"
        "    while True: fill(200, value); value += 1\n"
        "fill(600, 1 << 30); threading.Thread(target=change, daemon=True).start()"
    )
    with kept_running(*[python(code)] * 2) as pids:
        once, twice = estimate.measure(pids), estimate.measure(pids, again=0.5)
    assert once.changing == 0
    assert 380 <= twice.changing / PAGE_SIZE < 700
    assert 395 <= twice.saved / PAGE_SIZE < 500
    assert twice.seconds >= 0.5
    assert twice.frames == pytest.approx(once.frames, rel=0.1)


FORKED = """
import mmap, os, random, sys
b = mmap.mmap(-1, 4096000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
b.madvise(mmap.MADV_NOHUGEPAGE)
r = random.Random(3)
for at in range(0, len(b), 4096): b[at : at + 4096] = r.randbytes(4096)
for n in range(3):
    if os.fork() == 0:
        for at in range(0, 100 * 4096, 4096): b[at] = b[at]  # equal, but a copy of its own
        os.write(1, b'x')
        sys.stdin.buffer.raw.read()
        os._exit(0)
"""


def family(pid: int) -> list[int]:
    wait_until(lambda: len(process.descendants(pid)) == 3, 10, "three children")
    return [pid, *process.descendants(pid)]


@pytest.mark.root
def test_what_fork_shares_is_not_saved_again() -> None:
    """Of 1000 pages in four processes 100 were copied by each child: only those are a saving."""
    with kept_running(python(FORKED)) as (pid,):
        pids = family(pid)
        settle_copies(pids)
        found = estimate.measure(pids)
    assert found.exact
    assert 300 <= found.saved / PAGE_SIZE < 300 + 200  # a Python copies some more by itself
    assert found.anonymous - found.frames > 3 * 900 * PAGE_SIZE


def settle_copies(pids: Sequence[int]) -> None:
    """Wait until every child has made its copies, as the kernel tells."""
    copies = 100 * PAGE_SIZE
    wait_until(lambda: min(map(private_dirty, pids[1:])) >= copies, 10, "every child's copies")


def private_dirty(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Private_Dirty:"))
    return int(line.split()[1]) * 1024


def test_what_is_shared_by_fork_stays_shared() -> None:
    """By process_vm_readv each process would get a copy of its own of all 1000."""
    with kept_running(python(FORKED)) as (pid,):
        pids = family(pid)
        settle_copies(pids)
        before = [private_dirty(one) for one in pids]
        assert estimate.measure(pids).processes == 4
        assert [private_dirty(one) for one in pids] == before


@pytest.mark.ksm
def test_what_is_merged_stays_merged(tree: Tree, victims: Victims, ksm: Ksm) -> None:
    with kept_running(*[(tree.wrapper, victims("pages"), 7, 1000, 10)] * 2) as pids:
        ksm.apply({"run": "1"})
        wait_until(lambda: process.total(pids).merging_pages >= 2000, 60, "all is merged")
        ksm.apply({"run": "0"})
        # Not merging_pages, from which a page is only taken off when ksmd comes by.
        before = process.total(pids).pss_anon
        assert estimate.measure(pids).processes == 2
        assert process.total(pids).pss_anon == before


@pytest.mark.root
def test_without_frames_what_fork_shares_is_taken_for_one() -> None:
    """As a user without root: the same within what equal shared pages can hide."""
    code = (
        "import ctypes, mmap, os, random, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)\n" + FORKED
    )
    with kept_running(python(code)) as (pid,):
        pids = family(pid)
        settle_copies(pids)
        exact = estimate.measure(pids)
        blind = as_nobody(pids)
    assert exact.exact
    assert not blind["exact"]
    assert blind["processes"] == 4
    assert blind["saved"] == pytest.approx(exact.saved, rel=0.1)
    assert blind["anonymous"] == pytest.approx(exact.anonymous, rel=0.02)


def as_nobody(pids: Sequence[int]) -> dict[str, Any]:
    """Measure as nobody; the venv may lie where nobody cannot look, so in a child of ours."""
    code = (
        "import os, sys, xxhash; from ksmtool import estimate, estimate_report, policy, trial\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"print(estimate_report.as_json(estimate.measure({list(pids)})))"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.root
def test_nobody_may_look_at_nobodys_only() -> None:
    with kept_running(python("pass")) as pids:
        code = (
            "import os, xxhash; from ksmtool import estimate, policy, trial, cli, estimate_report\n"
            "import rich.console, rich.progress, sys\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            f"sys.argv = ['ksmtool', 'estimate', '{pids[0]}']; cli.main()"
        )
        done = run([sys.executable, "-c", code])
    assert done.returncode == ExitStatus.NEEDS_ROOT, done.stderr
    assert done.stderr.startswith("ksmtool: None of these processes may be looked at.\nhint: ")


@pytest.mark.root
def test_who_may_not_be_looked_at_is_counted(tree: Tree) -> None:
    """All processes of the machine, as nobody: most are root's, and the kernel's do not count."""
    need_command("setpriv")
    with kept_running([*AS_NOBODY, "sh", "-c", "echo; read x"]) as pids:
        found = as_nobody_all()
    assert found["unreadable"] > 0
    assert found["processes"] >= len(pids)


def as_nobody_all() -> dict[str, Any]:
    code = (
        "import os, xxhash; from ksmtool import estimate, estimate_report, policy, trial\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(estimate_report.as_json(estimate.measure(estimate.everything())))"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_stopped_process_is_read(victims: Victims) -> None:
    with kept_running((victims("pages"), 7, 50, 50)) as (pid,):
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: "T (stopped)" in Path(f"/proc/{pid}/status").read_text(), 10, "stopped")
        found = estimate.measure([pid])
        os.kill(pid, signal.SIGCONT)
    assert found.processes == 1
    assert found.anonymous >= 100 * PAGE_SIZE


def test_one_that_ends_in_the_middle_is_no_error(victims: Victims) -> None:
    """It is killed when the first of its memory has been read; the other is read to the end."""
    with kept_running(*[(victims("pages"), 7, 500, 20_000)] * 2) as pids:
        looked: list[str] = []

        def say(text: str, _done: float) -> None:
            looked.append(text)
            if len(looked) == 2:
                os.kill(pids[0], signal.SIGKILL)
                wait_until(lambda: not estimate.has_memory(pids[0]), 10, "dead")

        found = estimate.measure(pids, say=say)
        again = estimate.measure(pids)
    assert found.processes + found.ended >= 2
    assert 20_500 <= found.anonymous / PAGE_SIZE < 41_000
    assert (again.processes, again.ended) == (1, 1)


def test_programs_that_share(victims: Victims, tmp_path: Path) -> None:
    """Of one content in two programs: as a pair, beyond what each saves alone."""
    other = shutil.copy(victims("pages"), tmp_path / "other")
    with kept_running((victims("pages"), 7, 400, 10), (other, 7, 400, 10)) as pids:
        found = estimate.measure(pids)
    (pair,) = found.pairs
    assert {Path(pair.one).name, Path(pair.other).name} == {Path(victims("pages")).name, "other"}
    assert 400 <= pair.saved / PAGE_SIZE < 420
    assert found.saved >= pair.saved
    assert all(program.saved < 10 * PAGE_SIZE for program in found.programs)


def test_a_sample_of_live_memory(victims: Victims) -> None:
    """A quarter of the contents: within what that lets one expect (four standard deviations)."""
    with kept_running(*[(victims("pages"), 7, 8000, 100)] * 2) as pids:
        found = estimate.measure(pids, share=0.25)
    assert found.share == 0.25
    assert found.saved / PAGE_SIZE == pytest.approx(8000, abs=4 * (8000 * 0.75 / 0.25) ** 0.5)


def test_itself_is_left_out_and_so_is_what_the_policy_says(tmp_path: Path) -> None:
    assert os.getpid() not in estimate.everything()
    folder = tmp_path / "etc/ksm-preload"
    folder.mkdir(parents=True)
    (folder / "policy").write_text("deny sleep\n")
    rules = policy.load(tmp_path)
    need(rules.sources and not rules.problems, "the temporary folder is not trusted")
    with kept_running(["sh", "-c", "echo; exec sleep 600"]) as (pid,):
        wait_until(lambda: estimate.executable(pid).endswith("/sleep"), 10, "exec")
        found = estimate.measure([pid], rules)
        assert (found.processes, found.left_out) == (0, 1)
        assert estimate.measure([pid]).processes == 1


def test_kernel_threads_and_zombies_have_no_memory() -> None:
    assert not estimate.has_memory(2) or Path("/proc/2/comm").read_text() != "kthreadd\n"
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not estimate.has_memory(child.pid)
        assert child.pid not in estimate.everything()


def test_a_thread_stands_for_its_process() -> None:
    code = "import threading; threading.Thread(target=input, daemon=True).start()"
    with kept_running(python(code)) as (pid,):
        threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
        assert len(threads) == 2
        assert estimate.named(threads) == [pid]
        found = estimate.measure(estimate.named([*threads, 4_194_305]))
    assert (found.processes, found.ended) == (1, 1)


# The command.


def test_json(tree: Tree, victims: Victims) -> None:
    """The shape is pinned: schema 1."""
    with kept_running(*[(victims("pages"), 7, 50, 50)] * 2) as pids:
        done = run([tree.ksmtool, "estimate", "--json", *pids])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert {name: type(value).__name__ for name, value in found.items()} == {
        "schema": "int", "processes": "int", "unreadable": "int", "ended": "int",
        "left_out": "int", "anonymous": "int", "frames": "int", "saved": "int", "zeros": "int",
        "metadata": "int", "swapped": "int", "changing": "int", "again": "float",
        "share": "float", "exact": "bool", "seconds": "float", "programs": "list", "pairs": "list",
    }  # fmt: skip
    assert found["schema"] == 1
    assert set(found["programs"][0]) == {
        "name", "processes", "anonymous", "frames", "saved", "zeros",
    }  # fmt: skip
    assert found["programs"][0]["processes"] == 2


def test_by_name(tree: Tree, victims: Victims) -> None:
    program = victims("pages")
    with kept_running(*[(program, 7, 50, 50)] * 2):
        for name in (program, program.name, program.name[:15]):
            done = run([tree.ksmtool, "estimate", "--app", name])
            assert done.returncode == 0, done.stderr
            assert "that 2 processes have in RAM" in done.stdout


def test_all(tree: Tree, victims: Victims) -> None:
    with kept_running((victims("pages"), 7, 50, 50)):
        done = run([tree.ksmtool, "estimate", "--all", "--json"])
    assert done.returncode == 0, done.stderr
    names = [program["name"] for program in json.loads(done.stdout)["programs"]]
    assert str(victims("pages")) in names


@pytest.mark.parametrize("hidden", [False, True])
def test_processes_that_are_hidden(monkeypatch: pytest.MonkeyPatch, hidden: bool) -> None:
    monkeypatch.setattr(process, "hides", lambda: hidden)
    monkeypatch.setattr(estimate, "everything", lambda: [os.getpid()])
    done = CliRunner().invoke(cli.cli, ["estimate", "--all", "--json"])
    assert ("hides the processes of others" in done.stderr) is hidden
    assert json.loads(done.stdout)["schema"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "Either PIDs, or --app NAME, or --all."),
        (["1", "--all"], 2, "Either PIDs, or --app NAME, or --all."),
        (["--app", "x", "--all"], 2, "Either PIDs, or --app NAME, or --all."),
        (["0"], 2, "0"),
        (["x"], 2, "'x' is not a valid integer"),
        (["--sample", "0", "1"], 2, "0 is no part of a whole"),
        (["--sample", "101%", "1"], 2, "101% is no part of a whole"),
        (["--sample", "much", "1"], 2, "much is no part of a whole"),
        (["--sample", "nan", "1"], 2, "nan is no part of a whole"),
        (["999999999"], 1, "There is no process 999999999 that has memory of its own."),
        (["--again", "-1", "1"], 2, "-1"),
        (["--again", "nan", "1"], 2, "nan is no time"),
        (["4194305", "4194306"], 1, "There is no process 4194305, 4194306 that has memory"),
        (["1" * 300], 1, "There is no process 1"),
        (["--app", "no-such-app"], 1, "No process of no-such-app runs."),
    ],
)
def test_bad_input(tree: Tree, arguments: list[str], status: int, words: str) -> None:
    done = run([tree.ksmtool, "estimate", *arguments])
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "share"), [("10%", 0.1), ("10", 0.1), ("0.5", 0.005), ("1e-30", 0.0)]
)
def test_parts_of_a_whole(tree: Tree, victims: Victims, text: str, share: float) -> None:
    with kept_running((victims("pages"), 7, 50, 50)) as pids:
        done = run([tree.ksmtool, "estimate", "--json", "--sample", text, *pids])
    assert json.loads(done.stdout)["share"] == pytest.approx(share)


# In words.

FOUND = Estimate(
    processes=3, unreadable=0, ended=0, left_out=0, anonymous=120_000_000, frames=100_000_000,
    saved=40_000_000, zeros=10_000_000, metadata=1_875_000, swapped=0, changing=0, again=0.0,
    share=1.0, exact=True,
    seconds=0.1,
    programs=(
        Program("/usr/bin/one", 2, 90_000_000, 80_000_000, 30_000_000, 8_000_000),
        Program("/opt/one", 1, 30_000_000, 20_000_000, 1_000_000, 2_000_000),
    ),
    pairs=(Pair("/opt/one", "/usr/bin/one", 9_000_000),),
)  # fmt: skip


def test_the_sentences() -> None:
    assert estimate_report.sentences(FOUND) == [
        "KSM could save 40.0 MB (40.0 %) of the 100.0 MB that 3 processes have in RAM and KSM may "
        "merge, 10.0 MB of it pages of zeros.",
        "The kernel's records of these pages would take 1.9 MB: 38.1 MB are left.",
        "Note: 20.0 MB are shared already, by fork or KSM.",
        "Note: pages that a program keeps changing are not merged, but counted here; --again 30 "
        "looks twice.",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"saved": 1_000_000}, "would take 1.9 MB: a loss of 0.9 MB."),
        ({"swapped": 5_000_000}, "5.0 MB are swapped out: not read, and in no other number."),
        ({"share": 0.125}, "12.5 % of all contents were counted"),
        ({"exact": False}, "only root is told page frames"),
        ({"left_out": 2}, "2 processes left out, as the policy says"),
        ({"unreadable": 1}, "1 process may not be looked at"),
        ({"again": 5.0, "changing": 3_000_000}, "3.0 MB changed within 5 s: KSM does not merge"),
        ({"ended": 2}, "2 processes ended meanwhile"),
        ({"frames": 0, "saved": 0, "processes": 0}, "0.0 MB (0.0 %)"),
    ],
)
def test_what_has_to_be_said_besides(change: dict[str, Any], words: str) -> None:
    assert words in "\n".join(estimate_report.sentences(replace(FOUND, **change)))


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_a_terminal(width: int) -> None:
    many = tuple(replace(FOUND.programs[0], name=f"/usr/bin/program-{n}") for n in range(20))
    pairs = tuple(Pair(one.name, many[0].name, 1_000_000) for one in many[1:])
    pairs += (Pair("/usr/bin/few", many[0].name, 40_000),)
    for found in (FOUND, replace(FOUND, programs=many, pairs=pairs)):
        output = io.StringIO()
        estimate_report.print_tables(found, Console(file=output, width=width))
        text = output.getvalue()
        assert "…" not in text
        assert max(map(len, text.partition("KSM could")[0].splitlines())) <= width
    assert "5 more" in text
    assert "program-14" in text
    assert "few" not in text
    assert "program-19" not in text
    assert "4 more pairs" in text


def test_programs_of_one_name_are_told_apart() -> None:
    assert estimate_report.short_names(["/a/x", "/b/x", "/b/y"]) == {
        "/a/x": "/a/x", "/b/x": "/b/x", "/b/y": "y",
    }  # fmt: skip


# Beside what `try` measures.

PYTHONS = (
    "import asyncio, email, http.server, json, logging, sqlite3, ssl, time, unittest, "
    "urllib.request, xml.dom.minidom; time.sleep(1000)"
)
TABLE = (
    "import hashlib, sys, time\n"
    "table = b''.join(hashlib.sha512(b'%d' % i).digest() for i in range(40_000_000 // 64))\n"
    "open(sys.argv[1], 'w').close(); time.sleep(1000)"
)


@pytest.mark.ksm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("copies", "arm_name", "code"), [(20, "group", PYTHONS), (10, "wrap", TABLE)]
)
def test_it_comes_true(
    ksm: Ksm,
    tmp_path: Path,
    measured: Callable[[str], None],
    copies: int,
    arm_name: str,
    code: str,
) -> None:
    """The figure: within 10 % of what merging then saves, as `try` measures it, by Pss_Anon."""
    ready = str(tmp_path / "ready.{i}")
    command = [sys.executable, "-c", code, ready]
    options = trial.Options(
        copies=copies, ready_file=ready if code == TABLE else None, pages_to_scan=20000
    )
    (arm,) = trial.arms_named([arm_name], command)
    with trial.Fleet(command, arm, copies) as fleet:
        trial.wait_ready(fleet, options)
        before = fleet.memory()
        found = estimate.measure(fleet.pids())
        trial.turn_on(ksm, options)
        passes, settled = trial.settle(ksm, fleet, 120)
        after = fleet.memory()
    saved = before.pss_anon - after.pss_anon
    measured(
        f"{copies} copies, {arm_name}: estimated {found.saved / 1e6:.1f} MB in "
        f"{found.seconds:.2f} s, saved {saved / 1e6:.1f} MB of {before.pss_anon / 1e6:.1f} MB "
        f"(ratio {found.saved / saved:.3f})"
    )
    assert settled, passes
    assert saved > 0.5 * before.pss_anon
    assert found.saved == pytest.approx(saved, rel=0.10)


@pytest.mark.ksm
def test_what_is_merged_already_is_not_saved_again(ksm: Ksm, tree: Tree, victims: Victims) -> None:
    with kept_running(*[(tree.wrapper, victims("pages"), 7, 500, 10)] * 3) as pids:
        before = estimate.measure(pids)
        ksm.write("run", 1)
        wait_until(lambda: process.total(pids).merging_pages >= 1500, 60, "merged")
        after = estimate.measure(pids)
        ksm.write("run", 2)
    assert before.saved >= 1000 * PAGE_SIZE
    assert after.saved < 60 * PAGE_SIZE
    assert after.anonymous == pytest.approx(before.anonymous, rel=0.05)
    assert after.anonymous - after.frames >= 1000 * PAGE_SIZE


def test_a_bar_only_on_a_terminal(tree: Tree, victims: Victims) -> None:
    need_command("script")
    with kept_running((victims("pages"), 7, 50, 5000)) as pids:
        command = f"{tree.ksmtool} estimate {pids[0]} >/dev/null"
        quiet = run(["sh", "-c", command])
        shown = run(["script", "-qec", command, "/dev/null"])
    assert quiet.stderr == ""
    assert victims("pages").name in shown.stdout
