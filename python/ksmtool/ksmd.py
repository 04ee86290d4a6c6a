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

from ksmtool import atomic, boot, families, owners, profile
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE, Ksm, undisturbed

STATE = "var/lib/ksm-preload/kernel.json"


@dataclass(frozen=True)
class State:
    """What was asked for, and what was there before."""

    profile: str
    cpu: int | None
    found: Mapping[str, str]

    def settings(self, ksm: Ksm) -> dict[str, str]:
        """Return the settings that this kernel has for it, now."""
        used = ksm.ksmd_cpu_seconds() or 0.0
        return profile.settings(profile.PROFILES[self.profile], ksm.settings(), self.cpu, used)


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


def _remove_state(root: Path) -> None:
    file = root / STATE
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise KsmtoolError(f"Cannot remove /{STATE}: {error.strerror}.") from error
    with contextlib.suppress(OSError):
        file.parent.rmdir()


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
    return _changes(before, ksm.settings())


def planned(ksm: Ksm, wanted: Mapping[str, str]) -> list[Change]:
    """Return what `apply` would change."""
    found = ksm.settings()
    return _changes(found, {name: wanted.get(name, value) for name, value in found.items()})


def enable(
    name: str, cpu: int | None, ksm: Ksm, files: boot.Files | None = None
) -> tuple[list[Change], list[str]]:
    """Switch KSM on with a profile, and keep what was found before the first time.

    `files` are for the next boot. Returns the settings and the paths that changed. Raises
    KsmtoolError, and everything is as it was.
    """
    known = read_state(ksm.root)
    found = ksm.settings()
    state = State(name, cpu, known.found if known else found)
    changes = apply(ksm, state.settings(ksm))
    try:
        _write_state(state, ksm.root)
        return changes, boot.install(files, ksm.root) if files else []
    except KsmtoolError:
        with contextlib.suppress(KsmtoolError):
            ksm.apply(found)
        with contextlib.suppress(KsmtoolError, OSError):
            if known is None:
                _remove_state(ksm.root)
            else:
                _write_state(known, ksm.root)
        raise


def apply_state(ksm: Ksm) -> list[Change]:
    """Set what `enable` has kept: what runs at boot. Raises KsmtoolError if it was never called."""
    state = read_state(ksm.root)
    if state is None:
        raise KsmtoolError(
            f"There is no /{STATE}: nothing to apply.", "Run ksmtool kernel-enable first."
        )
    return apply(ksm, state.settings(ksm))


def disable(ksm: Ksm, unmerge: bool, init: str = "") -> tuple[list[Change], list[str]]:
    """Set what was found before `enable`, and let nothing of ours run at boot.

    With `unmerge`, every program gets pages of its own again, too. Returns the settings and the
    paths that changed. Raises KsmtoolError, and everything else is as it was; pages that were
    unmerged meanwhile stay so.
    """
    state = read_state(ksm.root)
    before = ksm.settings()
    if unmerge:
        _require_memory(ksm)
    try:
        if unmerge:
            ksm.write("run", 2)
            ksm.write("run", 0)
        if state is not None:
            ksm.apply(dict(state.found))
        _remove_state(ksm.root)
        gone = boot.remove(init, ksm.root)
    except KsmtoolError:
        with contextlib.suppress(KsmtoolError):
            ksm.apply(before)
        with contextlib.suppress(KsmtoolError):
            if state is not None:
                _write_state(state, ksm.root)
        raise
    after = ksm.settings()
    return _changes(before, after), gone


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    return [
        Change(name, before[name], value) for name, value in after.items() if value != before[name]
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


@dataclass(frozen=True)
class Settled:
    """What scanning as fast as it goes came to."""

    settled: bool
    """False: the time was up."""
    seconds: float
    saved: int
    """Bytes on the whole machine, less the kernel's records: general_profit."""
    cpu_seconds: float | None
    """ksmd's, None where they cannot be seen."""


def settle(ksm: Ksm, state: State, timeout: float, say: Callable[[str, float], None]) -> Settled:
    """Scan as fast as ksmd can until merging has settled, then go on at the rate of `state`.

    Settled is: two full passes in a row by each of which less than 1 % more was merged; the time
    is up after `timeout` seconds. Also if it fails or is interrupted the rate is that of `state`.
    Raises KsmtoolError.
    """
    start, cpu = time.monotonic(), ksm.ksmd_cpu_seconds()
    try:
        ksm.apply(profile.settings(profile.SETTLING, ksm.settings()))
        quiet = 0
        scans, merged = ksm.counters().full_scans, ksm.counters().merged
        while quiet < 2:
            now = ksm.counters()
            seconds = time.monotonic() - start
            say(
                f"settling: KSM saves {now.general_profit_bytes / 1e6:.0f} MB",
                min(seconds / timeout, 1),
            )
            if now.full_scans > scans:
                quiet = quiet + 1 if now.merged <= merged * 1.01 else 0
                scans, merged = now.full_scans, now.merged
            if seconds > timeout:
                break
            time.sleep(0.05)
    finally:
        with undisturbed():
            ksm.apply(state.settings(ksm))
    after = ksm.ksmd_cpu_seconds()
    return Settled(
        settled=quiet >= 2,
        seconds=time.monotonic() - start,
        saved=ksm.counters().general_profit_bytes,
        cpu_seconds=None if cpu is None or after is None else after - cpu,
    )


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
    distribution: str = ""
    """As os-release(5) has it."""
    drift: tuple[Change, ...] = ()
    """What is not as the profile has it, from what it is to what that says."""


def status(ksm: Ksm, seconds: float = 1.0) -> Status:
    """Look, for `seconds`. Raises KsmtoolError for a damaged file of ours."""
    name = families.pretty_name(ksm.root)
    if not ksm.available():
        return Status({}, False, None, None, "", False, (), in_container(ksm.root), name)
    state = read_state(ksm.root)
    drift = planned(ksm, state.settings(ksm)) if state else []
    before, start = ksm.ksmd_cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    after, took = ksm.ksmd_cpu_seconds(), time.monotonic() - start
    known = before is not None and after is not None
    init = boot.init_system(ksm.root)
    return Status(
        settings=ksm.settings(),
        merging=ksm.running(),
        cpu_percent=100 * ((after or 0) - (before or 0)) / took if known else None,
        state=state,
        boot=init,
        kept=boot.installed(init, ksm.root),
        others=tuple(owners.found(ksm.root)),
        container=in_container(ksm.root),
        distribution=name,
        drift=tuple(drift),
    )


def require_host(root: Path = Path("/")) -> None:
    """Raise KsmtoolError where there is no KSM to set: in a container, in a kernel without it."""
    if in_container(root):
        raise KsmtoolError(
            "This is a container: KSM is the host's to set, and merges over all containers.",
            "Run ksmtool kernel-enable on the host; programs in here can opt in (ksmtool wrap).",
            ExitStatus.UNSUPPORTED,
        )
    Ksm(root).require(families.family(root).no_ksm)


def require_root() -> None:
    """Raise KsmtoolError for a user."""
    if os.geteuid() != 0:
        raise KsmtoolError("Only root may set KSM.", "Run it with sudo.", ExitStatus.NEEDS_ROOT)
