# SPDX-License-Identifier: MIT
"""All that `ksmtool doctor` has to know, looked up once below one root; doctor.py judges it.

A process that ends meanwhile is no error, and what could not be looked at is kept in words.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from ksmtool import boot, facts, families, kinds, ksmd, ldpreload, policy, process, program, systemd
from ksmtool import machine as machines
from ksmtool.compare import Comparison, compare
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.estimate import leader
from ksmtool.facts import MachineFacts, Pace, ProcessFacts
from ksmtool.kernel import Ksm
from ksmtool.kinds import Kinds
from ksmtool.ksmd import Change
from ksmtool.program import Program
from ksmtool.wrap import Kernel, probe

_ROOT = Path("/")
_AT_SECURE = 23  # include/uapi/linux/auxvec.h
_SLACK = 1.0
"""Seconds: btime of /proc/stat is a whole number of them."""
_TWINS = 3
"""How many processes of the same program are tried for a comparison: one may have ended."""


@dataclass(frozen=True)
class Subject:
    """A program that runs, or that is to be started: what decides whether it is opted in."""

    pid: int | None
    """None for one that is to be started."""
    name: str
    command: tuple[str, ...]
    """Its command line, () if that is not known."""
    again: str
    """That as it can be typed again; CMD if it is not what the process was started by."""
    program: Program | None
    """None if its file cannot be read."""
    path: str
    """Of the executable that runs in the end, as the policy looks at it; "" if not known."""
    verdict: policy.Verdict
    off: bool = False
    """KSM_PRELOAD=off is in its environment."""
    privileged: str = ""
    """"setuid", "setgid", "setcap", or "privileged" where only the kernel's AT_SECURE is known."""

    # Only of one that runs:
    facts: ProcessFacts | None = None
    loaded: bool = False
    """Whether it has our library."""
    before: str = ""
    """The file that opts in the machine, if the process started before it was written."""
    confinement: str = ""
    """What keeps files of the system from it: a snap, a flatpak, an AppArmor profile."""
    parent_opted_in: bool = False
    kinds: Kinds | None = None
    twin: int | None = None
    """Another process of the same program, with which `comparison` was made."""
    comparison: Comparison | None = None

    @property
    def opted_in(self) -> bool:
        """Whether KSM may merge memory of it now."""
        return self.facts is not None and bool(self.facts.memory.opted_in)

    @property
    def container(self) -> str:
        """Return its container as in cgroup.Place, "" for none."""
        return self.facts.container if self.facts else ""


@dataclass(frozen=True)
class Crowd:
    """A process and how many mappings it has."""

    pid: int
    name: str
    mappings: int


@dataclass(frozen=True)
class Checkup:
    """The machine, and the program that was asked for."""

    machine: MachineFacts
    pace: Pace
    kernel: Kernel | None
    """What it can by trial; None below another root, where nothing can be tried."""
    no_ksm: str
    """What to do on this distribution where the kernel has no KSM, "" for nothing special."""
    drift: tuple[Change, ...]
    """What is not as kernel-enable has set it, from what it is to what that says."""
    kept: bool
    """Whether `ksmtool kernel-apply` runs at boot."""
    methods: tuple[str, ...]
    """By which the machine is opted in, as files say."""
    preload: tuple[str, ...]
    """What is wrong with /etc/ld.so.preload, a sentence each."""
    rules: policy.Policy
    most_mappings: int
    """vm.max_map_count; 0 if it is not known."""
    crowd: Crowd | None
    """The opted-in process with the most mappings."""
    subject: Subject | None
    unlooked: tuple[str, ...]
    """What could not be looked at, and why, a sentence each."""


def examine(
    pid: int | None = None,
    command: Sequence[str] = (),
    root: Path = _ROOT,
    kernel: Kernel | None = None,
    seconds: float = 1.0,
    environ: Mapping[str, str] = os.environ,
) -> Checkup:
    """Look at the machine for `seconds`, and at process `pid` or the program of `command`.

    Raises KsmtoolError if there is no such process or program, or it may not be looked at.
    """
    ksm, unlooked = Ksm(root), list[str]()
    before = facts.sample(ksm)
    found = facts.gather(root)
    rules = policy.load(root)
    methods, preload = _preload(root, unlooked)
    kernel = kernel or (_tried(unlooked) if root == _ROOT else None)
    if kernel is None and root != _ROOT:
        unlooked.append("What this kernel can was not tried: it is not the one that runs.")
    if found.unreadable:
        some = "1 process" if found.unreadable == 1 else f"{found.unreadable} processes"
        unlooked.append(f"{some} may not be looked at; root may look at nearly all.")
    if found.hidden:
        unlooked.append("/proc hides the processes of others (hidepid); root sees them.")
    subject = None
    if pid is not None:
        subject = _process(pid, found, rules, methods, root, unlooked)
    elif command:
        subject = _command(command, rules, root, environ)
    state = found.setup.state
    if found.available and found.merging:
        time.sleep(max(0.0, before.at + seconds - time.monotonic()))
    return Checkup(
        machine=found,
        pace=facts.pace(before, facts.sample(ksm), found),
        kernel=kernel,
        no_ksm=families.family(root).no_ksm,
        drift=tuple(ksmd.planned(ksm, state.settings(ksm))) if state and found.available else (),
        kept=boot.installed(boot.init_system(root), root),
        methods=methods,
        preload=preload,
        rules=rules,
        most_mappings=kinds.most_mappings(root / "proc"),
        crowd=_crowd(found, root),
        subject=subject,
        unlooked=tuple(unlooked),
    )


def _tried(unlooked: list[str]) -> Kernel | None:
    try:
        return probe()
    except KsmtoolError as error:
        unlooked.append(f"What this kernel can was not tried: {error.message}")
        return None


def _preload(root: Path, unlooked: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the methods that are enabled, and what is wrong with /etc/ld.so.preload."""
    try:
        problems = tuple(ldpreload.problems(root))
    except (KsmtoolError, OSError) as error:
        unlooked.append(f"/{ldpreload.FILE} was not looked at: {error}")
        problems = ()
    try:
        return tuple(machines.enabled(root)), problems
    except (KsmtoolError, OSError):
        return (), problems


def _crowd(found: MachineFacts, root: Path) -> Crowd | None:
    counted = (
        Crowd(one.pid, one.name, kinds.mappings(one.pid, root / "proc"))
        for one in found.processes
        if one.memory.opted_in
    )
    return max(counted, key=lambda one: one.mappings, default=None)


# ---- A program that is to be started -------------------------------------------------------


def _command(
    command: Sequence[str], rules: policy.Policy, root: Path, environ: Mapping[str, str]
) -> Subject:
    search = environ.get("PATH", os.defpath)
    if root != _ROOT:
        search = os.pathsep.join(str(root / part.lstrip("/")) for part in search.split(os.pathsep))
    path = program.find(command[0], search)
    if path is None:
        raise KsmtoolError(f"There is no program {command[0]}.", "Give its path.")
    target = program.inspect(path, search)
    obstacle = _cannot_run(target, root)
    if obstacle:
        raise KsmtoolError(f"{command[0]} cannot be run: {obstacle}.")
    real = os.path.realpath(target.final.path)
    if root != _ROOT:
        real = "/" + os.path.relpath(real, os.path.realpath(root))
    return Subject(
        pid=None,
        name=command[0],
        command=tuple(command),
        again=" ".join(map(quoted, command)),
        program=target,
        path=real,
        verdict=replace(rules, off=False).verdict(real),
        off=environ.get("KSM_PRELOAD") == "off",
        privileged=target.final.privileged or "",
    )


def _cannot_run(target: Program, root: Path) -> str:
    """Return why exec would fail, as far as files say; "" if it would not."""
    path, line = target.path, b""
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no regular file"
        return f"{path} is {kind if os.path.exists(path) else 'missing'}"
    if not os.access(path, os.X_OK):
        return f"{path} is not executable"
    if target.interpreter:
        return _cannot_run(target.interpreter, root)
    if target.loader and root == _ROOT and not os.path.exists(target.loader):
        return f"its loader {target.loader} is missing"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        line = file.readline(256)
    # With -S env takes quotes apart, which is not done here.
    missing = line.startswith(b"#!") and b" -S" not in line
    return f"what the first line of {path} names is missing" if missing else ""


# ---- A process -----------------------------------------------------------------------------


def _process(
    pid: int,
    found: MachineFacts,
    rules: policy.Policy,
    methods: Sequence[str],
    root: Path,
    unlooked: list[str],
) -> Subject | None:
    """Return what is so of a process, None if it ends while it is looked at.

    Raises KsmtoolError if there is none, or it may not be looked at.
    """
    proc = root / "proc"
    asked, pid = pid, leader(pid, proc) or 0
    if not pid:
        raise KsmtoolError(f"There is no process {asked} that has memory of its own.")
    one = next((one for one in found.processes if one.pid == pid), None)
    if one is None:
        # It may have been started since all were looked at, or be another user's.
        said = f"Process {pid} may not be looked at."
        if os.geteuid() == 0:
            raise KsmtoolError(said)
        raise KsmtoolError(said, "Run it with sudo.", ExitStatus.NEEDS_ROOT)
    try:
        maps = (proc / str(pid) / "maps").read_text(errors="replace")
        sizes = kinds.of_process(pid, proc)
    except (FileNotFoundError, ProcessLookupError):
        maps, sizes = "", None
    if sizes is None:
        unlooked.append(f"Process {pid} ended while it was looked at.")
        return None
    target = _program_of(one, proc)
    words = [os.fsdecode(word) for word in process.command_line(pid, proc)]
    # What sets its title fills up what is left of the old one.
    while words and not words[-1]:
        words.pop()
    twin, comparison = _compared(one, found, proc, unlooked)
    return Subject(
        pid=pid,
        name=one.name,
        command=tuple(words),
        again=_again(words, one.executable, root),
        program=target,
        path=one.executable,
        verdict=replace(rules, off=False).verdict(one.executable),
        off=b"KSM_PRELOAD=off" in _environment(pid, proc),
        privileged=_privilege(pid, one.executable, proc),
        facts=one,
        loaded=any(f"/{name}" in maps for name in ldpreload.OURS),
        before=_before(pid, methods, root),
        confinement=_confinement(one, proc),
        parent_opted_in=any(
            other.pid == one.parent and other.memory.opted_in for other in found.processes
        ),
        kinds=sizes,
        twin=twin,
        comparison=comparison,
    )


def _program_of(one: ProcessFacts, proc: Path) -> Program | None:
    """Return what the executable is, as the process itself sees it: in its container."""
    path = f"{proc}/{one.pid}/root{one.executable}"
    return program.inspect(path) if one.executable and os.path.exists(path) else None


def _environment(pid: int, proc: Path) -> list[bytes]:
    try:
        return (proc / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _privilege(pid: int, executable: str, proc: Path) -> str:
    """Return why the loader took no LD_PRELOAD in the process, "" if it would have.

    The kernel has told the process, in its auxiliary vector; the file's mode says how it came.
    """
    try:
        vector = (proc / str(pid) / "auxv").read_bytes()
        mode = os.stat(f"{proc}/{pid}/root{executable}").st_mode
    except OSError:
        return ""
    # Two words for each entry, of the process's own size; those of 32 bits do not tell us.
    words = [struct.unpack_from("QQ", vector, at) for at in range(0, len(vector) - 15, 16)]
    if (_AT_SECURE, 1) not in words:
        return ""
    return "setuid" if mode & 0o4000 else "setgid" if mode & 0o2000 else "privileged"


def _before(pid: int, methods: Sequence[str], root: Path) -> str:
    """Return the file that opts in the machine, if it was written after the process had started."""
    started = _started(pid, root / "proc")
    paths = [ldpreload.FILE] if machines.PRELOAD in methods else []
    if machines.SYSTEMD in methods:
        paths += [one.path for one in systemd.present(root) if one.on][:1]
    for path in paths:
        with contextlib.suppress(OSError):
            if started is not None and (root / path).stat().st_mtime > started + _SLACK:
                return f"/{path}"
    return ""


def _started(pid: int, proc: Path) -> float | None:
    """Return when a process started, in seconds since 1970; None if that cannot be known."""
    try:
        fields = process.stat(pid, proc)
        lines = (proc / "stat").read_text().splitlines()
        boot_time = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    except (OSError, StopIteration):
        return None
    return boot_time + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _confinement(one: ProcessFacts, proc: Path) -> str:
    folder = proc / str(one.pid)
    profile = ""
    with contextlib.suppress(OSError):  # EINVAL without an LSM
        profile = (folder / "attr/current").read_text(errors="replace").rstrip("\0\n")
    if one.unit.startswith("snap.") or profile.startswith("snap."):
        return "a snap"
    if one.unit.startswith("app-flatpak-") or (folder / "root/.flatpak-info").exists():
        return "a flatpak"
    if profile.endswith("(enforce)"):
        return f"the AppArmor profile {profile[: -len(' (enforce)')]}"
    return ""


def _compared(
    one: ProcessFacts, found: MachineFacts, proc: Path, unlooked: list[str]
) -> tuple[int | None, Comparison | None]:
    """Compare a process with the most similar one of its program.

    That is the one of which the command line begins like its own for longest; of several, one that
    is no relative: what forked has its parent's layout.
    """
    others = [
        other
        for other in found.processes
        if other.executable == one.executable and one.executable and other.pid != one.pid
    ]
    words = process.command_line(one.pid, proc)

    def rank(other: ProcessFacts) -> tuple[int, bool]:
        theirs = process.command_line(other.pid, proc)
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, theirs)))
        relative = other.parent in (one.pid, one.parent) or other.pid == one.parent
        return -equal, relative

    others.sort(key=rank)
    for other in others[:_TWINS]:
        try:
            result = compare(one.pid, other.pid, proc=proc)
        except (KsmtoolError, OSError) as error:
            said = error.message if isinstance(error, KsmtoolError) else str(error.strerror)
            unlooked.append(f"Pages of two processes were not compared: {said}")
            return None, None
        if result is not None and result.pages:
            return other.pid, result
    return None, None


def _again(words: Sequence[str], executable: str, root: Path) -> str:
    """Return the command line as it can be typed, CMD if that would not run the executable.

    A process can write what it likes there, a shell of a login is called "-bash", and a path may
    start in another folder.
    """
    name = words[0] if words else ""
    path = name if name.startswith("/") else shutil.which(name) if "/" not in name else None
    if path and path != executable:
        path = "/" + os.path.relpath(os.path.realpath(root / path[1:]), os.path.realpath(root))
    return " ".join(map(quoted, words)) if path and path == executable else "CMD"


_ESCAPES = {"\n": "\\n", "\t": "\\t", "\\": "\\\\", "'": "\\'"}


def quoted(word: str) -> str:
    """Return a word as a shell takes it, in one line and with nothing that moves a cursor."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_escaped, word)) + "'"


def _escaped(one: str) -> str:
    if one in _ESCAPES or one.isprintable():
        return _ESCAPES.get(one, one)
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(one))
