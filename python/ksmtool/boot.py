# SPDX-License-Identifier: MIT
"""What the init system runs at boot: our unit or script, there and gone again."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ksmtool import atomic
from ksmtool.errors import KsmtoolError

NAME = "ksm-preload"
LOCAL = "etc/rc.local"
"""Where init systems without units or services of ours have the administrator's own commands."""
_MARK = "# Written by `ksmtool kernel-enable`; `ksmtool kernel-disable` removes it.\n"

# After all that may set KSM while the machine boots.
_UNIT = (
    _MARK
    + """\
[Unit]
Description=Kernel same-page merging as chosen by ksmtool kernel-enable
ConditionPathExists=/sys/kernel/mm/ksm/run
ConditionFileIsExecutable={ksmtool}
ConditionVirtualization=!container
After=local-fs.target systemd-tmpfiles-setup.service sysfsutils.service rc-local.service
After=qemu-kvm.service ksm.service ksmtuned.service ksmd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={ksmtool} kernel-apply

[Install]
WantedBy=multi-user.target
"""
)

_OPENRC = (
    "#!/sbin/openrc-run\n"
    + _MARK
    + """\
description="Kernel same-page merging as chosen by ksmtool kernel-enable"

depend() {{
	need localmount
	after sysfs sysfsconf
}}

start() {{
	ebegin "Setting KSM"
	{ksmtool} kernel-apply
	eend $?
}}
"""
)


@dataclass(frozen=True)
class Files:
    """What an init system needs: text by path, links by path, and what to call when they change."""

    texts: Mapping[str, str]
    links: Mapping[str, str]
    executable: bool = False
    reload: Sequence[str] = ()


def init_system(root: Path = Path("/")) -> str:
    """Return systemd, openrc, or another's name; "" if none is known."""
    if (root / "run/systemd/system").is_dir():
        return "systemd"
    if (root / "run/openrc").is_dir():
        return "openrc"
    # What is not running: an image that is being made.
    init = root / "sbin/init"
    target = os.path.basename(os.readlink(init)) if init.is_symlink() else ""
    for name, signs in (
        ("systemd", (target == "systemd", (root / "etc/systemd/system/default.target").exists())),
        ("openrc", (target == "openrc-init", (root / "etc/runlevels").is_dir())),
        ("runit", (target == "runit-init", (root / "etc/runit").is_dir())),
        ("sysvinit", ((root / "etc/inittab").exists(),)),
    ):
        if any(signs):
            return name
    return ""


def files(init: str, ksmtool: str) -> Files | None:
    """Return what the init system is to have; None for one that takes a line by hand."""
    if init == "systemd":
        unit = f"etc/systemd/system/{NAME}.service"
        wants = f"etc/systemd/system/multi-user.target.wants/{NAME}.service"
        return Files(
            {unit: _UNIT.format(ksmtool=ksmtool)},
            {wants: f"../{NAME}.service"},
            reload=("systemctl", "daemon-reload"),
        )
    if init == "openrc":
        return Files(
            {f"etc/init.d/{NAME}": _OPENRC.format(ksmtool=ksmtool)},
            {f"etc/runlevels/default/{NAME}": f"/etc/init.d/{NAME}"},
            executable=True,
        )
    return None


def install(wanted: Files, root: Path = Path("/")) -> list[str]:
    """Write the files and links; return the paths that changed.

    Raises KsmtoolError, and all is as it was; also for a file of that name that is not ours, such
    as the link that masks a unit.
    """
    for path in wanted.texts:
        if not _is_ours(root / path):
            raise KsmtoolError(
                f"/{path} is there, and not of ksmtool kernel-enable.",
                f"Remove it, or if it is masked: systemctl unmask {NAME}.service",
            )
    with _changed(_entries(wanted), wanted.reload, root) as changed:
        return changed


def planned(wanted: Files, root: Path = Path("/")) -> list[str]:
    """Return the paths that `install` would change."""
    return [path for path, entry in _entries(wanted).items() if _entry(root / path) != entry]


@contextmanager
def removed(init: str, root: Path = Path("/")) -> Iterator[list[str]]:
    """Take away what `install` wrote, and put it back if what is done inside fails.

    Yields the paths that were there. Raises KsmtoolError, and all is as it was.
    """
    known = files(init, "")
    if known is None:
        yield []
        return
    with _changed(dict.fromkeys(ours(init, root)), known.reload, root) as changed:
        yield changed


def ours(init: str, root: Path = Path("/")) -> list[str]:
    """Return the paths of what `install` wrote that are there."""
    known = files(init, "")
    if known is None or not all(_is_ours(root / path) for path in known.texts):
        return []
    return [path for path in (*known.links, *known.texts) if os.path.lexists(root / path)]


def installed(init: str, root: Path = Path("/")) -> bool:
    """Whether `ksmtool kernel-apply` will run at boot, as far as files say."""
    known = files(init, "")
    if known is None:
        return re.search(rb"^[^#]*kernel-apply", _content(root / LOCAL), re.MULTILINE) is not None
    if not all(os.path.lexists(root / link) for link in known.links):
        return False
    for path in known.texts:
        content = _content(root / path)
        program = re.search(rb"(/\S+) kernel-apply$", content, re.MULTILINE)
        if _MARK.encode() not in content or program is None:
            return False
        if not (root / os.fsdecode(program[1]).lstrip("/")).exists():
            return False  # of an installation that is gone
    return True


@dataclass(frozen=True)
class _Entry:
    """A file or a symbolic link."""

    content: bytes = b""
    mode: int = 0
    link: str = ""


def _entries(wanted: Files) -> dict[str, _Entry | None]:
    mode = 0o755 if wanted.executable else 0o644
    links = {path: _Entry(link=target) for path, target in wanted.links.items()}
    return {**{path: _Entry(text.encode(), mode) for path, text in wanted.texts.items()}, **links}


def _is_ours(file: Path) -> bool:
    """Whether we wrote it, or nobody did."""
    return not os.path.lexists(file) or (not file.is_symlink() and _MARK.encode() in _content(file))


def _entry(path: Path) -> _Entry | None:
    if path.is_symlink():
        return _Entry(link=os.readlink(path))
    try:
        return _Entry(path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
    except FileNotFoundError:
        return None


def _put(path: Path, entry: _Entry | None) -> None:
    if entry is None or entry.link:
        path.unlink(missing_ok=True)
    if entry is not None and entry.link:
        atomic.folders(path.parent)
        path.symlink_to(entry.link)
    elif entry is not None:
        atomic.write(path, entry.content, entry.mode)


@contextmanager
def _changed(
    wanted: Mapping[str, _Entry | None], reload: Sequence[str], root: Path
) -> Iterator[list[str]]:
    """Make all entries what they shall be, None for gone; yield those that changed.

    If that fails, or what is done inside, all are what they were. Raises KsmtoolError.
    """
    found: dict[str, _Entry | None] = {}
    path = ""
    try:
        for path, entry in wanted.items():
            old = _entry(root / path)
            if old != entry:
                found[path] = old
                _put(root / path, entry)
        if found:
            _call(reload, root)
        yield list(found)
    except BaseException as error:
        for changed, old in found.items():
            with contextlib.suppress(OSError):
                _put(root / changed, old)
        if found:
            with contextlib.suppress(KsmtoolError):
                _call(reload, root)
        if not isinstance(error, OSError):
            raise
        raise KsmtoolError(
            f"Cannot change /{path}: {error.strerror}.", "What runs at boot is as it was."
        ) from error


def _call(command: Sequence[str], root: Path) -> None:
    """Tell an init system that runs on this very machine."""
    if not command or root != Path("/") or not (root / "run/systemd/system").is_dir():
        return
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KsmtoolError(f"Cannot run {' '.join(command)}: {error}.") from error
    if done.returncode != 0:
        raise KsmtoolError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""
