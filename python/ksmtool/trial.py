# SPDX-License-Identifier: MIT
"""`ksmtool try`: run N copies of a command in several ways and measure what KSM saved and cost.

A trial runs one arm after the other, never two at once: each is started, left to get ready, merged
until that settles, driven, measured, and ended to the last process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from ksmtool import group, install, process, program
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import PAGE_SIZE, RECORD_BYTES, Ksm, ended_as_interrupted, undisturbed
from ksmtool.process import Memory
from ksmtool.wrap import plan_for, show

POLL_SECONDS = 0.1
STOP_SECONDS = 10.0
DAEMON_SECONDS = 0.5
SWEEP_SECONDS = 10.0

# A page merges only after two passes with an equal checksum, and with smart_scan (Linux 6.7) one
# that did not merge is passed over for a while: so whole passes are counted, and three compared.
SETTLED_PASSES = 4
SETTLED_WINDOW = 3
SETTLED_CHANGE = 0.01

_PR_SET_CHILD_SUBREAPER = 36

Say = Callable[[str, float], None]
"""Told what goes on and how much of it is done, 0 to 1."""


def _silent(_text: str, _done: float) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Arm:
    """One way to run the command."""

    name: str
    prefix: tuple[str, ...] = ()
    """Words put before the command."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables set for the copies."""
    group: str | None = None
    """The group whose layout the copies get; its secret is removed when they have ended."""


def plain_arm() -> Arm:
    """Return the arm without us, also where a shim is preloaded by ld.so.preload or a parent."""
    return Arm("plain", env={"KSM_PRELOAD": "off"})


def wrap_arm(command: Sequence[str]) -> Arm:
    """Return the arm that starts `command` as `ksmtool wrap` would."""
    environ = {name: text for name, text in os.environ.items() if name != "KSM_PRELOAD"}
    _, plan = plan_for(command, environ=environ)
    prefix = () if plan.alone else (install.wrapper(), *plan.options, "--")
    return Arm("wrap", prefix=prefix, env={"KSM_PRELOAD": ""})


def group_arm(command: Sequence[str], follow: bool = False) -> Arm:
    """Return the arm that starts `command` as `ksmtool wrap --group` would, in a group of its own.

    With `follow` what the copies exec joins too. Raises KsmtoolError with status 4 if the program
    cannot have a layout.
    """
    environ = {name: text for name, text in os.environ.items() if name != "KSM_PRELOAD"}
    name = f"try-{os.getpid()}"
    wanted = group.Wanted(name, required=True, follow=follow)
    target, plan = plan_for(command, environ=environ, wanted=wanted)
    reason = ""
    if target is not None:
        shown = show(plan.options, command, environ)
        reason = shown.fault or shown.obstacle
        group.discard(name)  # to be asked draws it
    if reason:
        raise KsmtoolError(
            f"{command[0]} cannot have the layout of a group: {reason}.",
            "Leave the arm group away.",
            ExitStatus.UNSUPPORTED,
        )
    prefix = (install.wrapper(), *plan.options, "--")
    return Arm("group", prefix=prefix, env={"KSM_PRELOAD": ""}, group=name)


def arms_named(names: Sequence[str], command: Sequence[str], follow: bool = False) -> list[Arm]:
    """Return the arms so named, in that order; `follow` is for the arm group.

    Raises KsmtoolError with status 2 for one unknown or twice, and with status 4 for the arm group
    of a program that cannot have a layout.
    """
    known: dict[str, Callable[[], Arm]] = {
        "plain": plain_arm,
        "wrap": lambda: wrap_arm(command),
        "group": lambda: group_arm(command, follow),
    }
    for name in names:
        if name not in known or names.count(name) > 1:
            raise KsmtoolError(
                f"No arm '{name}'." if name not in known else f"Arm '{name}' is named twice.",
                f"Arms are: {', '.join(known)}.",
                ExitStatus.USAGE,
            )
    return [known[name]() for name in names]


@dataclass(frozen=True)
class Options:
    """How to run a trial; times are in seconds."""

    copies: int = 10
    ready_file: str | None = None
    """`{i}` is the number of the copy, 1 to copies; ready when the file exists."""
    ready_port: str | None = None
    """A TCP port of 127.0.0.1, or BASE+{i}."""
    timeout: float = 120.0
    """For each arm: until ready, and again until settled."""
    pages_to_scan: int = 5000
    sleep_millisecs: int = 20
    """ksmd's rate, used only if it is off."""
    drive: str | None = None
    """Shell command run when merging has settled; measured at its end."""


@dataclass(frozen=True)
class ArmResult:
    """What was measured of one arm. Sizes are bytes, counts of pages say so."""

    name: str
    memory: Memory
    anon_huge_before: int
    """Huge pages when the copies were ready, before ksmd ran."""
    deduplicated_pages: int
    unique_pages: int
    volatile_pages: int
    zero_pages: int
    """The four of them are the growth of the kernel's machine-wide counters over the arm."""
    profit: int
    """Growth of general_profit: pages not needed less ksmd's own records."""
    ksmd_cpu_seconds: float | None
    passes: int
    settled: bool
    opted_in: bool
    members: int | None = None
    """Processes that have the layout of the arm's group; None without one."""
    others_opted_in: int = 0
    """Opted-in processes that are not of this trial: counters and ksmd's CPU are theirs too."""
    drive_status: int | None = None
    saved: int | None = None
    """Anonymous memory of the plain arm less that of this one; without a plain arm, profit."""
    saved_percent: float | None = None
    """Of the plain arm's anonymous memory."""
    seconds: float = 0.0
    """From ready to measured: the same age for all arms, or memory would differ by it."""

    @property
    def anonymous(self) -> int:
        """What is compared: anonymous memory, in RAM or swapped out."""
        return self.memory.pss_anon + self.memory.swap_pss

    @property
    def metadata(self) -> int:
        """Kernel memory for ksmd's records of these processes: not part of any process's Pss."""
        return self.memory.rmap_items * RECORD_BYTES


@dataclass(frozen=True)
class Trial:
    """The whole trial."""

    command: tuple[str, ...]
    copies: int
    arms: tuple[ArmResult, ...]
    rate: str
    """ksmd's pages_to_scan and sleep_millisecs during the trial, or its advisor, in words."""
    ksm_was_on: bool


def copy_text(number: int, copies: int) -> str:
    """Return $KSMTOOL_COPY: the number with leading zeros, equally long for all copies.

    Python and PHP keep strings of one character once and for all, but allocate longer ones: behind
    that, all memory lies elsewhere, and of 20 copies in a group 9 and 11 would be equal.
    """
    return str(number).zfill(len(str(copies)))


class Fleet:
    """N running copies of a command with all their descendants; ends them when left.

    The process is their subreaper meanwhile, so that a daemon's double fork does not hide it.
    """

    def __init__(self, command: Sequence[str], arm: Arm, copies: int) -> None:
        """Keep what to start; `with` starts and ends it."""
        self.arm = arm
        self.command = tuple(command)
        self.copies = copies
        self._children: list[subprocess.Popen[bytes]] = []
        self._stderr: list[IO[bytes]] = []
        self._others: set[int] = set()

    def __enter__(self) -> Fleet:
        """Start every copy; on a failure those started are ended again."""
        process.control(_PR_SET_CHILD_SUBREAPER, 1)
        process.clear_merge_flag()  # plain copies must not inherit it from us
        self._others = set(process.descendants(os.getpid()))
        try:
            for number in range(1, self.copies + 1):
                self._start(number)
        except BaseException:
            self.stop()
            process.control(_PR_SET_CHILD_SUBREAPER, 0)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every copy and descendant."""
        self.stop()
        process.control(_PR_SET_CHILD_SUBREAPER, 0)

    def _start(self, number: int) -> None:
        words = [*self.arm.prefix, *(word.replace("{i}", str(number)) for word in self.command)]
        env = {**os.environ, **self.arm.env, "KSMTOOL_COPY": copy_text(number, self.copies)}
        # "" in an arm's environment means: not set.
        env = {name: value for name, value in env.items() if value or name not in self.arm.env}
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - stop() closes it
        self._stderr.append(stderr)
        try:
            self._children.append(
                subprocess.Popen(
                    words,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                )
            )
        except OSError as error:
            raise KsmtoolError(f"Cannot run {words[0]}: {error.strerror}.") from error

    def pids(self) -> list[int]:
        """Return the PIDs of all copies and their descendants that run now."""
        found = process.descendants(os.getpid(), without=self._others)
        return [pid for pid in found if process.session_of(pid) not in self._others]

    def leave_out(self, pid: int) -> None:
        """Do not count the child `pid`, its descendants, and its session."""
        self._others.add(pid)

    def memory(self) -> Memory:
        """Return the sum over all processes of the fleet."""
        return process.total(self.pids())

    def members(self) -> int | None:
        """Count the processes of the fleet that have its group's layout; None without a group."""
        if self.arm.group is None:
            return None
        return len(set(self.pids()).intersection(group.members(self.arm.group)))

    def check(self) -> None:
        """Raise KsmtoolError if a copy has died, with the last lines of its stderr.

        A copy that ended with status 0 and left processes behind is a daemon, not dead. Orphans
        that have ended are collected: ours as their subreaper, such as the layouts' helpers.
        """
        self._collect()
        for number, child in enumerate(self._children, 1):
            status = child.poll()
            if status is None or (status == 0 and self._left_behind(number)):
                continue
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            raise KsmtoolError(
                f"Copy {number} of {self.copies} (arm {self.arm.name}) {how} before it was "
                "measured.",
                self._last_words(number)
                or "It must run until it is ended; it said nothing on stderr.",
                ExitStatus.UNSUPPORTED
                if self.arm.group and status == ExitStatus.UNSUPPORTED
                else ExitStatus.FAILED,
            )

    def _left_behind(self, number: int) -> bool:
        """Look for a while: /proc is no snapshot, and a daemon may fork again as it is read."""
        mark = f"KSMTOOL_COPY={copy_text(number, self.copies)}".encode()
        deadline = time.monotonic() + DAEMON_SECONDS
        while True:
            for pid in self.pids():
                try:
                    if mark in (process.PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                        return True
                except OSError:
                    continue
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS / 10)

    def _last_words(self, number: int, lines: int = 5) -> str:
        stderr = self._stderr[number - 1]
        end = stderr.seek(0, os.SEEK_END)
        stderr.seek(max(0, end - 4096))
        said = stderr.read().decode(errors="replace").strip().splitlines()[-lines:]
        return "\n".join(["It said last:", *("  " + line for line in said)]) if said else ""

    def stop(self) -> None:
        """End every process of the fleet by its PID: SIGTERM, and SIGKILL after 10 seconds."""
        with undisturbed():
            self._stop()

    def _stop(self) -> None:
        number = signal.SIGTERM
        deadline = time.monotonic() + STOP_SECONDS
        signalled: set[int] = set()
        while pids := self._reap():
            if time.monotonic() > deadline:
                number, signalled = signal.SIGKILL, set()
            for pid in pids:
                if pid not in signalled:
                    signalled.add(pid)
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue
            time.sleep(POLL_SECONDS / 4)
        for file in self._stderr:
            file.close()
        self._children, self._stderr = [], []
        if self.arm.group is not None:
            group.discard(self.arm.group)

    def _collect(self) -> None:
        """Wait for orphans that have ended, so that no zombie is left to look like a process."""
        ours = {child.pid for child in self._children}
        for pid in self.pids() if process.PROC.joinpath("self").exists() else []:
            if pid not in ours:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue

    def _reap(self) -> list[int]:
        """Collect what has ended and return what has not."""
        self._collect()
        # Without /proc the copies themselves are still known.
        alive = [child.pid for child in self._children if child.poll() is None]
        return list({*alive, *(self.pids() if process.PROC.joinpath("self").exists() else [])})


def run(
    command: Sequence[str],
    arms: Sequence[Arm],
    options: Options,
    say: Say = _silent,
    ksm: Ksm | None = None,
) -> Trial:
    """Run every arm in turn and return what was measured.

    `say` is told what goes on, all arms together being 1. Every KSM setting is as before when this
    returns or raises; KsmtoolError is raised for a copy that dies, for copies that do not get ready
    in time, for settings that cannot be written, and after Ctrl-C, SIGTERM and SIGHUP.
    """
    ksm = ksm or Ksm()
    if not process.PROC.joinpath("self").exists():
        raise KsmtoolError(
            "Memory is measured through /proc, which is not mounted here.",
            "mount -t proc proc /proc",
            ExitStatus.UNSUPPORTED,
        )
    _refuse_unrunnable(command[0])
    try:
        with ended_as_interrupted(), ksm.borrowed() as found:
            was_on = ksm.running()
            if not was_on:
                ksm.write("run", found["run"])  # find out now whether that is allowed
            # Plain last: it has nothing to wait for, and is held until as old as the others were.
            results: dict[str, ArmResult] = {}
            for at, arm in enumerate(sorted(arms, key=lambda arm: arm.name == "plain")):
                hold = max((result.seconds for result in results.values()), default=0.0)
                part = _part(say, arm.name, at, len(arms))
                results[arm.name] = _run_arm(command, arm, options, hold, part, ksm, found)
            rate = _rate(ksm, options, was_on)
    except KeyboardInterrupt:
        raise KsmtoolError(
            "Interrupted: the copies were ended and every KSM setting is as it was.",
            status=ExitStatus.INTERRUPTED,
        ) from None
    return Trial(
        tuple(command), options.copies, _compared([results[arm.name] for arm in arms]), rate, was_on
    )


def _refuse_unrunnable(name: str) -> None:
    path = program.find(name, os.environ.get("PATH"))
    if path is None:
        raise KsmtoolError(f"Cannot run {name}: No such file or directory.")
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        raise KsmtoolError(f"Cannot run {name}: Permission denied.")


def _part(say: Say, name: str, at: int, of: int) -> Say:
    """Return a Say for arm number `at` of `of`."""
    return lambda text, done: say(f"{name}: {text}", (at + done) / of)


def _run_arm(
    command: Sequence[str],
    arm: Arm,
    options: Options,
    hold: float,
    say: Say,
    ksm: Ksm,
    found: Mapping[str, str],
) -> ArmResult:
    _refuse_ready_already(options)
    _sweep(ksm, options)
    ksm.apply(dict(found))
    before = ksm.counters()
    try:
        with Fleet(command, arm, options.copies) as fleet:
            say(f"starting {options.copies} copies", 0.0)
            wait_ready(fleet, options, say)
            ready = fleet.memory()
            ready_at = time.monotonic()
            turn_on(ksm, options)
            cpu_before = ksm.ksmd_cpu_seconds()
            passes, settled = settle(
                ksm, fleet, options.timeout, lambda text, done: say(text, 0.2 + 0.6 * done)
            )
            while time.monotonic() < ready_at + hold:
                say("holding plain until as old as the others were", 0.7)
                fleet.check()
                time.sleep(POLL_SECONDS)
            seconds = time.monotonic() - ready_at
            drive_status = None
            if options.drive is not None:
                say("driving", 0.8)
                drive_status = _drive(options.drive, fleet)
            fleet.check()
            memory = fleet.memory()
            members = fleet.members()
            cpu_after = ksm.ksmd_cpu_seconds()
            others = process.opted_in_elsewhere(fleet.pids())
            if memory.opted_in and found["run"] != "1":
                say("counting unique and volatile pages", 0.9)
                _classify(ksm, options.timeout)
            after = ksm.counters()
            say("ending the copies", 0.95)
    finally:
        _remove_ready_files(options)
    _sweep(ksm, options)
    ksm.apply(dict(found))
    return ArmResult(
        name=arm.name,
        memory=memory,
        anon_huge_before=ready.anon_huge,
        deduplicated_pages=after.pages_sharing - before.pages_sharing,
        unique_pages=after.pages_unshared - before.pages_unshared,
        volatile_pages=after.pages_volatile - before.pages_volatile,
        zero_pages=after.zero_pages - before.zero_pages,
        profit=after.general_profit_bytes - before.general_profit_bytes,
        ksmd_cpu_seconds=(
            None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
        ),
        passes=passes,
        settled=settled,
        opted_in=memory.opted_in > 0,
        members=members,
        others_opted_in=others,
        seconds=seconds,
        drive_status=drive_status,
    )


def turn_on(ksm: Ksm, options: Options) -> None:
    """Let ksmd run at the rate of `options`, unless it runs already: then nothing is changed."""
    if not ksm.running():
        ksm.apply({"advisor_mode": "none"})
        ksm.apply(
            {
                "pages_to_scan": str(options.pages_to_scan),
                "sleep_millisecs": str(options.sleep_millisecs),
                "run": "1",
            }
        )


def settle(ksm: Ksm, fleet: Fleet, timeout: float, say: Say = _silent) -> tuple[int, bool]:
    """Wait until merging has settled; return the whole passes counted and whether it had by then.

    Settled: at least four passes over all opted-in memory, and over the last three less than 1 %
    change of the pages merged. At once if nothing is opted in: ksmd then makes no passes
    (mm/ksm.c, scan_get_next_rmap_item). Raises KsmtoolError if a copy dies.
    """
    if not any(process.opted_in(pid) for pid in fleet.pids()):
        return 0, True
    first = ksm.number("full_scans")
    passes = 0
    seen = [(0, ksm.counters().merged)]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        fleet.check()
        if not ksm.running():
            raise KsmtoolError(
                "KSM was turned off while it was measured.",
                "Another program sets it too: ksmtuned, MOM, virt-handler, or a person.",
            )
        passes = ksm.number("full_scans") - first
        if passes == seen[-1][0]:
            time.sleep(POLL_SECONDS)
            continue
        merged = ksm.counters().merged
        # How many passes it will take is not known: each takes a part of what is left.
        say(f"pass {passes}, {merged * PAGE_SIZE / 1e6:.0f} MB merged", 1 - 0.8**passes)
        if passes >= SETTLED_PASSES:
            before = [pages for at, pages in seen if at <= passes - SETTLED_WINDOW][-1]
            if abs(merged - before) <= max(SETTLED_CHANGE * merged, 16):
                return passes, True
        seen.append((passes, merged))
    return passes, False


def _classify(ksm: Ksm, timeout: float) -> None:
    """Let ksmd look at every page once more, so that the counters tell unique from volatile.

    smart_scan (Linux 6.7) takes the pages it passes over out of the tree whose pages are the
    unshared ones (mm/ksm.c, should_skip_rmap_item): the counters then take them for volatile.
    Memory and CPU are measured before this.
    """
    ksm.apply({"smart_scan": "0"} if "smart_scan" in ksm.settings() else {})
    target = ksm.number("full_scans") + 2
    deadline = time.monotonic() + timeout
    while ksm.number("full_scans") < target and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)


def wait_ready(fleet: Fleet, options: Options, say: Say = _silent) -> None:
    """Return when every copy is ready; raise KsmtoolError if one dies or time runs out."""
    deadline = time.monotonic() + options.timeout
    samples: list[tuple[int, int]] = []
    while True:
        fleet.check()
        if options.ready_file is not None:
            missing = [
                path
                for path, other in zip(_ready_files(options), _ready_files(options, padded=True))
                if not path.exists() and not other.exists()
            ]
            waiting_for = f"{len(missing)} ready files, first {missing[0]}" if missing else ""
        elif options.ready_port is not None:
            closed = [port for port in _ready_ports(options) if not _accepts(port)]
            waiting_for = f"{len(closed)} ports, first {closed[0]}" if closed else ""
        else:
            memory = fleet.memory()
            samples.append((memory.processes, memory.pss_anon))
            waiting_for = "" if _stopped_growing(samples) else "memory that stops growing"
        if not waiting_for:
            return
        if time.monotonic() > deadline:
            raise KsmtoolError(
                f"The copies (arm {fleet.arm.name}) were not ready after {options.timeout:g} s: "
                f"waited for {waiting_for}.",
                "Give them more time with --timeout.",
            )
        say(f"waiting for {waiting_for}", 0.1)
        time.sleep(POLL_SECONDS)


def _stopped_growing(samples: Sequence[tuple[int, int]], window: int = 10) -> bool:
    """Whether ten samples, a second or more, agree in processes and within 1 % of memory."""
    last = samples[-window:]
    sizes = [size for _, size in last]
    return (
        len(last) == window
        and len({count for count, _ in last}) == 1
        and last[-1][0] > 0
        and max(sizes) - min(sizes) <= 0.01 * max(sizes)
    )


def _ready_files(options: Options, padded: bool = False) -> list[Path]:
    """Return the ready file of every copy, by its number or, if `padded`, by its $KSMTOOL_COPY."""
    if options.ready_file is None:
        return []
    return [
        Path(
            options.ready_file.replace(
                "{i}", copy_text(number, options.copies) if padded else str(number)
            )
        )
        for number in range(1, options.copies + 1)
    ]


def _refuse_ready_already(options: Options) -> None:
    if options.ready_port is not None:
        for port in _ready_ports(options):
            if _accepts(port):
                raise KsmtoolError(
                    f"Port {port} of 127.0.0.1 accepts before the copies start.",
                    "Stop what listens there, or name another with --ready-port.",
                )
    for path in (*_ready_files(options), *_ready_files(options, padded=True)):
        if path.exists():
            raise KsmtoolError(
                f"The ready file {path} exists before the copies start.",
                "Remove it, or name another with --ready-file.",
            )


def _remove_ready_files(options: Options) -> None:
    for path in (*_ready_files(options), *_ready_files(options, padded=True)):
        with suppress(OSError):  # gone, or not a file
            path.unlink()


def ready_ports(text: str, copies: int) -> list[int]:
    """Return the port of every copy for `PORT` or `BASE+{i}`. Raises ValueError."""
    ports = []
    for number in range(1, copies + 1):
        terms = text.replace("{i}", str(number)).split("+")
        port = sum(int(term) for term in terms)
        if not 0 < port < 65536:
            raise ValueError(f"{port} is no port")
        ports.append(port)
    return ports


def _ready_ports(options: Options) -> list[int]:
    return ready_ports(options.ready_port or "", options.copies)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _drive(command: str, fleet: Fleet) -> int:
    """Run the drive command to its end; its status is told, not judged."""
    child = subprocess.Popen(
        ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, start_new_session=True
    )
    fleet.leave_out(child.pid)
    try:
        while child.poll() is None:
            fleet.check()
            time.sleep(POLL_SECONDS / 4)
    finally:
        with suppress(ProcessLookupError):  # what it left in the background, too
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode


def _sweep(ksm: Ksm, options: Options) -> None:
    """Let ksmd forget processes that have ended, so that the counters are those of living ones.

    Records of an ended process stay, and count, until ksmd passes by (mm/ksm.c, __ksm_exit).
    """
    target = ksm.number("full_scans") + 2
    deadline = time.monotonic() + SWEEP_SECONDS
    while ksm.counters().records and time.monotonic() < deadline:
        turn_on(ksm, options)
        if ksm.number("full_scans") >= target:
            return
        time.sleep(POLL_SECONDS / 4)


def _compared(results: Sequence[ArmResult]) -> tuple[ArmResult, ...]:
    plain = next((result for result in results if result.name == "plain"), None)
    if plain is None:
        return tuple(replace(result, saved=result.profit) for result in results)
    whole = plain.anonymous
    return tuple(
        result
        if result is plain
        else replace(
            result,
            saved=whole - result.anonymous,
            saved_percent=100 * (whole - result.anonymous) / whole if whole else 0.0,
        )
        for result in results
    )


def _rate(ksm: Ksm, options: Options, was_on: bool) -> str:
    if not was_on:
        return f"{options.pages_to_scan} pages every {options.sleep_millisecs} ms"
    if ksm.number("advisor_max_cpu", -1) >= 0 and ksm.read("advisor_mode") != "none":
        return f"the kernel's {ksm.read('advisor_mode')} advisor"
    return f"{ksm.read('pages_to_scan')} pages every {ksm.read('sleep_millisecs')} ms"
