# SPDX-License-Identifier: MIT
"""What opting in a whole machine gives away, and to whom: who else runs here."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

FIVE_LINES = """\
This opts in all programs of this machine and of all its users, but those the policy leaves out.
Each can then learn, by timing its own writes, whether another holds a page that it can guess:
programs, files, their addresses, with patience secrets; also over the network (NDSS 2022).
So all whose programs run here must be trusted with what the others' hold: no tenants.
`ksmtool global-disable` takes it back; what runs by then keeps it until it is restarted."""

# Each of these processes stands for a guest or a container.
_TENANTS = (
    ("a virtual machine", ("qemu-system-*", "qemu-kvm", "kvm", "firecracker", "cloud-hypervisor")),
    ("a virtual machine", ("crosvm", "VBoxHeadless", "VirtualBoxVM", "vmware-vmx")),
    (
        "a container",
        ("containerd-shim*", "conmon", "lxc-start", "[[]lxc monitor]", "systemd-nspawn"),
    ),
    ("a container", ("crun", "runc", "apptainer", "Apptainer*", "singularity")),
)
_HUMANS = range(1000, 60000)  # UID_MIN to UID_MAX of login.defs(5)


@dataclass(frozen=True)
class Company:
    """Who else is on this machine, as far as its processes tell."""

    tenants: tuple[str, ...]
    """Kinds of guests that run, each with one process and a count."""
    people: int
    """Ordinary users with a process."""


def company(root: Path = Path("/")) -> Company:
    """Look through the processes below `root`; one that ends meanwhile is not counted."""
    kinds: Counter[str] = Counter()
    example: dict[str, str] = {}
    users = set()
    for entry in (root / "proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = os.fsdecode((entry / "cmdline").read_bytes().split(b"\0")[0])
            users.add(entry.stat().st_uid)
        except OSError:
            continue
        # LXC's monitor has a title there, "[lxc monitor] /var/lib/lxc name".
        name = command[:13] if command.startswith("[lxc monitor]") else os.path.basename(command)
        names = {name}  # what it calls itself, and what it is
        with contextlib.suppress(OSError):
            names = {name, os.path.basename(os.readlink(entry / "exe"))}
        for kind, patterns in _TENANTS:
            if any(fnmatchcase(one, pattern) for one in names for pattern in patterns):
                kinds[kind] += 1
                example.setdefault(kind, f"{name}, PID {entry.name}")
    tenants = tuple(
        f"{kind} ({example[kind]}{f', and {count - 1} more' if count > 1 else ''})"
        for kind, count in sorted(kinds.items())
    )
    return Company(tenants, len(users & set(_HUMANS)))
