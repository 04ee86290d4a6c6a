# SPDX-License-Identifier: MIT
"""`ksmtool wrap`: what it decides, as a table, and what comes of it, for real."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Tree, facts, need, opted_in, run
from ksmtool import install, wrap
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.program import Program
from ksmtool.wrap import Kernel, decide

Victims = Callable[..., Path]

GLIBC = Program("/p", machine="x86_64", loader="/lib64/ld-linux-x86-64.so.2")
MUSL = Program("/p", machine="x86_64", loader="/lib/ld-musl-x86_64.so.1")
STATIC = Program("/p", machine="x86_64")
ASAN = Program("/p", machine="x86_64", loader="/lib64/ld-linux-x86-64.so.2", sanitizer="libasan.so")
FOREIGN = Program("/p", machine="sparc", loader="/lib/ld-linux.so.2")
SETUID = Program("/p", machine="x86_64", loader="/lib64/ld.so", privileged="setuid")
SCRIPT = Program("/s", interpreter=STATIC)
UNKNOWN = Program("/p")

NEW = Kernel(prctl=True, inherit=True, madvise=True)  # Linux 6.7
MIDDLE = Kernel(prctl=True, inherit=False, madvise=True)  # 6.4 to 6.6
OLD = Kernel(prctl=False, inherit=False, madvise=True)  # before
NONE = Kernel(prctl=False, inherit=False, madvise=False)  # without CONFIG_KSM

ALONE = "alone"
UNSUPPORTED = "status 4"
ONLY_FLAG = ("--method", "prctl", "--no-preload")


@pytest.mark.parametrize(
    ("what", "target", "kernel", "method", "expected"),
    [
        ("an ordinary program", GLIBC, NEW, "auto", ()),
        ("... before exec inheritance", GLIBC, MIDDLE, "auto", ()),
        ("... before the prctl", GLIBC, OLD, "auto", ()),
        ("... without KSM", GLIBC, NONE, "auto", ()),
        ("... prctl asked for", GLIBC, NEW, "prctl", ("--method", "prctl")),
        ("... madvise asked for", GLIBC, NEW, "madvise", ("--method", "madvise")),
        ("prctl where there is none", GLIBC, OLD, "prctl", UNSUPPORTED),
        ("madvise where there is none", GLIBC, NONE, "madvise", UNSUPPORTED),
        ("static", STATIC, NEW, "auto", ONLY_FLAG),
        ("static, flag lost on exec", STATIC, MIDDLE, "auto", ALONE),
        ("static, no prctl", STATIC, OLD, "auto", ALONE),
        ("static, madvise asked for", STATIC, NEW, "madvise", UNSUPPORTED),
        ("static, prctl asked for, flag lost", STATIC, MIDDLE, "prctl", UNSUPPORTED),
        ("a script for a static one", SCRIPT, NEW, "auto", ONLY_FLAG),
        ("ASan", ASAN, NEW, "auto", ONLY_FLAG),
        ("ASan, no prctl", ASAN, OLD, "auto", ALONE),
        ("musl", MUSL, NEW, "auto", ()),
        ("musl, flag lost on exec", MUSL, MIDDLE, "auto", ()),
        ("musl, no prctl", MUSL, OLD, "auto", ALONE),
        ("another architecture", FOREIGN, NEW, "auto", ONLY_FLAG),
        ("another architecture, no prctl", FOREIGN, OLD, "auto", ALONE),
        ("setuid", SETUID, NEW, "auto", ALONE),
        ("setuid, prctl asked for", SETUID, NEW, "prctl", ALONE),
        ("a format unknown to us", UNKNOWN, NEW, "auto", ()),
    ],
)
def test_decision(
    what: str, target: Program, kernel: Kernel, method: str, expected: object
) -> None:
    if expected == UNSUPPORTED:
        with pytest.raises(KsmtoolError) as caught:
            decide(target, kernel, method)
        assert caught.value.status is ExitStatus.UNSUPPORTED
        assert caught.value.hint
        return
    plan = decide(target, kernel, method)
    assert plan.why
    if expected == ALONE:
        assert plan.alone
        assert plan.warn
    else:
        assert not plan.alone
        assert plan.options == expected


def test_off_wins_over_all() -> None:
    assert not decide(STATIC, NEW, "auto", off=True).alone
    assert "KSM_PRELOAD=off" in decide(GLIBC, NEW, "auto", off=True).why


@pytest.mark.ksm
@pytest.mark.parametrize("kind", ["dynamic", "no-pie", "static", "static-pie", "musl", "i386"])
def test_it_opts_in(tree: Tree, victims: Victims, kind: str) -> None:
    done = run([tree.ksmtool, "wrap", "-q", victims("report", kind)])
    assert opted_in(facts(done)) == "prctl"
    assert done.stderr == ""


@pytest.mark.ksm
def test_an_asan_program_runs_and_is_opted_in(tree: Tree, victims: Victims) -> None:
    done = run([tree.ksmtool, "wrap", "-q", victims("report", "asan")])
    assert facts(done)["merge"] == ["1"]
    assert "ASan runtime does not come first" not in done.stderr


@pytest.mark.ksm
def test_madvise_asked_for(tree: Tree, victims: Victims) -> None:
    done = run([tree.ksmtool, "wrap", "-q", "--method", "madvise", victims("report")])
    assert opted_in(facts(done)) == "madvise"


def test_a_setuid_program_is_left_alone_and_that_is_said(tree: Tree, public: Path) -> None:
    need(os.getuid() == 0, "needs root to make a setuid program")
    program = public / "setuid-cat"
    program.write_bytes(Path("/bin/cat").read_bytes())
    os.chown(program, 65534, 65534)
    program.chmod(stat.S_ISUID | 0o755)
    done = run([tree.ksmtool, "wrap", program, "/proc/self/ksm_stat"])
    assert "is setuid and left alone" in done.stderr
    assert "yes" not in done.stdout
    quiet = run([tree.ksmtool, "wrap", "-q", program, "/dev/null"])
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_a_setuid_program_is_left_alone_also_below_an_opted_in_shell(
    tree: Tree, victims: Victims, public: Path
) -> None:
    need(os.getuid() == 0, "needs root to make a setuid program")
    program = public / "setuid-report"
    program.write_bytes(victims("report").read_bytes())
    os.chown(program, 65534, 65534)
    program.chmod(stat.S_ISUID | 0o755)
    done = run([tree.wrapper, "--no-preload", tree.ksmtool, "wrap", "-q", program])
    assert facts(done)["merge"] == ["0"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-"])
def test_closed_descriptors_do_not_matter(tree: Tree, closed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f'"$0" wrap --explain sh -c "echo run >{out}" {closed}'
    done = run(["sh", "-c", script, tree.ksmtool])
    assert done.returncode == 0
    assert out.read_text() == "run\n"
    assert "program:" not in done.stdout


def test_the_locale_is_the_callers(tree: Tree) -> None:
    """Python adds LC_CTYPE where it finds the C locale (PEP 538)."""
    done = subprocess.run(
        ["env", "-i", "PATH=/usr/bin:/bin", tree.ksmtool, "wrap", "-q", "env"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "LC_CTYPE" not in done.stdout


def test_a_setting_that_means_nothing_is_told_of(tree: Tree) -> None:
    done = run([tree.ksmtool, "wrap", "true"], env={"KSM_PRELOAD": "0"})
    assert "KSM_PRELOAD=0 means nothing" in done.stderr


def test_options_after_the_command_are_the_commands(tree: Tree) -> None:
    done = run([tree.ksmtool, "wrap", "-q", "sh", "-c", 'echo "$@"', "sh", "--explain", "-q"])
    assert done.stdout == "--explain -q\n"


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_exit_status_is_the_commands(tree: Tree, status: int) -> None:
    assert run([tree.ksmtool, "wrap", "-q", "sh", "-c", f"exit {status}"]).returncode == status


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        ("no-such-command", 127, "cannot run no-such-command: No such file"),
        ("/etc/group", 126, "cannot run /etc/group: Permission denied"),
        ("/", 126, "cannot run /: Permission denied"),
    ],
)
def test_what_cannot_be_run(tree: Tree, command: str, status: int, words: str) -> None:
    done = run([tree.ksmtool, "wrap", "-q", command])
    assert done.returncode == status
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_command_is_usage(tree: Tree) -> None:
    done = run([tree.ksmtool, "wrap"])
    assert done.returncode == 2
    assert "Missing argument" in done.stderr


def test_nothing_of_python_stays(tree: Tree) -> None:
    done = run(
        [tree.ksmtool, "wrap", "-q", "sh", "-c", "echo $$; cat /proc/$$/comm; ls /proc/$$/fd"]
    )
    lines = done.stdout.splitlines()
    assert lines[1] == "sh"
    assert lines[2:] == ["0", "1", "2"]


def test_sigpipe_is_the_default_again(tree: Tree) -> None:
    """Python ignores it, and what is ignored stays so over exec: `wrap yes | head` would go on."""
    with subprocess.Popen(
        [tree.ksmtool, "wrap", "-q", "yes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.wait(timeout=10) == -signal.SIGPIPE


def test_a_line_when_ksm_is_off(tree: Tree, ksm: object) -> None:
    done = run([tree.ksmtool, "wrap", "true"])  # the fixture has stopped KSM
    assert done.returncode == 0
    line = "ksmtool: KSM is off in this kernel: nothing will merge until: "
    assert re.fullmatch(line + "(sudo .*ksmtool kernel-enable|echo 1 .*/run)\n", done.stderr)
    assert run([tree.ksmtool, "wrap", "-q", "true"]).stderr == ""


@pytest.mark.parametrize(
    ("path", "trusted", "expected"),
    [
        ("/usr/bin/ksmtool", True, "sudo ksmtool kernel-enable"),
        ("/opt/a venv/bin/ksmtool", True, "sudo '/opt/a venv/bin/ksmtool' kernel-enable"),
        ("/home/me/bin/ksmtool", False, "echo 1 | sudo tee /sys/kernel/mm/ksm/run"),
    ],
)
def test_how_to_switch_ksm_on(
    path: str, trusted: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        if not trusted:
            raise KsmtoolError("no")

    monkeypatch.setattr(install, "ksmtool", lambda: path)
    monkeypatch.setattr(install, "require_trusted_ksmtool", check)
    assert wrap.turn_on() == expected


@pytest.mark.ksm
def test_explain_names_program_kernel_plan_and_preload(tree: Tree) -> None:
    env = {"LD_PRELOAD": "/no/such.so libm.so.6"}
    done = run([tree.ksmtool, "wrap", "--explain", "echo", "hello"], env=env)
    assert done.stdout == "hello\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("ksmtool: ")]
    assert said[0].endswith("/echo (dynamic, glibc, x86_64)")
    assert said[1].startswith("ksmtool: kernel:  prctl yes, kept over exec yes, madvise yes; KSM")
    assert said[2] == "ksmtool: plan:    prctl: the kernel has it"
    assert said[3] == f"ksmtool: preload: LD_PRELOAD=/no/such.so:libm.so.6:{tree.prctl_library}"
    assert "names /no/such.so, which cannot be read: passed on" in said[4]


def test_ksm_preload_off_is_passed_on(tree: Tree, victims: Victims) -> None:
    done = run([tree.ksmtool, "wrap", victims("report")], env={"KSM_PRELOAD": "off"})
    assert opted_in(facts(done)) == "no"
    assert done.stderr == ""


def test_start_up_stays_lean() -> None:
    """wrap must not import what it does not need: its start is 1.6 x `import click` at most."""
    code = (
        "import sys; from ksmtool import cli, wrap; "
        "heavy = {'rich', 'subprocess', 'ctypes', 'matplotlib', 'distro'}; "
        "print(*sorted(heavy & set(sys.modules)))"
    )
    assert run([sys.executable, "-c", code]).stdout == "\n"
