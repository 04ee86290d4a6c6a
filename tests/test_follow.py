# SPDX-License-Identifier: MIT
"""ksm-wrapper --follow: what a member of a group starts joins it, and nothing else changes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import AS_NOBODY, Tree, Victims, need_command, run, wait_until
from test_group_programs import free_port


@pytest.fixture
def group(tree: Tree, tmp_path: Path) -> Iterator[str]:
    """Return the name of a group that is new, and gone after the test."""
    name = f"test-follow-{os.getpid()}"
    yield name
    for path in run([tree.wrapper, "--groups"]).stdout.splitlines():
        if Path(path).name == name:
            Path(path).unlink()


@pytest.fixture
def following(tree: Tree, group: str) -> list[object]:
    """Return the command line to put before a program."""
    return [tree.wrapper, "--group", group, "--group-required", "--follow"]


def where(tree: Tree, group: str) -> str:
    """Return where programs of the group begin to map."""
    command = [tree.wrapper, "--group", group, "--group-required", "cat", "/proc/self/maps"]
    return last_before_stack(run(command).stdout)


def last_before_stack(maps: str) -> str:
    """Return the end of the last mapping below the stack."""
    last = ""
    for line in maps.splitlines():
        if "[stack]" in line:
            return last
        last = line.split()[0].partition("-")[2]
    pytest.fail("no stack")


WAYS = {
    "fork and exec": "cat /proc/self/maps; true",
    "exec in the same process": "exec cat /proc/self/maps",
    "a chain of execs": "exec sh -c 'exec sh -c \"exec cat /proc/self/maps\"'",
    "env": "exec env A=1 cat /proc/self/maps",
    "nohup and setsid": "setsid nohup cat /proc/self/maps",
    "xargs": "echo /proc/self/maps | xargs cat",
    "a daemon's double fork": "(setsid sh -c 'cat /proc/self/maps & wait' & wait)",
    "posix_spawn": 'exec python3 -c "import os; '
    "os.waitpid(os.posix_spawnp('cat', ['cat', '/proc/self/maps'], os.environ), 0)\"",
    "below a static program": "exec busybox env /bin/cat /proc/self/maps",
    "without privileges": "exec setpriv --no-new-privs cat /proc/self/maps",
}


@pytest.mark.parametrize("way", WAYS)
def test_joins(tree: Tree, group: str, following: list[object], way: str) -> None:
    if "busybox" in WAYS[way]:
        need_command("busybox")
    done = run([*following, "sh", "-c", WAYS[way]])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert last_before_stack(done.stdout) == where(tree, group)


def test_what_a_static_program_execs_joins(tree: Tree, victims: Victims, group: str) -> None:
    """It is that process still, but nobody in it could say that it has not been placed."""
    static = victims("start", "static")
    command = [tree.wrapper, "--group", group, "--follow", static]
    command += ["exec", "/bin/cat", "/proc/self/maps"]
    assert last_before_stack(run(command).stdout) == where(tree, group)


@pytest.mark.parametrize("user", [65534, 0])
def test_only_the_users_own_programs_join(public_tree: Tree, group: str, user: int) -> None:
    command = [public_tree.wrapper, "--group", group, "--follow", "setpriv", f"--reuid={user}"]
    done = run([*command, "--clear-groups", "cat", "/proc/self/maps"])
    assert done.returncode == 0, done.stderr
    assert (last_before_stack(done.stdout) == where(public_tree, group)) == (user == 0)
    folder = Path(f"/tmp/ksm-preload-{user}/groups")
    assert not (folder / group).exists()


def test_nothing_is_said_further_down(victims: Victims, following: list[object]) -> None:
    """Where the layout cannot be had: here by a filter that comes after the first program."""
    line = f"exec {victims('refuse')} mremap 1 /bin/sh -c 'cat /proc/self/comm'"
    done = run([*following, "sh", "-c", line])
    assert (done.returncode, done.stdout, done.stderr) == (0, "cat\n", "")


STAYS_OUT = {
    "an empty environment": "exec env -i cat /proc/self/maps",
    "without LD_PRELOAD": "exec env -u LD_PRELOAD cat /proc/self/maps",
    "without our variable": "exec env -u KSM_PRELOAD_FOLLOW cat /proc/self/maps",
    "the loader called by hand": "exec /lib64/ld-linux-x86-64.so.2 /bin/cat /proc/self/maps",
    "under strace": "exec strace -o /dev/null cat /proc/self/maps",
}


@pytest.mark.parametrize("way", STAYS_OUT)
def test_stays_out(tree: Tree, group: str, following: list[object], way: str) -> None:
    if "strace" in STAYS_OUT[way]:
        need_command("strace")
    done = run([*following, "sh", "-c", STAYS_OUT[way]])
    assert (done.returncode, done.stderr) == (0, "")
    assert last_before_stack(done.stdout) != where(tree, group)


def test_not_without_being_asked(tree: Tree, group: str) -> None:
    command = [tree.wrapper, "--group", group, "--group-required", "sh", "-c"]
    done = run([*command, "cat /proc/self/maps; true"])
    assert last_before_stack(done.stdout) != where(tree, group)


SEEN = r"""
import os, re, resource, sys
for name in ("PYTHONHASHSEED", "LD_PRELOAD"):
    os.environ.pop(name, None)
status = open("/proc/self/status").read()
print(sys.argv, os.environ["A"])
print(open("/proc/self/comm").read(), open("/proc/self/cmdline").read())
print(os.getpid() == os.getpgid(0), os.getcwd(), resource.getrlimit(resource.RLIMIT_STACK))
print([line for line in status.splitlines() if re.match("Tracer|Sig[PBIC]|Shd|Umask", line)])
print(sorted(os.listdir("/proc/self/fd")), open("/proc/self/personality").read())
print(os.environ.get("KSM_PRELOAD_FOLLOW", "")[:26])
"""


def test_program_sees_what_it_would_see(
    tree: Tree, tmp_path: Path, following: list[object]
) -> None:
    script = tmp_path / "a script"
    script.write_text(f"#!/usr/bin/python3 -sS\n{SEEN}")
    script.chmod(0o755)
    line = 'umask 027; exec 7</dev/null; "$0" one "" three; (exec -a other "$0")'
    plain = run(["bash", "-c", line, script], {"A": "b"})
    followed = run([*following, "bash", "-c", line, script], {"A": "b"})
    assert plain.returncode == followed.returncode == 0, followed.stderr
    assert followed.stderr == plain.stderr
    blank = "0000000000:///////////////"
    assert followed.stdout.replace(blank, "") == plain.stdout
    assert followed.stdout.count(blank) == 2


def test_status_and_signals_pass(following: list[object]) -> None:
    assert run([*following, "sh", "-c", "sh -c 'exit 42'"]).returncode == 42
    assert run([*following, "sh", "-c", "sh -c 'kill -TERM $$'; echo $?"]).stdout == "143\n"


def test_privileged_program_is_not_touched(public_tree: Tree, public: Path, group: str) -> None:
    """It keeps its privileges, which tracing would take away, and an ordinary layout."""
    privileged = public / "set-uid-cat"
    privileged.write_bytes(Path("/bin/cat").read_bytes())
    privileged.chmod(0o4755)
    folder = public / "runtime-dir-of-nobody"
    folder.mkdir(0o700)
    os.chown(folder, 65534, 65534)
    environment = {"XDG_RUNTIME_DIR": str(folder)}
    command = [*AS_NOBODY, public_tree.wrapper, "--group", group, "--follow", "sh", "-c"]
    done = run([*command, f"{privileged} /proc/self/maps /proc/self/status; true"], environment)
    joined = run([*command, "cat /proc/self/maps; true"], environment)
    again = run([*command, "cat /proc/self/maps; true"], environment)
    assert done.stderr == joined.stderr == ""
    assert "\nUid:\t65534\t0\t0\t0\n" in done.stdout
    assert last_before_stack(joined.stdout) == last_before_stack(again.stdout)
    assert last_before_stack(done.stdout) != last_before_stack(joined.stdout)


def members(tree: Tree, group: str) -> set[int]:
    """Return the PIDs that have the group's layout."""
    done = run([tree.wrapper, "--group", group, "--members"])
    assert (done.returncode, done.stderr) == (0, "")
    return {int(line) for line in done.stdout.split()}


def with_children(pid: int) -> set[int]:
    """Return a process and its children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return {pid, *(int(word) for word in text.split())}


def pid_in(file: Path) -> int:
    """Return the PID that a server has written, 0 if it has not."""
    text = file.read_text() if file.exists() else ""
    return int(text) if text.endswith("\n") else 0


def end(pids: set[int]) -> None:
    """End servers that are nobody's child here."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20, "they end")


def test_gunicorn_upgraded_in_place(
    tree: Tree, group: str, following: list[object], tmp_path: Path
) -> None:
    """Started through a shell; on SIGUSR2 its arbiter forks and execs itself anew."""
    need_command("gunicorn")
    (tmp_path / "app.py").write_text(
        "def app(environ, start):\n    start('200 OK', [])\n    return [b'said']\n"
    )
    first, second = tmp_path / "pid", tmp_path / "pid.2"
    line = f"gunicorn --workers 2 --bind unix:{tmp_path}/socket --pid {first} app:app; exit $?"
    log = (tmp_path / "log").open("w")
    with (
        log,
        subprocess.Popen(
            [*map(str, following), "sh", "-c", line], cwd=tmp_path, stderr=log, stdout=log
        ) as shell,
    ):
        servers: set[int] = set()
        try:
            wait_until(lambda: pid_in(first) != 0, 20, "gunicorn starts")
            old = pid_in(first)
            servers.add(old)
            wait_until(lambda: len(with_children(old)) == 3, 20, "it has its workers")
            wait_until(lambda: members(tree, group) >= with_children(old), 20, "all are members")
            os.kill(old, signal.SIGUSR2)
            wait_until(lambda: pid_in(second) != 0, 20, "the new arbiter starts")
            new = pid_in(second)
            servers.add(new)
            wait_until(lambda: len(with_children(new)) == 3, 20, "it has its workers")
            wait_until(lambda: members(tree, group) >= with_children(new), 20, "all are members")
        finally:
            end(servers)
            shell.wait(20)
    assert not members(tree, group)


@pytest.mark.slow
def test_apachectl(tree: Tree, group: str, following: list[object], tmp_path: Path) -> None:
    """A script that starts a daemon, which forks twice; then a graceful restart."""
    control, pid_file = need_command("apachectl"), tmp_path / "pid"
    modules = "/usr/lib/apache2/modules"
    lines = [
        f"LoadModule mpm_prefork_module {modules}/mod_mpm_prefork.so",
        f"LoadModule authz_core_module {modules}/mod_authz_core.so",
        *(
            "ServerName localhost",
            f"Listen 127.0.0.1:{free_port()}",
            "User nobody",
            "Group nogroup",
        ),
        *(f"PidFile {pid_file}", f"ErrorLog {tmp_path}/errors", "StartServers 3"),
    ]
    (tmp_path / "conf").write_text("\n".join(lines) + "\n")
    (tmp_path / "envvars").write_text(
        f"export APACHE_RUN_DIR={tmp_path} APACHE_LOCK_DIR={tmp_path} APACHE_RUN_USER=root\n"
    )
    environment = {"APACHE_ENVVARS": str(tmp_path / "envvars"), "APACHE_CONFDIR": str(tmp_path)}
    done = run([*following, control, "-f", tmp_path / "conf", "-k", "start"], environment)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: pid_in(pid_file) != 0, 20, "Apache starts")
    pid = pid_in(pid_file)
    try:
        wait_until(lambda: len(with_children(pid)) == 4, 20, "it has its workers")
        before = with_children(pid)
        assert members(tree, group) >= before
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: with_children(pid) & before == {pid}, 20, "it has new workers")
        wait_until(lambda: members(tree, group) >= with_children(pid), 20, "all are members")
    finally:
        end({pid})


def test_debugger_finds_its_program(tree: Tree, victims: Victims, following: list[object]) -> None:
    need_command("gdb")
    script = "break main", "run", "bt", "continue"
    commands = [word for line in script for word in ("-ex", line)]
    done = run([*following, "gdb", "-q", "-nx", "--batch", *commands, victims("report")])
    assert "in main" in done.stdout or "main (" in done.stdout, done.stdout
    assert "exited normally" in done.stdout


def test_valgrind_keeps_its_program(victims: Victims, following: list[object]) -> None:
    need_command("valgrind")
    done = run([*following, "sh", "-c", "exec valgrind --error-exitcode=9 true"])
    assert done.returncode == 0
    assert "ERROR SUMMARY: 0 errors" in done.stderr


def test_program_that_was_replaced_goes_on(
    tree: Tree, tmp_path: Path, following: list[object]
) -> None:
    """The file is gone by the time the wrapper runs it: what runs is what was running."""
    copy = tmp_path / "copy"
    copy.write_bytes(Path("/bin/cat").read_bytes())
    copy.chmod(0o755)
    # A shell that removes the program in between cannot be timed: so the wrapper is asked directly.
    state = "R000000009:copy///////////:-:0/nobody-has-this-name-yet:/x"
    line = f"exec 9<{copy}; rm {copy}; exec {tree.wrapper} /proc/self/comm"
    done = run(["bash", "-c", line], {"KSM_PRELOAD_FOLLOW": state})
    for path in run([tree.wrapper, "--groups"]).stdout.splitlines():
        if Path(path).name == "nobody-has-this-name-yet":
            Path(path).unlink()
    assert (done.returncode, done.stdout) == (0, "copy\n"), done.stderr


@pytest.mark.parametrize(
    "state",
    [
        "",
        "R",
        "R00000000",
        "0" * 27,
        "R000000999:x//////////////:s:g:/nowhere",
        ":" * 60,
        "9" * 200,
    ],
)
def test_nonsense_in_the_variable_harms_nobody(tree: Tree, state: str) -> None:
    library = tree.follow_library
    done = run(["/bin/echo", "x"], {"LD_PRELOAD": str(library), "KSM_PRELOAD_FOLLOW": state})
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")


def test_wrapper_that_is_gone_harms_nobody(tree: Tree) -> None:
    library = tree.follow_library
    state = f"{'0' * 10}:{'/' * 15}:s:g:/nowhere/ksm-wrapper"
    environment = {"LD_PRELOAD": str(library), "KSM_PRELOAD_FOLLOW": state}
    done = run(["bash", "-c", 'echo "$KSM_PRELOAD_FOLLOW"; ls /proc/self/fd | wc -l'], environment)
    plain = run(["bash", "-c", "ls /proc/self/fd | wc -l"])
    assert done.stdout == f"{state}\n{plain.stdout}"
    assert done.stderr == ""


def test_library_exports_and_needs_nothing(tree: Tree) -> None:
    need_command("readelf")
    library = tree.follow_library
    shown = subprocess.run(
        ["readelf", "-dW", "--dyn-syms", library], capture_output=True, text=True, check=True
    ).stdout
    assert "(NEEDED)" not in shown
    assert "INITFIRST" in shown
    assert not re.search(r"(GLOBAL|WEAK)", shown)
