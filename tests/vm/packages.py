# SPDX-License-Identifier: MIT
"""The Debian packages: built in clean chroots, and chroots to install them in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import machine
from conftest import HERE, need_command

PROJECT = HERE.parent
NAMES = ("ksm-preload", "libksm-preload")
BUILDER = "1000"
"""The user who builds, without fakeroot: Rules-Requires-Root is no."""

# Where they are installed: what they depend on, and what looks at them.
TOOLS = ("autopkgtest", "lintian")
USED = ("libc6:i386", "python3-click", "python3-distro", "python3-rich", "python3-xxhash", "sudo")

ENTER = """
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount -t sysfs sys "$0/sys"
mount --bind /dev "$0/dev"
mount -t tmpfs tmp "$0/run"
exec chroot "$0" "$@"
"""


@dataclass(frozen=True)
class Chroot:
    """A Debian in a folder."""

    folder: Path

    def run(
        self,
        *command: object,
        env: Mapping[str, str] | None = None,
        seconds: float = 300,
        personality: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there, with mounts of its own and without a network."""
        enter = ["unshare", "--mount", "--net", "--propagation=private", "sh", "-ec", ENTER]
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run(
            [*personality, *enter, str(self.folder), *map(str, command)],
            env={"PATH": path, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def __call__(self, *command: object) -> str:
        """Run a command in there, which has to succeed; return what it prints."""
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def build_dependencies() -> list[str]:
    """Return the packages that debian/control declares for building, without versions."""
    control = (PROJECT / "debian/control").read_text()
    (field,) = re.findall(r"^Build-Depends:((?:.*\n)(?: .*\n)*)", control, re.MULTILINE)
    return [re.split(r"[\s(<\[]", word.strip())[0] for word in field.split(",")]


def archive(purpose: str, suite: str, architectures: str) -> Path:
    """Return the archive of a chroot to "build" or to "use" the packages in, from the cache."""

    def keep(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        with tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as copy:
            for member in packed:
                if not member.isdev():
                    copy.addfile(member, packed.extractfile(member) if member.isreg() else None)

    left_out = (f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in machine.LEFT_OUT)
    variant, packages = {
        "build": ("buildd", build_dependencies()),
        "use": ("minbase", [*TOOLS, *USED]),
    }[purpose]
    content = (f"--variant={variant}", f"--include={','.join(packages)}", *left_out, suite, "-")
    architecture = replace(machine.AMD64, debian=architectures)
    return machine.made(f"{purpose}-{suite}", content, keep, architecture)


def chroot(archive: Path, folder: Path) -> Chroot:
    """Unpack a chroot into `folder`, which is made."""
    folder.mkdir()
    done = subprocess.run(
        [need_command("tar"), "-C", folder, "--numeric-owner", "-xpf", archive],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Chroot(folder)
