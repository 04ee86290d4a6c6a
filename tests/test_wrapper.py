# SPDX-License-Identifier: MIT
"""ksm-wrapper: becomes the program, which sees nothing of it but the flag and LD_PRELOAD."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from conftest import (
    AS_NOBODY,
    PR_SET_MEMORY_MERGE,
    Tree,
    Victims,
    facts,
    need,
    need_command,
    opted_in,
    run,
    without_us,
)

# Signals whose default is to end the process, with numbers that are the same everywhere.
DEADLY = [
    signal.Signals(number)
    for number in (1, 2, 3, 4, 5, 6, 8, 9, 11, 13, 14, 15, signal.SIGUSR1, signal.SIGXCPU)
]

FAILED, USAGE, UNSUPPORTED, CANNOT_EXEC, NOT_FOUND = 1, 2, 4, 126, 127


def refused(
    done: subprocess.CompletedProcess[str], status: int, *words: str, hint: bool = True
) -> None:
    """Assert that ksm-wrapper ended with `status` and a clear message, and ran nothing."""
    assert done.returncode == status
    assert done.stdout == ""
    message, *rest = done.stderr.splitlines()
    assert message.startswith("ksm-wrapper: ")
    for word in words:
        assert word in message
    assert [line.startswith("hint: ") for line in rest] == ([True] if hint else [])


def shown(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Return method and LD_PRELOAD as `--show` printed them."""
    assert done.returncode == 0, done.stderr
    method, _, rest = done.stdout.partition("\n")
    assert method.startswith("method ")
    assert rest.startswith("LD_PRELOAD ")
    return method[len("method ") :], rest[len("LD_PRELOAD ") : -1]


# --- it becomes the program ---

GIVEN: dict[str, list[str]] = {
    "as started": [],
    "stdin closed": ["sh", "-c", 'exec "$@" <&-', "sh"],
    "stderr closed": ["sh", "-c", 'exec "$@" 2>&-', "sh"],
    "all of 0, 1, 2 but stdout closed": ["sh", "-c", 'exec "$@" <&- 2>&-', "sh"],
    "more descriptors": ["sh", "-c", 'exec "$@" 5</dev/null 9>/dev/zero', "sh"],
    "umask 027": ["sh", "-c", 'umask 027; exec "$@"', "sh"],
    "signals blocked": ["env", "--block-signal=USR1", "--block-signal=CHLD"],
    "signals ignored": ["env", "--ignore-signal=PIPE", "--ignore-signal=INT"],
    "another directory": ["env", "-C", "/proc"],
    "a session of its own": ["setsid"],
    "an empty environment": ["env", "-i"],
    "a strange environment": ["env", "-i", "A=", "B==", "=C", "D=\n", "E=\udcff", "LD_X=:"],
    "no privileges": list(AS_NOBODY),
    "no new privileges": ["setpriv", "--no-new-privs"],
    "few descriptors allowed": ["sh", "-c", 'ulimit -n 10; exec "$@"', "sh"],
}


@pytest.mark.ksm
@pytest.mark.parametrize("given", GIVEN)
def test_program_finds_what_was_given(public_tree: Tree, victims: Victims, given: str) -> None:
    command = [victims("report"), "", "a b", "--", "-x", "\n", "\udcff"]
    plain = facts(run([*GIVEN[given], *command]))
    ours = facts(run([*GIVEN[given], public_tree.wrapper, *command]))
    assert (opted_in(plain), opted_in(ours)) == ("no", "prctl")
    assert without_us(ours) == without_us(plain)

    # To the letter and in order, with one variable more.
    added = [entry for entry in ours["env"] if entry not in plain["env"]]
    assert added == [f"LD_PRELOAD={public_tree.prctl_library}"]
    assert ours["env"] == [*plain["env"], *added]


@pytest.mark.ksm
@pytest.mark.parametrize("options", [[], ["--"], ["--no-preload"], ["--method", "auto", "--"]])
def test_same_process(tree: Tree, victims: Victims, options: list[str]) -> None:
    shell = ["sh", "-c", 'echo shell $$ $PPID; exec "$@"', "sh"]
    report = facts(run([*shell, tree.wrapper, *options, victims("report")]))
    assert report["shell"] == [f"{report['pid'][0]} {report['ppid'][0]}"]
    assert opted_in(report) == "prctl"


@pytest.mark.parametrize("name", ["report-dynamic", "./report-dynamic"])
def test_argv0_is_as_typed(tree: Tree, victims: Victims, name: str) -> None:
    folder = victims("report").parent
    found = run([tree.wrapper, name, "x"], {"PATH": f"/nowhere:{folder}"}, cwd=folder)
    assert facts(found)["argv"] == [name, "x"]


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], ["--show"]),
        ([], ["--", "--show"]),
        (["--"], ["-x", "--method"]),
        (["--"], ["--"]),
        (["--no-preload", "--"], ["--", "a"]),
    ],
)
def test_options_end_at_the_command(
    tree: Tree, victims: Victims, options: list[str], arguments: list[str]
) -> None:
    report = facts(run([tree.wrapper, *options, victims("report"), *arguments]))
    assert report["argv"][1:] == arguments


def test_every_exit_status_is_passed_on(tree: Tree, victims: Victims) -> None:
    end = victims("end")
    statuses = [
        subprocess.run([tree.wrapper, end, "exit", str(status)], check=False).returncode
        for status in range(256)
    ]
    assert statuses == list(range(256))


@pytest.mark.parametrize("number", DEADLY, ids=lambda number: number.name)
def test_death_by_signal_is_passed_on(tree: Tree, victims: Victims, number: signal.Signals) -> None:
    assert run([tree.wrapper, victims("end"), "signal", int(number)]).returncode == -number


def test_standard_streams_are_the_programs(tree: Tree) -> None:
    done = subprocess.run(
        [tree.wrapper, "sh", "-c", "cat; echo error >&2"],
        input=b"\x00\xff in",
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\x00\xff in", b"error\n")


@pytest.mark.ksm
def test_wrapped_twice_is_wrapped_once(tree: Tree, victims: Victims) -> None:
    once = facts(run([tree.wrapper, victims("report")]))
    twice = facts(run([tree.wrapper, tree.wrapper, "--", tree.wrapper, victims("report")]))
    assert opted_in(twice) == "prctl"
    assert twice["env"] == once["env"]


# --- programs that cannot be run ---


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def not_runnable(tmp_path: Path) -> list[tuple[object, int, int]]:
    """Return commands that cannot be run, each with a shell's status for it and the errno."""
    plain_file = script(tmp_path / "plain", "text\n", 0o644)
    return [
        (tmp_path / "nothing", NOT_FOUND, errno.ENOENT),
        ("no-such-command-anywhere", NOT_FOUND, errno.ENOENT),
        ("", NOT_FOUND, errno.ENOENT),
        (plain_file, CANNOT_EXEC, errno.EACCES),
        (tmp_path, CANNOT_EXEC, errno.EACCES),
        (plain_file / "below", CANNOT_EXEC, errno.ENOTDIR),
        ("x" * 300, CANNOT_EXEC, errno.ENAMETOOLONG),
        (script(tmp_path / "orphan", "#!/no/such/interpreter\n"), NOT_FOUND, errno.ENOENT),
    ]


def test_statuses_of_a_shell_for_what_cannot_be_run(tree: Tree, tmp_path: Path) -> None:
    for program, status, error in not_runnable(tmp_path):
        done = run([tree.wrapper, program])
        refused(done, status, f"cannot run {program}: ", os.strerror(error), hint=False)


def test_script_without_an_interpreter_line_runs_as_in_a_shell(tree: Tree, tmp_path: Path) -> None:
    assert (
        run([tree.wrapper, script(tmp_path / "script", "echo $1; exit 5\n"), "x"]).stdout == "x\n"
    )


def test_too_many_arguments(tree: Tree) -> None:
    # 128 KiB is the most that one argument may have (MAX_ARG_STRLEN); the variable added is less.
    libraries = ":".join(f"/no/{number:0100}" for number in range(1300))[: 131072 - 20]
    done = run([tree.wrapper, "true"], {"LD_PRELOAD": libraries})
    mine = [line for line in done.stderr.splitlines() if line.startswith("ksm-wrapper")]
    assert done.returncode == CANNOT_EXEC
    assert mine == [f"ksm-wrapper: cannot run true: {os.strerror(errno.E2BIG)}"]


# --- wrong use ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command given"),
        (["--"], "no command given"),
        (["--no-preload"], "no command given"),
        (["--method", "auto"], "no command given"),
        (["--method"], "'--method'"),
        (["--method", "magic", "true"], "no method 'magic'"),
        (["--method=", "true"], "no method ''"),
        (["--bogus", "true"], "'--bogus'"),
        (["-x", "true"], "'-x'"),
        (["-xy", "true"], "'-x"),
        (["--show=yes", "true"], "'--show=yes'"),
        (["--no-preload", "-n", "echo", "run"], "'-n'"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_use_is_status_2(tree: Tree, arguments: list[str], words: str) -> None:
    refused(run([tree.wrapper, *arguments]), USAGE, words)


def test_help_and_version(tree: Tree) -> None:
    done = run([tree.wrapper, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("Usage: ksm-wrapper", "KSM_PRELOAD=off", "KSM_PRELOAD_VERBOSE=1", "--method"):
        assert word in done.stdout
    assert run(["sh", "-c", '"$0" --help >/dev/full', tree.wrapper]).returncode == FAILED
    version = importlib.metadata.version("ksm-preload")
    assert run([tree.wrapper, "--version"]).stdout == f"ksm-wrapper {version}\n"


@pytest.mark.ksm
def test_show_runs_nothing(tree: Tree) -> None:
    alone, with_command = run([tree.wrapper, "--show"]), run([tree.wrapper, "--show", "echo", "x"])
    assert shown(alone) == shown(with_command) == ("prctl", str(tree.prctl_library))
    assert shown(run([tree.wrapper, "--show", "--no-preload"])) == ("prctl", "")


# --- method and kernel ---


def refusing(victims: Victims, *what: str) -> list[object]:
    """Return a command prefix under which the kernel refuses `prctl`, `madvise` or both."""
    option = {"prctl": PR_SET_MEMORY_MERGE, "madvise": "madvise"}
    return [part for one in what for part in (victims("refuse"), option[one], errno.EINVAL)]


@pytest.mark.ksm
def test_probe_says_what_is_true(tree: Tree, victims: Victims) -> None:
    alone = opted_in(facts(run([tree.wrapper, "--no-preload", victims("report", "static")])))
    expected = f"prctl yes\nmadvise yes\ninherit {'yes' if alone == 'prctl' else 'no'}\n"
    done = run([tree.wrapper, "--probe"])
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")

    done = run([*refusing(victims, "prctl"), tree.wrapper, "--probe"])
    assert done.stdout == "prctl no\nmadvise yes\ninherit no\n"
    done = run([*refusing(victims, "madvise"), tree.wrapper, "--probe"])
    assert done.stdout == expected.replace("madvise yes", "madvise no")


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        (["prctl"], ["--method", "prctl"], "PR_SET_MEMORY_MERGE"),
        (["prctl"], ["--no-preload"], "madvise"),
        (["madvise"], ["--method", "madvise"], "no KSM"),
        (["prctl", "madvise"], ["--method", "madvise"], "no KSM"),
        (["prctl", "madvise"], ["--no-preload", "--method", "prctl"], "PR_SET_MEMORY_MERGE"),
        ([], ["--no-preload", "--method", "madvise"], "madvise"),
    ],
)
def test_method_that_the_kernel_lacks_is_status_4(
    tree: Tree, victims: Victims, missing: list[str], arguments: list[str], words: str
) -> None:
    command = [tree.wrapper, *arguments, "echo", "run"]
    refused(run([*refusing(victims, *missing), *command]), UNSUPPORTED, words)


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("missing", "instead"),
    [(["prctl"], "madvise"), (["prctl", "madvise"], "no")],
    ids=["prctl", "KSM"],
)
def test_program_runs_where_the_kernel_lacks_it(
    tree: Tree, victims: Victims, missing: list[str], instead: str
) -> None:
    refuse = refusing(victims, *missing)
    assert shown(run([*refuse, tree.wrapper, "--show"])) == ("madvise", str(tree.madvise_library))
    plain, ours = (run([*refuse, *us, victims("report")]) for us in ([], [tree.wrapper]))
    assert opted_in(facts(ours)) == instead
    assert without_us(facts(ours)) == without_us(facts(plain))
    assert ours.stderr == ""


@pytest.mark.ksm
@pytest.mark.parametrize("by", ["option", "environment"])
def test_madvise_is_told_to_the_library_and_sets_no_flag(
    tree: Tree, victims: Victims, by: str
) -> None:
    wrapper = [tree.wrapper, "--method", "madvise"]
    if by == "environment":
        wrapper = ["env", "KSM_PRELOAD=madvise", tree.wrapper]
    assert shown(run([*wrapper, "--show"])) == ("madvise", str(tree.madvise_library))

    flagged = [tree.wrapper, "--no-preload"]
    report = facts(run([*flagged, *wrapper, victims("report")]))
    assert opted_in(report) == "madvise"
    assert "KSM_PRELOAD=madvise" in report["env"]
    # No library in a static program: what it has is what ksm-wrapper did.
    assert opted_in(facts(run([*flagged, *wrapper, victims("report", "static")]))) == "no"


@pytest.mark.ksm
def test_option_overrides_the_environment(tree: Tree, victims: Victims) -> None:
    """Or the library would clear what the option asks for."""
    command = [tree.wrapper, "--method", "prctl", victims("report")]
    assert opted_in(facts(run(command, {"KSM_PRELOAD": "madvise"}))) == "prctl"


@pytest.mark.ksm
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("options", [[], ["--method", "prctl"], ["--no-preload"]])
def test_off_clears_the_flag_and_adds_nothing(
    tree: Tree, victims: Victims, kind: str, options: list[str]
) -> None:
    off = {"KSM_PRELOAD": "off"}
    assert shown(run([tree.wrapper, *options, "--show"], off)) == ("off", "")
    flagged = [tree.wrapper, "--no-preload", "env", "KSM_PRELOAD=off"]
    left_out = facts(run([*flagged, tree.wrapper, *options, victims("report", kind)]))
    assert opted_in(left_out) == "no"
    assert left_out["env"] == facts(run([victims("report", kind)], off))["env"]


# --- where it lies ---


@pytest.mark.ksm
@pytest.mark.parametrize("name", ["a b", "a:b", "a$b", "a\tb", "a\nb"])
def test_place_that_ld_preload_cannot_name(
    tree: Tree, victims: Victims, public: Path, name: str
) -> None:
    there = tree.copy_to(public / name)
    done = run([there.wrapper, "echo", "run"])
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr.startswith("ksm-wrapper: LD_PRELOAD cannot name ")
    assert "\nhint: " in done.stderr
    # Without LD_PRELOAD there is nothing against the place.
    assert opted_in(facts(run([there.wrapper, "--no-preload", victims("report")]))) == "prctl"
    assert run([there.wrapper, "echo", "run"], {"KSM_PRELOAD": "off"}).stdout == "run\n"


@pytest.mark.ksm
@pytest.mark.parametrize("name", ["moved", "a-b+c,d@e~f%g=h", "ä\udcff", "l#o'n\"g" * 20])
def test_moved_installation_works(tree: Tree, victims: Victims, public: Path, name: str) -> None:
    there = tree.copy_to(public / name)
    report = facts(run([there.wrapper, victims("report")]))
    assert opted_in(report) == "prctl"
    assert f"LD_PRELOAD={there.prctl_library}" in report["env"]


@pytest.mark.ksm
def test_called_by_a_symbolic_link(tree: Tree, victims: Victims, public: Path) -> None:
    link = public / "a link with spaces"
    link.symlink_to(tree.wrapper)
    report = facts(run([link, victims("report")]))
    assert opted_in(report) == "prctl"
    assert f"LD_PRELOAD={tree.prctl_library}" in report["env"]


@pytest.mark.ksm
def test_run_from_a_build_folder(tree: Tree, victims: Victims, public: Path) -> None:
    folder = public / "build"
    folder.mkdir()
    for file in (tree.wrapper, tree.prctl_library):
        shutil.copy(file, folder)
    report = facts(run([folder / tree.wrapper.name, victims("report")]))
    assert f"LD_PRELOAD={folder / tree.prctl_library.name}" in report["env"]


@pytest.mark.ksm
def test_library_that_is_missing(tree: Tree, public: Path) -> None:
    there = tree.copy_to(public / "incomplete")
    there.prctl_library.unlink()
    refused(run([there.wrapper, "echo", "run"]), FAILED, there.prctl_library.name)
    assert run([there.wrapper, "--no-preload", "echo", "run"]).stdout == "run\n"


@pytest.mark.ksm
def test_without_proc(public_tree: Tree, victims: Victims) -> None:
    """Then /proc/self/exe does not say where the libraries are, but the exec's file name does."""
    need_command("unshare")
    script = 'mount -t tmpfs none /proc && exec "$@"'
    no_proc: Sequence[object] = ["unshare", "--mount", "sh", "-c", script, "sh"]
    assert facts(run([*no_proc, victims("report")]))["merge"] == ["0"]
    alone = run([*no_proc, public_tree.wrapper, "--no-preload", victims("report")])
    assert facts(alone)["merge"] == ["1"]

    done = run([*no_proc, public_tree.wrapper, "--show"])
    assert done.stdout == f"method prctl\nLD_PRELOAD {public_tree.prctl_library}\n"
    assert facts(run([*no_proc, public_tree.wrapper, victims("report")]))["merge"] == ["1"]


@pytest.mark.ksm
def test_installation_that_the_user_cannot_read(tree: Tree, public: Path) -> None:
    """A library that its loader could not open would be a warning in every program started."""
    need(os.geteuid() == 0, "needs root")
    there = tree.copy_to(public / "unreadable")
    there.prctl_library.chmod(0o600)
    refused(run([*AS_NOBODY, there.wrapper, "echo", "run"]), FAILED, there.prctl_library.name)
