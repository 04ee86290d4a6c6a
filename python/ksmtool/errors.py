# SPDX-License-Identifier: MIT
"""The one error users see, and the exit statuses."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """What ksmtool exits with; `wrap` exits with the program's own status."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NEEDS_ROOT = 3
    UNSUPPORTED = 4
    CANNOT_EXEC = 126
    NOT_FOUND = 127
    INTERRUPTED = 130


class KsmtoolError(Exception):
    """One sentence for the user, a hint what to do next, and the exit status."""

    def __init__(
        self, message: str, hint: str | None = None, status: ExitStatus = ExitStatus.FAILED
    ) -> None:
        """Keep message, hint and status for the one place that prints them."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = status
