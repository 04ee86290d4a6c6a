# SPDX-License-Identifier: MIT
"""Run a few programs as they are and under a candidate /etc/ld.so.preload, and tell what differs.

The candidate is seen in a private mount namespace only: nothing outside changes.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtool import install, ldpreload
from ksmtool.errors import KsmtoolError

SECONDS = 20
NOT_STARTED = -1000
NOBODY = 65534

_SETUID = (("su", "--version"), ("mount", "--version"), ("passwd", "--help"), ("sudo", "--version"))
_SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")


@dataclass(frozen=True)
class Check:
    """A program that has to run as it did before."""

    what: str
    command: tuple[str, ...]
    user: int | None = None
    """The user to run it as; None: as this process."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program: the status is -N for a signal, NOT_STARTED for none."""

    status: int
    stdout: str
    stderr: str


def checks(architectures: Sequence[str]) -> list[Check]:
    """Return the programs to try: shells, set-uid, static, Python, systemd, each architecture."""
    found = [
        Check("a shell", ("/bin/sh", "-c", "echo started; echo by a pipe | cat")),
        Check("a user's shell", ("/bin/sh", "-c", "echo started; echo by a pipe | cat"), NOBODY),
        Check("Python", (sys.executable, "-c", "print('started')")),
        Check("a static program", (install.rescue(), "--help")),
    ]
    for name, option in _SETUID:
        path = shutil.which(name)
        if path is not None and os.stat(path).st_mode & 0o4000:
            found.append(Check(f"set-uid {name}", (path, option), NOBODY))
            break
    for path in _SYSTEMD:
        if os.access(path, os.X_OK):
            found.append(Check("systemd", (path, "--version")))
            break
    return found + of_architectures(architectures)


def of_architectures(libcs: Sequence[str]) -> list[Check]:
    """Return a program for each architecture: its libc is one."""
    return [Check(f"{path}, a program of its architecture", (path,)) for path in libcs]


def run(programs: Iterable[Check]) -> list[Outcome]:
    """Run the programs one after the other and return what came of each."""
    return [_run(check) for check in programs]


def _run(check: Check) -> Outcome:
    try:
        done = subprocess.run(
            check.command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            user=check.user,
            group=check.user,
            extra_groups=None if check.user is None else [],
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return Outcome(NOT_STARTED, "", f"still running after {SECONDS} s")
    except OSError as error:
        return Outcome(NOT_STARTED, "", error.strerror or str(error))
    return Outcome(done.returncode, _text(done.stdout), _text(done.stderr))


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def differences(
    programs: Sequence[Check], before: Sequence[Outcome], after: Sequence[Outcome]
) -> list[str]:
    """Return one sentence for each program that no longer does what it did before."""
    said = []
    for check, old, new in zip(programs, before, after):
        if new.status != old.status:
            said.append(f"{check.what} ends with {_status(new)}, not {_status(old)}.")
        elif new.stderr != old.stderr:
            said.append(f"{check.what} says: {new.stderr.strip() or 'nothing'}")
        elif new.stdout != old.stdout:
            said.append(f"{check.what} prints something else.")
    return said


def _status(outcome: Outcome) -> str:
    if outcome.status == NOT_STARTED:
        return f"no status ({outcome.stderr})"
    if outcome.status < 0:
        return f"signal {-outcome.status}"
    return f"status {outcome.status}"


# ---- The namespace -------------------------------------------------------------------------

_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 0x1000, 0x4000, 1 << 18


def under(candidate: bytes, programs: Sequence[Check]) -> list[Outcome]:
    """Return what comes of the programs where `candidate` is /etc/ld.so.preload.

    Needs CAP_SYS_ADMIN. Raises KsmtoolError if this system allows no such namespace.
    """
    # Not in $TMPDIR, whose name may hold what overlayfs takes for a separator.
    folder = tempfile.mkdtemp(prefix="ksmtool-", dir="/run")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _in_child(lambda: _rehearse(Path(folder), candidate, programs), read_end, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    os.rmdir(folder)
    if not answer:
        raise KsmtoolError("The rehearsal ended without an answer.")
    result = json.loads(answer)
    if isinstance(result, str):
        hint = "In a container this takes CAP_SYS_ADMIN."
        if "overlay" in result:
            hint = "modprobe overlay   # the kernel's file system for this"
        raise KsmtoolError(f"Cannot try the new file in a mount namespace: {result}.", hint)
    return [Outcome(*one) for one in result]


def _in_child(work: Callable[[], object], read_end: int, write_end: int) -> None:
    """Send the result, or what went wrong, through the pipe and end; never returns."""
    try:
        os.close(read_end)
        try:
            answer = work()
        except OSError as error:
            answer = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        with os.fdopen(write_end, "w") as pipe:
            json.dump(answer, pipe)
    finally:
        os._exit(0)


def _rehearse(
    folder: Path, candidate: bytes, programs: Sequence[Check]
) -> list[tuple[object, ...]]:
    os.umask(0o022)  # users' programs have to see what is in here
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
        done = libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
        )
        if done != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), f"mount {kind} {target}")

    if libc.unshare(_CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")
    mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
    mount("none", str(folder), "tmpfs", 0)
    file = Path("/", ldpreload.FILE)
    new = folder / "new"
    new.write_bytes(candidate)
    new.chmod(0o644)
    if file.exists():
        mount(str(new), str(file), "none", _MS_BIND)
    else:
        # There is nothing to bind it over, and nothing must be made: a copy of /etc in which it is.
        upper, work = folder / "upper", folder / "work"
        upper.mkdir(mode=0o755)
        work.mkdir()
        new.rename(upper / file.name)
        mount("none", "/etc", "overlay", 0, f"lowerdir=/etc,upperdir={upper},workdir={work}")
    return [(one.status, one.stdout, one.stderr) for one in run(programs)]
