# SPDX-License-Identifier: MIT
"""`ksmtool try` on real processes and the real KSM: what it measures, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Tree, need, run, wait_until
from ksmtool import trial
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import Ksm

Victims = Callable[..., Path]

# 16 MB, equal in all copies, then nothing: what KSM is best at.
EQUAL = (
    "import random, sys, time; r = random.Random(1); "
    "x = [r.randbytes(4096) for _ in range(4096)]; "
    "b = b''.join(x); del x; open(sys.argv[1], 'w').close(); time.sleep(600)"
)


@pytest.fixture
def settings(ksm_free: Ksm) -> Iterator[Ksm]:
    """KSM, checked to be at the end as it was before."""
    before = ksm_free.settings()
    yield ksm_free
    assert ksm_free.settings() == before


@pytest.fixture
def ksm_free(reason_against_ksm: str | None) -> Ksm:
    need(reason_against_ksm is None, reason_against_ksm or "")
    return Ksm()


def try_json(tree: Tree, *arguments: object) -> dict[str, Any]:
    # By SIGTERM, after which it puts KSM's settings back; subprocess's own timeout is a SIGKILL.
    done = subprocess.run(
        ["timeout", "--foreground", "170", tree.ksmtool, "try", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def left_over(mark: str) -> list[int]:
    """Processes whose command line has `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.ksm
def test_equal_memory_is_saved_and_the_saving_is_real(
    tree: Tree, settings: Ksm, tmp_path: Path
) -> None:
    """The figure: saved MB agrees with an independent sum of Pss_Anon within 3 %.

    The independent sum is made by awk, from smaps, at the end of each arm (--drive).
    """
    mark = f"{tmp_path}/ready"
    sums = tmp_path / "sums"
    drive = (
        f"for p in $(pgrep -f {mark}); do tr '\\0' '\\n' < /proc/$p/environ | grep -q KSMTOOL_COPY "
        "&& cat /proc/$p/smaps_rollup; done 2>/dev/null | "
        f"awk '/^Pss_Anon/ {{ s += $2 }} END {{ print s * 1024 }}' >> {sums}"
    )
    result = try_json(
        tree, "-n", 5, "--ready-file", mark + ".{i}", "--drive", drive, "--pages-to-scan", 20000,
        "--", sys.executable, "-c", EQUAL, mark + ".{i}",
    )  # fmt: skip
    plain, wrap = result["arms"]
    independent = [int(line) for line in sums.read_text().split()]  # plain is measured last
    assert plain["opted_in"] is False
    assert wrap["opted_in"] is True
    assert wrap["settled"] is True
    assert wrap["memory"]["processes"] == 5
    # 4 of the 5 equal 16 MB (and the garbage of making it, maybe).
    assert wrap["saved"] > 4 * 16e6
    assert wrap["saved"] == pytest.approx(independent[1] - independent[0], rel=0.03)
    assert wrap["saved"] == pytest.approx(
        wrap["profit"] + wrap["memory"]["rmap_items"] * 64, rel=0.1
    )
    assert wrap["ksmd_cpu_seconds"] > 0
    assert wrap["deduplicated_pages"] > 4 * 4096
    assert not left_over(mark)
    assert not list(tmp_path.glob("ready*"))


@pytest.mark.ksm
def test_unique_memory_is_unique_not_volatile(tree: Tree, settings: Ksm, victims: Victims) -> None:
    command = f"tail -f /dev/null | {victims('pages')} 1 0 3000"
    result = try_json(tree, "-n", 3, "--pages-to-scan", 20000, "--", "sh", "-c", command)
    wrap = result["arms"][1]
    assert wrap["unique_pages"] > 3 * 3000
    assert wrap["volatile_pages"] < 0.05 * wrap["unique_pages"]
    assert abs(wrap["saved"]) < 0.1 * result["arms"][0]["memory"]["pss_anon"]


@pytest.mark.ksm
def test_the_json_is_schema_1(tree: Tree, settings: Ksm) -> None:
    result = try_json(tree, "-n", 1, "--arms", "wrap", "--", "sleep", 600)
    assert set(result) == {"schema", "command", "copies", "arms", "rate", "ksm_was_on"}
    assert result["schema"] == 1
    assert result["command"] == ["sleep", "600"]
    assert set(result["arms"][0]) == {
        "name", "memory", "anon_huge_before", "deduplicated_pages", "unique_pages",
        "volatile_pages", "zero_pages", "profit", "ksmd_cpu_seconds", "passes", "settled",
        "opted_in", "members", "others_opted_in", "drive_status", "saved", "saved_percent",
        "seconds",
    }  # fmt: skip
    assert set(result["arms"][0]["memory"]) == {
        "processes", "rss", "pss", "pss_anon", "anonymous", "anon_huge", "swap_pss",
        "merging_pages", "zero_pages", "rmap_items", "opted_in",
    }  # fmt: skip
    assert result["arms"][0]["saved_percent"] is None  # there is no plain arm to be a part of


@pytest.mark.ksm
def test_copies_know_their_number_and_daemons_are_found(
    tree: Tree, settings: Ksm, tmp_path: Path
) -> None:
    """A daemon forks twice and leaves its session: its memory is still the copy's."""
    code = (
        "import os, sys, time\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "if os.fork(): os._exit(0)\n"
        "open(sys.argv[1] + '.' + os.environ['KSMTOOL_COPY'], 'w').close()\n"
        "time.sleep(600)\n"
    )
    mark = str(tmp_path / "daemon")
    result = try_json(
        tree, "-n", 3, "--arms", "plain", "--ready-file", mark + ".{i}",
        "--", sys.executable, "-c", code, mark,
    )  # fmt: skip
    assert result["arms"][0]["memory"]["processes"] == 3
    assert not left_over(mark)


@pytest.mark.ksm
def test_ready_port(tree: Tree, settings: Ksm) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base = probe.getsockname()[1]
    code = (
        "import socket, sys, time; time.sleep(0.5); s = socket.socket(); "
        f"s.bind(('127.0.0.1', {base} + int(sys.argv[1]))); s.listen(); time.sleep(600)"
    )
    result = try_json(
        tree, "-n", 2, "--arms", "plain", "--ready-port", f"{base}+{{i}}",
        "--", sys.executable, "-c", code, "{i}",
    )  # fmt: skip
    assert result["arms"][0]["memory"]["processes"] == 2


@pytest.mark.parametrize(
    ("text", "ports"),
    [("8080", [8080, 8080]), ("8000+{i}", [8001, 8002]), ("80{i}", [801, 802])],
)
def test_ports(text: str, ports: list[int]) -> None:
    assert trial.ready_ports(text, 2) == ports


@pytest.mark.parametrize("text", ["x", "", "8000+", "70000", "0", "-1", "8000*{i}"])
def test_no_ports(text: str) -> None:
    with pytest.raises(ValueError, match=r"port|invalid literal"):
        trial.ready_ports(text, 2)


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("code", "how"),
    [("import sys; sys.exit('what I had to say')", "ended with status 1"),
     ("import sys, os; print('what I had to say', file=sys.stderr, flush=True); os.abort()",
      "was ended by signal 6")],
)  # fmt: skip
def test_a_copy_that_dies_is_an_error_with_its_last_words(
    tree: Tree, settings: Ksm, code: str, how: str
) -> None:
    done = run([tree.ksmtool, "try", "-n", 3, "--", sys.executable, "-c", code])
    assert done.returncode == 1
    assert f"Copy 1 of 3 (arm wrap) {how} before it was measured." in done.stderr
    assert "  what I had to say" in done.stderr
    assert done.stdout == ""


@pytest.mark.ksm
def test_one_of_many_that_dies_ends_the_others(tree: Tree, settings: Ksm, tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    code = "import sys, time; time.sleep(0.3 if sys.argv[2] == '2' else 600)"
    done = run([tree.ksmtool, "try", "-n", 3, "--", sys.executable, "-c", code, mark, "{i}"])
    assert done.returncode == 1
    assert "Copy 2 of 3 (arm wrap) ended with status 0" in done.stderr
    assert not left_over(mark)


@pytest.mark.ksm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_leaves_nothing_behind(
    tree: Tree, settings: Ksm, tmp_path: Path, number: signal.Signals
) -> None:
    """In the middle of merging: KSM is on, the copies run."""
    mark = str(tmp_path / "ready")
    arguments = ["-n", "3", "--arms", "wrap", "--ready-file", mark + ".{i}", "--pages-to-scan", "1"]
    command = [sys.executable, "-c", EQUAL, mark + ".{i}"]
    with subprocess.Popen(
        [tree.ksmtool, "try", *arguments, "--", *command], stderr=subprocess.PIPE, text=True
    ) as child:
        wait_until(lambda: settings.running() and bool(list(tmp_path.iterdir())), 60, "all run")
        child.send_signal(number)
        _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert said == (
        "ksmtool: Interrupted: the copies were ended and every KSM setting is as it was.\n"
    )
    assert not left_over(mark)
    assert not list(tmp_path.iterdir())


@pytest.mark.ksm
def test_copies_that_ignore_sigterm_are_ended(
    tree: Tree, settings: Ksm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "STOP_SECONDS", 0.5)
    mark = str(tmp_path / "mark")
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    fleet = trial.Fleet([sys.executable, "-c", code, mark], trial.plain_arm(), 2)
    with fleet:
        wait_until(lambda: len(left_over(mark)) == 2, 10, "copies run")
    assert not left_over(mark)


@pytest.mark.ksm
def test_memory_is_compared_at_the_same_age(tree: Tree, settings: Ksm) -> None:
    """What a program frees by itself after two seconds is no saving."""
    code = "import os, time; b = os.urandom(20_000_000); time.sleep(2); del b; time.sleep(600)"
    command = [sys.executable, "-c", code]
    plain, wrap = try_json(tree, "-n", 3, "--pages-to-scan", 300, "--", *command)["arms"]
    assert plain["seconds"] == pytest.approx(wrap["seconds"], abs=0.5)
    assert plain["memory"]["pss_anon"] < 3 * 20_000_000
    assert abs(wrap["saved"]) < 5_000_000


@pytest.mark.ksm
def test_other_opted_in_processes_are_told_of(tree: Tree, settings: Ksm) -> None:
    with subprocess.Popen([tree.wrapper, "sleep", "600"]) as other:
        done = run([tree.ksmtool, "try", "-n", 1, "--arms", "wrap", "sleep", 600])
        other.kill()
    assert "other processes of this machine were opted in during arm wrap" in done.stdout


@pytest.mark.ksm
def test_a_second_interruption_does_not_cut_the_end_short(
    tree: Tree, settings: Ksm, tmp_path: Path
) -> None:
    mark = str(tmp_path / "ready")
    code = (
        "import signal, sys, time; make = lambda end='': open(sys.argv[1] + end, 'w').close(); "
        "signal.signal(15, lambda *_: make('.told')); make(); time.sleep(600)"
    )
    with subprocess.Popen(
        [tree.ksmtool, "try", "-n", "2", "--arms", "wrap", "--ready-file", mark + ".{i}",
         "--pages-to-scan", "1", "--", sys.executable, "-c", code, mark + ".{i}"],
        stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        wait_until(lambda: settings.running() and bool(list(tmp_path.iterdir())), 60, "all run")
        child.send_signal(signal.SIGINT)
        wait_until(lambda: bool(list(tmp_path.glob("*.told"))), 10, "it cleans up")
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=40)
    assert not left_over(mark)


@pytest.mark.ksm
def test_what_drive_leaves_behind_is_ended_and_not_counted(tree: Tree, settings: Ksm) -> None:
    mark = "600.125"
    result = try_json(
        tree, "-n", 1, "--arms", "plain", "--drive", f"sleep {mark} & exit 0", "sleep", 600
    )
    assert result["arms"][0]["memory"]["processes"] == 1
    assert not left_over(mark)


@pytest.mark.ksm
def test_a_port_that_accepts_before_is_refused(tree: Tree, settings: Ksm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run([tree.ksmtool, "try", "-n", 1, "--ready-port", port, "sleep", 600])
    assert done.returncode == 1
    assert f"Port {port} of 127.0.0.1 accepts before the copies start." in done.stderr


@pytest.mark.ksm
def test_an_asan_program_can_be_tried(tree: Tree, settings: Ksm, victims: Victims) -> None:
    """The wrap arm is what `ksmtool wrap` does: no library for this one."""
    command = f"tail -f /dev/null | exec {victims('pages', 'asan')} 1 10 10"
    script = ["sh", "-c", command]
    assert trial.wrap_arm([str(victims("pages", "asan"))]).prefix[1:] == (
        "--method", "prctl", "--no-preload", "--",
    )  # fmt: skip
    result = try_json(tree, "-n", 1, "--arms", "plain", *script)
    assert result["arms"][0]["memory"]["processes"] >= 2


@pytest.mark.ksm
def test_markup_and_odd_commands_are_shown_as_they_are(tree: Tree, settings: Ksm) -> None:
    done = run([
        tree.ksmtool, "try", "-n", 1, "--arms", "plain", "--", "sh", "-c", "sleep 600 # x[i]y[/b]"
    ])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "x[i]y[/b]" in done.stdout


@pytest.mark.ksm
def test_without_proc_it_is_refused(tree: Tree, settings: Ksm) -> None:
    script = 'mount -t tmpfs none /proc && exec "$@"'
    done = run(["unshare", "--mount", "sh", "-c", script, "sh", tree.ksmtool, "try", "sleep", 600])
    assert done.returncode == ExitStatus.UNSUPPORTED
    assert "through /proc, which is not mounted" in done.stderr


@pytest.mark.ksm
def test_a_plot_that_cannot_be_is_refused_before_the_trial(tree: Tree, settings: Ksm) -> None:
    done = run([tree.ksmtool, "try", "--plot", "/no/such/folder/x.svg", "sleep", 600])
    assert done.returncode == 1
    assert "Cannot write /no/such/folder/x.svg" in done.stderr


@pytest.mark.ksm
def test_not_ready_in_time(tree: Tree, settings: Ksm, tmp_path: Path) -> None:
    done = run([
        tree.ksmtool, "try", "-n", 2, "--timeout", 0.5, "--ready-file", tmp_path / "no.{i}",
        "sleep", 600,
    ])  # fmt: skip
    assert done.returncode == 1
    assert "not ready after 0.5 s: waited for 2 ready files" in done.stderr
    assert "--timeout" in done.stderr


@pytest.mark.ksm
def test_an_old_ready_file_is_refused_and_kept(tree: Tree, settings: Ksm, tmp_path: Path) -> None:
    old = tmp_path / "ready.2"
    old.write_text("mine")
    done = run([
        tree.ksmtool, "try", "-n", 2, "--ready-file", tmp_path / "ready.{i}", "sleep", 600
    ])  # fmt: skip
    assert done.returncode == 1
    assert f"The ready file {old} exists before" in done.stderr
    assert old.read_text() == "mine"


@pytest.mark.ksm
def test_merging_that_does_not_settle_is_said(tree: Tree, settings: Ksm) -> None:
    done = run([
        tree.ksmtool, "try", "-n", 1, "--arms", "wrap", "--pages-to-scan", 1, "--timeout", 2,
        "sleep", 600,
    ])  # fmt: skip
    assert done.returncode == 0
    assert "still merging when the time was up" in done.stdout


@pytest.mark.ksm
def test_a_drive_command_that_fails_is_said(tree: Tree, settings: Ksm) -> None:
    done = run([
        tree.ksmtool, "try", "-n", 1, "--arms", "plain", "--drive", "exit 7", "sleep", 600
    ])  # fmt: skip
    assert done.returncode == 0
    assert "the drive command ended with 7" in done.stdout


@pytest.mark.ksm
def test_plain_is_plain_also_below_a_wrapped_shell(tree: Tree, settings: Ksm) -> None:
    done = run([
        tree.wrapper, tree.ksmtool, "try", "--json", "-n", 1, "--arms", "plain", "sleep", 600
    ])  # fmt: skip
    assert json.loads(done.stdout)["arms"][0]["opted_in"] is False


@pytest.mark.ksm
def test_ksm_that_is_on_keeps_its_rate(tree: Tree, ksm: Ksm) -> None:
    """Run inside of the fixture's loan, with its lock held: so through the module."""
    ksm.write("run", 1)
    before = ksm.settings()
    trial.turn_on(ksm, trial.Options())
    assert ksm.settings() == before


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["-n", "x", "true"], 2, "'x' is not a valid integer"),
        (["-n", "0", "true"], 2, "0 is not in the range"),
        (["--arms", "plain,ours", "true"], 2, "No arm 'ours'."),
        (["--arms", "plain,plain", "true"], 2, "Arm 'plain' is named twice."),
        (["--ready-port", "eighty", "true"], 2, "eighty is not PORT or BASE+{i}"),
        (["--plot", "x.pdf", "true"], 2, "has to end in .svg or .png"),
        (["--timeout", "-1", "true"], 2, "-1"),
        (["--timeout", "nan", "true"], 2, "nan is no time"),
        ([], 2, "Missing argument"),
        (["no-such-command"], 1, "Cannot run no-such-command: No such file or directory."),
        (["/etc/passwd"], 1, "Cannot run /etc/passwd: Permission denied."),
    ],
)
def test_bad_input(tree: Tree, arguments: list[str], status: int, words: str) -> None:
    done = run([tree.ksmtool, "try", *arguments])
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ksm
def test_not_root_is_status_3(tree: Tree, settings: Ksm) -> None:
    """As nobody; the venv may lie where nobody cannot look, so in a child of ours."""
    need(not settings.running(), "KSM is on: then nothing has to be written")
    code = (
        "import os, sys, locale, gettext, rich.console, ksmtool.report; from ksmtool import cli; "
        "cli.cli.main(['try', '--help'], standalone_mode=False); "
        "os.setgid(65534); os.setuid(65534); "
        "sys.argv = ['ksmtool', 'try', '--arms', 'plain', 'sleep', '9']; cli.main()"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == ExitStatus.NEEDS_ROOT, done.stderr
    assert done.stderr.startswith("ksmtool: Cannot set KSM's run to 0: only root may.\nhint: ")


@pytest.mark.ksm
def test_sys_read_only_is_status_4(tree: Tree, settings: Ksm) -> None:
    """As in a container: /sys is mounted read-only, in a mount namespace of its own."""
    script = 'mount -o remount,ro,bind /sys && exec "$@"'
    done = run([
        "unshare", "--mount", "sh", "-c", script, "sh", tree.ksmtool, "try", "sleep", 600
    ])  # fmt: skip
    assert done.returncode == ExitStatus.UNSUPPORTED, done.stderr
    assert "/sys is read-only here" in done.stderr


@pytest.mark.ksm
def test_no_ksm_in_the_kernel_is_status_4(tree: Tree, settings: Ksm) -> None:
    script = 'mount -t tmpfs none /sys/kernel/mm && exec "$@"'
    ways = ["unshare", "--mount", "sh", "-c", script, "sh", tree.ksmtool]
    done = run([*ways, "try", "sleep", 600])
    assert done.returncode == ExitStatus.UNSUPPORTED, done.stderr
    assert done.stderr.startswith("ksmtool: This kernel has no KSM")
    wrapped = run([*ways, "wrap", "echo", "runs all the same"])
    assert wrapped.stdout == "runs all the same\n"
    assert wrapped.stderr == "ksmtool: This kernel has no KSM: nothing will merge.\n"


def test_arms_named() -> None:
    assert [arm.name for arm in trial.arms_named(["wrap", "plain"], ["true"])] == ["wrap", "plain"]
    with pytest.raises(KsmtoolError):
        trial.arms_named(["plain", "x"], ["true"])


def test_the_environment_of_a_copy(tmp_path: Path) -> None:
    """Plain is told to leave us out, wrap is not; both know their number."""
    out = str(tmp_path / "env")
    arm = trial.Arm("x", env={"KSM_PRELOAD": "", "ONLY": "here"})
    os.environ["KSM_PRELOAD"] = "off"
    try:
        with trial.Fleet(["sh", "-c", f"env > {out}.{{i}}; exec sleep 600"], arm, 2):
            wait_until(
                lambda: all(
                    Path(f"{out}.{i}").exists() and "ONLY" in Path(f"{out}.{i}").read_text()
                    for i in (1, 2)
                ),
                10,
                "the copies have written their environment",
            )
    finally:
        del os.environ["KSM_PRELOAD"]
    lines = Path(f"{out}.2").read_text().splitlines()
    assert "KSMTOOL_COPY=2" in lines
    assert not [line for line in lines if line.startswith("KSM_PRELOAD")]
    assert not left_over(out)
