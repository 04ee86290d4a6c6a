# SPDX-License-Identifier: MIT
"""Who else sets KSM on this machine: found by what is really there, not by the distribution's name.

A manager that writes again and again is in conflict with us; what only sets it while the machine
boots is not, since our unit comes after it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ksmtool import boot

_WANTS = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)


@dataclass(frozen=True)
class Owner:
    """A program or file that sets KSM."""

    name: str
    does: str
    conflict: bool
    """It sets KSM again and again."""
    choices: tuple[str, ...] = ()
    """Commands, each a way out."""


def found(root: Path = Path("/")) -> list[Owner]:
    """Return those that are enabled or run below `root`."""
    running = _running(root)
    return [*_managers(root, running), *_at_boot(root)]


def _managers(root: Path, running: set[str]) -> Iterable[Owner]:
    if "ksmtuned" in running or _enabled("ksmtuned", root):
        keep = "set KSM_THRES_COEF=95 in /etc/ksmtuned.conf, then: " + _restart("ksmtuned", root)
        stop = _disable("ksmtuned", root) + "   # and this command again"
        proxmox = (root / "etc/pve").is_dir() or (root / "usr/bin/pveversion").exists()
        yield Owner(
            "ksmtuned",
            "switches KSM off each minute while virtual machines do not use most of the memory, "
            "and sets its rate",
            conflict=True,
            choices=(keep,) if proxmox else (stop, keep),
        )
    if "virt-handler" in running:
        yield Owner(
            "KubeVirt's virt-handler",
            "switches KSM by the labels of the node every 3 minutes",
            conflict=True,
            choices=("kubectl edit kubevirt -n kubevirt   # spec.configuration.ksmConfiguration",),
        )
    if running & {"momd", "vdsmd"} or _enabled("mom-vdsm", root) or _enabled("momd", root):
        yield Owner(
            "MOM (oVirt)",
            "switches KSM by its policy every few seconds",
            conflict=True,
            choices=("disable KSM control in the cluster's MoM policy of oVirt",),
        )
    if "uksmd" in running or _enabled("uksmd", root):
        yield Owner(
            "uksmd",
            "switches KSM on when it starts, and unmerges everything when it stops",
            conflict=True,
            choices=(_disable("uksmd", root) + "   # and this command again",),
        )


def _at_boot(root: Path) -> Iterable[Owner]:
    if _enabled("ksm", root):
        yield Owner("ksm.service", "switches KSM on at boot, and off when it is stopped", False)
    if _enabled("qemu-kvm", root):
        setting = _assigned(root / "etc/default/qemu-kvm", "KSM_ENABLED")
        yield Owner(
            "qemu-kvm.service",
            f"sets KSM at boot (KSM_ENABLED={setting or 'AUTO'} in /etc/default/qemu-kvm): "
            "in a virtual machine, off",
            False,
        )
    if _enabled("ksmd", root):
        yield Owner("ksmd.service (CachyOS)", "switches KSM on at boot", False)
    for pattern in ("etc/tmpfiles.d/*.conf", "usr/lib/tmpfiles.d/*.conf", "etc/local.d/*.start"):
        for file in sorted(root.glob(pattern)):
            if _mentions(file):
                yield Owner(f"/{file.relative_to(root)}", "sets KSM at boot", False)
    for name in ("etc/rc.local", "etc/rc.d/rc.local", "etc/sysfs.conf"):
        if _mentions(root / name):
            yield Owner(f"/{name}", "sets KSM at boot", False)


def _running(root: Path) -> set[str]:
    """Return the names of programs and of the scripts that interpreters run."""
    names: set[str] = set()
    try:
        entries = list((root / "proc").iterdir())
    except OSError:
        return names
    for entry in entries:
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")[:2]
        except OSError:
            continue
        names.update(os.path.basename(os.fsdecode(word)) for word in words)
    return names


def _enabled(service: str, root: Path) -> bool:
    """Whether an init system starts it at boot: what it does is what files say."""
    for folder in _WANTS:
        unit = f"{service}.service"
        if any(os.path.lexists(wants / unit) for wants in (root / folder).glob("*.wants")):
            masked = root / "etc/systemd/system" / unit
            return not (masked.is_symlink() and os.readlink(masked) == "/dev/null")
    levels = root / "etc/runlevels"
    return any(os.path.lexists(level / service) for level in levels.glob("*"))


def _disable(service: str, root: Path) -> str:
    if boot.init_system(root) == "openrc":
        return f"rc-update del {service} && rc-service {service} stop"
    return f"systemctl disable --now {service}.service"


def _restart(service: str, root: Path) -> str:
    if boot.init_system(root) == "openrc":
        return f"rc-service {service} restart"
    return f"systemctl restart {service}.service"


def _mentions(file: Path) -> bool:
    """Whether a line that is no comment names KSM's folder."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return False
    return re.search(r"^(?!\s*#).*kernel/mm/ksm/", text, re.MULTILINE) is not None


def _assigned(file: Path, name: str) -> str:
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return ""
    values: list[str] = re.findall(rf"^\s*{name}=[\"']?([^\"'\n]*)", text, re.MULTILINE)
    return values[-1] if values else ""
