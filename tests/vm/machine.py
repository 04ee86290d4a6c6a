# SPDX-License-Identifier: MIT
"""Virtual machines with Debian's own kernels: a kernel, an initramfs, QEMU's software emulation.

Everything is made of Debian packages of the host's own mirror, without privileges and without
mounting anything, and kept below .cache/vm. What was made in another way is not used.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import platform
import re
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import distro

from conftest import need, need_command

CACHE = Path(__file__).parents[2] / ".cache" / "vm"

# What the tests run in there. The rest of the root is Debian's essential packages.
PACKAGES = (
    "mount",
    "perl",
    "php-cli",
    "python3-click",
    "python3-distro",
    "python3-pytest",
    "python3-rich",
    "python3-xxhash",
    "redis-server",
)
LEFT_OUT = ("doc", "i18n", "info", "locale", "man")

# The same where no package can be configured, since nothing of that architecture runs here.
UNPACKED = ("coreutils", "dash", "mount", "python3-click", "python3-pytest", "util-linux")
MERGED = ("bin", "lib", "lib64", "sbin")

SECONDS = 1200
"""The most that a machine may take; 60 to 250 are usual where nothing else runs."""


@dataclass(frozen=True)
class Architecture:
    """What QEMU is told, and what the kernel calls the two serial ports."""

    debian: str
    emulator: str
    options: str
    console: str
    report: str


# With two CPUs newer kernels crash in QEMU 7.2. The board of arm64 has one serial port of its own.
AMD64 = Architecture("amd64", "qemu-system-x86_64", "-serial file:{report}", "ttyS0", "ttyS1")
ARM64 = Architecture(
    "arm64",
    "qemu-system-aarch64",
    "-M virt -chardev file,id=report,path={report} -device pci-serial,chardev=report",
    "ttyAMA0",
    "ttyS0",
)


def kernel(suite: str, architecture: Architecture = AMD64) -> Path:
    """Return the newest kernel of a Debian suite."""

    def unpack(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        for member in packed:
            if member.name.startswith("./boot/vmlinuz-"):
                output.write(content(packed, member))

    return made(
        f"kernel-{suite}",
        ("--variant=extract", f"--include=linux-image-{architecture.debian}", suite, "-"),
        unpack,
        architecture,
    )


def libc(suite: str) -> Path:
    """Return a tar archive with the loader and the C library of a Debian suite."""

    def choose(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        with tarfile.open(fileobj=output, mode="w") as chosen:
            for member in packed:
                # Before 2.34 the files have a version in their names.
                if member.isfile() and re.search(
                    r"/(ld|libc)-[^/]*so[^/]*$|/libc\.so\.6$", member.name
                ):
                    is_loader = "/ld-" in member.name
                    data = content(packed, member)
                    member.name = "ld-linux-x86-64.so.2" if is_loader else "libc.so.6"
                    chosen.addfile(member, io.BytesIO(data))

    packages = ("--variant=extract", "--include=libc6", suite, "-")
    return made(f"libc-{suite}", packages, choose, AMD64)


def base(architecture: Architecture = AMD64) -> Path:
    """Return the archive of a root with the host's release of Debian, for programs built here."""

    def convert(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        output.write(entry("usr", stat.S_IFDIR | 0o755))
        for name in MERGED:
            output.write(entry(f"usr/{name}", stat.S_IFDIR | 0o755))
            output.write(entry(name, stat.S_IFLNK | 0o777, os.fsencode(f"usr/{name}")))
        for member in packed:
            # Only what was not configured still has files in /lib.
            name = re.sub(rf"^\./(?=({'|'.join(MERGED)})/)", "./usr/", member.name)
            if member.isdir():
                if member.name not in {f"./{name}" for name in MERGED}:
                    output.write(entry(name, stat.S_IFDIR | member.mode))
            elif member.isfile():
                data = content(packed, member)
                output.write(entry(name, stat.S_IFREG | member.mode, data))
            elif member.issym() or member.islnk():
                # A hard link's target is named from the root.
                target = member.linkname if member.issym() else member.linkname.lstrip(".")
                output.write(entry(name, stat.S_IFLNK | 0o777, os.fsencode(target)))
            # What is left are devices, which the kernel makes itself.

    left_out = (f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT)
    packages = ("--variant=essential", f"--include={','.join(PACKAGES)}", *left_out)
    if architecture is not AMD64:
        packages = ("--variant=extract", f"--include={','.join(UNPACKED)}")
    return made("base", (*packages, _codename(), "-"), convert, architecture)


def archive(files: Iterable[tuple[str, Path]]) -> bytes:
    """Return the archive of `files`, each with its name in the machine.

    The kernel unpacks one archive after the other: this goes behind the base.
    """
    entries = {}
    for name, file in files:
        for parent in reversed(Path(name).parents[:-1]):
            entries[str(parent)] = entry(str(parent), stat.S_IFDIR | 0o755)
        entries[name] = entry(name, file.stat().st_mode, file.read_bytes())
    return b"".join([*entries.values(), entry("TRAILER!!!", 0)])


def boot(
    kernel: Path,
    initramfs: Path,
    environment: dict[str, str],
    report: Path,
    architecture: Architecture = AMD64,
) -> str:
    """Run /init in a machine, and return what that wrote to the second serial port.

    It ends with a line `status N`, or with what QEMU and the kernel had to say.
    """
    words = [f"{name}={value}" for name, value in environment.items()]
    words += [f"KSM_TEST_REPORT=/dev/{architecture.report}"]
    append = f"rdinit=/init {' '.join(words)}"
    ended = emulate(kernel, initramfs, append, report, SECONDS, architecture=architecture)
    text = plain_text(report)
    if re.search(r"^status \d+\n\Z", text, re.MULTILINE):
        return text
    return f"{text}\nQEMU {ended}\n{plain_text(console_of(report))}\n"


def emulate(
    kernel: Path,
    initramfs: Path,
    append: str,
    report: Path,
    seconds: float,
    options: Sequence[object] = (),
    architecture: Architecture = AMD64,
) -> str:
    """Run a machine until it ends or restarts, for `seconds` at most; return how it ended.

    The second serial port is written to `report`, the console to the file beside it.
    """
    console = console_of(report)
    for output in (report, console):
        output.touch()
    # mem-merge: else QEMU opts in the guest's memory to the host's KSM, which other tests measure.
    common = (
        "-accel tcg -cpu max -smp 1 -m 2G -machine mem-merge=off -nodefaults -no-reboot"
        " -display none"
    )
    own_options = [part.format(report=report) for part in architecture.options.split()]
    append = f"console={architecture.console} quiet panic=-1 {append}"
    command: list[object] = [need_command(architecture.emulator), "-serial", f"file:{console}"]
    command += [*common.split(), *own_options, *options]
    command += ["-kernel", kernel, "-initrd", initramfs, "-append", append]
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"was stopped after {seconds:g} s"
    return f"ended with status {done.returncode}\n{os.fsdecode(done.stderr)}".strip()


def console_of(report: Path) -> Path:
    """Return the file with what was written to the console of a machine with that report."""
    return report.with_suffix(".console")


def plain_text(file: Path) -> str:
    """Return what was written to a serial port."""
    return file.read_text(errors="replace").replace("\r\n", "\n")


def made(
    name: str,
    arguments: Sequence[str],
    convert: Callable[[tarfile.TarFile, IO[bytes]], None],
    architecture: Architecture = AMD64,
    how: Sequence[str] = (),
) -> Path:
    """Return what `convert` makes of mmdebstrap's output, from the cache if it is there.

    `how` is what `convert` depends on.
    """
    if architecture is not AMD64:
        name = f"{architecture.debian}-{name}"
    recipe = hashlib.sha256("\0".join((*arguments, *how)).encode()).hexdigest()[:12]
    file = CACHE / f"{name}-{recipe}"
    if file.exists():
        return file
    need(platform.machine() == "x86_64", "the machines are of x86_64")
    command = [
        need_command("mmdebstrap"),
        "--quiet",
        f"--architectures={architecture.debian}",
        *arguments,
        _mirror(),
    ]
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    with unfinished.open("ab") as output, tempfile.TemporaryFile() as errors:
        # Who else wants it waits; then this file is what it wants.
        fcntl.flock(output, fcntl.LOCK_EX)
        if file.exists():
            return file
        output.truncate(0)
        output.seek(0)
        # In a session of its own: when it fails it sends its whole process group a SIGHUP.
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        ) as process:
            assert process.stdout is not None
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as packed:
                    convert(packed, output)
            except tarfile.ReadError:
                pass  # It has failed and says why.
            process.stdout.read()
        output.flush()
        errors.seek(0)
        reason = os.fsdecode(errors.read())
        need(process.returncode == 0, f"cannot download {name}: {reason}")
        for stale in CACHE.glob(f"{name}-*"):
            if stale != unfinished:
                stale.unlink()
        return unfinished.rename(file)


def content(packed: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = packed.extractfile(member)
    return file.read() if file else b""


def entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """Return one entry of a cpio archive (Documentation/driver-api/early-userspace)."""
    path = os.fsencode(name) + b"\0"
    # inode, mode, uid, gid, links, mtime, size, two devices, length of the path, no checksum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _codename() -> str:
    need(distro.id() == "debian", "the machines are made of this Debian's packages")
    return distro.codename()


def _mirror() -> str:
    """Return where this machine gets its own packages from."""
    wanted = ["Created-By: Packages", f"Codename: {_codename()}", "Component: main"]
    command = [need_command("apt-get"), "indextargets", "--format", "$(SITE)", *wanted]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    need(found, "APT has no package list of this release: run apt-get update")
    return found[0]
