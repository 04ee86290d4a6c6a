# SPDX-License-Identifier: MIT
"""Memory and relations of processes: on fixture trees of old kernels, and on live processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Victims, kept_running, wait_until
from ksmtool import process
from ksmtool.kernel import PAGE_SIZE

ROLLUP = """55d0c0e9d000-7ffe1b5d5000 ---p 00000000 00:00 0                          [rollup]
Rss:                1000 kB
Pss:                 500 kB
{anon}AnonHugePages:      2048 kB
SwapPss:               4 kB
"""
MAPS = "7f00-7f01 rw-p 00000000 00:00 0\nRss: 4 kB\nVmFlags: rd wr mr mw me ac{flags}\n"


def fixture(root: Path, pid: int, files: dict[str, str]) -> Path:
    folder = root / str(pid)
    folder.mkdir()
    for name, text in {"statm": "900 250 0 0 0 0 0\n", **files}.items():
        (folder / name).write_text(text)
    return root


def test_linux_6_18(tmp_path: Path) -> None:
    stat = (
        "ksm_rmap_items 10\nksm_zero_pages 2\nksm_merging_pages 7\nksm_process_profit 5\n"
        "ksm_merge_any: yes\nksm_mergeable: yes\n"
    )
    files = {"smaps_rollup": ROLLUP.format(anon="Pss_Anon:   300 kB\n"), "ksm_stat": stat}
    memory = process.memory(5, fixture(tmp_path, 5, files))
    assert memory == process.Memory(
        processes=1,
        rss=1000 * 1024,
        pss=500 * 1024,
        pss_anon=300 * 1024,
        anon_huge=2048 * 1024,
        swap_pss=4096,
        merging_pages=7,
        zero_pages=2,
        rmap_items=10,
        opted_in=1,
    )


@pytest.mark.parametrize(("flags", "opted_in"), [(" mg", 1), ("", 0)])
def test_linux_6_1_says_it_only_in_smaps(tmp_path: Path, flags: str, opted_in: int) -> None:
    files = {
        "smaps_rollup": ROLLUP.format(anon="Pss_Anon:   300 kB\n"),
        "ksm_stat": "ksm_rmap_items 3\n",
        "smaps": MAPS.format(flags=flags),
    }
    memory = process.memory(5, fixture(tmp_path, 5, files))
    assert memory is not None
    assert (memory.opted_in, memory.rmap_items, memory.merging_pages) == (opted_in, 3, 0)


def test_linux_6_1_has_the_merged_pages_in_a_file_of_their_own(tmp_path: Path) -> None:
    files = {
        "smaps_rollup": ROLLUP.format(anon="Pss_Anon:   300 kB\n"),
        "ksm_stat": "ksm_rmap_items 3\n",
        "ksm_merging_pages": "2\n",
        "smaps": MAPS.format(flags=" mg"),
    }
    memory = process.memory(5, fixture(tmp_path, 5, files))
    assert memory is not None
    assert (memory.rmap_items, memory.merging_pages) == (3, 2)


def test_no_more_of_smaps_is_read_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.14: what the prctl opted in says so in its first mappings."""
    other = MAPS.format(flags="")
    mark = MAPS.format(flags=" mg")
    fixture(tmp_path, 5, {"smaps": mark + other * 5000})
    fixture(tmp_path, 6, {"smaps": other * 5000 + mark})
    # A name is no flag, nor is a flag cut in two by where a part ends.
    fixture(tmp_path, 7, {"smaps": other.replace("0\n", "0 /a mg\n", 1) * 5000})
    fixture(tmp_path, 8, {"smaps": "x" * ((1 << 16) - 9) + "\n" + "VmFlags: rd mg\n"})
    assert [process.opted_in(pid, tmp_path) for pid in (5, 6, 7, 8)] == [True, True, False, True]


STATUS = """Name:\t{name}
State:\tS (sleeping)
Tgid:\t5
Pid:\t5
PPid:\t42
TracerPid:\t0
Uid:\t1000\t0\t0\t0
Gid:\t1000\t0\t0\t0
{memory}Threads:\t1
"""


def test_identity(tmp_path: Path) -> None:
    text = STATUS.format(name="Web Content", memory="VmSize:\t 5000 kB\nVmRSS:\t   1200 kB\n")
    fixture(tmp_path, 5, {"status": text})
    assert process.identity(5, tmp_path) == process.Identity(
        pid=5, parent=42, name="Web Content", uid=0, resident=1200 * 1024
    )
    # A thread of the kernel, or a zombie; one that ended.
    fixture(tmp_path, 6, {"status": STATUS.format(name="kworker/0:1", memory="")})
    assert process.identity(6, tmp_path) is None
    assert process.identity(7, tmp_path) is None


def test_a_process_whose_first_thread_has_ended_is_not_dropped(victims: Victims) -> None:
    """It has no memory by its own PID, and is no zombie either."""
    with kept_running((victims("leader"),)) as (pid,):
        wait_until(lambda: "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(), 10, "it ends")
        with pytest.raises(PermissionError):
            process.identity(pid)


@pytest.mark.parametrize(
    ("options", "hides"),
    [("rw", False), ("rw,hidepid=invisible", True), ("rw,gid=4,hidepid=2", True)],
)
def test_hidepid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, hides: bool
) -> None:
    (tmp_path / "self").mkdir()
    mounts = f"22 28 0:21 / /proc rw,relatime shared:13 - proc proc {options}\n"
    (tmp_path / "self/mountinfo").write_text(f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n{mounts}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert process.hides(tmp_path) is hides
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not process.hides(tmp_path)


def test_identity_of_names_that_look_like_something_else(tmp_path: Path) -> None:
    memory = "VmRSS:\t   1200 kB\n"
    for pid, name in enumerate(("PPid:\t7", "a) b (", "", "\x1b[31mred", "\udcff"), 10):
        folder = fixture(tmp_path, pid, {}) / str(pid)
        (folder / "status").write_bytes(os.fsencode(STATUS.format(name=name, memory=memory)))
        found = process.identity(pid, tmp_path)
        assert found is not None
        assert (found.parent, found.uid) == (42, 0)


def test_linux_4_18_has_neither_ksm_stat_nor_pss_anon(tmp_path: Path) -> None:
    files = {"smaps_rollup": ROLLUP.format(anon=""), "smaps": MAPS.format(flags="")}
    memory = process.memory(5, fixture(tmp_path, 5, files))
    assert memory is not None
    assert memory.pss_anon == 500 * 1024


def test_a_rollup_that_leaves_a_mapping_out_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Linux 6.1 says it when somebody waits for the lock: guest.py has the real kernel."""
    rollup = ROLLUP.replace("1000", "{rss}")
    whole = rollup.format(rss=9000, anon="Pss_Anon: 6528 kB\n")
    partly = rollup.format(rss=7500, anon="Pss_Anon: 5059 kB\n")
    stat = "ksm_merge_any: yes\nksm_mergeable: yes\n"
    files = {
        "smaps_rollup": whole,
        "ksm_stat": stat,
        "statm": f"9999 {9000 * 1024 // PAGE_SIZE} 0\n",
    }
    fixture(tmp_path, 5, files)
    read, said = process._content, [partly, partly]

    def content(path: str) -> bytes:
        return said.pop().encode() if path.endswith("smaps_rollup") and said else read(path)

    monkeypatch.setattr(process, "_content", content)
    memory = process.memory(5, tmp_path)
    assert memory is not None
    assert (memory.pss_anon, said) == (6528 * 1024, [])
    # One that really got smaller, and one of which statm says so for good.
    (tmp_path / "5/statm").write_text(f"9999 {7500 * 1024 // PAGE_SIZE} 0\n")
    said = [partly] * 30
    memory = process.memory(5, tmp_path)
    assert memory is not None
    assert (memory.pss_anon, len(said)) == (5059 * 1024, 29)
    (tmp_path / "5/statm").write_text("9999 9999 0\n")
    memory = process.memory(5, tmp_path)
    assert memory is not None
    assert (memory.pss_anon, len(said)) == (5059 * 1024, 9)


def test_one_that_ended_is_no_error(tmp_path: Path) -> None:
    assert process.memory(5, tmp_path) is None
    assert process.opted_in(5, tmp_path) is False
    assert process.parent_of(5, tmp_path) is None
    assert process.total([5, 6], tmp_path) == process.Memory()


def test_a_zombie_is_no_error() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.memory(child.pid) is None
        assert process.opted_in(child.pid) is False


def test_a_command_name_with_parentheses(tmp_path: Path) -> None:
    fixture(tmp_path, 7, {"stat": "7 (a) 1 (b) S 42 7 7 0"})
    assert process.parent_of(7, tmp_path) == 42


def test_descendants_without_some() -> None:
    shell = "sleep 60 & sh -c 'sleep 60 & echo; wait' & wait"
    others = process.descendants(os.getpid())  # of fixtures
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = process.descendants(os.getpid(), without=others)
        try:
            assert found[0] == child.pid
            assert len(found) == 4
            assert process.descendants(os.getpid(), without=[*others, child.pid]) == []
            inner = next(
                p for p in found if process.parent_of(p) == child.pid and process.descendants(p)
            )
            assert len(process.descendants(os.getpid(), without=[*others, inner])) == 2
        finally:
            for pid in found:
                os.kill(pid, 9)


def test_the_sum_of_pss_anon_is_that_of_smaps() -> None:
    """smaps_rollup against the sum over smaps, in a process that holds still."""
    code = "x = bytearray(8 << 20); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        memory = process.memory(child.pid)
        anonymous = sum(
            int(line.split()[1]) * 1024
            for line in Path(f"/proc/{child.pid}/smaps").read_text().splitlines()
            if line.startswith("Anonymous:")
        )
        child.kill()
    assert memory is not None
    assert memory.pss_anon > 8 << 20
    assert memory.pss_anon == pytest.approx(anonymous, rel=0.01)
