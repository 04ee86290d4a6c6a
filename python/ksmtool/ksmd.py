# SPDX-License-Identifier: MIT
"""KSM on, tuned and kept on over reboots; and back to what was found.

What is set is kept in a file of ours with the values that were there before: only what we switched
on is switched off.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ksmtool import boot, families, owners, profile, state
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE, Ksm, undisturbed
from ksmtool.state import State


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


@contextmanager
def _all_back(ksm: Ksm) -> Iterator[None]:
    """Set all that profiles set to what it was, if what is done inside fails in any way."""
    before = state.found(ksm)
    try:
        yield
    except BaseException as error:
        try:
            ksm.apply(before)
        except KsmtoolError as second:
            raise KsmtoolError(
                f"{error} And it could not be put back: {second.message}", second.hint
            ) from error
        raise


def apply(ksm: Ksm, wanted: Mapping[str, str]) -> list[Change]:
    """Write the settings in the only order that the kernel takes, and read each back.

    Returns what changed. Raises KsmtoolError, and what had changed is as it was.
    """
    before = ksm.settings()
    with _all_back(ksm):
        ksm.apply(dict(wanted))
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
    known = state.read(ksm.root)
    kept = State(name, cpu, known.found if known else state.found(ksm))
    with _all_back(ksm):
        # Before anything is set: after a loss of power it is known what was found.
        state.write(kept, ksm.root)
        try:
            changes = apply(ksm, kept.settings(ksm))
            return changes, boot.install(files, ksm.root) if files else []
        except BaseException:
            if known is None:
                state.remove(ksm.root)
            else:
                state.write(known, ksm.root)
            raise


def apply_state(ksm: Ksm) -> list[Change]:
    """Set what `enable` has kept: what runs at boot. Raises KsmtoolError if it was never called."""
    kept = state.read(ksm.root)
    if kept is None:
        raise KsmtoolError(
            f"There is no /{state.FILE}: nothing to apply.", "Run ksmtool kernel-enable first."
        )
    return apply(ksm, kept.settings(ksm))


def disable(
    known: State | None, unmerge: bool, ksm: Ksm, init: str = ""
) -> tuple[list[Change], list[str]]:
    """Set what was found before `enable`, and let nothing of ours run at boot.

    With `unmerge`, every program gets pages of its own again, too. Where there is no KSM to set,
    only our files are removed. Returns the settings and the paths that changed. Raises
    KsmtoolError, and all is as it was, but for pages that were unmerged.
    """
    here = ksm.available() and not in_container(ksm.root)
    before = ksm.settings() if here else {}
    if unmerge and here:
        _require_memory(ksm)
    with _all_back(ksm) if here else nullcontext():
        if unmerge and here:
            ksm.write("run", 2)
            ksm.write("run", 0)
        if known is not None and here:
            ksm.apply(dict(known.found))
        # What was found is forgotten last.
        with boot.removed(init, ksm.root) as gone:
            forgotten = state.remove(ksm.root)
    changes = _changes(before, ksm.settings()) if here else []
    return changes, [*gone, *([state.FILE] if forgotten else [])]


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    return [
        Change(name, before[name], value) for name, value in after.items() if value != before[name]
    ]


def _require_memory(ksm: Ksm) -> None:
    """Unmerging takes what was saved; without it, programs are killed (mm/ksm.c, run_store)."""
    needed = ksm.counters().merged * PAGE_SIZE
    try:
        text = (ksm.root / "proc/meminfo").read_text()
    except OSError as error:
        raise KsmtoolError(f"Cannot tell how much memory is free: {error}.") from error
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

    end: str
    """"settled"; "idle", since nothing is opted in; "late", since the time was up."""
    seconds: float
    saved: int
    """Bytes on the whole machine, less the kernel's records: general_profit."""
    cpu_seconds: float | None
    """ksmd's, None where they cannot be seen."""


def settle(ksm: Ksm, kept: State, timeout: float, say: Callable[[str, float], None]) -> Settled:
    """Scan as fast as ksmd can until merging has settled, then go on at the rate of `kept`.

    Settled is: a pass by which less than 1 % more was merged, from the third on, since a page is
    merged the second time that it is looked at; the time is up after `timeout` seconds. Also if it
    fails or is interrupted the rate is that of `kept`.
    Raises KsmtoolError.
    """
    start, cpu = time.monotonic(), ksm.ksmd_cpu_seconds()
    try:
        ksm.apply(profile.settling(ksm.settings()))
        end = _wait_for_quiet(ksm, start, timeout, say)
    finally:
        with undisturbed():
            wanted = kept.settings(ksm)
            if not ksm.running():
                del wanted["run"]  # somebody has switched it off meanwhile
            ksm.apply(wanted)
    after = ksm.ksmd_cpu_seconds()
    return Settled(
        end=end,
        seconds=time.monotonic() - start,
        saved=ksm.counters().general_profit_bytes,
        cpu_seconds=None if cpu is None or after is None else after - cpu,
    )


_IDLE_SECONDS = 3.0
"""ksmd that has not worked for so long has nothing to look at."""


def _wait_for_quiet(
    ksm: Ksm, start: float, timeout: float, say: Callable[[str, float], None]
) -> str:
    passes = 0
    scans, merged = ksm.counters().full_scans, ksm.counters().merged
    worked, cpu = start, ksm.ksmd_cpu_seconds()
    while True:
        counters, now, used = ksm.counters(), time.monotonic(), ksm.ksmd_cpu_seconds()
        if not ksm.running():
            raise KsmtoolError("Something else has switched KSM off.", "See ksmtool kernel-status.")
        saved = counters.general_profit_bytes / 1e6
        say(f"settling: KSM saves {saved:.0f} MB", min((now - start) / timeout, 1))
        if counters.full_scans > scans:
            passes += counters.full_scans - scans
            if passes >= 3 and counters.merged <= merged * 1.01:
                return "settled"
            scans, merged = counters.full_scans, counters.merged
        if used is None or cpu is None or used - cpu > 0.01:
            worked, cpu = now, used
        if now - worked > _IDLE_SECONDS:
            return "idle"
        if now - start > timeout:
            return "late"
        time.sleep(0.05)


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
    kept = state.read(ksm.root)
    drift = planned(ksm, kept.settings(ksm)) if kept else []
    before, start = ksm.ksmd_cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    after, took = ksm.ksmd_cpu_seconds(), time.monotonic() - start
    known = before is not None and after is not None
    init = boot.init_system(ksm.root)
    return Status(
        settings=ksm.settings(),
        merging=ksm.running(),
        cpu_percent=100 * ((after or 0) - (before or 0)) / took if known else None,
        state=kept,
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
