# SPDX-License-Identifier: MIT
"""The whole machine: opt in every program, take that back, and see what holds.

By /etc/ld.so.preload, which every dynamic program of the GNU C library heeds, set-uid ones too; or
by systemd, which gives each service the kernel's flag and loads nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ksmtool import ldpreload, policy, process, rehearsal, systemd
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.wrap import Kernel

PRELOAD, SYSTEMD = "ld.so.preload", "systemd"
_LOCK = "/run/ksm-preload.lock"


@dataclass(frozen=True)
class Choice:
    """A method, and why it is that one."""

    method: str
    why: str


@contextmanager
def alone() -> Iterator[None]:
    """Keep other runs out, from what is tried to what is confirmed.

    Raises KsmtoolError: with status 3 for who is not root, with 1 while another one goes on.
    """
    if os.geteuid() != 0:
        raise KsmtoolError("Only root may do this.", "Run it with sudo.", ExitStatus.NEEDS_ROOT)
    # Not for users to open, who could hold it for ever.
    with open(_LOCK, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KsmtoolError("Another global-enable or global-disable is under way.") from None
        yield


def enabled(root: Path = Path("/")) -> list[str]:
    """Return the methods by which this machine is opted in, as its files say."""
    found = [PRELOAD] if any(entry.ours for entry in ldpreload.entries(root)) else []
    return found + ([SYSTEMD] if systemd.present(root) else [])


def choose(
    wanted: str, kernel: Kernel, obstacle: Callable[[], str | None], already: Sequence[str] = ()
) -> Choice:
    """Return the method to take; `wanted` is auto or one of the two.

    `obstacle` tells why systemd cannot do it. Raises KsmtoolError with status 4 where a method that
    was named, or any, cannot work here.
    """
    if not kernel.madvise and not kernel.prctl:
        raise KsmtoolError(
            "This kernel has no KSM.", "It was built without CONFIG_KSM.", ExitStatus.UNSUPPORTED
        )
    if wanted == PRELOAD:
        return Choice(PRELOAD, "as asked for")
    if wanted == "auto" and PRELOAD in already:
        return Choice(PRELOAD, "the machine is enabled by it already")
    reason = obstacle()
    if reason is None and not kernel.inherit:
        reason = "this kernel loses the flag at exec (Linux 6.7 keeps it)"
    if reason is None:
        return Choice(
            SYSTEMD, "the kernel keeps its flag over exec, so no library has to be loaded"
        )
    if wanted == SYSTEMD:
        raise KsmtoolError(
            f"Services cannot be opted in by systemd here: {reason}.",
            "--method ld.so.preload works without.",
            ExitStatus.UNSUPPORTED,
        )
    return Choice(PRELOAD, f"not systemd: {reason}")


def library(kernel: Kernel) -> str:
    """Return the base name of the library for this kernel."""
    return "libksm_preload_prctl.so" if kernel.prctl else "libksm_preload.so"


# ---- /etc/ld.so.preload --------------------------------------------------------------------


@dataclass(frozen=True)
class Rehearsal:
    """An entry that has been tried: the programs, and what came of them without it."""

    entry: str
    programs: Sequence[rehearsal.Check]
    before: Sequence[rehearsal.Outcome]


def rehearse(entry: str) -> Rehearsal:
    """Run programs with `entry` in the file, in a private mount namespace.

    Raises KsmtoolError if one no longer does the same, or the library is not loaded.
    """
    programs = rehearsal.checks(ldpreload.architectures())
    before = rehearsal.run(programs)
    candidate = ldpreload.candidate(entry)
    *after, loaded = rehearsal.under(candidate, [*programs, _loads(entry)])
    _require_the_same(programs, before, after, "Nothing was written")
    if loaded.stdout != "loaded\n":
        raise KsmtoolError(
            f"The loader did not load {entry}. Nothing was written.",
            f"The file would be: {candidate!r}",
        )
    return Rehearsal(entry, programs, before)


def _loads(entry: str) -> rehearsal.Check:
    name = entry.rpartition("/")[2]
    look = f"grep -q '/{name}$' /proc/self/maps && echo loaded"
    user = rehearsal.NOBODY if os.geteuid() == 0 else None
    return rehearsal.Check("the loader", ("/bin/sh", "-c", look), user)


def _require_the_same(
    programs: Sequence[rehearsal.Check],
    before: Sequence[rehearsal.Outcome],
    after: Sequence[rehearsal.Outcome],
    what_then: str,
) -> None:
    differences = rehearsal.differences(programs, before, after)
    if differences:
        hint = "\n      ".join(differences[1:])
        if "architecture" in differences[0]:
            hint = "Install ksm-preload's library for that architecture, too (libksm-preload:i386)."
        raise KsmtoolError(
            f"With the library in /{ldpreload.FILE}, {differences[0]} {what_then}.", hint or None
        )


def enable_by_preload(tried: Rehearsal) -> str:
    """Put the entry that was tried into the file, and try it for real; return what was done.

    Raises KsmtoolError, and the file is as it was.
    """
    entry = tried.entry
    with ldpreload.adding(entry) as said:
        after = rehearsal.run([*tried.programs, _loads(entry)])
        _require_the_same(tried.programs, tried.before, after, f"/{ldpreload.FILE} is as it was")
        if after[-1].stdout != "loaded\n":
            raise KsmtoolError(f"The loader did not load {entry}. /{ldpreload.FILE} is as it was.")
    return said


# ---- systemd -------------------------------------------------------------------------------


def drop_ins(logins: bool, root: Path = Path("/")) -> list[systemd.DropIn]:
    """Return the drop-ins that the policy asks for."""
    # The kill switch is for now, these are for good.
    rules = replace(policy.load(root), off=False)
    return systemd.wanted(
        lambda path: not rules.verdict(path).allowed, rules.default().allowed, logins, root
    )


def enable_by_systemd(wanted: Sequence[systemd.DropIn], root: Path = Path("/")) -> list[str]:
    """Write the drop-ins and have systemd read them; return the paths that changed.

    Raises KsmtoolError, and the drop-ins are as they were.
    """
    before = systemd.present(root)
    changed = systemd.write(wanted, root)
    try:
        if changed:
            systemd.reload()
    except KsmtoolError:
        systemd.write(before, root)
        raise
    return changed


def disable(root: Path = Path("/")) -> list[str]:
    """Take out what either method put in; return what was done, a sentence each."""
    said = []
    if any(entry.ours for entry in ldpreload.entries(root)):
        said.append(ldpreload.remove(root) + ".")
    removed = systemd.write([], root)
    if removed:
        systemd.reload()
        said.append(f"Removed {len(removed)} drop-ins of systemd, {removed[0]} among them.")
    return said


# ---- What holds ----------------------------------------------------------------------------


@dataclass
class Processes:
    """The processes that have memory of their own, by what KSM may do with it."""

    total: int = 0
    opted_in: int = 0
    unreadable: int = 0
    loaded: int = 0
    """Processes with our library."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> count, for those that are not opted in."""
    still: list[tuple[int, str]] = field(default_factory=list)
    """PID and program of each that is opted in or has the library, but for what started us."""


def processes(root: Path = Path("/")) -> Processes:
    """Look at every process below `root`; one that ends meanwhile is not counted."""
    rules = replace(policy.load(root), off=False)
    found = Processes()
    proc = root / "proc"
    ours = process.ancestors(os.getpid(), proc)  # dpkg, and the script that asks
    for entry in proc.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            exe = os.readlink(entry / "exe").removesuffix(" (deleted)")
            maps = (entry / "maps").read_text(errors="replace")
            opted = process.opted_in(int(entry.name), proc)
        except PermissionError:
            found.unreadable += 1
            continue
        except OSError:
            continue  # ended, or a kernel thread
        if not maps:
            continue
        found.total += 1
        loaded = any(f"/{name}" in maps for name in ldpreload.OURS)
        found.loaded += loaded
        found.opted_in += opted
        if (opted or loaded) and int(entry.name) not in ours:
            found.still.append((int(entry.name), os.path.basename(exe)))
        if not opted:
            found.left_out[_reason(exe, maps, loaded, rules)] += 1
    return found


def _reason(exe: str, maps: str, loaded: bool, rules: policy.Policy) -> str:
    if not rules.verdict(exe).allowed:
        return "left out by the policy"
    if loaded:
        return "privileged, or left out by its environment or the kill switch"
    if "/ld-linux" not in maps and "/ld-2." not in maps:
        return "static, or not of the GNU C library"
    return "started before, or not reached by the method"


@dataclass(frozen=True)
class Status:
    """What is enabled, and what that comes to: measured, not concluded from our own files."""

    methods: tuple[str, ...]
    """What our own files say."""
    entry: str | None
    entries: tuple[ldpreload.Entry, ...]
    problems: tuple[str, ...]
    loaded: bool | None
    """Whether a program that is started now gets the library; None where that is not known."""
    complaint: str
    """What the loader says on stderr when a program starts, "" for nothing."""
    drop_ins: tuple[systemd.DropIn, ...]
    killed: bool
    processes: Processes


def _drift(root: Path) -> list[str]:
    """Return a sentence if the drop-ins are not those that units and the policy now ask for."""
    there = systemd.present(root)
    if not there or os.geteuid() != 0:
        return []
    logins = any(one.on and one.unit == "user@" for one in there)
    differ = systemd.changes(drop_ins(logins, root), root)
    if not differ:
        return []
    some = ", ".join(sorted({Path(path).parent.name.removesuffix(".d") for path in differ})[:5])
    return [
        "Units or the policy have changed since `ksmtool global-enable --method systemd`; run it "
        f"again for {some}."
    ]


def _without_library(entry: str) -> list[str]:
    """Return a sentence for each architecture whose loader does not find our library."""
    libcs = ldpreload.architectures()
    outcomes = rehearsal.run(rehearsal.of_architectures(libcs))
    return [
        f"Programs for {libc} print an error when they start: ksm-preload's library for their "
        "architecture is missing (libksm-preload:i386)."
        for libc, outcome in zip(libcs, outcomes)
        if outcome.status != rehearsal.NOT_STARTED and entry in outcome.stderr
    ]


def status(root: Path = Path("/")) -> Status:
    """Measure it. Raises KsmtoolError."""
    entries = ldpreload.entries(root)
    ours = next((entry.name for entry in entries if entry.ours), None)
    outcome = rehearsal.run([_loads(ours or "/libksm_preload")])[0]
    started = outcome.status != rehearsal.NOT_STARTED
    problems = [*ldpreload.problems(root), *_drift(root)]
    if ours and ours not in outcome.stderr:  # else that is the complaint already
        problems += _without_library(ours)
    return Status(
        methods=tuple(enabled(root)),
        entry=ours,
        entries=tuple(entries),
        problems=tuple(problems),
        loaded=outcome.stdout == "loaded\n" if ours and started else None,
        complaint=" ".join(dict.fromkeys(outcome.stderr.splitlines())) if started else "",
        drop_ins=tuple(systemd.present(root)),
        killed=policy.load(root).off,
        processes=processes(root),
    )
