# SPDX-License-Identifier: MIT
"""ksm-rescue and others: editors at the same time, who confirms, and the kernel that starts it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from conftest import AS_NOBODY, Rescue, Tree, Victims, need_command, wait_until

E = b"/usr/lib/libksm_preload_prctl.so"
MADVISE = b"/usr/lib/libksm_preload.so"
NEW_NAME = ".ld.so.preload.ksm-new"

# --- two editors ---


@pytest.mark.parametrize("others", [b"", b"/a.so\n/b.so\n"], ids=["only ours", "others too"])
def test_editors_at_the_same_time(
    rescue: Rescue, others: bytes, measured: Callable[[str], None]
) -> None:
    """Each moment the file is one of the valid ones; and each edit succeeds."""
    rescue.write(others or None)
    valid = {others or None, others + E + b"\n", others + MADVISE + b"\n"}
    failed: list[object] = []
    seen: Counter[bytes | None] = Counter()
    ended = threading.Event()

    def edit(*arguments: str | bytes) -> None:
        for _ in range(40):
            done = rescue(*arguments)
            if done.returncode != 0 or done.stderr:
                failed.append(done)

    def watch() -> None:
        while not ended.is_set():
            seen[rescue.read()] += 1

    editors = [
        threading.Thread(target=edit, args=arguments)
        for arguments in (("--add", E), (), ("--add", MADVISE), ())
    ]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *editors):
        thread.start()
    for thread in editors:
        thread.join()
    ended.set()
    watcher.join()
    assert failed == []
    assert set(seen) <= valid
    assert len(seen) > 1
    assert rescue.left() == []
    for backup in rescue.backups():
        assert backup.read_bytes() in valid
    assert rescue().returncode == 0
    assert rescue.read() == (others or None)
    measured(f"160 edits by 4 at the same time, read {sum(seen.values())} times: 0 torn files")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    held = os.open(file, os.O_RDONLY | (0 if file.is_dir() else os.O_CREAT), 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


@pytest.mark.slow
def test_a_lock_that_another_does_not_give_up(rescue: Rescue) -> None:
    rescue.write(b"/a.so\n")
    with locked(rescue.etc / NEW_NAME):
        started = time.monotonic()
        done = rescue("--add", E)
        assert time.monotonic() - started >= 9.9
    assert done.returncode == 1
    assert done.stderr == (
        b"ksm-rescue: Cannot write /etc/ld.so.preload: Somebody else has been editing it for 10"
        b" seconds.\n"
    )
    assert rescue.read() == b"/a.so\n"


def test_a_lock_that_is_given_up_is_waited_for(rescue: Rescue) -> None:
    with locked(rescue.etc / NEW_NAME):
        waiting = subprocess.Popen(rescue.command("--add", E), stdout=subprocess.PIPE)
        # It sleeps between its trials.
        wait_until(lambda: sleeps(waiting), 10, "it waits for the lock")
        assert rescue.read() is None
    assert waiting.communicate(timeout=20)[0]
    assert waiting.returncode == 0
    assert rescue.read() == E + b"\n"
    assert rescue.left() == []


def test_a_lock_that_has_become_the_file_is_not_one(rescue: Rescue) -> None:
    """Between opening it and locking it, its owner may rename it, and another make a new one."""
    log, new = rescue.root / "log", rescue.etc / NEW_NAME
    strace = [need_command("strace"), "-qq", "-o", str(log)]
    strace += ["-e", "inject=flock:delay_enter=2000000:when=1"]
    new.write_bytes(b"/a.so\n" + E + b"\n")
    log.touch()
    waiting = subprocess.Popen([*strace, *rescue.command()], stdout=subprocess.DEVNULL)
    wait_until(lambda: f'"{NEW_NAME}"' in log.read_text(), 10, "it has opened it")
    new.rename(rescue.file)
    with locked(new):
        wait_until(lambda: "nanosleep" in log.read_text(), 10, "it waits for the new one")
        assert new.exists()
        assert rescue.read() == b"/a.so\n" + E + b"\n"
    assert waiting.wait(timeout=20) == 0
    assert rescue.read() == b"/a.so\n"
    assert rescue.left() == []


def sleeps(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("S")


def test_what_a_killed_run_left_behind_is_no_lock(rescue: Rescue) -> None:
    for left in (b"", b"half a fi", b"x" * 5000):
        rescue.write(b"/a.so\n")
        (rescue.etc / NEW_NAME).write_bytes(left)
        (rescue.etc / NEW_NAME).chmod(0o644)
        assert rescue("--add", E).returncode == 0
        assert rescue.read() == b"/a.so\n" + E + b"\n"
        assert rescue.left() == []


@pytest.mark.parametrize("kind", ["hard link", "symbolic link", "fifo", "folder"])
def test_what_others_put_in_the_place_of_the_new_file(rescue: Rescue, kind: str) -> None:
    """A root that is given with --root may be theirs."""
    theirs, new = rescue.root / "theirs", rescue.etc / NEW_NAME
    rescue.write(b"/a.so\n")
    theirs.touch(0o600)
    if kind == "hard link":
        os.link(theirs, new)
    elif kind == "symbolic link":
        new.symlink_to(theirs)
    elif kind == "fifo":
        os.mkfifo(new)
    else:
        new.mkdir()
    done = rescue("--add", E)
    assert (theirs.read_bytes(), theirs.stat().st_mode & 0o777) == (b"", 0o600)
    if kind == "hard link":
        assert done.returncode == 0
        assert rescue.read() == b"/a.so\n" + E + b"\n"
    else:
        assert done.returncode == 1
        assert rescue.SAYS.fullmatch(done.stderr)
        assert rescue.read() == b"/a.so\n"


@pytest.mark.root
def test_other_users_cannot_lock_it(tree: Tree, public: Path) -> None:
    """Anybody may lock a folder that he can read."""
    editor = Rescue(tree.rescue, public / "locked")
    hold = [need_command("flock"), str(editor.etc), "sh", "-c", "echo has it; cat"]
    holder = subprocess.Popen([*AS_NOBODY, *hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"has it\n"
    assert editor("--add", E).returncode == 0
    holder.communicate()


NO_SLEEP = ("-e", "inject=nanosleep:retval=0")
"""The 10 seconds are over at once."""


@pytest.mark.root
@pytest.mark.parametrize("kind", ["--shared", "--exclusive"])
def test_other_users_cannot_keep_what_a_killed_run_left_behind(
    tree: Tree, public: Path, kind: str
) -> None:
    """It may have got its last mode already."""
    editor = Rescue(tree.rescue, public / "left" / kind)
    strace = [need_command("strace"), "-qq", "-o", str(editor.root / "log")]
    editor.write(b"/a.so\n")
    killed = [*strace, "-e", "inject=renameat:signal=KILL:when=1", *editor.command("--add", E)]
    assert subprocess.run(killed, check=False).returncode in {-signal.SIGKILL, 137}
    new = editor.etc / NEW_NAME
    assert new.stat().st_mode & 0o777 == 0o644
    hold = [need_command("flock"), kind, str(new), "sh", "-c", "echo has it; cat"]
    holder = subprocess.Popen([*AS_NOBODY, *hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"has it\n"
    next_one = [*strace, *NO_SLEEP, *editor.command("--add", E)]
    done = subprocess.run(next_one, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert editor.read() == b"/a.so\n" + E + b"\n"
    assert editor.left() == []
    assert holder.poll() is None
    holder.communicate()


@pytest.mark.parametrize("added", [MADVISE, None], ids=["add", "take out"])
def test_an_editor_that_is_slow_writes_no_more_when_others_went_on(
    rescue: Rescue, added: bytes | None
) -> None:
    """Its last fsync took longer than others wait."""
    log, new = rescue.root / "log", rescue.etc / NEW_NAME
    strace = [need_command("strace"), "-qq", "-o"]
    rescue.write(E + b"\n/a.so\n")
    delay = ["-e", "inject=fsync:delay_exit=2000000:when=1"]
    slow = subprocess.Popen(
        [*strace, str(log), *delay, *rescue.command()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: new.exists() and new.stat().st_mode & 0o777 == 0o644, 10, "it has its mode")
    edit = ("--add", added) if added else ()
    other = [*strace, str(rescue.root / "other"), *NO_SLEEP, *rescue.command(*edit)]
    assert subprocess.run(other, stdout=subprocess.DEVNULL, check=False).returncode == 0
    content = rescue.read()
    assert content == b"/a.so\n" + (added + b"\n" if added else b"")
    assert slow.poll() is None
    with locked(new):  # a third one, whose file has the name now
        said = slow.communicate(timeout=20)[1]
        assert new.exists()
    new.unlink()
    assert slow.returncode == 1
    assert rescue.SAYS.fullmatch(said)
    assert rescue.read() == content
    assert rescue.left() == []


# --- --confirm ---


class Asked:
    """ksm-rescue --add --confirm, which has added and waits."""

    def __init__(self, rescue: Rescue, old: bytes | None = b"/a.so\n") -> None:
        self.rescue = rescue
        self.old = old
        self.new = (old or b"") + E + b"\n"
        rescue.write(old)
        self.process = subprocess.Popen(
            rescue.command("--add", E, "--confirm"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin = self.process.stdin
        assert self.process.stdout.readline().endswith(b"added\n")
        assert rescue.read() == self.new

    def say(self, words: bytes) -> None:
        self.stdin.write(words)
        self.stdin.flush()

    def ended(self) -> tuple[int, bytes]:
        """Return status and stderr; its stdin stays open."""
        status = self.process.wait(timeout=20)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        for file in (self.stdin, self.process.stdout, self.process.stderr):
            file.close()
        assert self.rescue.left() == []
        return status, said

    def is_kept(self) -> None:
        assert self.ended() == (0, b"")
        assert self.rescue.read() == self.new
        assert len(self.rescue.backups()) == (1 if self.old else 0)

    def is_taken_back(self) -> None:
        assert self.ended() == (1, OUT)
        assert self.rescue.read() == self.old
        assert self.rescue.backups() == []


OUT = b"ksm-rescue: Not confirmed, so the entry is out of /etc/ld.so.preload again.\n"


def unread(pipe: IO[bytes]) -> int:
    (size,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"    "))
    return int(size)


@pytest.mark.parametrize("old", [None, b"/a.so\n"])
@pytest.mark.parametrize("writes", [[b"keep\n"], [b"ke", b"ep", b"\n"], [b"keep\nand more\n"]])
def test_keep(rescue: Rescue, writes: list[bytes], old: bytes | None) -> None:
    asked = Asked(rescue, old)
    for words in writes:
        assert asked.process.poll() is None
        asked.say(words)
        if words != writes[-1]:
            wait_until(lambda: unread(asked.stdin) == 0, 10, "it has read that")
            wait_until(lambda: sleeps(asked.process), 10, "it waits for the rest")
    asked.is_kept()


@pytest.mark.parametrize("old", [None, b"/a.so\n"])
@pytest.mark.parametrize(
    "words", [b"no\n no", b"keep ", b"Keep\n", b" keep\n", b"\0\0\0\0\0", b"keeps\n"]
)
def test_another_word(rescue: Rescue, words: bytes, old: bytes | None) -> None:
    asked = Asked(rescue, old)
    asked.say(words)
    asked.is_taken_back()


@pytest.mark.parametrize("words", [b"", b"keep", b"no\n"])
def test_the_end_of_input(rescue: Rescue, words: bytes) -> None:
    asked = Asked(rescue)
    asked.say(words)
    asked.stdin.close()
    asked.is_taken_back()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal(rescue: Rescue, name: str) -> None:
    asked = Asked(rescue)
    asked.process.send_signal(getattr(signal, name))
    asked.is_taken_back()


@pytest.mark.parametrize("name", ["SIGPIPE", "SIGUSR1", "SIGALRM", "SIGCHLD", "SIGWINCH"])
def test_another_signal_is_no_answer(rescue: Rescue, name: str) -> None:
    asked = Asked(rescue)
    asked.process.send_signal(getattr(signal, name))
    asked.process.send_signal(signal.SIGSTOP)
    asked.process.send_signal(signal.SIGCONT)
    asked.say(b"keep\n")
    asked.is_kept()


def test_a_parent_that_is_killed(rescue: Rescue) -> None:
    rescue.write(b"/a.so\n")
    script = "import subprocess, sys\n"
    script += "subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE).wait()"
    command = [sys.executable, "-c", script, *rescue.command("--add", E, "--confirm")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        assert parent.stdout.readline().endswith(b"added\n")
        parent.kill()
        assert parent.wait() == -signal.SIGKILL
        assert parent.stderr.read() == OUT  # ksm-rescue holds it open until its end
    assert rescue.read() == b"/a.so\n"
    assert rescue.left() == []


@pytest.mark.parametrize(
    ("theirs", "left"),
    [
        (b"/a.so\n" + E + b"\n/new.so\n", b"/a.so\n/new.so\n"),
        (b"/new.so\n", b"/new.so\n"),
        (E + b"\n", None),
        (b"", b""),
        (None, None),
    ],
    ids=["one more", "without ours", "without theirs", "emptied", "deleted"],
)
def test_an_edit_meanwhile_is_kept(
    rescue: Rescue, theirs: bytes | None, left: bytes | None
) -> None:
    asked = Asked(rescue)
    rescue.file.unlink()
    if theirs is not None:
        rescue.file.write_bytes(theirs)
        rescue.file.chmod(0o640)
    asked.stdin.close()
    assert asked.ended() == (1, OUT)
    assert rescue.read() == left
    if left is not None:
        assert rescue.file.stat().st_mode & 0o777 == 0o640


def test_another_ksm_rescue_need_not_wait_for_the_answer(rescue: Rescue) -> None:
    asked = Asked(rescue)
    assert rescue().returncode == 0
    assert rescue.read() == b"/a.so\n"
    assert asked.process.poll() is None
    asked.stdin.close()
    assert asked.ended() == (1, OUT)
    assert rescue.read() == b"/a.so\n"


def test_no_stdin_is_no_confirmation(rescue: Rescue) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *rescue.command("--add", E, "--confirm")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (1, OUT)
    assert rescue.read() is None


# --- the kernel's first program ---

BOOT = """
    mount -t tmpfs -o size=8m none "$place"
    cp -a "$root/." "$place"
    cd "$place"
    eval "$prepare"
    exec chroot . "$@"
"""


class Machine:
    """A root with ksm-rescue and an init, on a file system of its own."""

    def __init__(self, folder: Path, rescue: Path, init: Path) -> None:
        self.root, self.place = folder / "root", folder / "place"
        for name in ("etc", "sbin", "bin"):
            (self.root / name).mkdir(parents=True)
        self.place.mkdir()
        shutil.copy(rescue, self.root / "sbin" / "ksm-rescue")
        self.init = self.root / "sbin" / "init"
        shutil.copy(init, self.init)
        self.file = self.root / "etc" / "ld.so.preload"

    def boot(self, *arguments: str, prepare: str = "", pid: str = "--pid") -> tuple[int, str, str]:
        """Start ksm-rescue as PID 1; return its status, or init's, stdout and stderr."""
        unshare = [need_command("unshare"), pid, "--fork", "--mount"]
        done = subprocess.run(
            [*unshare, "sh", "-euc", BOOT, "sh", "/sbin/ksm-rescue", *arguments],
            env={
                "PATH": os.environ["PATH"],
                "root": str(self.root),
                "place": str(self.place),
                "prepare": prepare,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


STARTED = "ksm-rescue: started by the kernel, will go on with /sbin/init\n"
REMOVED = "/etc/ld.so.preload: entry of ksm-preload removed\n"
NONE = "/etc/ld.so.preload has no entry of ksm-preload\n"
INIT = "pid 1, 0 blocked, flags"

root_only = pytest.mark.root


@pytest.fixture
def computer(tree: Tree, victims: Victims, tmp_path: Path) -> Machine:
    return Machine(tmp_path, tree.rescue, victims("init", "static"))


@root_only
@pytest.mark.parametrize(
    "arguments",
    [[], ["single"], ["quiet", "3"], ["-b"], ["--unit=rescue.target"], ["--root"], [""]],
)
def test_as_first_program(computer: Machine, arguments: list[str]) -> None:
    computer.file.write_bytes(b"/a.so\n" + E + b"\n")
    words = "".join(f" {word}" for word in arguments)
    assert computer.boot(*arguments) == (
        0,
        f"{REMOVED}{INIT} 0: /sbin/init{words}\n/a.so\n",
        STARTED,
    )


@root_only
@pytest.mark.parametrize("flags", ["ro", "ro,nosuid,nodev"])
@pytest.mark.parametrize("rest", [b"", b"/a.so\n"], ids=["only ours", "others too"])
def test_a_read_only_root_becomes_read_only_again(
    computer: Machine, flags: str, rest: bytes
) -> None:
    computer.file.write_bytes(rest + E + b"\n")
    assert computer.boot("single", prepare=f"mount -o remount,{flags} .") == (
        0,
        f"{REMOVED}{INIT} {1 if flags == 'ro' else 7}: /sbin/init single\n{rest.decode()}",
        STARTED,
    )


@root_only
def test_remount_as_any_program(computer: Machine) -> None:
    computer.file.write_bytes(E + b"\n")
    readonly, pid = "mount -o remount,ro .", "--ipc"
    status, stdout, stderr = computer.boot("--remount", prepare=readonly, pid=pid)
    assert (status, stdout, stderr) == (0, REMOVED, "")
    status, stdout, stderr = computer.boot(prepare=readonly, pid=pid)
    assert (status, stdout) == (1, "")
    assert "Read-only file system (try --remount, if it is /)" in stderr


@root_only
@pytest.mark.parametrize(
    ("prepare", "complaint", "rest"),
    [
        ("mount --bind etc etc && mount -o remount,bind,ro etc", "Read-only file system", True),
        ("rm -r etc", "No such file or directory", False),
        ("rm etc/ld.so.preload && mkdir etc/ld.so.preload", "no file with a list", False),
        ("rm etc/ld.so.preload && ln -s /sbin etc/ld.so.preload", "symbolic link", False),
    ],
)
def test_whatever_comes_of_it_the_machine_goes_on(
    computer: Machine, prepare: str, complaint: str, rest: bool
) -> None:
    computer.file.write_bytes(E + b"\n")
    status, stdout, stderr = computer.boot("single", prepare=prepare)
    assert status == 0
    assert stdout.startswith(f"{INIT} 0: /sbin/init single\n" + (E.decode() if rest else ""))
    assert stderr.startswith(STARTED + "ksm-rescue: ")
    assert complaint in stderr


@root_only
def test_an_init_elsewhere(computer: Machine) -> None:
    computer.init.rename(computer.root / "bin" / "sh")
    assert computer.boot("single") == (0, f"{NONE}{INIT} 0: /bin/sh single\n", STARTED)
    (computer.root / "bin" / "sh").unlink()
    status, _, stderr = computer.boot("single")
    assert status == 1
    assert stderr == STARTED + "ksm-rescue: Cannot run /sbin/init: No such file or directory.\n"


@root_only
def test_options_as_first_program_of_a_container(computer: Machine) -> None:
    computer.file.write_bytes(E + b"\n")
    assert computer.boot("--list") == (0, f"ours\tentry\t{E.decode()}\n", "")
    assert computer.boot("--dry-run") == (0, "", "")
    assert computer.boot("--add", "/b/libksm_preload.so") == (
        0,
        "/etc/ld.so.preload: entry of ksm-preload added\n",
        "",
    )
