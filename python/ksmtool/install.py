# SPDX-License-Identifier: MIT
"""Where this installation's own files are."""

from __future__ import annotations

import os
import sys

from ksmtool.errors import KsmtoolError


def wrapper() -> str:
    """Return the path of ksm-wrapper, which knows where the libraries are. Raises KsmtoolError."""
    return _beside("ksm-wrapper")


def rescue() -> str:
    """Return the path of ksm-rescue, which edits /etc/ld.so.preload. Raises KsmtoolError."""
    return _beside("ksm-rescue")


def _beside(name: str) -> str:
    """Programs lie beside the `ksmtool` that runs, in a venv, below ~/.local and in /usr alike.

    A package has those for root in sbin.
    """
    folders = (
        os.path.dirname(os.path.realpath(sys.argv[0])),
        os.path.join(sys.prefix, "bin"),
        os.path.dirname(sys.executable),
    )
    for folder in (*folders, os.path.join(os.path.dirname(folders[0]), "sbin")):
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK):
            return path
    raise KsmtoolError(
        f"{name} is not in {folders[0]} or {folders[1]}.", "Install ksm-preload again."
    )
