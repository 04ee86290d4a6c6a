# SPDX-License-Identifier: MIT
"""Opting in by systemd: drop-ins with MemoryKSM= for every service, and who is left out of that.

From systemd 254 on a service can be given the kernel's flag (exec-invoke.c), and Linux 6.7 keeps it
over exec. What a service starts has it, too; no library is loaded and no environment changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtool import atomic
from ksmtool.errors import KsmtoolError

NAME = "50-ksm-preload.conf"
SYSTEM = "etc/systemd/system"
USER = "etc/systemd/user"
_MARK = "# Written by `ksmtool global-enable`; `ksmtool global-disable` removes it.\n"

# Where units are, the first wins (systemd.unit(5)); the last is for systems without a merged /usr.
_OLD_UNITS = "lib/systemd/system"
_SYSTEM_UNITS = (
    SYSTEM,
    "run/systemd/system",
    "run/systemd/generator",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    _OLD_UNITS,
)
_USER_UNITS = (USER, "run/systemd/user", "usr/local/lib/systemd/user", "usr/lib/systemd/user")


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
    What a unit says of MemoryKSM= itself is repeated, since drop-ins count in the order of their
    names, whatever folder they are in: ours would count more.
    """
    chosen = [
        DropIn(f"{SYSTEM}/service.d/{NAME}", default_on),
        DropIn(f"{SYSTEM}/user@.service.d/{NAME}", logins),
    ]
    kinds = [(SYSTEM, _asked() if root == Path("/") and runs() else _read(_SYSTEM_UNITS, root))]
    if logins:  # else they inherit from user@.service that they are left out
        kinds.append((USER, _read(_USER_UNITS, root)))
    for target, units in kinds:
        for unit in sorted(units, key=lambda unit: unit.name):
            if unit.name == "user@.service":
                continue
            own = unit.own_setting
            on = not any(_is_denied(words, denied, root) for words in unit.commands)
            if own is not None or (unit.commands and on != default_on):
                chosen.append(DropIn(f"{target}/{unit.name}.d/{NAME}", on if own is None else own))
    return chosen


@dataclass(frozen=True)
class _Unit:
    """A service, or a template of services."""

    name: str
    commands: Sequence[Sequence[str]]
    """The words of each of its Exec lines, the program first."""
    own_setting: bool | None
    """What it or a drop-in of others says of MemoryKSM=."""


# Of what these are given to run, any word can be the program.
_LAUNCHERS = {
    "bash",
    "chroot",
    "chrt",
    "dash",
    "env",
    "flock",
    "ionice",
    "nice",
    "nsenter",
    "runuser",
}
_LAUNCHERS |= {"setpriv", "sh", "start-stop-daemon", "stdbuf", "su", "systemd-cat", "taskset"}
_LAUNCHERS |= {"timeout", "unshare"}


def _is_denied(words: Sequence[str], denied: Callable[[str], bool], root: Path) -> bool:
    """Whether the policy leaves out the program of a command, or one that it is to run."""
    program = _real(words[0], root)
    if denied(program):
        return True
    rest = [word.strip("\"';") for word in words[1:]]
    if os.path.basename(program) in _LAUNCHERS:
        rest = re.findall(r"[\w./@+-]+", " ".join(words[1:]))
        return any(denied(_real(word, root)) for word in rest)
    return any(word.startswith("/") and denied(_real(word, root)) for word in rest)


_EXEC = ("Condition", "Start", "StartPre", "StartPost", "Reload", "Stop", "StopPost")
_ASKED = ("Id", "FragmentPath", "DropInPaths", *(f"Exec{kind}" for kind in _EXEC))


def _asked() -> list[_Unit]:
    """Ask systemd, which knows all folders, generators, drop-ins, quotes and specifiers."""
    listed = _systemctl("list-unit-files", "--type=service", "--no-legend", "--plain")
    loaded = _systemctl("list-units", "--all", "--type=service", "--no-legend", "--plain")
    names = {line.split()[0] for line in (listed + loaded).splitlines() if line.strip()}
    # Of a template it knows nothing but with an instance.
    instances = sorted(name.replace("@.service", "@ksm.service") for name in names)
    shown = _systemctl("show", f"--property={','.join(_ASKED)}", "--", *instances)
    units: dict[str, _Unit] = {}
    for block in shown.split("\n\n"):
        values = dict(line.partition("=")[::2] for line in block.splitlines())
        commands: list[Sequence[str]] = [
            [path, *words.split()]
            for path, words in re.findall(
                r"^Exec\w+=\{ path=(.*?) ; argv\[\]=(.*?) ; (?:flags|ignore_errors)=", block, re.M
            )
        ]
        files = [values.get("FragmentPath", ""), *values.get("DropInPaths", "").split()]
        name = re.sub(r"@[^@]*\.service$", "@.service", values.get("Id", ""))
        if name:
            texts = [_content(Path(file)) for file in files if file]
            commands += units[name].commands if name in units else ()
            units[name] = _Unit(name, commands, _own_setting(texts))
    if not any(unit.commands for unit in units.values()):
        # Else every service would be opted in, those with secrets too.
        raise KsmtoolError("systemctl show names no program of any service.")
    return list(units.values())


def _systemctl(*arguments: str) -> str:
    done = subprocess.run(
        ["systemctl", "--no-pager", *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise KsmtoolError(f"systemctl {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _read(folders: Sequence[str], root: Path) -> list[_Unit]:
    """Read the unit files below `root` where no systemd can be asked."""
    files: dict[str, Path] = {}
    for folder in folders:
        for file in sorted((root / folder).glob("*.service")):
            files.setdefault(file.name, file)
    units = []
    for name, file in files.items():
        target = os.readlink(file) if file.is_symlink() else ""
        # An alias of a unit in one of the folders; /dev/null: it is masked.
        if target and os.path.basename(target) != name and not _is_elsewhere(target, folders):
            continue
        real = root / target[1:] if target.startswith("/") else file
        drop_ins = [one for folder in folders for one in (root / folder).glob(f"{name}.d/*.conf")]
        texts = [_content(one) for one in (real, *sorted(drop_ins, key=_by_name))]
        commands = [words for text in texts for words in _commands(text)]
        units.append(_Unit(name, commands, _own_setting(texts)))
    return units


def _by_name(path: Path) -> str:
    return path.name


def _is_elsewhere(target: str, folders: Sequence[str]) -> bool:
    """Whether a link leads out of the folders of units: then it is no alias, but the unit."""
    if not target.startswith("/") or target == "/dev/null":
        return False
    return os.path.dirname(target)[1:] not in {*folders, _OLD_UNITS}


def _content(file: Path) -> str:
    """Return what is in a unit file or a drop-in, nothing for ours and for what cannot be read."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return ""
    if text.startswith(_MARK):
        return ""
    lines = (line for line in text.split("\n") if not line.lstrip().startswith(("#", ";")))
    return "\n".join(lines).replace("\\\n", " ")


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each Exec line, without systemd's prefixes (systemd.service(5))."""
    for line in re.findall(r"^\s*Exec\w+\s*=\s*(\S.*)$", text, re.MULTILINE):
        command = line.lstrip("@-:+!| \t")
        try:
            words = shlex.split(command)
        except ValueError:
            words = command.split()
        if words:
            yield words


def _own_setting(texts: Iterable[str]) -> bool | None:
    values = re.findall(r"^\s*MemoryKSM\s*=\s*(\S*)", "\n".join(texts), re.MULTILINE)
    if not values or not values[-1]:
        return None
    return values[-1].lower() in ("yes", "true", "on", "1", "y", "t")


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
                if text.startswith(_MARK):
                    found.append(DropIn(str(file.relative_to(root)), "MemoryKSM=yes" in text))
    return found


def changes(drop_ins: Sequence[DropIn], root: Path = Path("/")) -> list[str]:
    """Return the paths that `write` would change."""
    before = {one.path: one for one in present(root)}
    after = {one.path: one for one in drop_ins}
    return [path for path in {**after, **before} if before.get(path) != after.get(path)]


def write(drop_ins: Sequence[DropIn], root: Path = Path("/")) -> list[str]:
    """Write the drop-ins and take away those of ours that are not among them.

    Returns the paths that changed. Where a write fails, all is put back as it was. Raises
    KsmtoolError, also for a file of that name that is not ours.
    """
    before = present(root)
    changed = changes(drop_ins, root)
    ours = {one.path for one in before}
    for path in changed:
        if path not in ours and (root / path).exists():
            raise KsmtoolError(f"/{path} is there and is not of ksm-preload.", "Rename it.")
    try:
        _reach(drop_ins, root)
    except OSError as error:
        with contextlib.suppress(OSError):
            _reach(before, root)
        raise KsmtoolError(
            f"Cannot write {error.filename or 'a drop-in'}: {error.strerror}.",
            "The drop-ins are as they were.",
        ) from error
    return changed


def _reach(target: Sequence[DropIn], root: Path) -> None:
    """Get from what is there to `target` so that at each moment no service is on too early.

    Killed in between, it leaves more services out than it should, and never less.
    """
    for base in (SYSTEM, USER):
        for stale in atomic.unfinished(root / base, NAME):
            stale.unlink()
    there = {one.path: one.on for one in present(root)}
    wanted_on = {one.path for one in target if one.on}
    wanted_off = {one.path for one in target if not one.on}
    for path, on in there.items():
        if on and path not in wanted_on | wanted_off:
            _remove(root / path)
    for one in sorted(target, key=lambda one: one.on):
        if there.get(one.path) != one.on:
            _put(root / one.path, one.text.encode())
    for path, on in there.items():
        if not on and path not in wanted_on | wanted_off:
            _remove(root / path)


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    atomic.sync(file.parent)
    with contextlib.suppress(OSError):
        file.parent.rmdir()  # stays if it holds anything else


def _put(file: Path, content: bytes) -> None:
    made = not file.parent.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        if made:
            file.parent.chmod(0o755)  # whatever the umask: user managers have to read it
            atomic.sync(file.parent.parent)
        atomic.write(file, content)
    except OSError:
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
