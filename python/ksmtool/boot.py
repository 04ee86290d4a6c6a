# SPDX-License-Identifier: MIT
"""What the init system runs at boot: our unit or script, there and gone again."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtool import atomic
from ksmtool.errors import KsmtoolError

NAME = "ksm-preload"
_MARK = "# Written by `ksmtool kernel-enable`; `ksmtool kernel-disable` removes it.\n"

# After all that may set KSM while the machine boots.
_UNIT = (
    _MARK
    + """\
[Unit]
Description=Kernel same-page merging as chosen by ksmtool kernel-enable
ConditionPathExists=/sys/kernel/mm/ksm/run
ConditionVirtualization=!container
After=local-fs.target systemd-tmpfiles-setup.service qemu-kvm.service ksm.service ksmd.service

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
	after sysfs sysfsconf local
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

    Raises KsmtoolError, and what was written is gone again.
    """
    changed: list[str] = []
    before = {path: _read(root / path) for path in wanted.texts}
    try:
        for path, text in wanted.texts.items():
            if before[path] != text:
                changed.append(path)
                _write(root / path, text, wanted.executable)
        for path, target in wanted.links.items():
            link = root / path
            if not link.is_symlink() or os.readlink(link) != target:
                changed.append(path)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(target)
    except OSError as error:
        for path in changed:
            old = before.get(path)
            with contextlib.suppress(OSError):
                if old is None:
                    (root / path).unlink(missing_ok=True)
                else:
                    _write(root / path, old, wanted.executable)
        raise KsmtoolError(
            f"Cannot write /{changed[-1]}: {error.strerror}.", "Nothing of it is left."
        ) from error
    if changed:
        _call(wanted.reload, root)
    return changed


def remove(init: str, root: Path = Path("/")) -> list[str]:
    """Take away what `install` wrote; return the paths that were there. Raises KsmtoolError."""
    known = files(init, "")
    if known is None:
        return []
    gone = []
    for path in (*known.links, *known.texts):
        try:
            (root / path).unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise KsmtoolError(f"Cannot remove /{path}: {error.strerror}.") from error
        gone.append(path)
    if gone:
        _call(known.reload, root)
    return gone


def installed(init: str, root: Path = Path("/")) -> bool:
    """Whether it will run at boot."""
    known = files(init, "")
    return known is not None and all(
        os.path.lexists(root / path) for path in (*known.texts, *known.links)
    )


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def _write(file: Path, text: str, executable: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, text.encode(), 0o755 if executable else 0o644)


def _call(command: Sequence[str], root: Path) -> None:
    """Tell an init system that runs on this very machine."""
    if not command or root != Path("/") or not (root / "run/systemd/system").is_dir():
        return
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise KsmtoolError(f"{' '.join(command)} failed: {done.stderr.strip()}")
