# SPDX-License-Identifier: MIT
"""KSM's settings and counters: on fixture trees, and on the real kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import ENDING, PAGE_SIZE, Ksm, ended_as_interrupted, undisturbed

LINUX_5_10 = {
    "run": "0",
    "pages_to_scan": "100",
    "sleep_millisecs": "20",
    "merge_across_nodes": "1",
    "max_page_sharing": "256",
    "use_zero_pages": "0",
    "full_scans": "7",
    "pages_shared": "10",
    "pages_sharing": "90",
    "pages_unshared": "1000",
    "pages_volatile": "20",
}
LINUX_6_18 = {
    **LINUX_5_10,
    "advisor_mode": "[none] scan-time",
    "advisor_max_cpu": "70",
    "smart_scan": "1",
    "ksm_zero_pages": "5",
    "pages_scanned": "12345",
    "general_profit": "-4096",
}


def tree(root: Path, files: dict[str, str]) -> Ksm:
    folder = root / "sys/kernel/mm/ksm"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return Ksm(root)


def test_counters_of_a_new_kernel(tmp_path: Path) -> None:
    counters = tree(tmp_path, LINUX_6_18).counters()
    assert counters.general_profit_bytes == -4096
    assert counters.merged == 95
    assert counters.records == 1120
    assert counters.pages_scanned == 12345


def test_profit_of_a_kernel_that_does_not_say_it(tmp_path: Path) -> None:
    counters = tree(tmp_path, LINUX_5_10).counters()
    assert counters.general_profit_bytes == 90 * PAGE_SIZE - 64 * 1120
    assert counters.zero_pages == 0
    assert counters.pages_scanned is None


def test_settings_of_an_old_kernel_are_those_it_has(tmp_path: Path) -> None:
    settings = tree(tmp_path, LINUX_5_10).settings()
    assert "advisor_mode" not in settings
    assert "smart_scan" not in settings
    assert list(settings)[-1] == "run"


def test_a_bracketed_choice_is_read_as_its_word(tmp_path: Path) -> None:
    assert tree(tmp_path, LINUX_6_18).read("advisor_mode") == "none"


@pytest.mark.parametrize(
    ("run", "running"), [("0", False), ("1", True), ("2", False), ("5", True), ("4", False)]
)
def test_running_ignores_the_memory_hotplug_bit(tmp_path: Path, run: str, running: bool) -> None:
    assert tree(tmp_path, {"run": run}).running() is running


def test_no_ksm_is_status_4(tmp_path: Path) -> None:
    ksm = Ksm(tmp_path)
    assert not ksm.available()
    with pytest.raises(KsmtoolError, match="no KSM") as caught:
        ksm.require()
    assert caught.value.status is ExitStatus.UNSUPPORTED


class Recorded(Ksm):
    """Notes the order of the writes."""

    def write(self, name: str, value: str | int) -> None:
        self.writes = [*getattr(self, "writes", []), name]
        super().write(name, value)


def test_apply_writes_in_the_kernels_order_and_only_what_differs(tmp_path: Path) -> None:
    tree(tmp_path, {**LINUX_6_18, "advisor_mode": "none"})
    ksm = Recorded(tmp_path)
    ksm.apply({"run": "1", "sleep_millisecs": "20", "pages_to_scan": "5", "smart_scan": "0"})
    assert ksm.writes == ["pages_to_scan", "smart_scan", "run"]


def test_the_advisors_pages_to_scan_is_left_to_it(tmp_path: Path) -> None:
    tree(tmp_path, {**LINUX_6_18, "advisor_mode": "scan-time"})
    ksm = Recorded(tmp_path)
    ksm.apply({"pages_to_scan": "5", "run": "1"})
    assert ksm.writes == ["run"]


def test_borrowed_puts_all_back_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    ksm = tree(tmp_path, {**LINUX_5_10})
    folder = ksm.folder

    def scenario() -> None:
        with ksm.borrowed():
            ksm.apply({"pages_to_scan": "77", "use_zero_pages": "1", "run": "1"})
            (folder / "use_zero_pages").unlink()
            (folder / "use_zero_pages").mkdir()  # cannot be read or written any more
            raise RuntimeError

    with pytest.raises((KsmtoolError, OSError)):
        scenario()
    assert ksm.read("pages_to_scan") == "100"
    assert ksm.read("run") == "0"


def test_a_missing_setting_is_status_4(tmp_path: Path) -> None:
    ksm = tree(tmp_path, LINUX_5_10)
    ksm.folder = tmp_path / "gone"
    with pytest.raises(KsmtoolError, match="smart_scan to 1: this kernel does not") as caught:
        ksm.write("smart_scan", 1)
    assert caught.value.status is ExitStatus.UNSUPPORTED


@pytest.mark.ksm
def test_every_setting_of_this_kernel_is_borrowed_and_returned(ksm: Ksm) -> None:
    before = ksm.settings()
    program = (
        "from ksmtool.kernel import Ksm\n"
        "k = Ksm()\n"
        "k.apply({'advisor_mode': 'scan-time', 'use_zero_pages': '1', 'run': '1'})\n"
        "k.apply({'advisor_mode': 'none', 'pages_to_scan': '123'})\n"
        "print(k.read('pages_to_scan'), k.read('run'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "123 1\n"
    ksm._restore(before)
    assert ksm.settings() == before


@pytest.mark.ksm
def test_invalid_values_are_refused_in_one_sentence(ksm: Ksm) -> None:
    with pytest.raises(KsmtoolError, match=r"^Cannot set KSM's run to 9: Invalid argument\.$"):
        ksm.write("run", 9)


@pytest.mark.ksm
def test_ksmd_is_found(ksm: Ksm) -> None:
    seconds = ksm.ksmd_cpu_seconds()
    assert seconds is not None
    assert seconds >= 0


@pytest.mark.parametrize("number", ENDING)
def test_undisturbed_holds_signals_back_with_other_threads(number: signal.Signals) -> None:
    """A mask of this thread alone would let another take them."""
    came: list[int] = []
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    old = signal.signal(number, lambda number, _frame: came.append(number))
    try:
        with undisturbed():
            for _ in range(3):
                os.kill(os.getpid(), number)
            assert came == []
        assert came == [number]
    finally:
        signal.signal(number, old)
        done.set()
        other.join()


def test_only_the_first_signal_interrupts() -> None:
    cleaned = False

    def run() -> None:
        nonlocal cleaned
        with ended_as_interrupted():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("not interrupted")
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                cleaned = True

    with pytest.raises(KeyboardInterrupt):
        run()
    assert cleaned
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_as_interrupted(), undisturbed():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
