# SPDX-License-Identifier: MIT
"""The policy in the libraries: real files at the real paths, in a mount namespace of the test's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import (
    HERE,
    SHIMS,
    SOURCE,
    Tree,
    Victims,
    facts,
    need,
    need_command,
    opted_in,
    run,
    without_us,
)
from policy_cases import ALLOW
from test_policy import FOLDERS, make

LEFT_OUT = "ksm_preload: left out: "
BY_POLICY = LEFT_OUT + "the policy\n"
UNREADABLE = LEFT_OUT + "the policy cannot be read\n"
OFF = LEFT_OUT + "/run/ksm-preload.disabled\n"
NO_NAME = LEFT_OUT + "/proc/self/exe cannot be read\n"
OPTED_IN = "ksm_preload: opted in (prctl)\n"


@dataclass(frozen=True)
class System:
    """An /etc and a /run of a test's own."""

    root: Path

    def inside(self, *before: str) -> list[object]:
        """Return a command prefix: what follows sees them, after more shell commands."""
        mounts = [f"mount --bind '{self.root}/{name}' /{name}" for name in ("etc", "run")]
        script = " && ".join([*mounts, *before, 'exec "$@"'])
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]

    def folder(self, files: dict[str, str]) -> Path:
        """Write files of the policy."""
        return make(self.root, files)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    need(os.geteuid() == 0, "needs root for a mount namespace")
    need_command("unshare")
    before = os.path.lexists("/etc/ksm-preload"), os.path.lexists("/run/ksm-preload.disabled")
    root = tmp_path / "root"
    for name in ("etc", "run"):
        (root / name).mkdir(parents=True)
    for name in ("ld.so.cache", "passwd", "group", "nsswitch.conf"):
        if Path("/etc", name).exists():
            shutil.copy(Path("/etc", name), root / "etc")
    yield System(root)
    assert before == (
        os.path.lexists("/etc/ksm-preload"), os.path.lexists("/run/ksm-preload.disabled")
    )  # fmt: skip


@pytest.fixture(params=SHIMS)
def shim(request: pytest.FixtureRequest, tree: Tree) -> tuple[str, list[str]]:
    """Return how a shim opts in, and the arguments of `env` that load it."""
    library, env = tree.shim(request.param)
    method = "madvise" if "madvise" in request.param else "prctl"
    return method, [f"LD_PRELOAD={library}", *(f"{name}={value}" for name, value in env.items())]


@pytest.fixture(scope="session")
def ssh(victims: Victims, public: Path) -> Path:
    """Return the program `report` under a name that the defaults leave out."""
    program = public / "ssh"
    shutil.copy(victims("report"), program)
    return program


@pytest.mark.ksm
@pytest.mark.parametrize("name", FOLDERS)
def test_folder(
    name: str, system: System, shim: tuple[str, list[str]], victims: Victims, ssh: Path
) -> None:
    files, then, report, other = FOLDERS[name]
    make(system.root, files, then)
    method, env = shim
    for program, expected in ((victims("report"), report), (ssh, other)):
        done = run([*system.inside(), "/usr/bin/env", *env, program])
        assert opted_in(facts(done)) == (method if expected == ALLOW else "no"), program
        assert done.stderr == ""


@pytest.mark.ksm
@pytest.mark.parametrize("why", ["policy", "switch", "no rule"])
def test_left_out_loses_an_inherited_flag_and_sees_nothing(
    why: str, system: System, shim: tuple[str, list[str]], victims: Victims, tree: Tree
) -> None:
    system.folder({"policy": "deny report-*\n" if why == "policy" else ""})
    if why == "switch":
        (system.root / "run/ksm-preload.disabled").touch()
    method, env = shim
    flagged = [*system.inside(), tree.wrapper, "--no-preload", "/usr/bin/env"]
    inherited = facts(run([*flagged, victims("report")]))
    assert opted_in(inherited) == "prctl"
    done = run([*flagged, *env, victims("report")])
    assert opted_in(facts(done)) == (method if why == "no rule" else "no")
    plain = run([*system.inside(), "/usr/bin/env", victims("report")])
    assert without_us(facts(done)) == without_us(facts(plain))
    assert facts(done)["errno_in_constructor"] == facts(done)["errno_at_start"] == ["0"]
    assert done.stderr == ""


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"policy": "deny end-*\n"}, BY_POLICY),
        ({"policy": "default deny\n"}, BY_POLICY),
        ({"policy": ""}, ""),
        ({"off": ""}, OFF),
    ],
    ids=["a rule", "the default", "let in", "switched off"],
)
def test_says_why_when_asked(
    system: System,
    shim: tuple[str, list[str]],
    victims: Victims,
    files: dict[str, str],
    line: str,
) -> None:
    system.folder(files)
    if "off" in files:
        (system.root / "run/ksm-preload.disabled").touch()
    method, env = shim
    command = ["/usr/bin/env", *env, "KSM_PRELOAD_VERBOSE=1", victims("end"), "exit", "7"]
    done = run([*system.inside(), *command])
    assert done.returncode == 7
    assert done.stderr == (line or f"ksm_preload: opted in ({method})\n")


@pytest.mark.ksm
def test_off_in_the_environment_comes_first(
    system: System, shim: tuple[str, list[str]], victims: Victims
) -> None:
    (system.root / "run/ksm-preload.disabled").touch()
    _, env = shim
    more = ["KSM_PRELOAD=off", "KSM_PRELOAD_VERBOSE=1", victims("end"), "exit", "7"]
    done = run([*system.inside(), "/usr/bin/env", *env, *more])
    assert (done.returncode, done.stderr) == (7, LEFT_OUT + "KSM_PRELOAD=off\n")


@pytest.mark.ksm
@pytest.mark.parametrize("name", SHIMS[:2])
def test_without_proc_the_name_has_to_be_sure(
    system: System, tree: Tree, victims: Victims, public: Path, name: str
) -> None:
    """Where exec's own word is not (a symlink, a rule on the whole path), the program stays out."""
    library, _ = tree.shim(name)
    command = [*system.inside("mount -t tmpfs none /proc"), "/usr/bin/env"]
    command += ["KSM_PRELOAD_VERBOSE=1", f"LD_PRELOAD={library}"]
    link = public / "a-link-to-end"
    if not link.exists():
        link.symlink_to(victims("end"))
    end = ["exit", "7"]
    assert run([*command, victims("end"), *end]).stderr == OPTED_IN
    assert run([*command, link, *end]).stderr == NO_NAME
    folder = system.folder({"policy": "deny no-such\n"})
    assert run([*command, victims("end"), *end]).stderr == OPTED_IN
    (folder / "policy").write_text("deny end-*\n")
    assert run([*command, victims("end"), *end]).stderr == BY_POLICY
    (folder / "policy").write_text("deny /opt/*\n")
    assert run([*command, victims("end"), *end]).stderr == NO_NAME


@pytest.mark.ksm
@pytest.mark.parametrize("name", SHIMS[:2])
def test_the_name_is_the_executables_however_it_was_started(
    system: System, tree: Tree, victims: Victims, public: Path, name: str
) -> None:
    """A symlink, a script, a relative path, an argument that equals the path, and the loader."""
    system.folder({"policy": "deny report-dynamic\nallow ld-*\n"})
    named = public / "names"
    named.mkdir(exist_ok=True)
    report = victims("report")
    for link, target in (("link", report), ("report-dynamic", victims("end"))):
        if not (named / link).is_symlink():
            (named / link).symlink_to(target)
    script, nested = named / "script", named / "nested"
    script.write_text(f"#!{report} --fork\n")
    nested.write_text(f"#!{script}\n")
    for file in (script, nested):
        file.chmod(0o755)
    env = [*system.inside(f"cd {named}"), "/usr/bin/env"]
    env += ["KSM_PRELOAD_VERBOSE=1", f"LD_PRELOAD={tree.shim(name)[0]}"]
    for command in (
        [report], ["./link"], [named / "link"], ["../victims/report-dynamic"], [script], [nested],
    ):  # fmt: skip
        assert run([*env, *command]).stderr == BY_POLICY, command
    # Of the other name, though it is called by the denied one.
    assert run([*env, named / "report-dynamic", "exit", "0"]).stderr == OPTED_IN
    assert run([*env, victims("end"), "exit", victims("end")]).stderr == OPTED_IN
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    need(loader.exists(), f"no {loader}")
    assert run([*env, loader, report]).stderr == OPTED_IN
    (system.root / "etc/ksm-preload/policy").write_text("deny ld-*\n")
    for by_hand in ([loader], [loader, "--argv0", "x"]):
        assert run([*env, *by_hand, report]).stderr == BY_POLICY


@pytest.mark.ksm
def test_nothing_is_read_where_the_environment_has_decided(
    system: System, tree: Tree, victims: Victims
) -> None:
    system.folder({"policy": "default deny\n"})
    log = system.root / "log"
    for setting in ("KSM_PRELOAD=off", "KSM_PRELOAD=madvise"):
        strace = [need_command("strace"), "-o", log, "-E", setting]
        library = ["-E", f"LD_PRELOAD={tree.prctl_library}"]
        assert (
            run([*system.inside(), *strace, *library, victims("end"), "exit", "7"]).returncode == 7
        )
        assert "ksm-preload." not in log.read_text()


@pytest.mark.ksm
def test_a_file_that_is_cut_short_meanwhile(system: System, tree: Tree, victims: Victims) -> None:
    """Read by mmap this would be a SIGBUS, now and then, in every program of the machine."""
    folder = system.folder({"policy": ""})
    text = b"deny nothing-of-that-name\n" * 40_000
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            with (folder / "policy").open("r+b") as file:
                file.write(text)
                file.flush()
                file.truncate(0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        loop = 'i=0; while [ $i -lt 150 ]; do "$1" exit 7; [ $? = 7 ] || exit 1; i=$((i+1)); done'
        env = ["/usr/bin/env", f"LD_PRELOAD={tree.prctl_library}"]
        done = run([*system.inside(), *env, "sh", "-c", loop, "sh", victims("end")])
    finally:
        stop.set()
        writer.join()
    assert (done.returncode, done.stderr) == (0, "")


# --- every system call that the constructor makes fails, one after the other ---

FILES = {
    "policy.d/a.conf": "deny x\n",
    "policy.d/b.conf": "deny y\n",
    "policy": "deny /no/end-dynamic\n",
    # More than one getdents64(2) gives, so that the folder is read again.
    **{f"policy.d/not-one-{'x' * 200}-{i}": "" for i in range(8)},
}
# What a call that fails with an error nobody expects there leads to.
IN_DOUBT = {
    "faccessat": OFF,
    "openat": UNREADABLE,
    "fstat": UNREADABLE,
    "getdents64": UNREADABLE,
    "lseek": UNREADABLE,
    "read": UNREADABLE,
    "close": OPTED_IN,
    "readlinkat": NO_NAME,
    "readlinkat of AT_EXECFN": OPTED_IN,
    "prctl": "ksm_preload: not opted in: the kernel refused the prctl\n",
    "write": "",
}


def calls_of(log: str) -> list[tuple[str, int, str]]:
    """Return the calls between the look at the switch and the line said: name, which, text."""
    seen: dict[str, int] = {}
    found = []
    started = False
    for line in log.splitlines():
        name = line.partition("(")[0]
        seen[name] = seen.get(name, 0) + 1
        started |= "ksm-preload.disabled" in line
        if started:
            found.append((name, seen[name], line))
        if started and name == "write":
            break
    return found


@pytest.mark.ksm
@pytest.mark.parametrize("error", ["EIO", "ENOMEM", "EINTR", "ENOSYS"])
def test_each_call_fails(system: System, tree: Tree, victims: Victims, error: str) -> None:
    system.folder(FILES)
    log = system.root / "log"
    strace = [need_command("strace"), "-o", log, "-E", "KSM_PRELOAD_VERBOSE=1"]
    library = ["-E", f"LD_PRELOAD={tree.prctl_library}"]
    ours = [*library, victims("end"), "exit", "7"]

    assert run([*system.inside(), *strace, *ours]).stderr == OPTED_IN
    calls = calls_of(log.read_text())
    assert {name for name, _, _ in calls} >= {
        "faccessat", "openat", "getdents64", "lseek", "read", "close", "readlinkat", "prctl"
    }  # fmt: skip
    for name, which, line in calls:
        inject = f"inject={name}:error={error}:when={which}"
        done = run([*system.inside(), *strace, "-e", inject, *ours])
        assert "INJECTED" in log.read_text(), line
        kind = "fstat" if "fstat" in name else name
        if name == "readlinkat" and "/proc/self" not in line:
            kind += " of AT_EXECFN"
        assert (done.returncode, done.stderr) == (7, IN_DOUBT[kind]), (line, done.stderr)


@pytest.mark.ksm
@pytest.mark.parametrize(
    ("error", "said"),
    [("ENOENT", OPTED_IN), ("ELOOP", OPTED_IN), ("EACCES", UNREADABLE), ("EPERM", UNREADABLE)],
)
def test_what_is_not_there_and_what_may_not_be_read(
    system: System, tree: Tree, victims: Victims, error: str, said: str
) -> None:
    system.folder({"policy": "default deny\n"})
    log = system.root / "log"
    strace = [need_command("strace"), "-o", log, "-E", "KSM_PRELOAD_VERBOSE=1"]
    ours = ["-E", f"LD_PRELOAD={tree.prctl_library}", victims("end"), "exit", "7"]
    assert run([*system.inside(), *strace, *ours]).stderr == BY_POLICY
    for name, which, line in calls_of(log.read_text()):
        if name == "openat" and "policy.d" not in line:
            inject = f"inject=openat:error={error}:when={which}"
            assert run([*system.inside(), *strace, "-e", inject, *ours]).stderr == said, line


@pytest.mark.ksm
@pytest.mark.parametrize("name", ["", "policy.d", "policy.d/a.conf", "policy"])
def test_another_users_program_that_may_not_read_the_policy_is_left_out(
    system: System, shim: tuple[str, list[str]], victims: Victims, name: str
) -> None:
    files = {"policy.d/a.conf": "allow a\n", "policy": "allow *\n"}
    folder = system.folder(files)
    for above in (system.root / "etc", system.root / "run"):
        above.chmod(0o755)
    method, env = shim
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/env", *env]
    command = [*system.inside(), *other, "KSM_PRELOAD_VERBOSE=1", victims("end"), "exit", "7"]
    assert run(command).stderr == f"ksm_preload: opted in ({method})\n"
    (folder / name).chmod(0o700 if (folder / name).is_dir() else 0o600)
    assert run(command).stderr == UNREADABLE


@pytest.mark.ksm
def test_the_descriptors_are_closed(
    system: System, shim: tuple[str, list[str]], victims: Victims
) -> None:
    system.folder({**FILES, "policy.d/c.conf": "allow report-*\n"})
    _, env = shim
    plain = facts(run([*system.inside(), "/usr/bin/env", victims("report")]))
    ours = facts(run([*system.inside(), "/usr/bin/env", *env, victims("report")]))
    assert without_us(ours)["fd"] == without_us(plain)["fd"]


# --- other architectures, and what else is there ---


@pytest.mark.parametrize("kind", ["dynamic", "i386", "aarch64"])
def test_every_architecture_reads_the_same(
    system: System, victims: Victims, kind: str, tmp_path: Path
) -> None:
    """What the kernel fills in (struct stat, directory entries) differs between them."""
    compiler = {"dynamic": "gcc", "i386": "i686-linux-gnu-gcc", "aarch64": "aarch64-linux-gnu-gcc"}
    program = tmp_path / "ask"
    include = [f"-I{SOURCE}", f"-I{victims.defaults()}", "-Wall", "-Wextra", "-Werror"]
    source = HERE / "programs" / "policy.c"
    built = run([need_command(compiler[kind]), "-static", *include, "-o", program, source])
    assert built.returncode == 0, built.stderr
    emulator = [need_command("qemu-aarch64")] if kind == "aarch64" else []
    ask = [*system.inside(), *emulator, program, "ask"]
    for files, line in (
        ({}, ""),
        ({"policy": "deny ask\n"}, BY_POLICY),
        ({"policy": f"deny {tmp_path}/*\n"}, BY_POLICY),
        ({"policy.d/b.conf": "deny *\n", "policy.d/a.conf": "allow ask\n"}, ""),
        ({"policy": "x" * 1500 + "\ndefault deny\n"}, BY_POLICY),
    ):
        folder = system.folder(files)
        assert run(ask).stdout == line, files
        for name in files:
            (folder / name).chmod(0o646)
        assert run(ask).stdout == "", files
        for name in files:
            (folder / name).chmod(0o644)
            os.chown(folder / name, 65534, 65534)
        assert run(ask).stdout == "", files
        shutil.rmtree(folder)
    (system.root / "run/ksm-preload.disabled").touch()
    assert run(ask).stdout == OFF


# --- ksmtool ---


@pytest.mark.ksm
def test_wrap_says_it_in_one_line_and_starts_it_left_out(
    system: System, tree: Tree, victims: Victims
) -> None:
    report = victims("report")
    system.folder({"policy": "# mine\ndeny report-*\n"})
    inside = [*system.inside(), tree.wrapper, "--no-preload", tree.ksmtool, "wrap"]
    why = f'{report} is left out of KSM: "deny report-*" in /etc/ksm-preload/policy:2'
    done = run([*inside, report])
    assert opted_in(facts(done)) == "no"
    assert done.stderr == f"ksmtool: {why}\n"
    assert run([*inside, "-q", report]).stderr == ""
    explained = run([*inside, "--explain", report])
    assert f"ksmtool: plan:    {why}\n" in explained.stderr
    assert opted_in(facts(explained)) == "no"
    required = run([*inside, "--group", "any", "--group-required", report])
    assert required.returncode == 4
    (system.root / "run/ksm-preload.disabled").touch()
    off = run([*inside, victims("end"), "exit", "7"])
    assert (off.returncode, off.stderr) == (
        7, f"ksmtool: {victims('end')} is left out of KSM: /run/ksm-preload.disabled is there\n"
    )  # fmt: skip


def check(system: System, tree: Tree, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run([*system.inside(), tree.ksmtool, "policy", "check", *arguments])


def test_policy_check_says_what_is_in_force(system: System, tree: Tree, public: Path) -> None:
    link = public / "shell"
    if not link.exists():
        link.symlink_to("/bin/sh")
    script = public / "a-script"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    system.folder({"policy.d/a.conf": "deny sh\ndeny dash\ndeny bash\n"})
    done = check(system, tree, link, script, "env")
    sh = os.path.realpath("/bin/sh")
    lines = done.stdout.splitlines()
    assert lines[0] == "in force: /etc/ksm-preload/policy.d/a.conf (3 rules)"
    assert re.fullmatch(r"in force: /.*/default_policy, the defaults .* \(\d+ rules\)", lines[1])
    assert lines[2] == "default:  opted in, no rule matches"
    assert lines[3] == "switch:   /run/ksm-preload.disabled is not there"
    for line, name in zip(lines[4:], (link, script)):
        assert line.startswith(f'{name}: left out, "deny {Path(sh).name}" in /etc/ksm-preload/pol')
        assert line.endswith(f"; it is {sh}")
    assert lines[6].startswith("env: opted in, no rule matches; it is /")
    assert (done.returncode, done.stderr) == (0, "")


def test_policy_check_finds_problems(system: System, tree: Tree) -> None:
    folder = system.folder({"policy.d/a.conf": "denny sh\n", "policy.d/b.conf": "", "policy": ""})
    (folder / "policy").chmod(0o666)
    done = check(system, tree)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == [
        "/etc/ksm-preload/policy.d/a.conf:1: 'denny' is none of deny, allow, default.",
        "/etc/ksm-preload/policy: Not read: others than root may write it (mode 0666).",
    ]
    assert done.stderr == ""


def test_policy_check_as_json(system: System, tree: Tree) -> None:
    system.folder({"policy": "default deny\nallow [\nallow env\n"})
    (system.root / "run/ksm-preload.disabled").touch()
    done = check(system, tree, "--json", "env")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    file = "/etc/ksm-preload/policy"
    assert document.pop("programs") == [
        {
            "program": "env", "executable": os.path.realpath(str(shutil.which("env"))),
            "verdict": "deny", "why": "/run/ksm-preload.disabled is there",
            "file": None, "line": None, "rule": None, "note": None,
        }
    ]  # fmt: skip
    assert document == {
        "schema": 1,
        "sources": [{"file": file, "rules": 2}],
        "default": {
            "verdict": "deny", "why": f'"default deny" in {file}:1',
            "file": file, "line": 1, "rule": "default deny",
        },
        "kill_switch": {"file": "/run/ksm-preload.disabled", "on": True},
        "unreadable": None,
        "problems": [
            {
                "file": file, "line": 2,
                "message": "A set that begins with [ is never closed by ].",
            }
        ],
    }  # fmt: skip


def test_policy_check_of_a_static_program_that_is_denied(
    system: System, tree: Tree, victims: Victims
) -> None:
    system.folder({"policy": "default deny\n"})
    end = victims("end", "static")
    said = "static: it loads no library, so it keeps the flag of whoever starts it"
    why = '"default deny" in /etc/ksm-preload/policy:1'
    assert check(system, tree, end).stdout.splitlines()[-1] == (
        f"{end}: left out, {why}; it is {end}, {said}"
    )
    [found] = json.loads(check(system, tree, "--json", end).stdout)["programs"]
    assert (found["verdict"], found["note"]) == ("deny", said)


def test_policy_check_finds_likely_mistakes(system: System, tree: Tree) -> None:
    system.folder({"policy.d/a": "", "policy": "deny a # not b\n"})
    done = check(system, tree)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:2] == [
        "/etc/ksm-preload/policy.d/a: Not read: its name does not end in .conf.",
        "/etc/ksm-preload/policy:1: A comment is a line of its own: here the # is part of the"
        " pattern.",
    ]


def test_policy_check_of_what_is_not_there(system: System, tree: Tree) -> None:
    done = check(system, tree, "no-such-program")
    assert done.returncode == 2
    assert "There is no program no-such-program." in done.stderr
