# SPDX-License-Identifier: MIT
"""Where this installation's own files are."""

from __future__ import annotations

import os
import sys

from ksmtool.errors import KsmtoolError


def wrapper() -> str:
    """Return the path of ksm-wrapper, which knows where the libraries are.

    It lies beside the `ksmtool` that runs, in a venv, below ~/.local and in /usr alike. Raises
    KsmtoolError if it does not.
    """
    folders = (
        os.path.dirname(os.path.realpath(sys.argv[0])),
        os.path.join(sys.prefix, "bin"),
        os.path.dirname(sys.executable),
    )
    for folder in folders:
        path = os.path.join(folder, "ksm-wrapper")
        if os.access(path, os.X_OK):
            return path
    raise KsmtoolError(
        f"ksm-wrapper is not in {folders[0]} or {folders[1]}.", "Install ksm-preload again."
    )
