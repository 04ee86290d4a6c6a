# SPDX-License-Identifier: MIT
"""What kernel-enable was asked for and what it found, kept in a file until that is undone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmtool import atomic, profile
from ksmtool.errors import KsmtoolError
from ksmtool.kernel import Ksm

FILE = "var/lib/ksm-preload/kernel.json"
_SCHEMA = 1


@dataclass(frozen=True)
class State:
    """A profile, and what was found before it was set the first time."""

    profile: str
    cpu: int | None
    """Percent of one CPU, if not the profile's own limit."""
    found: Mapping[str, str]
    """Only of the settings that profiles set: no others are ever put back."""

    def settings(self, ksm: Ksm) -> dict[str, str]:
        """Return the settings that this kernel has for it, now."""
        used = ksm.ksmd_cpu_seconds() or 0.0
        return profile.settings(profile.PROFILES[self.profile], ksm.settings(), self.cpu, used)

    def advised(self, ksm: Ksm) -> bool:
        """Whether the kernel's advisor chooses the rate, wherever it could."""
        found = ksm.settings()
        return found.get("advisor_mode") == "scan-time" or not profile.advisable(found, self.limit)

    @property
    def limit(self) -> int:
        """The limit that holds, in percent of one CPU."""
        return profile.PROFILES[self.profile].cpu if self.cpu is None else self.cpu


def found(ksm: Ksm) -> dict[str, str]:
    """Return what is to be put back one day.

    A `run` of 2 is what unmerged everything once, and 4 is added while memory is taken out: to set
    it again would do that again, so it is 0.
    """
    settings = {name: value for name, value in ksm.settings().items() if name in profile.SETS}
    return {**settings, "run": "1" if ksm.running() else "0"}


def read(root: Path = Path("/")) -> State | None:
    """Return what was asked for, None if nothing was. Raises KsmtoolError for a damaged file."""
    try:
        content = (root / FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise KsmtoolError(f"Cannot read /{FILE}: {error.strerror}.") from error
    try:
        return _parse(json.loads(content.decode()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KsmtoolError(
            f"/{FILE} is damaged: what was set before is not known any more.",
            "ksmtool kernel-disable sets the kernel's defaults; then enable again.",
        ) from error


def _parse(document: Mapping[str, object]) -> State:
    name, cpu, settings = document["profile"], document["cpu"], document["found"]
    limited = isinstance(cpu, int) and not isinstance(cpu, bool) and 1 <= cpu <= 100
    if document["schema"] != _SCHEMA or name not in profile.PROFILES:
        raise ValueError(document)
    if not isinstance(settings, dict) or not (cpu is None or limited):
        raise ValueError(document)
    kept = {str(setting): str(value) for setting, value in settings.items()}
    return State(str(name), cpu if isinstance(cpu, int) else None, kept)


def write(state: State, root: Path = Path("/")) -> None:
    """Keep it. Raises KsmtoolError, and the one before is there."""
    shape = {**vars(state), "schema": _SCHEMA}
    try:
        atomic.write(root / FILE, (json.dumps(shape, indent=2) + "\n").encode())
    except OSError as error:
        raise KsmtoolError(f"Cannot write /{FILE}: {error.strerror}.") from error


def remove(root: Path = Path("/")) -> bool:
    """Forget it; return whether it was there. Raises KsmtoolError."""
    file = root / FILE
    try:
        file.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise KsmtoolError(f"Cannot remove /{FILE}: {error.strerror}.") from error
    with contextlib.suppress(OSError):
        file.parent.rmdir()
    return True
