# SPDX-License-Identifier: MIT
"""KSM on, tuned and kept on over reboots; and back to what was found.

What is set is kept in a file of ours with the values that were there before: only what we switched
on is switched off.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ksmtool import atomic, boot, owners, profile
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE, Ksm

STATE = "var/lib/ksm-preload/kernel.json"


@dataclass(frozen=True)
class State:
    """What was asked for, and what was there before."""

    profile: str
    cpu: int | None
    found: Mapping[str, str]


def read_state(root: Path = Path("/")) -> State | None:
    """Return what was asked for, None if nothing was. Raises KsmtoolError for a damaged file."""
    try:
        text = (root / STATE).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        read = json.loads(text)
        found = {str(name): str(value) for name, value in read["found"].items()}
        state = State(str(read["profile"]), read["cpu"], found)
        if state.profile not in profile.PROFILES or not isinstance(state.cpu, (int, type(None))):
            raise ValueError(state.profile)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KsmtoolError(
            f"/{STATE} is damaged.", "Remove it, and run ksmtool kernel-enable again."
        ) from error
    return state


def _write_state(state: State, root: Path) -> None:
    file = root / STATE
    shape = {"schema": 1, "profile": state.profile, "cpu": state.cpu, "found": dict(state.found)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, (json.dumps(shape, indent=2) + "\n").encode())
    except OSError as error:
        raise KsmtoolError(f"Cannot write /{STATE}: {error.strerror}.") from error


def in_container(root: Path = Path("/")) -> bool:
    """Whether this is a container, whose KSM is the host's (signs of systemd, Podman, Docker).

    The signs can be left over in a machine made of a container's image; what is in the kernel's
    first PID namespace is none, whatever lies about (include/linux/proc_ns.h, PROC_PID_INIT_INO).
    """
    with contextlib.suppress(OSError):
        if os.readlink(root / "proc/self/ns/pid") == f"pid:[{0xEFFFFFFC}]":
            return False
    if (root / "run/systemd/container").exists() or (root / "run/.containerenv").exists():
        return True
    if (root / ".dockerenv").exists():
        return True
    try:
        return b"\0container=" in b"\0" + (root / "proc/1/environ").read_bytes()
    except OSError:
        return False


def require_ours(root: Path = Path("/")) -> list[owners.Owner]:
    """Return who else sets KSM at boot. Raises KsmtoolError if somebody does so all the time."""
    found = owners.found(root)
    for owner in found:
        if owner.conflict:
            raise KsmtoolError(
                f"{owner.name} has KSM: it {owner.does}.", "\n  or: ".join(owner.choices)
            )
    return found


@dataclass(frozen=True)
class Change:
    """A setting, from what to what."""

    name: str
    old: str
    new: str


def apply(ksm: Ksm, wanted: Mapping[str, str]) -> list[Change]:
    """Write the settings in the only order that the kernel takes, and read each back.

    Returns what changed. Raises KsmtoolError, and what had changed is as it was.
    """
    before = ksm.settings()
    try:
        ksm.apply(dict(wanted))
    except KsmtoolError:
        with contextlib.suppress(KsmtoolError):
            ksm.apply(before)
        raise
    after = ksm.settings()
    return [
        Change(name, before[name], value) for name, value in after.items() if value != before[name]
    ]


def planned(ksm: Ksm, wanted: Mapping[str, str]) -> list[Change]:
    """Return what `apply` would change."""
    found = ksm.settings()
    return [
        Change(name, found[name], wanted[name])
        for name in found
        if name in wanted and wanted[name] != found[name]
    ]


def enable(
    name: str, cpu: int | None, ksm: Ksm, files: boot.Files | None = None
) -> tuple[list[Change], list[str]]:
    """Switch KSM on with a profile, and keep what was found before the first time.

    `files` are for the next boot. Returns the settings and the paths that changed. Raises
    KsmtoolError, and everything is as it was.
    """
    ksm.require()
    known = read_state(ksm.root)
    found = ksm.settings()
    changes = apply(ksm, profile.settings(profile.PROFILES[name], found, cpu))
    try:
        _write_state(State(name, cpu, known.found if known else found), ksm.root)
        return changes, boot.install(files, ksm.root) if files else []
    except KsmtoolError:
        with contextlib.suppress(KsmtoolError):
            ksm.apply(found)
        with contextlib.suppress(KsmtoolError, OSError):
            if known is None:
                (ksm.root / STATE).unlink(missing_ok=True)
            else:
                _write_state(known, ksm.root)
        raise


def apply_state(ksm: Ksm) -> list[Change]:
    """Set what `enable` has kept: what runs at boot. Raises KsmtoolError if it was never called."""
    ksm.require()
    state = read_state(ksm.root)
    if state is None:
        raise KsmtoolError(
            f"There is no /{STATE}: nothing to apply.", "Run ksmtool kernel-enable first."
        )
    wanted = profile.settings(profile.PROFILES[state.profile], ksm.settings(), state.cpu)
    return apply(ksm, wanted)


def disable(ksm: Ksm, unmerge: bool) -> list[Change]:
    """Set what was found before `enable`; with `unmerge`, also give every program its own pages.

    Raises KsmtoolError if there is not enough memory for that.
    """
    ksm.require()
    state = read_state(ksm.root)
    before = ksm.settings()
    if unmerge:
        _require_memory(ksm)
        ksm.write("run", 2)
    if state is not None:
        ksm.apply(dict(state.found))
    elif unmerge:
        ksm.write("run", 0)
    with contextlib.suppress(FileNotFoundError):
        (ksm.root / STATE).unlink()
    after = ksm.settings()
    return [
        Change(name, before[name], after[name]) for name in after if after[name] != before[name]
    ]


def _require_memory(ksm: Ksm) -> None:
    """Unmerging takes what was saved; without it, programs are killed (mm/ksm.c, run_store)."""
    needed = ksm.counters().merged * PAGE_SIZE
    text = (ksm.root / "proc/meminfo").read_text()
    fields = dict(line.split(":") for line in text.splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if needed > available * 0.9:
        raise KsmtoolError(
            f"Unmerging needs {needed / 1e6:.0f} MB, and {available / 1e6:.0f} MB are available.",
            "End programs first, or leave the pages merged.",
        )


def settle(ksm: Ksm, timeout: float, say: Callable[[str, float], None]) -> float:
    """Scan as fast as ksmd can until merging has settled, then go back to the rate found.

    Settled is: two full passes in a row by each of which less than 1 % more was merged. Returns
    the seconds it took. Raises KsmtoolError with everything as it was.
    """
    ksm.require()
    found = ksm.settings()
    start = time.monotonic()
    try:
        ksm.apply(profile.settings(profile.SETTLING, found))
        quiet = 0
        scans, merged = ksm.counters().full_scans, ksm.counters().merged
        while quiet < 2:
            now = ksm.counters()
            seconds = time.monotonic() - start
            say(
                f"settling: {now.merged * PAGE_SIZE / 1e6:.0f} MB merged", min(seconds / timeout, 1)
            )
            if now.full_scans > scans:
                quiet = quiet + 1 if now.merged <= merged * 1.01 else 0
                scans, merged = now.full_scans, now.merged
            if seconds > timeout:
                break
            time.sleep(0.05)
    finally:
        ksm.apply(found)
    return time.monotonic() - start


@dataclass(frozen=True)
class Status:
    """How KSM is set, by whom, and what it does."""

    settings: Mapping[str, str]
    """None of them where the kernel has no KSM."""
    merging: bool
    cpu_percent: float | None
    """ksmd's, of one CPU, over a second; None where it cannot be seen."""
    state: State | None
    boot: str
    """The init system, "" if it is not known."""
    kept: bool
    """Whether it will be set so at boot."""
    others: tuple[owners.Owner, ...]
    container: bool


def status(ksm: Ksm, seconds: float = 1.0) -> Status:
    """Look, for `seconds`. Raises KsmtoolError for a damaged file of ours."""
    if not ksm.available():
        return Status({}, False, None, None, "", False, (), in_container(ksm.root))
    before, start = ksm.ksmd_cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    after, took = ksm.ksmd_cpu_seconds(), time.monotonic() - start
    known = before is not None and after is not None
    init = boot.init_system(ksm.root)
    return Status(
        settings=ksm.settings(),
        merging=ksm.running(),
        cpu_percent=100 * ((after or 0) - (before or 0)) / took if known else None,
        state=read_state(ksm.root),
        boot=init,
        kept=boot.installed(init, ksm.root),
        others=tuple(owners.found(ksm.root)),
        container=in_container(ksm.root),
    )


def require_root_and_host(root: Path = Path("/")) -> None:
    """Raise KsmtoolError where KSM cannot be set from: by a user, in a container."""
    if os.geteuid() != 0:
        raise KsmtoolError("Only root may set KSM.", "Run it with sudo.", ExitStatus.NEEDS_ROOT)
    if in_container(root):
        raise KsmtoolError(
            "This is a container: KSM is the host's to set, and merges over all containers.",
            "Run ksmtool kernel-enable on the host; programs in here can opt in (ksmtool wrap).",
            ExitStatus.UNSUPPORTED,
        )
