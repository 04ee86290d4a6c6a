# SPDX-License-Identifier: MIT
"""Who else sets KSM on this machine: found by what is really there.

A manager that writes again and again is in conflict with us; what only sets it while the machine
boots is not: our unit comes after nearly all of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ksmtool import boot, families, process
from ksmtool.families import Manager

_WANTS = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)

# What OpenRC, runit and sysvinit start.
_STARTED = ("etc/runlevels/*/{}", "var/service/{}", "etc/rc[2-5].d/S[0-9][0-9]{}")

_INTERPRETER = re.compile(r"(ba|da|k|z)?sh|perl|python[0-9.]*")

# How an init system is told not to start a service any more, and to start it anew.
_COMMANDS = {
    "systemd": ("sudo systemctl disable --now {}.service", "sudo systemctl restart {}.service"),
    "openrc": ("sudo rc-update del {0} && sudo rc-service {0} stop", "sudo rc-service {} restart"),
    "runit": ("sudo rm /var/service/{}", "sudo sv restart {}"),
    "sysvinit": (
        "sudo update-rc.d {0} disable && sudo service {0} stop",
        "sudo service {} restart",
    ),
}


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
    return list(_found(root, families.family(root).known()))


def _found(root: Path, known: list[Manager]) -> Iterator[Owner]:
    running = _running(root)
    init = boot.init_system(root)
    for one in known:
        if running & set(one.programs) or any(_enabled(name, root) for name in one.services):
            choices = tuple(_command(way, one.services, init) for way in one.ways_out)
            yield Owner(one.name, one.does, one.conflict, choices)
        seen: set[str] = set()
        for file in (file for pattern in one.files for file in sorted(root.glob(pattern))):
            # The first of a name counts: tmpfiles.d(5).
            if file.name not in seen and _mentions(file):
                yield Owner(f"/{file.relative_to(root)}", one.does, one.conflict)
            seen.add(file.name)


def _command(way: str, services: tuple[str, ...], init: str) -> str:
    if not services:
        return way
    disable, restart = _COMMANDS.get(init, _COMMANDS["sysvinit"])
    return way.format(disable=disable.format(services[0]), restart=restart.format(services[0]))


def _running(root: Path) -> set[str]:
    """Return the names of root's programs, and of the scripts that its interpreters run."""
    names: set[str] = set()
    proc = root / "proc"
    try:
        pids, owner = process.pids(proc), proc.stat().st_uid
    except OSError:
        return names
    for pid in pids:
        try:
            if (proc / str(pid)).stat().st_uid != owner:
                continue  # a user's process can be called anything
        except OSError:
            continue
        words = process.command_line(pid, proc)
        program, *rest = (os.path.basename(os.fsdecode(word)) for word in words)
        names.add(program)
        if _INTERPRETER.fullmatch(program):
            names.add(next((word for word in rest if not word.startswith("-")), ""))
    return names


def _enabled(service: str, root: Path) -> bool:
    """Whether an init system starts it at boot: what it does is what files say."""
    for folder in _WANTS:
        unit = f"{service}.service"
        if any(os.path.lexists(wants / unit) for wants in (root / folder).glob("*.wants")):
            masks = [root / "etc/systemd/system" / unit, root / "run/systemd/system" / unit]
            return not any(mask.is_symlink() and os.readlink(mask) == "/dev/null" for mask in masks)
    return any(any(root.glob(pattern.format(service))) for pattern in _STARTED)


def _mentions(file: Path) -> bool:
    """Whether a line that is no comment names KSM's folder."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return False
    return re.search(r"^(?!\s*#).*kernel/mm/ksm/", text, re.MULTILINE) is not None
