# SPDX-License-Identifier: MIT
"""Groups of processes with one secret layout: which there are, who is in one, what that saves.

The secrets' files are written and read by ksm-wrapper alone (src/group.c); here they are listed and
removed. Modules that cost start-up time are imported where used: `ksmtool wrap` imports this.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksmtool import install
from ksmtool.errors import ExitStatus, KsmtoolError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")  # group_name_is_valid in src/group.c


@dataclass(frozen=True)
class Wanted:
    """The group that a program is to be started in."""

    name: str
    required: bool = False
    """Do not run the program where it cannot have the layout."""
    hash_seed: bool = True
    """Give it the group's hash seeds, too."""
    follow: bool = False
    """Let descendants that exec join."""

    def options(self) -> tuple[str, ...]:
        """Return the options for ksm-wrapper."""
        return (
            *("--group", self.name),
            *(["--group-required"] if self.required else []),
            *([] if self.hash_seed else ["--no-hash-seed"]),
            *(["--follow"] if self.follow else []),
        )


@dataclass(frozen=True)
class Group:
    """A group and the memory of its members, in bytes."""

    name: str
    members: int
    """Processes alive that have its layout, forked ones included."""
    unreadable: int
    """Members whose memory we may not look at; it is not in the sums below."""
    anonymous: int
    """Sum of the members' anonymous memory: what they would use if no page were shared."""
    pss_anon: int
    """Sum of their Pss_Anon: what they use."""
    saved: int
    """Memory that merging spares: the members' mappings of merged pages less one page for each page
    of memory behind them. What forks share is not in it."""
    exact: bool
    """Whether `saved` was counted page by page, as root can; else it is the most it can be."""


def require_valid(name: str) -> None:
    """Raise KsmtoolError with status 2 for what cannot be a group's name."""
    if _NAME.fullmatch(name) is None:
        raise KsmtoolError(
            f"No group can be called '{name}'.",
            "At most 64 letters, digits and . _ @ + -, the first a letter or digit.",
            ExitStatus.USAGE,
        )


def files() -> dict[str, Path]:
    """Return the file of each of this user's groups, by name. Raises KsmtoolError."""
    paths = [Path(line) for line in _ask("--groups").splitlines()]
    return {path.name: path for path in sorted(paths)}


def members(name: str) -> list[int]:
    """Return the PIDs of the processes that have the layout of the group. Raises KsmtoolError."""
    return [int(line) for line in _ask("--group", name, "--members").split()]


def measure(name: str, pids: Iterable[int]) -> Group:
    """Return the memory of the processes `pids` as that of the group; ended ones do not count."""
    from ksmtool import process  # noqa: PLC0415

    sums, unreadable = process.Memory(), 0
    readable = []
    for pid in pids:
        try:
            one = process.memory(pid)
        except PermissionError:
            unreadable += 1
            continue
        if one is not None:
            sums += one
            readable.append(pid)
    merged = process.merged(readable)
    zeros = sums.zero_pages * os.sysconf("SC_PAGE_SIZE")
    if merged is None:
        saved = min(sums.anonymous - sums.pss_anon, sums.merging_pages * os.sysconf("SC_PAGE_SIZE"))
    else:
        saved = merged
    return Group(
        name=name,
        members=sums.processes + unreadable,
        unreadable=unreadable,
        anonymous=sums.anonymous,
        pss_anon=sums.pss_anon,
        saved=max(0, saved) + zeros,
        exact=merged is not None,
    )


def listed(names: Sequence[str] = ()) -> list[Group]:
    """Return the groups so named, or all of this user's, measured. Raises KsmtoolError."""
    known = files()
    for name in names:
        require_valid(name)
        if name not in known:
            raise _unknown(name, known)
    return [measure(name, members(name)) for name in names or known]


def _unknown(name: str, known: Iterable[str]) -> KsmtoolError:
    others = ", ".join(other for other in known if other != name)
    return KsmtoolError(
        f"There is no group {name}.",
        f"Groups of this user: {others}." if others else "This user has no group.",
    )


def forget(name: str) -> int:
    """Remove the secret of the group and return how many processes keep its layout.

    Raises KsmtoolError if there is no such group, or it cannot be removed.
    """
    require_valid(name)
    known = files()
    try:
        alive = len(members(name)) if name in known else 0
        known[name].unlink()
    except (KeyError, FileNotFoundError):
        raise _unknown(name, known) from None
    except OSError as error:
        raise KsmtoolError(f"Cannot remove {known[name]}: {error.strerror}.") from error
    return alive


def discard(*names: str) -> None:
    """Remove the secrets of groups that may not be there; never fails."""
    with contextlib.suppress(KsmtoolError):
        known = files()
        for name in names:
            if name in known:
                with contextlib.suppress(OSError):
                    known[name].unlink()


def _ask(*options: str) -> str:
    import subprocess  # noqa: PLC0415

    done = subprocess.run(
        [install.wrapper(), *options],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("ksm-wrapper: ")
        message, _, hint = said.partition("\nhint: ")
        raise KsmtoolError(f"ksm-wrapper failed: {message}.", hint or None)
    return done.stdout
