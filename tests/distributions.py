# SPDX-License-Identifier: MIT
"""Roots of distributions as far as KSM goes: what they are, how they boot, who else sets KSM there.

A table that makes folders. Versions of kernels are those of ../facts: which settings there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# When a setting came (Documentation/ABI/testing/sysfs-kernel-mm-ksm), and its default.
SETTINGS = {
    "run": ((2, 6), "0"),
    "pages_to_scan": ((2, 6), "100"),
    "sleep_millisecs": ((2, 6), "20"),
    "merge_across_nodes": ((3, 9), "1"),
    "use_zero_pages": ((4, 11), "0"),
    "max_page_sharing": ((4, 13), "256"),
    "stable_node_chains_prune_millisecs": ((4, 13), "2000"),
    "smart_scan": ((6, 7), "1"),
    "advisor_mode": ((6, 8), "[none] scan-time"),
    "advisor_max_cpu": ((6, 8), "70"),
    "advisor_min_pages_to_scan": ((6, 8), "500"),
    "advisor_max_pages_to_scan": ((6, 8), "30000"),
    "advisor_target_scan_time": ((6, 8), "200"),
}
COUNTERS = ("full_scans", "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")

SYSTEMD = {"run/systemd/system/": "", "sbin/init": "-> ../lib/systemd/systemd"}
OPENRC = {"run/openrc/": "", "etc/runlevels/default/": "", "sbin/init": "-> openrc-init"}


def wanted(unit: str, target: str = "multi-user.target") -> dict[str, str]:
    """Return what `systemctl enable` makes."""
    return {f"etc/systemd/system/{target}.wants/{unit}": f"-> /usr/lib/systemd/system/{unit}"}


@dataclass(frozen=True)
class Distribution:
    """One that is installed."""

    os_release: str
    kernel: tuple[int, int]
    files: Mapping[str, str]
    """Path -> text; "-> x" is a link to x, a path that ends in / is a folder."""
    others: tuple[str, ...] = ()
    """Names of those that set KSM, too, as `owners` has them."""
    conflict: str = ""
    """A word of what the refusal says; "" where there is none."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What is not the kernel's default."""

    def make(self, root: Path) -> Path:
        """Make it below `root`, and return that."""
        files = {"etc/os-release": self.os_release, **self.files, "proc/": "", "var/lib/": ""}
        for name, text in files.items():
            path = root / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if text.startswith("-> "):
                path.symlink_to(text[3:])
            elif not name.endswith("/"):
                path.write_text(text)
        folder = root / "sys/kernel/mm/ksm"
        folder.mkdir(parents=True)
        for name, (since, default) in SETTINGS.items():
            if since <= self.kernel:
                (folder / name).write_text(self.settings.get(name, default) + "\n")
        for name in COUNTERS:
            (folder / name).write_text("0\n")
        (root / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n")
        return root

    def running(self, root: Path, pid: int, *words: str) -> None:
        """Let a program run there."""
        (root / f"proc/{pid}").mkdir(parents=True)
        (root / f"proc/{pid}/cmdline").write_bytes(b"\0".join(map(os.fsencode, words)) + b"\0")


def _os(name: str, version: str = "", like: str = "") -> str:
    lines = [f"ID={name}", f'NAME="{name}"', f'PRETTY_NAME="{name} {version}"']
    lines += [f'VERSION_ID="{version}"'] if version else []
    lines += [f'ID_LIKE="{like}"'] if like else []
    return "\n".join(lines) + "\n"


KSMTUNED = {
    **wanted("ksm.service"),
    **wanted("ksmtuned.service"),
    "etc/ksmtuned.conf": "# defaults\n",
}
QEMU_KVM = {**wanted("qemu-kvm.service"), "etc/default/qemu-kvm": "KSM_ENABLED=AUTO\n"}
CACHYOS = {
    **wanted("ksmd.service"),
    "usr/lib/tmpfiles.d/ksm.conf": "w! /sys/kernel/mm/ksm/run - - - - 1\n",
}

DISTRIBUTIONS = {
    "debian-11": Distribution(_os("debian", "11"), (5, 10), SYSTEMD),
    "debian-12": Distribution(_os("debian", "12"), (6, 1), SYSTEMD),
    "debian-13": Distribution(_os("debian", "13"), (6, 12), SYSTEMD),
    "debian-13 with ksmtuned": Distribution(
        _os("debian", "13"),
        (6, 12),
        {**SYSTEMD, **KSMTUNED},
        ("ksmtuned", "ksm.service"),
        "sudo systemctl disable --now ksmtuned.service",
    ),
    "ubuntu-22.04": Distribution(_os("ubuntu", "22.04", "debian"), (5, 15), SYSTEMD),
    "ubuntu-24.04 with qemu": Distribution(
        _os("ubuntu", "24.04", "debian"), (6, 8), {**SYSTEMD, **QEMU_KVM}, ("qemu-kvm.service",)
    ),
    "ubuntu-26.04": Distribution(_os("ubuntu", "26.04", "debian"), (7, 0), SYSTEMD),
    "alma-8": Distribution(
        _os("almalinux", "8.10", "rhel centos fedora"),
        (4, 18),
        {**SYSTEMD, **KSMTUNED},
        ("ksmtuned", "ksm.service"),
        "KSM_THRES_COEF=95",
    ),
    "alma-9": Distribution(_os("almalinux", "9.6", "rhel centos fedora"), (5, 14), SYSTEMD),
    "alma-10": Distribution(_os("almalinux", "10.0", "rhel centos fedora"), (6, 12), SYSTEMD),
    "fedora": Distribution(_os("fedora", "43"), (6, 17), SYSTEMD),
    "opensuse-leap with qemu-ksm": Distribution(
        _os("opensuse-leap", "15.6", "suse opensuse"),
        (6, 4),
        {**SYSTEMD, **wanted("ksm.service")},
        ("ksm.service",),
    ),
    "opensuse-tumbleweed": Distribution(
        _os("opensuse-tumbleweed", like="opensuse suse"), (6, 17), SYSTEMD
    ),
    "sles-15": Distribution(_os("sles", "15.7", "suse"), (6, 4), SYSTEMD),
    "arch": Distribution(_os("arch"), (6, 17), SYSTEMD),
    "cachyos": Distribution(
        _os("cachyos", like="arch"),
        (6, 17),
        {**SYSTEMD, **CACHYOS},
        ("ksmd.service", "/usr/lib/tmpfiles.d/ksm.conf"),
        settings={"run": "1", "pages_to_scan": "40"},
    ),
    "alpine": Distribution(_os("alpine", "3.22"), (6, 12), OPENRC),
    "gentoo with openrc": Distribution(_os("gentoo"), (6, 12), OPENRC),
    "gentoo with systemd": Distribution(_os("gentoo"), (6, 12), SYSTEMD),
    "proxmox-ve": Distribution(
        _os("debian", "13"),
        (6, 14),
        {**SYSTEMD, **KSMTUNED, "usr/bin/pveversion": ""},
        ("ksmtuned", "ksm.service"),
        "KSM_THRES_COEF=95",
        {"run": "1"},
    ),
    "amazon-2023": Distribution(_os("amzn", "2023", "fedora"), (6, 1), SYSTEMD),
    "raspberry-pi-os": Distribution(
        _os("debian", "13"), (6, 12), {**SYSTEMD, "etc/rpi-issue": "Raspberry Pi reference\n"}
    ),
    "void with runit": Distribution(_os("void"), (6, 12), {"etc/runit/": ""}),
    "devuan with sysvinit": Distribution(
        _os("devuan", "5", "debian"), (6, 1), {"etc/inittab": "id:2:initdefault:\n"}
    ),
    "devuan with ksmtuned": Distribution(
        _os("devuan", "5", "debian"),
        (6, 1),
        {
            "etc/inittab": "id:2:initdefault:\n",
            "etc/rc2.d/S01ksmtuned": "-> ../init.d/ksmtuned",
            "etc/rc.local": "echo 1 >/sys/kernel/mm/ksm/run\n",
        },
        ("ksmtuned", "/etc/rc.local"),
        "sudo update-rc.d ksmtuned disable && sudo service ksmtuned stop",
    ),
}
