# SPDX-License-Identifier: MIT
"""What each family of distributions has that sets KSM: a table, and which family this is.

What is really there decides (owners.py); this says what that can be, and what is to be said of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import distro


@dataclass(frozen=True)
class Manager:
    """What can set KSM: it is there if one of its services, programs or files is."""

    name: str
    does: str
    services: tuple[str, ...] = ()
    """Started at boot, under one of these names."""
    programs: tuple[str, ...] = ()
    """Running under one of these names, also as a script."""
    files: tuple[str, ...] = ()
    """Globs below the root, of files of which a line names KSM's folder."""
    ways_out: tuple[str, ...] = ()
    """Commands to choose from, with what else is to be done behind a #; {disable} and {restart} are
    those for its first service."""

    @property
    def conflict(self) -> bool:
        """Whether it sets KSM again and again."""
        return bool(self.ways_out)


@dataclass(frozen=True)
class Family:
    """Distributions of which the same is to be said."""

    name: str
    ids: tuple[str, ...] = ()
    """ID, or one of ID_LIKE, of os-release(5)."""
    sign: str = ""
    """A path that says more than os-release: Proxmox VE calls itself Debian."""
    managers: tuple[Manager, ...] = ()
    """What it has beyond EVERYWHERE, or otherwise than there."""
    no_ksm: str = ""
    """What to do where its kernel has no KSM."""

    def known(self) -> list[Manager]:
        """Return all that can set KSM there."""
        own = {one.name for one in self.managers}
        return [*self.managers, *(one for one in EVERYWHERE if one.name not in own)]


def _ksmtuned(package: str, *ways_out: str) -> Manager:
    # KSM_THRES_COEF: the percentage of memory that has to be free for it to switch KSM off.
    return Manager(
        "ksmtuned",
        f"(package {package}) switches KSM off each minute while virtual machines do not use most "
        "of the memory, and sets its rate",
        services=("ksmtuned",),
        programs=("ksmtuned",),
        ways_out=(
            *ways_out,
            "sudoedit /etc/ksmtuned.conf && {restart}   # KSM_THRES_COEF=95 leaves KSM to it",
        ),
    )


_AGAIN = "{disable}   # then sudo ksmtool kernel-enable"

EVERYWHERE = (
    _ksmtuned("ksmtuned", _AGAIN),
    Manager(
        "KubeVirt's virt-handler",
        "switches KSM by the labels of the node every 3 minutes",
        programs=("virt-handler",),
        ways_out=("kubectl edit kubevirt -n kubevirt   # spec.configuration.ksmConfiguration",),
    ),
    Manager(
        "MOM (oVirt)",
        "switches KSM by its policy every few seconds",
        services=("mom-vdsm", "momd"),
        programs=("momd", "vdsmd"),
        ways_out=("# disable KSM control in the cluster's MoM policy of oVirt",),
    ),
    Manager(
        "uksmd",
        "switches KSM on when it starts, and unmerges everything when it stops",
        services=("uksmd",),
        programs=("uksmd",),
        ways_out=(_AGAIN,),
    ),
    Manager(
        "ksm.service",
        "switches KSM on at boot, before us, and off when it is stopped",
        services=("ksm",),
    ),
    Manager(
        "tmpfiles.d",
        "sets KSM at boot, before us",
        files=("etc/tmpfiles.d/*.conf", "usr/lib/tmpfiles.d/*.conf"),
    ),
    Manager(
        "sysfsutils", "sets KSM at boot, before us", files=("etc/sysfs.conf", "etc/sysfs.d/*.conf")
    ),
    # OpenRC's service local is the last of all.
    Manager("local.d", "sets KSM at boot, after us", files=("etc/local.d/*.start",)),
    Manager("rc.local", "sets KSM at boot, before us", files=("etc/rc.local", "etc/rc.d/rc.local")),
)

# The first that fits counts.
FAMILIES = (
    Family(
        "Proxmox VE",
        sign="usr/bin/pveversion",
        # It is on by default there, and virtual machines are what the host is for.
        managers=(_ksmtuned("ksm-control-daemon"),),
    ),
    Family(
        "CachyOS",
        ("cachyos",),
        managers=(
            Manager("ksmd.service", "switches KSM on at boot, before us", services=("ksmd",)),
        ),
    ),
    Family(
        "Ubuntu",
        ("ubuntu",),
        managers=(
            Manager(
                "qemu-kvm.service",
                "(package qemu-system-common) sets KSM at boot, before us, as KSM_ENABLED in "
                "/etc/default/qemu-kvm says: with AUTO, off in a virtual machine",
                services=("qemu-kvm",),
            ),
        ),
    ),
    Family("Raspberry Pi OS", ("raspbian",), sign="etc/rpi-issue", no_ksm="Its kernels have none."),
    Family("Debian", ("debian",)),
    Family("Amazon Linux", ("amzn",)),
    Family(
        "Fedora and RHEL",
        ("fedora", "rhel", "centos"),
        managers=(_ksmtuned("ksmtuned, before RHEL 9 qemu-kvm", _AGAIN),),
    ),
    Family(
        "SUSE",
        ("suse", "opensuse", "sles"),
        managers=(
            Manager(
                "ksm.service",
                "(package qemu-ksm) switches KSM on at boot, before us, and off when it is stopped",
                services=("ksm",),
            ),
        ),
    ),
    Family("Arch", ("arch",)),
    Family("Alpine", ("alpine",)),
    Family("Gentoo", ("gentoo",), no_ksm="Build the kernel with CONFIG_KSM=y."),
)
OTHER = Family("other")


def family(root: Path = Path("/")) -> Family:
    """Return what the system below `root` is by its os-release, OTHER if that says nothing."""
    system = _os_release(root)
    names = (system.id(), *system.like().split())
    signs = [one for one in FAMILIES if one.sign and (root / one.sign).exists()]
    return next(iter(signs + [one for name in names for one in FAMILIES if name in one.ids]), OTHER)


def pretty_name(root: Path = Path("/")) -> str:
    """Return how the system below `root` calls itself, with its version; "" if it does not."""
    return _os_release(root).name(pretty=True)


def _os_release(root: Path) -> distro.LinuxDistribution:
    files = [root / name for name in ("etc/os-release", "usr/lib/os-release")]
    file = next((file for file in files if file.exists()), files[0])
    # Nothing of the machine that this runs on: lsb_release, uname, other files in /etc.
    nothing = str(root / "etc/no-such-release")
    return distro.LinuxDistribution(
        include_lsb=False,
        os_release_file=str(file),
        distro_release_file=nothing,
        include_uname=False,
    )
