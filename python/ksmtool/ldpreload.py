# SPDX-License-Identifier: MIT
"""/etc/ld.so.preload: what is in it, what is wrong with it, and our entry in and out.

The file is read and written by ksm-rescue alone (src/preload_file.c has the loader's grammar): a
static program, so that what takes the entry out again does not depend on what the entry does.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ksmtool import install
from ksmtool.errors import ExitStatus, KsmtoolError

FILE = "etc/ld.so.preload"
OURS = ("libksm_preload.so", "libksm_preload_prctl.so", "libksm_preload_follow.so")


@dataclass(frozen=True)
class Entry:
    """A name that the loader takes from the file."""

    name: str
    ours: bool
    in_comment: bool
    """A person would take it for a part of a comment; the loader does not (elf/rtld.c)."""


def entries(root: Path = Path("/")) -> list[Entry]:
    """Return what the loader reads from the file, in its order. Raises KsmtoolError."""
    found = []
    # No name holds a newline; other bytes come back as they are.
    for line in _rescue(root, "--list").split(b"\n")[:-1]:
        whose, where, name = line.split(b"\t", 2)
        found.append(Entry(os.fsdecode(name), whose == b"ours", where == b"comment"))
    return found


def candidate(entry: str, root: Path = Path("/")) -> bytes:
    """Return the file as it would be with `entry` in it. Raises KsmtoolError if it cannot be."""
    return _rescue(root, "--dry-run", "--add", entry)


def content(root: Path = Path("/")) -> bytes:
    """Return the bytes of the file, none where it is missing."""
    try:
        return (root / FILE).read_bytes()
    except FileNotFoundError:
        return b""


def problems(root: Path = Path("/")) -> list[str]:
    """Return what is wrong with the file, one sentence each. Raises KsmtoolError."""
    if (root / FILE).is_symlink() or (root / FILE).is_dir():
        kind = "symlink" if (root / FILE).is_symlink() else "folder"
        return [f"/{FILE} is no regular file but a {kind}: nothing of ours goes in or out there."]
    found = entries(root)
    said = []
    ours = [entry for entry in found if entry.ours]
    if len(ours) > 1:
        names = " and ".join(entry.name for entry in ours)
        said.append(f"/{FILE} loads more than one copy of ksm-preload's library: {names}.")
    for entry in found:
        fault = _fault(entry.name, root)
        if entry.in_comment:
            said.append(
                f"The loader takes '{entry.name}' for a library though it is in a comment: behind "
                f"the first comment it reads others as names; remove the comments of /{FILE}."
            )
        elif fault:
            said.append(
                f"{entry.name} is {fault}: every program prints an error until it is taken out of "
                f"/{FILE}."
            )
    text = content(root)
    for name in OURS:
        inert = re.search(rb"^[^\n]*#[^\n]*" + re.escape(name.encode()), text, re.MULTILINE)
        if inert and not any(entry.ours and entry.in_comment for entry in found):
            said.append(
                f"A comment in /{FILE} names {name}; the loader can read a comment as a library "
                "when another comment is added: remove it."
            )
            break
    if text and not (root / FILE).stat().st_mode & 0o004:
        said.append(f"/{FILE} is readable by root only, so only root's programs heed it.")
    return said


def _fault(name: str, root: Path) -> str:
    """Return why the loader cannot load what it takes for a library, "" if it can, or who knows."""
    plain = name.replace("${LIB}", "$LIB")
    if "$" in plain.replace("$LIB", "") or ("/" in plain and not plain.startswith("/")):
        return ""
    if "$LIB" in plain:
        folders = [
            "lib",
            "lib64",
            *(f"lib/{one.name}" for one in (root / "usr/lib").glob("*-linux-*")),
        ]
        paths = [root / plain.replace("$LIB", folder).lstrip("/") for folder in folders]
    elif plain.startswith("/"):
        paths = [root / plain.lstrip("/")]
    else:
        paths = [folder / plain for folder in _folders(root)]
    faults = [_fault_of(path) for path in paths if os.path.exists(path)]
    return "" if "" in faults else (faults or ["missing"])[0]


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders in which the loader looks for bare names: ld.so(8), ld.so.conf."""
    for folder in ("lib", "lib64", "usr/lib", "usr/lib64"):
        yield root / folder
        yield from (root / folder).glob("*-linux-*")
    for file in (root / "etc/ld.so.conf", *(root / "etc/ld.so.conf.d").glob("*.conf")):
        with contextlib.suppress(OSError):
            for line in file.read_text(errors="replace").splitlines():
                yield from [root / line.strip().lstrip("/")] if line.startswith("/") else ()


def _fault_of(path: Path) -> str:
    if not path.is_file():  # opening a FIFO would wait for a writer
        return "no library"
    try:
        with path.open("rb") as file:
            head = file.read(5)
    except OSError:
        return "not to be read"
    if head[:4] != b"\x7fELF":
        return "no library"
    native = 2 if sys.maxsize >> 32 else 1
    return "" if head[4:] == bytes([native]) else "for programs of another word size"


@contextmanager
def adding(entry: str, root: Path = Path("/")) -> Iterator[str]:
    """Put `entry` into the file for as long as the body takes, and for good if it ends well.

    Yields what ksm-rescue said. It waits beside us and brings the old file back if the body
    raises, or if this process dies, even by SIGKILL. Raises KsmtoolError if it cannot be added.
    """
    with subprocess.Popen(
        [install.rescue(), "--root", str(root), "--confirm", "--add", entry],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline().decode().strip()
        try:
            if not said:
                raise _failed(process.stderr.read())
            yield said
            with contextlib.suppress(BrokenPipeError):  # it had the entry already and did not wait
                process.stdin.write(b"keep\n")
        finally:
            # Its end without that line is what makes ksm-rescue take the entry out.
            process.stdin.close()
            process.wait()
    if process.returncode != 0:
        raise KsmtoolError(f"ksm-rescue gave up on /{FILE} and brought the old one back.")


def remove(root: Path = Path("/")) -> str:
    """Take every entry of ours out and return what ksm-rescue said. Raises KsmtoolError."""
    return _rescue(root).decode().strip()


def _rescue(root: Path, *options: str) -> bytes:
    done = subprocess.run(
        [install.rescue(), "--root", str(root), *options],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    if done.returncode != 0:
        raise _failed(done.stderr)
    return done.stdout


def _failed(stderr: bytes) -> KsmtoolError:
    said = os.fsdecode(stderr).strip().removeprefix("ksm-rescue: ")
    hint = "The file is as it was."
    if "cannot be read by users" in said:
        hint = f"If users' programs are to load what is in it, too: chmod 644 /{FILE}"
    return KsmtoolError(said or "ksm-rescue failed.", hint)


# ---- The entry -----------------------------------------------------------------------------


def entry_for(library: str) -> str:
    """Return the entry by which programs of every architecture find `library` (a base name).

    The loader puts its own folder in the place of $LIB. A bare name would not do: for set-uid
    programs it is only taken from files that are set-uid themselves (elf/dl-load.c, open_path).
    Raises KsmtoolError if the library is not where a package puts it, or others may write it.
    """
    for prefix in ("/usr", "/usr/local"):
        entry = f"{prefix}/$LIB/{library}"
        path = _resolved(entry)
        if path is not None:
            install.require_trusted(str(path))
            return entry
    raise KsmtoolError(
        f"{library} is not in the system's library folder: a library below a home or a venv can be "
        f"changed or removed by others, so it must not go into /{FILE}, and with the venv would go "
        "what takes systemd's drop-ins back.",
        "Install ksm-preload's package; `ksmtool wrap` needs no installation.",
        ExitStatus.UNSUPPORTED,
    )


def _resolved(entry: str) -> Path | None:
    """Have the loader load an entry and return the file that it took."""
    done = subprocess.run(
        ["cat", "/proc/self/maps"],
        check=False,
        env={"PATH": "/usr/bin:/bin", "LD_PRELOAD": entry},
        capture_output=True,
    )
    if done.returncode < 0:
        raise KsmtoolError(
            f"With {entry} preloaded, programs die of signal {-done.returncode}.",
            "Install ksm-preload again.",
        )
    name = entry.rpartition("/")[2]
    for line in os.fsdecode(done.stdout).splitlines():
        if line.endswith(f"/{name}"):
            return Path(line[line.index("/") :])
    return None


def architectures() -> Sequence[str]:
    """Return the libc of each architecture in the loader's cache: each is a program, too."""
    for ldconfig in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        if os.access(ldconfig, os.X_OK):
            shown = subprocess.run([ldconfig, "-p"], check=False, capture_output=True, text=True)
            found = re.findall(r"^\s*libc\.so\.6 \([^)]*\) => (\S+)$", shown.stdout, re.MULTILINE)
            return [path for path in dict.fromkeys(found) if os.access(path, os.X_OK)]
    return []
