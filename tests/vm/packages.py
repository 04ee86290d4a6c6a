# SPDX-License-Identifier: MIT
"""The Debian packages: built in clean chroots, and chroots to install them in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import machine
from conftest import HERE, need_command, run

PROJECT = HERE.parent
BUILDER = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")
"""Who builds, without fakeroot: Rules-Requires-Root is no."""

# Where they are installed: what they depend on, and what looks at them.
USED = (
    "autopkgtest",
    "libc6:i386",
    "lintian",
    "python3-click",
    "python3-distro",
    "python3-rich",
    "python3-xxhash",
    "sudo",
)

ENTER = """
mount -t overlay root -o "lowerdir=$0,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount -t sysfs sys sys
mount --bind /dev dev
mount -t tmpfs tmp run
shift
exec chroot . "$@"
"""


@dataclass(frozen=True)
class Chroot:
    """A Debian that others share, and what is changed in this one, in a folder of its own."""

    below: tuple[Path, ...]
    """Its files, the first folder that has one counts."""
    layer: Path

    @property
    def changed(self) -> Path:
        """Return the folder with the files that are not as below."""
        return self.layer / "upper"

    def run(
        self, *command: object, env: Mapping[str, str] | None = None, seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there, with mounts of its own and without a network."""
        enter = ("unshare", "--mount", "--net", "--propagation=private", "sh", "-ec", ENTER)
        known = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "TERM": "dumb"}
        return subprocess.run(
            [*enter, ":".join(map(str, self.below)), str(self.layer), *map(str, command)],
            env={**known, "DEBIAN_FRONTEND": "noninteractive", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def __call__(self, *command: object, env: Mapping[str, str] | None = None) -> str:
        """Run a command in there, which has to succeed; return what it prints."""
        done = self.run(*command, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def new_and_gone(self) -> set[str]:
        """Return the paths that are here and not below, or the other way round."""
        (base,) = self.below
        paths = {path: str(path.relative_to(self.changed)) for path in self.changed.rglob("*")}
        # What is deleted is a device (Documentation/filesystems/overlayfs.rst).
        return {
            name
            for path, name in paths.items()
            if os.path.lexists(base / name) == path.is_char_device()
        }


def build_dependencies() -> list[str]:
    """Return the packages that debian/control declares for building, without versions."""
    control = (PROJECT / "debian/control").read_text()
    (declared,) = re.findall(r"^Build-Depends:((?:.*\n)(?: .*\n)*)", control, re.MULTILINE)
    return [re.split(r"[\s(<\[]", word.strip())[0] for word in declared.split(",")]


def archive(purpose: str, suite: str, architectures: str) -> Path:
    """Return the archive of a Debian to "build" or to "use" the packages in, from the cache."""

    def keep(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        with tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as copy:
            for member in packed:
                if not member.isdev():
                    copy.addfile(member, packed.extractfile(member) if member.isreg() else None)

    left_out = (f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in machine.LEFT_OUT)
    variant, packages = {
        "build": ("buildd", build_dependencies()),
        "use": ("minbase", USED),
    }[purpose]
    # The kernel runs i386's programs itself.
    foreign = ("--skip=check/qemu",) if architectures == "i386" else ()
    what = (f"--variant={variant}", f"--include={','.join(packages)}", *left_out, *foreign)
    return machine.made(
        f"{purpose}-{suite}",
        (*what, suite, "-"),
        keep,
        replace(machine.AMD64, debian=architectures),
    )


@dataclass
class Debians:
    """Debians unpacked below a folder, each once, and layers on them."""

    folder: Path
    _layers: int = 0
    _bases: dict[str, Path] = field(default_factory=dict)

    def base(self, purpose: str, suite: str, architectures: str) -> Path:
        """Return the folder of one."""
        name = f"{purpose}-{suite}-{architectures}".replace(",", "-")  # it is in mount's options
        if name not in self._bases:
            packed, folder = archive(purpose, suite, architectures), self.folder / name
            folder.mkdir()
            done = run([need_command("tar"), "-C", folder, "--numeric-owner", "-xpf", packed])
            assert done.returncode == 0, done.stderr
            self._bases[name] = folder
        return self._bases[name]

    def chroot(self, *below: Path) -> Chroot:
        """Return a new one."""
        self._layers += 1
        layer = self.folder / f"layer-{self._layers}"
        for name in ("upper", "work", "root"):
            (layer / name).mkdir(parents=True)
        layer.joinpath("upper").chmod(0o755)
        return Chroot(below, layer)


def source(folder: Path) -> None:
    """Copy what git would have in a commit of now to `folder`, as the builder's."""
    listed = subprocess.run(
        [need_command("git"), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    for name in listed.split("\0")[:-1]:
        if os.path.lexists(PROJECT / name):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, target, follow_symlinks=False)


@dataclass(frozen=True)
class Built:
    """What came of a build."""

    folder: Path
    log: str
    seconds: float

    def file(self, pattern: str) -> Path:
        """Return the only file of that pattern."""
        (found,) = self.folder.glob(pattern)
        return found

    def packages(self) -> list[Path]:
        """Return the packages, without those of debug symbols."""
        return [file for file in sorted(self.folder.glob("*.deb")) if "-dbgsym_" not in file.name]


def build(
    chroot: Chroot,
    where: str = "build/ksm-preload",
    umask: int = 0o022,
    env: Mapping[str, str] | None = None,
    personality: Sequence[str] = (),
    version: str = "",
) -> Built:
    """Build all packages with dpkg-buildpackage, as a user. Fails the test if that fails.

    A version is one to release next.
    """
    folder = chroot.changed / where
    source(folder)
    if version:
        stated = {"meson.build": r"(?<=version: ')[^']*", "debian/changelog": r"(?<=\()[^)]*"}
        for name, pattern in stated.items():
            text, found = re.subn(pattern, version, (folder / name).read_text(), count=1)
            assert found == 1
            (folder / name).write_text(text)
    for path in (folder.parent, *folder.parent.rglob("*")):
        os.chown(path, 1000, 1000)
    command = f"umask {umask:03o}; cd /{where}; exec dpkg-buildpackage -us -uc"
    start = time.monotonic()
    done = chroot.run(
        *BUILDER, *personality, "sh", "-ec", command, env={"HOME": "/nonexistent", **(env or {})}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Built(folder.parent, done.stdout + done.stderr, time.monotonic() - start)
