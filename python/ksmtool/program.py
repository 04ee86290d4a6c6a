# SPDX-License-Identifier: MIT
"""What a program is, as far as preloading cares: read from its file, nothing is run.

The ELF headers are read here and not by a library because `ksmtool wrap` does it at each start:
importing pyelftools costs 15 ms there, a third of the whole command (measured).
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass

_MACHINES = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_MACHINE_OF_UNAME = {"i586": "i386", "i686": "i386", "armv7l": "arm", "riscv64": "riscv"}
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_SONAME = 1, 5, 14
_SANITIZERS = ("libasan.so", "libclang_rt.asan", "libtsan.so", "libhwasan.so")
_MOST_INTERPRETERS = 5  # fs/exec.c, exec_binprm(): more levels of #! are ELOOP


@dataclass(frozen=True)
class Program:
    """An executable file and what its headers say."""

    path: str
    interpreter: Program | None = None
    """For a script: the program that its #! line starts; everything below is then empty."""
    machine: str = ""
    """Architecture as `uname -m` says it, with i386 for all 32-bit x86; "" if not ELF."""
    loader: str | None = None
    """Path of the dynamic loader; None for a static program."""
    sanitizer: str | None = None
    """Name of the sanitizer's run-time library it is linked to, which wants to be loaded first."""
    library: bool = False
    """Whether it has a DT_SONAME: a loader that is called by hand."""
    privileged: str | None = None
    """"setuid", "setgid" or "setcap" if it gains privileges here: the loader drops LD_PRELOAD."""

    @property
    def final(self) -> Program:
        """The program that the kernel starts in the end."""
        return self.interpreter.final if self.interpreter else self

    @property
    def static(self) -> bool:
        """Whether it is an ELF program without a dynamic loader: nothing can be preloaded."""
        return bool(self.machine) and self.loader is None

    @property
    def alone(self) -> bool:
        """Whether it loads no library whatever its environment says."""
        return self.static and not self.library

    @property
    def musl(self) -> bool:
        """Whether its loader is musl's, which our glibc-linked library does not fit."""
        return self.loader is not None and "ld-musl" in self.loader

    @property
    def foreign(self) -> bool:
        """Whether it is of another architecture than this machine's native one."""
        native = os.uname().machine
        return bool(self.machine) and self.machine != _MACHINE_OF_UNAME.get(native, native)

    def describe(self) -> str:
        """Return one line for people."""
        if self.interpreter:
            return f"{self.path}, a script for {self.interpreter.describe()}"
        if not self.machine:
            return f"{self.path}, of a format that the kernel has to know"
        words = ["static" if self.static else "dynamic"]
        if self.loader:
            words.append("musl" if self.musl else "glibc")
        words.append(self.machine)
        words.extend(word for word in (self.privileged, self.sanitizer) if word)
        return f"{self.path} ({', '.join(words)})"


def find(command: str, path: str | None = None) -> str | None:
    """Return the file that execvp(3) would run for `command`, None if there is none."""
    if "/" in command:
        return command if os.path.exists(command) else None
    for folder in (path if path is not None else os.defpath).split(os.pathsep):
        candidate = os.path.join(folder or ".", command)
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    return None


def inspect(path: str, search: str | None = None, _depth: int = 0) -> Program:
    """Return what the file at `path` is; `search` is the PATH for `#!/usr/bin/env NAME`.

    An unreadable file is described as far as possible: exec will say what is wrong with it.
    """
    privileged = _privileges(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for a writer
            return Program(path)
        with open(path, "rb") as file:
            head = file.read(4096)
            if head.startswith(b"\x7fELF"):
                return _read_elf(path, head, privileged)
    except (OSError, struct.error, IndexError, ValueError):
        return Program(path, privileged=privileged)
    words = [os.fsdecode(word) for word in head[2:].split(b"\n", 1)[0].split()]
    if not head.startswith(b"#!") or not words or _depth == _MOST_INTERPRETERS:
        return Program(path)
    name: str | None = words[0]
    if os.path.basename(words[0]) == "env":
        # What env will run: the first word that is neither an option nor a variable.
        rest = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
        name = find(rest[0], search) if rest else None
    return Program(path, interpreter=inspect(name, search, _depth + 1) if name else None)


def _privileges(path: str) -> str | None:
    """Which privilege exec would add: only a real gain makes AT_SECURE (security/commoncap.c)."""
    try:
        info = os.stat(path)
        if info.st_mode & stat.S_ISUID and info.st_uid != os.getuid():
            return "setuid"
        if info.st_mode & stat.S_ISGID and info.st_gid != os.getgid():
            return "setgid"
        if os.getuid() != 0 and os.getxattr(path, "security.capability"):
            return "setcap"
    except OSError:
        pass
    return None


def _read_elf(path: str, head: bytes, privileged: str | None) -> Program:
    """Read the program headers and the dynamic section (System V ABI, chapters 4 and 5)."""
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    machine = struct.unpack_from(order + "H", head, 18)[0]
    if wide:
        offset, (size, count) = (
            struct.unpack_from(order + "Q", head, 32)[0],
            struct.unpack_from(order + "HH", head, 54),
        )
    else:
        offset, (size, count) = (
            struct.unpack_from(order + "I", head, 28)[0],
            struct.unpack_from(order + "HH", head, 42),
        )
    loader = None
    dynamic = None
    loads = []
    with open(path, "rb") as file:
        file.seek(offset)
        table = file.read(
            size * count
        )  # two 16-bit numbers: 4 GB at most, and no more than is there
        for at in range(0, size * count, size):
            if wide:
                kind, _, start, address, _, length = struct.unpack_from(order + "IIQQQQ", table, at)
            else:
                kind, start, address, _, length = struct.unpack_from(order + "IIIII", table, at)
            if kind == _PT_INTERP:
                file.seek(start)
                loader = os.fsdecode(file.read(min(length, 4096)).rstrip(b"\0"))
            elif kind == _PT_DYNAMIC:
                dynamic = (start, min(length, 1 << 16) & ~15)
            elif kind == _PT_LOAD:
                loads.append((address, start, length))
        needed: list[str] = []
        library = False
        if dynamic:
            file.seek(dynamic[0])
            entries = list(
                struct.iter_unpack(order + ("qQ" if wide else "iI"), file.read(dynamic[1]))
            )
            library = any(tag == _DT_SONAME for tag, _ in entries)
            strings = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
            strings = next(
                (s + strings - a for a, s, length in loads if a <= strings < a + length), 0
            )
            for tag, value in entries:
                if tag == _DT_NEEDED:
                    file.seek(strings + value)
                    needed.append(os.fsdecode(file.read(256).split(b"\0", 1)[0]))
    sanitizer = next((name for name in needed if name.startswith(_SANITIZERS)), None)
    return Program(
        path,
        machine=_MACHINES.get(machine, f"machine {machine}"),
        loader=loader,
        sanitizer=sanitizer,
        library=library,
        privileged=privileged,
    )
