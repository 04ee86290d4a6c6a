# SPDX-License-Identifier: MIT
"""ksm-rescue interrupted at each system call: /etc/ld.so.preload is the old file or the new."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import Rescue, Tree, need_command

E = b"/usr/lib/libksm_preload_prctl.so"
NEW_NAME = ".ld.so.preload.ksm-new"
ERRORS = ("ENOSPC", "EIO", "EROFS", "EINTR", "EACCES")

WARNING = b"ksm-rescue: A loss of power now might bring the old /etc/ld.so.preload back.\n"

# Real ones never fail.
NEVER_FAIL = {"execve", "exit_group", "getpid", "rt_sigprocmask"}


@dataclass(frozen=True)
class Edit:
    """One run: the file before and after it, what it is told, and the file's mode."""

    old: bytes | None
    new: bytes | None
    arguments: tuple[str | bytes, ...] = ()
    stdin: bytes = b""
    mode: int = 0o640
    confirmed: bool = True
    removed: bytes | None = None
    """What a later run that takes ours out leaves."""


ADD = ("--add", E, "--force")
CONFIRM = (*ADD, "--confirm")
OTHERS, BOTH = b"/a.so\n/b.so", b"/a.so\n/b.so\n" + E

EDITS = {
    "add to no file": Edit(None, E + b"\n", ADD, mode=0o644),
    "add to others": Edit(OTHERS, BOTH, ADD, removed=OTHERS),
    "move": Edit(
        E + b"\n# x\n",
        b"# x\nlibksm_preload.so\n",
        ("--add", b"libksm_preload.so", "--force"),
        removed=b"# x\n",
    ),
    "remove, others stay": Edit(BOTH, OTHERS, removed=OTHERS),
    "remove, nothing stays": Edit(E + b"\n", None),
    "confirmed": Edit(OTHERS, BOTH, CONFIRM, stdin=b"keep\n", removed=OTHERS),
    "not confirmed": Edit(OTHERS, BOTH, CONFIRM, stdin=b"no\n", confirmed=False, removed=OTHERS),
    "not confirmed, no file": Edit(None, E + b"\n", CONFIRM, confirmed=False, mode=0o644),
}


@dataclass(frozen=True)
class Point:
    """The `count`-th call of `name`, and what happens there."""

    name: str
    count: int
    what: str

    @property
    def inject(self) -> str:
        return f"inject={self.name}:{self.what}:when={self.count}"


class Victim(Rescue):
    """ksm-rescue under strace."""

    def run(self, edit: Edit, *options: str) -> subprocess.CompletedProcess[bytes]:
        """Run it on the old file."""
        self.write(edit.old, edit.mode)
        log = self.root / "log"
        strace = [need_command("strace"), "-qq", "-o", str(log), *options]
        return subprocess.run(
            [*strace, *self.command(*edit.arguments)],
            input=edit.stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def calls(self, edit: Edit) -> Counter[str]:
        """Return the system calls of an undisturbed run."""
        done = self.run(edit)
        assert done.returncode == (0 if edit.confirmed else 1), done.stderr
        assert self.read() == (edit.new if edit.confirmed else edit.old)
        return Counter(line.partition("(")[0] for line in self.log() if not line.startswith("+"))

    def log(self) -> list[str]:
        """Return what strace saw."""
        return (self.root / "log").read_text().splitlines()

    def interrupt(self, edit: Edit, point: Point) -> list[str]:
        """Run it with a fault; return what is wrong then."""
        done = self.run(edit, "-e", point.inject)
        content, wrong = self.read(), []
        if content not in (edit.old, edit.new):
            wrong.append(f"torn: {content!r}")
        if content is not None:
            mode = edit.mode if content == edit.old or not edit.arguments else edit.mode | 0o444
            if stat.S_IMODE(self.file.stat().st_mode) != mode:
                wrong.append(f"mode {self.file.stat().st_mode:o}")
        # The one call that removes the file of the other name may itself be what fails.
        killed = point.what == "signal=KILL"
        if self.left() not in ([], [NEW_NAME] if killed or point.name == "unlinkat" else []):
            wrong.append(f"left: {self.left()}")
        if killed:
            wrong += [f"not killed but {done}"] * (done.returncode not in (-9, 137))
        else:
            wrong += self.judge(edit, point, done, content)
        # Whatever was left, the next run goes on and cleans up.
        after = self()
        if after.returncode != 0 or self.read() != edit.removed or self.left():
            wrong.append(f"next run: {after}, {self.read()!r}, {self.left()}")
        return [f"{point.inject}: {reason}" for reason in wrong]

    def judge(
        self,
        edit: Edit,
        point: Point,
        done: subprocess.CompletedProcess[bytes],
        content: bytes | None,
    ) -> Iterator[str]:
        """Yield what is wrong about how a run ended that was not killed."""
        status = done.returncode
        injected = [line for line in self.log() if line.endswith("(INJECTED)")]
        if len(injected) != 1:
            yield f"injected: {injected}"
        if (status == 0) != (content == edit.new and edit.confirmed):
            yield f"status {status} with {content!r}, {done.stderr!r}"
        # A failed fsync of the folder is a warning: nothing can be taken back then.
        said = done.stderr.replace(WARNING, b"") if point.name == "fsync" else done.stderr
        unheard = injected[0].startswith("write(2, ")
        if not unheard and not (self.SAYS if status else re.compile(b"")).fullmatch(said):
            yield f"says {done.stderr!r} with status {status}"
        if content == edit.old and self.backups() and point.name != "unlinkat":
            yield "keeps a copy of what is there"
        retried = "EINTR" in point.what and point.name in {"flock", "read", "write", "ppoll"}
        if retried and edit.confirmed and status != 0:
            yield "does not try again"


def points(calls: Counter[str], faults: tuple[str, ...]) -> Iterator[Point]:
    for name, count in calls.items():
        for at in range(1, count + 1):
            if name != "execve":
                yield Point(name, at, "signal=KILL")
            if name not in NEVER_FAIL:
                for fault in faults:
                    yield Point(name, at, fault)
            if name == "write":
                yield Point(name, at, "retval=0")


def disturb(tree: Tree, folder: Path, name: str, faults: tuple[str, ...]) -> int:
    """Interrupt the edit at each point; fail with what was wrong; return how many there were."""
    need_command("strace")
    edit = EDITS[name]
    every = list(points(Victim(tree.rescue, folder / "first").calls(edit), faults))
    workers = 2

    def some(worker: int) -> list[str]:
        victim = Victim(tree.rescue, folder / str(worker))
        return [
            wrong for point in every[worker::workers] for wrong in victim.interrupt(edit, point)
        ]

    with ThreadPoolExecutor(workers) as pool:
        wrong = [reason for reasons in pool.map(some, range(workers)) for reason in reasons]
    if wrong:
        pytest.fail("\n".join([f"{name}: {len(wrong)} of {len(every)} points", *wrong]))
    return len(every)


def test_one_edit_killed_at_every_call(
    tree: Tree, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    count = disturb(tree, tmp_path, "add to others", ())
    measured(f"ksm-rescue killed at {count} system calls: 0 torn files")


@pytest.mark.slow
def test_every_edit_with_every_fault_at_every_call(
    tree: Tree, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    faults = tuple(f"error={error}" for error in ERRORS)
    counts = {name: disturb(tree, tmp_path / name, name, faults) for name in EDITS}
    each = ", ".join(f"{name} {count}" for name, count in counts.items())
    measured(f"ksm-rescue with a fault at {sum(counts.values())} points ({each}): 0 torn files")


@pytest.mark.parametrize("name", EDITS)
def test_the_new_file_is_on_the_disk_before_its_name(tree: Tree, tmp_path: Path, name: str) -> None:
    """A loss of power cannot be tried here; the order that its outcome depends on can be seen."""
    victim = Victim(tree.rescue, tmp_path)
    victim.calls(EDITS[name])
    log = [line for line in victim.log() if re.match(r"write\([^12]|f?sync|rename|unlinkat", line)]
    log = [line for line in log if NEW_NAME not in line or line.startswith("rename")]
    for at, line in enumerate(log):
        if line.startswith("renameat("):
            (new,) = re.findall(r"^write\((\d+)", log[at - 2])
            assert log[at - 1].startswith(f"fsync({new})")
        if "ld.so.preload" in line and "Z" not in line:
            (folder,) = re.findall(r"^\w+\((\d+)", line)
            assert log[at + 1].startswith(f"fsync({folder})")
    changes = 1 if EDITS[name].confirmed else 2
    assert sum(line.startswith("fsync") for line in log) >= changes


@pytest.mark.parametrize("name", ["confirmed", "not confirmed, no file"])
def test_no_answer_in_time(rescue: Rescue, tree: Tree, name: str) -> None:
    """As if the 5 minutes were over; that it is 5 is seen as well."""
    victim, edit = Victim(tree.rescue, rescue.root), EDITS[name]
    done = victim.run(edit, "-e", "inject=ppoll:retval=0")
    assert done.returncode == 1
    assert b"Not confirmed" in done.stderr
    assert victim.read() == edit.old
    (asked,) = (line for line in victim.log() if line.startswith("ppoll("))
    assert "{tv_sec=300, tv_nsec=0}" in asked


# --- where there is no room ---


@pytest.mark.parametrize("name", ["add to others", "remove, others stay", "add to no file"])
def test_short_writes(rescue: Rescue, name: str) -> None:
    edit, prlimit = EDITS[name], need_command("prlimit")
    assert edit.new is not None
    for size in range(len(edit.new) + 1):
        rescue.write(edit.old, edit.mode)
        command = [prlimit, f"--fsize={size}", *rescue.command(*edit.arguments)]
        done = subprocess.run(command, capture_output=True, check=False)
        if size < len(edit.new):
            assert rescue.read() == edit.old
            assert done.returncode == 1
            assert rescue.SAYS.fullmatch(done.stderr)
            assert rescue.backups() == []
        else:
            assert rescue.read() == edit.new
            assert (done.returncode, done.stderr) == (0, b"")
        assert rescue.left() == []


MOUNTED = """
    mount -t tmpfs -o "$options" none "$etc"
    if [ -e "$old" ]; then cat "$old" >"$etc/ld.so.preload"; fi
    eval "$prepare"
    status=0
    "$@" 2>"$errors" || status=$?
    ls -A "$etc" >&2
    [ ! -e "$etc/ld.so.preload" ] || cat "$etc/ld.so.preload"
    exit $status
"""


def mounted(
    rescue: Rescue, edit: Edit, options: str, prepare: str = ""
) -> tuple[int, bytes | None, bytes, list[bytes]]:
    """Run it with a file system of its own; return status, content, stderr and names in etc."""
    unshare = need_command("unshare")
    old, errors = rescue.root / "old", rescue.root / "errors"
    if edit.old is not None:
        old.write_bytes(edit.old)
    variables = {"etc": rescue.etc, "old": old, "errors": errors, "options": options}
    done = subprocess.run(
        [unshare, "--mount", "sh", "-euc", MOUNTED, "sh", *quiet(rescue.command(*edit.arguments))],
        env={**os.environ, **{k: str(v) for k, v in variables.items()}, "prepare": prepare},
        capture_output=True,
        check=False,
    )
    names = done.stderr.split()
    content = done.stdout if b"ld.so.preload" in names else None
    return done.returncode, content, errors.read_bytes(), names


def quiet(command: list[str | bytes]) -> list[str | bytes]:
    return ["sh", "-c", 'exec "$@" >/dev/null', "sh", *command]


root_only = pytest.mark.root

FULL = {
    "no space": ("size=4k", ""),
    "no inode": ("nr_inodes=2", ""),
    "read-only": ("size=1m", 'mount -o remount,ro "$etc"'),
}


@root_only
@pytest.mark.parametrize(("options", "prepare"), FULL.values(), ids=FULL)
@pytest.mark.parametrize("name", ["add to others", "remove, others stay", "move"])
def test_where_no_file_can_be_written(
    rescue: Rescue, name: str, options: str, prepare: str
) -> None:
    edit = EDITS[name]
    status, content, said, names = mounted(rescue, edit, options, prepare)
    assert status == 1
    assert content == edit.old
    assert names == [b"ld.so.preload"]
    assert rescue.SAYS.fullmatch(said)
    assert (b"Read-only" if prepare else b"No space left") in said


@root_only
@pytest.mark.parametrize("options", ["size=4k", "nr_inodes=2"])
def test_deleting_needs_no_room(rescue: Rescue, options: str) -> None:
    assert mounted(rescue, EDITS["remove, nothing stays"], options) == (0, None, b"", [])


@root_only
def test_nothing_to_do_on_a_read_only_system(rescue: Rescue) -> None:
    edit = Edit(OTHERS, OTHERS)
    done = mounted(rescue, edit, "size=1m", 'mount -o remount,ro "$etc"')
    assert done == (0, OTHERS, b"", [b"ld.so.preload"])
