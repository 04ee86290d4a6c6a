# SPDX-License-Identifier: MIT
"""Where a process belongs: its systemd unit and its container, from the text of /proc/PID/cgroup.

Pure. Paths are those that systemd, Docker, Podman, LXC, Incus, Kubernetes and nerdctl make, on
cgroup v1, hybrid and v2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

_UNIT = re.compile(r".+\.(?:service|scope|socket|mount|swap)")
_MANAGER = re.compile(r"user@(\d+)\.service")
_ID = r"([0-9a-f]{12,64})"

# One folder of the path -> who runs the container that its group names.
_FOLDERS = (
    ("docker", re.compile(rf"docker-{_ID}\.scope")),
    ("podman", re.compile(rf"libpod-(?:payload-)?{_ID}(?:\.scope)?")),
    ("kubernetes", re.compile(rf"(?:cri-containerd|crio|cri-o)-{_ID}(?:\.scope)?")),
    ("containerd", re.compile(rf"nerdctl-{_ID}\.scope")),
    # containerd's systemd driver on a kubelet that is set to cgroupfs: slice:prefix:id.
    ("kubernetes", re.compile(rf"kubepods[^:]*:[^:]+:{_ID}")),
    ("lxc", re.compile(r"lxc\.payload\.(.+)")),
    ("nspawn", re.compile(r"systemd-nspawn@(.+)\.service")),
    # A virtual machine's scope is called so, too: libvirt's begin with qemu- or lxc-.
    ("nspawn", re.compile(r"machine-(?!qemu-|lxc-)(.+)\.scope")),
    ("lxc", re.compile(r"machine-lxc-\d+-(.+)\.scope")),
)
_IN_FOLDER = {"docker": "docker", "lxc": "lxc", "lxc.payload": "lxc"}
_HEX = re.compile(_ID)
_ESCAPED = re.compile(r"(?:\\x[0-9a-f]{2})+")


@dataclass(frozen=True)
class Place:
    """Where a process belongs, in the words of tables; "" for nowhere."""

    unit: str = ""
    """The innermost unit as systemctl knows it, such as "nginx.service". If it is not one of the
    system's own manager, "foo.service of user 1000" or "nginx.service in lxc:web"."""
    container: str = ""
    """The innermost container: who runs it, and its name or the first 12 digits of its ID, such as
    "docker:3f4e2a1b9c8d"."""


@lru_cache(maxsize=4096)
def place(text: str) -> Place:
    """Return where a process with this /proc/PID/cgroup belongs."""
    unit = container = ""
    for path in _paths(text):
        # cg_escape() of systemd puts a _ before what could be taken for a file of the kernel's.
        folders = [part.removeprefix("_") for part in path.split("/") if part]
        at, found = _container([_unescape(part) for part in folders])
        container = container or found
        unit = unit or _unit(folders, at, found)
    return Place(unit, container)


def _paths(text: str) -> Iterator[str]:
    """Yield the path in each hierarchy: the unified one first, then systemd's own."""
    lines = [line.split(":", 2) for line in text.splitlines() if line.count(":") >= 2]
    order = {"": 0, "name=systemd": 1}
    for _number, _controllers, path in sorted(lines, key=lambda line: order.get(line[1], 2)):
        yield path.removesuffix(" (deleted)")


def _unescape(part: str) -> str:
    """Undo systemd's escapes of what a unit is named after, such as \\x2d for a hyphen."""
    return _ESCAPED.sub(
        lambda found: bytes.fromhex(found[0].replace(r"\x", "")).decode(errors="replace"), part
    )


def _container(folders: Sequence[str]) -> tuple[int, str]:
    """Return the innermost container and the index of the folder that names it, or (-1, "")."""
    for at in range(len(folders) - 1, -1, -1):
        for runtime, pattern in _FOLDERS:
            found = pattern.fullmatch(folders[at])
            if found:
                return at, _name(runtime, found[1], folders[:at])
        runtime = _IN_FOLDER.get(folders[at - 1], "") if at else ""
        if runtime == "lxc" or (runtime and _HEX.fullmatch(folders[at])):
            return at, _name(runtime, folders[at], folders[:at])
        # Kubernetes without systemd: kubepods/burstable/pod<uid>/<id>.
        if at and folders[at - 1].startswith("pod") and _HEX.fullmatch(folders[at]):
            return at, _name("kubernetes", folders[at], folders[:at])
    return -1, ""


def _name(runtime: str, name: str, above: Sequence[str]) -> str:
    if any(folder.startswith("kubepods") for folder in above):
        runtime = "kubernetes"  # Docker's own names stay below a pod
    return f"{runtime}:{name[:12] if _HEX.fullmatch(name) else name}"


def _unit(folders: Sequence[str], container_at: int, container: str) -> str:
    """Return the last folder that is a unit, with the manager that it is a unit of."""
    for at in range(len(folders) - 1, -1, -1):
        if not _UNIT.fullmatch(folders[at]):
            continue
        if container and at > container_at:
            return f"{folders[at]} in {container}"
        for above in folders[:at]:
            manager = _MANAGER.fullmatch(above)
            if manager:
                return f"{folders[at]} of user {manager[1]}"
        return folders[at]
    return ""
