# SPDX-License-Identifier: MIT
"""Boots of a disk's Debian by its own kernel and systemd, one after the other."""

from __future__ import annotations

import lzma
import re
import stat
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

import disk
import machine
from conftest import HERE

MACHINES = HERE / "vm"
UNITS = "etc/systemd/system"

# What a kernel of Debian has as modules of what it needs to mount the disk, in the order they need
# each other, and of what is loaded on demand elsewhere: there are none on the disk. Those that a
# kernel lacks it has built in.
MODULES = (
    "crc16",
    "crc32c_generic",
    "libcrc32c",
    "mbcache",
    "jbd2",
    "ext4",
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "overlay",
)

SECONDS = 600
"""The most that a boot may take; 40 to 70 are usual where nothing else runs."""


@dataclass(frozen=True)
class Boot:
    """One run of a machine, from its start until QEMU ended."""

    report: str
    console: str
    qemu: str
    """How QEMU ended."""
    seconds: float

    @property
    def end(self) -> str:
        """Return how it ended: "status N" as the stage said, "panic", or what else happened."""
        status = re.search(r"^(status \d+)\n\Z", self.report, re.MULTILINE)
        if "ended with status 0" in self.qemu and status:
            return status[1]
        if "Kernel panic" in self.console:
            return "panic"
        return f"no status: QEMU {self.qemu}"

    def __str__(self) -> str:
        """Return all there is to know."""
        return f"{self.report}{self.end}, {self.seconds:.0f} s\n--- console ---\n{self.console}"


@dataclass(frozen=True)
class Step:
    """One boot of a disk, on which the steps before have left their traces."""

    name: str
    do: str
    """What the runner does, in this order."""
    method: str = "ld.so.preload"
    """How it is enabled."""
    append: str = ""
    end: str = "status 0"
    console: str = ""
    """What is said on the console, as a pattern."""

    @property
    def words(self) -> str:
        """Return what is added to the kernel's command line."""
        words = (f"ksm_test.do={self.do.replace(' ', ',')}", f"ksm_test.method={self.method}")
        return " ".join((*words, self.append))


@dataclass(frozen=True)
class System:
    """A disk, and what boots it."""

    kernel: Path
    initramfs: Path
    disk: Path

    def boot(self, append: str = "", seconds: float = SECONDS) -> Boot:
        """Boot with more words on the kernel's command line, until it is off or restarts."""
        report = self.disk.with_suffix(".report")
        for file in (report, machine.console_of(report)):
            file.write_bytes(b"")
        # The disk outlives QEMU however that ends: it need not wait for the host's disk.
        drive = ("-drive", f"file={self.disk},if=virtio,format=raw,cache=unsafe")
        start = time.monotonic()
        qemu = machine.emulate(
            self.kernel,
            self.initramfs,
            f"root=/dev/vda ro TERM=dumb {append}",
            report,
            seconds,
            drive,
        )
        took = time.monotonic() - start
        console = machine.plain_text(machine.console_of(report))
        return Boot(machine.plain_text(report), console, qemu, took)


def system(suite: str, folder: Path, first: Path, files: Iterable[tuple[str, Path]]) -> System:
    """Return a system in `folder`, whose initramfs runs `first` and whose disk has `files`, too."""
    initramfs = folder / f"{suite}.initramfs"
    initramfs.write_bytes(modules(suite).read_bytes() + machine.archive([("init", first)]))
    copy = disk.copy(disk.image(suite), folder / f"{suite}.disk")
    disk.put(copy, files)
    return System(machine.kernel(suite), initramfs, copy)


def runner(folder: Path, script: Path, *units: Path) -> Iterator[tuple[str, Path]]:
    """Yield what runs `script` at every boot, which works where ksmtool is not installed."""
    for file in {MACHINES / "guest_boot.py", script}:
        yield f"project/tests/vm/{file.name}", file
    # Found beside the script, by nothing else: nothing that it starts shall find it.
    for name in ("__init__.py", "process.py"):
        yield f"project/tests/vm/ksmtool/{name}", HERE.parent / "python/ksmtool" / name
    run = folder / "run"
    run.symlink_to(f"tests/vm/{script.name}")
    yield "project/run", run
    for unit in (MACHINES / "ksm-test.service", MACHINES / "ksm-probe.service", *units):
        yield f"{UNITS}/{unit.name}", unit
        if "@" not in unit.name:
            wanted = folder / unit.name
            wanted.symlink_to(f"../{unit.name}")
            yield f"{UNITS}/multi-user.target.wants/{unit.name}", wanted


def follow(system: System, steps: Iterable[Step]) -> dict[str, Boot]:
    """Boot a system by steps, up to the first that does not end as it should; its disk is gone."""
    done = {}
    for step in steps:
        done[step.name] = system.boot(step.words)
        if done[step.name].end != step.end:
            break
    system.disk.unlink()
    return done


def check(step: Step, done: Mapping[str, Boot]) -> None:
    """Fail the test unless a step of what has been followed ended as it should."""
    if step.name not in done:
        pytest.fail(f"not reached: failed at {list(done)[-1]!r}", pytrace=False)
    print(done[step.name])
    if done[step.name].end != step.end:
        pytest.fail(f"{done[step.name].end} instead of {step.end}, see the report", pytrace=False)
    assert re.search(step.console, done[step.name].console)
    assert "ERROR: ld.so" not in done[step.name].report + done[step.name].console


def modules(suite: str) -> Path:
    """Return the archive of MODULES of the newest kernel, with names that sort in their order."""

    def convert(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        output.write(machine.entry("modules", stat.S_IFDIR | 0o755))
        for member in packed:
            found = re.search(r"/([^/]+)\.ko(\.xz)?$", member.name)
            name = found[1].replace("-", "_") if found else ""
            if found and name in MODULES:
                data = machine.content(packed, member)
                data = lzma.decompress(data) if found[2] else data
                place = f"modules/{MODULES.index(name):02}-{name}"
                output.write(machine.entry(place, stat.S_IFREG | 0o644, data))

    arguments = ("--variant=extract", "--include=linux-image-amd64", suite, "-")
    return machine.made(f"modules-{suite}", arguments, convert, how=MODULES)
