# SPDX-License-Identifier: MIT
"""Where this installation's own files are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ksmtool.errors import KsmtoolError


def wrapper() -> str:
    """Return the path of ksm-wrapper, which knows where the libraries are. Raises KsmtoolError."""
    return _beside("ksm-wrapper")


def rescue() -> str:
    """Return the path of ksm-rescue, which edits /etc/ld.so.preload. Raises KsmtoolError."""
    return _beside("ksm-rescue")


def ksmtool() -> str:
    """Return the path of ksmtool itself. Raises KsmtoolError."""
    return _beside("ksmtool")


def require_trusted_ksmtool() -> None:
    """Raise KsmtoolError if others than root can change what runs as `ksmtool`: all its parts."""
    for path in (ksmtool(), os.path.dirname(__file__), sys.executable):
        require_trusted(path)


def require_trusted(path: str) -> None:
    """Raise KsmtoolError if others than root can change what root is to run at each boot.

    Also if that cannot be told.
    """
    real = Path(path).resolve()
    for part in (real, *real.parents):
        try:
            status = part.stat()
        except OSError as error:
            raise KsmtoolError(f"Cannot look at {part}: {error.strerror}.") from error
        if status.st_uid != 0 or status.st_mode & 0o022:
            raise KsmtoolError(f"{part} can be changed by others than root.", f"See: ls -ld {part}")


def _beside(name: str) -> str:
    """Programs lie beside the `ksmtool` that runs, in a venv, below ~/.local and in /usr alike.

    A package has those for root in sbin.
    """
    beside = os.path.dirname(os.path.realpath(sys.argv[0]))
    candidates = (
        beside,
        os.path.join(sys.prefix, "bin"),
        os.path.dirname(sys.executable),
        os.path.join(os.path.dirname(beside), "sbin"),
    )
    folders = dict.fromkeys(candidates)  # each once
    for folder in folders:
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK):
            return path
    raise KsmtoolError(f"{name} is not in {' or '.join(folders)}.", "Install ksm-preload again.")
