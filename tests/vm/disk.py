# SPDX-License-Identifier: MIT
"""Disks with a real Debian, with its systemd: made without privileges, changed without mounting."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import machine
from conftest import need, need_command, run

# Of what Debian has installed everywhere, what a boot and the stages need; and python3.
PACKAGES = (
    "apt",
    "dbus",
    "gpg",
    "gpg-agent",
    "ksmtuned",
    "libpam-systemd",
    "login",
    "openssh-client",
    "openssh-server",
    "procps",
    "python3-click",
    "python3-distro",
    "python3-rich",
    "python3-xxhash",
    "sudo",
    "systemd-sysv",
    "udev",
)

# Nothing waits for these, and in emulation each takes a good part of a second of every boot.
UNNEEDED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "getty@tty1.service",
    "modprobe@.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-pstore.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
)
# Of the devices that are there before udev: those that a unit waits for.
COLDPLUG = """[Service]
ExecStart=
ExecStart=udevadm trigger --action=add --sysname-match=ttyS0 --sysname-match=vda"""

# alice has no password, may log in by a key and use sudo.
SETUP = f"""
UNNEEDED="{" ".join(UNNEEDED)}"
COLDPLUG="{COLDPLUG}"
chroot "$1" useradd --create-home --shell /bin/bash alice
chroot "$1" passwd --quiet --delete alice
echo "alice ALL=(ALL) NOPASSWD: ALL" >"$1/etc/sudoers.d/alice"
mkdir -m 700 "$1/home/alice/.ssh"
ssh=/home/alice/.ssh
chroot "$1" ssh-keygen -q -t ed25519 -N "" -f $ssh/id_ed25519
cp "$1$ssh/id_ed25519.pub" "$1$ssh/authorized_keys"
echo "127.0.0.1 $(cut -d" " -f1,2 "$1/etc/ssh/ssh_host_ed25519_key.pub")" >"$1$ssh/known_hosts"
chroot "$1" chown -R alice: $ssh
chroot "$1" systemctl --quiet mask $UNNEEDED
chroot "$1" systemctl --quiet disable ksm.service ksmtuned.service
mkdir "$1/etc/systemd/system/systemd-udev-trigger.service.d"
echo "$COLDPLUG" >"$1/etc/systemd/system/systemd-udev-trigger.service.d/few.conf"
echo "/dev/vda / ext4 defaults 0 0" >"$1/etc/fstab"
echo guest >"$1/etc/hostname"
echo "127.0.0.1 localhost guest" >"$1/etc/hosts"
"""

# What fakeroot is told of owners lasts as long as it runs. Nor shall the first boot do what systemd
# does after an update of /usr (systemd-update-done.service(8)).
MAKE = """
trap 'rm -rf "$1"' EXIT
mkdir "$1"
tar --extract --preserve-permissions --numeric-owner --directory="$1"
echo "$3" >"$1/etc/machine-id"
touch "$1/etc/.updated" "$1/var/.updated"
"$5" -q -t ext4 -F -d "$1" "$2" "$4"
"""

# An empty ID means a first boot to systemd, which then asks questions. mmdebstrap empties it.
MACHINE_ID = "5ba9ee1f0d6b4c1f9d0f3f1d5b6c7a80"
SIZE = "1G"
HOW = (MAKE, MACHINE_ID, SIZE)

# What debugfs says where all is well.
EXISTS = "mkdir: Ext2 directory already exists"
USUAL = ("debugfs ", EXISTS, f"ext2fs_{EXISTS}")


def image(suite: str) -> Path:
    """Return the disk image of a Debian suite."""

    def convert(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        folder = Path(output.name).with_suffix(".root")
        command = [need_command("fakeroot"), "sh", "-ec", MAKE, "sh", folder, output.name]
        command += [MACHINE_ID, SIZE, _administrators("mke2fs")]
        with subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            with tarfile.open(fileobj=process.stdin, mode="w|", format=tarfile.GNU_FORMAT) as copy:
                for member in packed:
                    copy.addfile(member, packed.extractfile(member) if member.isfile() else None)
            process.stdin.close()
        assert process.returncode == 0

    left_out = (f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in machine.LEFT_OUT)
    content = ("--variant=essential", f"--include={','.join(PACKAGES)}", *left_out)
    setup = f"--customize-hook=set -e{SETUP}"
    return machine.made(f"disk-{suite}", (*content, setup, suite, "-"), convert, how=HOW)


def copy(image: Path, target: Path) -> Path:
    """Copy an image, which is mostly holes."""
    done = run(["cp", "--sparse=always", "--reflink=auto", image, target])
    assert done.returncode == 0, done.stderr
    return target


def put(disk: Path, files: Iterable[tuple[str, Path]]) -> None:
    """Write files, root's and with their modes, and symbolic links to a disk that nobody uses."""
    commands = []
    folders: dict[str, None] = {}
    for name, file in files:
        for parent in reversed(Path(name).parents[:-1]):
            folders[f"mkdir /{parent}"] = None
        if file.is_symlink():
            commands.append(f"symlink /{name} {os.readlink(file)}")
        else:
            mode = 0o100000 | (0o755 if os.access(file, os.X_OK) else 0o644)
            commands += [f"write {file} /{name}", f"set_inode_field /{name} mode 0{mode:o}"]
    script = "".join(f"{line}\n" for line in (*folders, *commands))
    done = subprocess.run(
        [_administrators("debugfs"), "-w", "-f", "/dev/stdin", str(disk)],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    # It succeeds whatever happens.
    wrong = [line for line in done.stderr.splitlines() if not line.startswith(USUAL)]
    assert done.returncode == 0, done.stderr
    assert not wrong, "\n".join(wrong)


def _administrators(name: str) -> str:
    """Return the path of a command that is not on everybody's $PATH, or skip."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    need(path is not None, f"no {name}")
    return str(path)
