# SPDX-License-Identifier: MIT
"""Opting in by systemd: drop-ins with MemoryKSM= for every service, and who is left out of that.

From systemd 254 on a service can be given the kernel's flag (exec-invoke.c), and Linux 6.7 keeps it
over exec. What a service starts has it, too; no library is loaded and no environment changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtool.errors import KsmtoolError

NAME = "50-ksm-preload.conf"
SYSTEM = "etc/systemd/system"
USER = "etc/systemd/user"
_MARK = "# Written by `ksmtool global-enable`; `ksmtool global-disable` removes it.\n"

# Where units are, the first wins (systemd.unit(5)).
_SYSTEM_UNITS = (
    SYSTEM,
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
)
_USER_UNITS = (USER, "run/systemd/user", "usr/local/lib/systemd/user", "usr/lib/systemd/user")
_OLD_UNITS = "lib/systemd/system"  # of systems without a merged /usr


@dataclass(frozen=True)
class DropIn:
    """A file of ours, below `root`."""

    path: str
    on: bool

    @property
    def unit(self) -> str:
        """Return the unit it is for; `service` for all of them."""
        return Path(self.path).parent.name.removesuffix(".d").removesuffix(".service")

    @property
    def text(self) -> str:
        """Return what is in it."""
        return f"{_MARK}[Service]\nMemoryKSM={'yes' if self.on else 'no'}\n"


def runs(root: Path = Path("/")) -> bool:
    """Whether systemd manages this machine: sd_booted(3)."""
    return (root / "run/systemd/system").is_dir()


_FLAG = "import ctypes; p = ctypes.CDLL(None).prctl; p.argtypes = [ctypes.c_ulong] * 5; "
_FLAG += "print(p(68, 0, 0, 0, 0))"  # PR_GET_MEMORY_MERGE


def obstacle() -> str | None:
    """Return why MemoryKSM= does not work here, None if it does: it is tried with a service.

    254.0 to 255.4 have the setting and fail each service that has it, with status 245: two of the
    prctl's five arguments were passed (systemd#31683).
    """
    if not runs() or shutil.which("systemd-run") is None:
        return "systemd does not run here"
    command = ["systemd-run", "--wait", "--pipe", "--quiet", "--collect", "-p", "MemoryKSM=yes"]
    try:
        done = subprocess.run(
            [*command, "--", sys.executable, "-c", _FLAG],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return "systemd-run did not end within a minute"
    said = done.stderr.strip()
    if done.returncode == 0:
        kept = done.stdout.strip() == "1"
        return None if kept else "the kernel does not keep the flag that systemd sets"
    if done.returncode == 245:
        return "this systemd fails every service with MemoryKSM= (fixed in 256)"
    if "MemoryKSM" in said:
        return "this systemd does not have MemoryKSM= (it came with 254)"
    return f"systemd-run failed: {said or f'status {done.returncode}'}"


def wanted(
    denied: Callable[[str], bool], default_on: bool, logins: bool, root: Path = Path("/")
) -> list[DropIn]:
    """Return the drop-ins to write: for all services, for logins, for those that differ.

    `denied` tells of a program's path whether the policy leaves it out, `default_on` what holds for
    a program that the policy does not name. With `logins` false, what people start after a login is
    left out: systemd cannot tell one from the other there, and it includes sudo, ssh and browsers.
    """
    chosen = [
        DropIn(f"{SYSTEM}/service.d/{NAME}", default_on),
        DropIn(f"{SYSTEM}/user@.service.d/{NAME}", logins),
    ]
    for folders, target in ((_SYSTEM_UNITS, SYSTEM), (_USER_UNITS, USER)):
        here = (*folders, _OLD_UNITS) if target == SYSTEM else folders
        for unit, programs in sorted(_services(here, root).items()):
            on = not any(denied(_real(program, root)) for program in programs)
            # A unit of the user manager inherits that one's flag.
            if programs and on != default_on and unit != "user@.service":
                chosen.append(DropIn(f"{target}/{unit}.d/{NAME}", on))
    return chosen


def _services(folders: Sequence[str], root: Path) -> dict[str, list[str]]:
    """Return the programs that each service's unit file names, by unit; aliases left out."""
    found: dict[str, list[str]] = {}
    masked = set()
    for folder in folders:
        try:
            files = sorted((root / folder).glob("*.service"))
        except OSError:
            continue
        for file in files:
            if file.name in found or file.name in masked:
                continue
            if file.is_symlink():
                # An alias, or enabled from elsewhere; to /dev/null it is masked.
                target = os.readlink(file)
                if target == "/dev/null" or os.path.basename(target) != file.name:
                    masked.add(file.name)
                    continue
            with contextlib.suppress(OSError):
                found[file.name] = list(_programs(_text(file, root)))
    return found


def _text(file: Path, root: Path) -> str:
    if file.is_symlink() and os.readlink(file).startswith("/"):
        file = root / os.readlink(file).lstrip("/")
    return file.read_text(errors="replace")


_EXEC = re.compile(r"^Exec(?:Start|StartPre|StartPost)\s*=\s*(.*)$", re.MULTILINE)


def _programs(unit: str) -> Iterator[str]:
    """Yield the program of each Exec line, without systemd's prefixes (systemd.service(5))."""
    for line in _EXEC.findall(unit.replace("\\\n", " ")):
        words = line.lstrip("@-:+!|").split()
        if words:
            yield words[0].strip("\"'")


def _real(program: str, root: Path) -> str:
    """Return what the kernel calls the program: a path without links, below `root`."""
    if not program.startswith("/"):
        for folder in ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin"):
            if (root / folder / program).exists():
                program = f"/{folder}/{program}"
                break
    for _ in range(10):
        path = root / program.lstrip("/")
        if not path.is_symlink():
            break
        program = os.path.normpath(os.path.join(os.path.dirname(program), os.readlink(path)))
    return program


def present(root: Path = Path("/")) -> list[DropIn]:
    """Return the drop-ins of ours that are there."""
    found = []
    for base in (SYSTEM, USER):
        for file in sorted((root / base).glob(f"*.d/{NAME}")):
            with contextlib.suppress(OSError):
                text = file.read_text()
                found.append(DropIn(str(file.relative_to(root)), "MemoryKSM=yes" in text))
    return found


def changes(drop_ins: Iterable[DropIn], root: Path = Path("/")) -> list[str]:
    """Return the paths that `write` would change."""
    before, after = _contents(drop_ins, root)
    return [path for path in {**after, **before} if before.get(path) != after.get(path)]


def _contents(drop_ins: Iterable[DropIn], root: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return what is in our drop-ins, and what should be."""
    before = {one.path: (root / one.path).read_bytes() for one in present(root)}
    return before, {one.path: one.text.encode() for one in drop_ins}


def write(drop_ins: Sequence[DropIn], root: Path = Path("/")) -> list[str]:
    """Write the drop-ins and take away those of ours that are not among them.

    Returns the paths that changed. Where a write fails, all is put back as it was. Raises
    KsmtoolError.
    """
    before, after = _contents(drop_ins, root)
    changed = changes(drop_ins, root)
    done: list[str] = []
    try:
        for path in changed:
            done.append(path)
            _put(root / path, after.get(path))
    except OSError as error:
        for path in done:
            with contextlib.suppress(OSError):
                _put(root / path, before.get(path))
        raise KsmtoolError(
            f"Cannot write /{done[-1]}: {error.strerror}.", "No drop-in has changed."
        ) from error
    return changed


def _put(file: Path, content: bytes | None) -> None:
    """Have the file with that content, or not at all."""
    if content is None:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.parent.rmdir()  # stays if it holds anything else
        return
    made = not file.parent.exists()
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    try:
        with new.open("wb") as output:
            output.write(content)
            output.flush()
            os.fchmod(output.fileno(), 0o644)
            os.fsync(output.fileno())
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                file.parent.rmdir()
        raise


def reload() -> None:
    """Have systemd read its units again. Raises KsmtoolError."""
    if not runs():
        return
    done = subprocess.run(
        ["systemctl", "daemon-reload"], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise KsmtoolError(f"systemctl daemon-reload failed: {done.stderr.strip()}")
