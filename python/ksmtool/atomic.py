# SPDX-License-Identifier: MIT
"""Files that are the old or the new one at each moment, also after a loss of power."""

from __future__ import annotations

import os
from pathlib import Path


def unfinished(file: Path) -> Path:
    """Return the name under which `file` is written; what a killed run leaves has it."""
    return file.with_name(f".{file.name}.new")


def write(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Put `content` in the place of `file`, with `mode` whatever the umask, as its folders.

    Raises OSError, and the old one is there.
    """
    folders(file.parent)
    new = unfinished(file)
    try:
        with new.open("wb") as output:
            output.write(content)
            output.flush()
            os.fchmod(output.fileno(), mode)
            os.fsync(output.fileno())
        new.replace(file)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    sync(file.parent)


def sync(folder: Path) -> None:
    """Bring to the disk which files are in `folder`. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folders(folder: Path) -> None:
    """Make `folder` and those above it that are missing, for everybody to read. Raises OSError."""
    if folder.is_dir():
        return
    folders(folder.parent)
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    sync(folder.parent)
