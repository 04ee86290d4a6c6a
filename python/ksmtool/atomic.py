# SPDX-License-Identifier: MIT
"""Files that are the old or the new one at each moment, also after a loss of power."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_NEW = ".{name}.{by}.new"


def unfinished(units: Path, name: str) -> Iterator[Path]:
    """Yield what killed runs left of drop-ins of that name, in the folders of all units."""
    return units.glob(f"*.d/{_NEW.format(name=name, by='*')}")


def write(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Put `content` in the place of `file`, with `mode` whatever the umask, as its folders.

    Raises OSError, and the old one is there.
    """
    folders(file.parent)
    new = file.with_name(_NEW.format(name=file.name, by=os.getpid()))
    # Others may write to the folder: what they put there is not written to, nor followed.
    new.unlink(missing_ok=True)
    try:
        with new.open("xb") as output:
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
