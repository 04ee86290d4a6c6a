# SPDX-License-Identifier: MIT
"""`ksmtool wrap`: decide how to opt a program in, say why, and become ksm-wrapper."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from ksmtool import install, policy, program
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.group import Wanted
from ksmtool.kernel import Ksm


@dataclass(frozen=True)
class Kernel:
    """What this kernel can, tried out by `ksm-wrapper --probe`."""

    prctl: bool
    """It has PR_SET_MEMORY_MERGE."""
    inherit: bool
    """It keeps that flag over exec (Linux 6.7)."""
    madvise: bool
    """It has MADV_MERGEABLE: CONFIG_KSM is on."""


@dataclass(frozen=True)
class Plan:
    """What will be done with a program, and why."""

    options: tuple[str, ...]
    """Options for ksm-wrapper; without effect if `alone`."""
    why: str
    alone: bool = False
    """The program is started without ksm-wrapper, not opted in."""
    warn: bool = False
    """Say `why` unasked: the program will not be opted in though that was asked for."""
    note: str = ""
    """What else is to be said unasked."""


def decide(
    target: program.Program,
    kernel: Kernel,
    method: str,
    off: bool = False,
    verdict: policy.Verdict = policy.LET_IN,
) -> Plan:
    """Return the plan for `target`; `method` is auto, prctl or madvise, `off` is KSM_PRELOAD=off.

    `verdict` is the policy's. Raises KsmtoolError with status 4 if a forced method cannot work.
    """
    final = target.final
    if off:
        return Plan((), "KSM_PRELOAD=off asks to leave it out", alone=False)
    if final.privileged:
        return Plan(
            (),
            f"{final.path} is {final.privileged} and left alone: the loader drops LD_PRELOAD "
            "there, and the kernel's flag would open a privileged program's memory to merging",
            alone=True,
            warn=True,
        )
    if not verdict.allowed:
        return Plan((), f"{final.path} is left out of KSM: {verdict.why}", alone=True, warn=True)
    if method == "prctl" and not kernel.prctl:
        raise KsmtoolError(
            "This kernel does not take PR_SET_MEMORY_MERGE.",
            "Linux 6.4 or newer has it; --method madvise works on any.",
            ExitStatus.UNSUPPORTED,
        )
    if method == "madvise" and not kernel.madvise:
        raise KsmtoolError(
            "This kernel has no KSM.", "It was built without CONFIG_KSM.", ExitStatus.UNSUPPORTED
        )
    chosen = method if method != "auto" else "prctl" if kernel.prctl else "madvise"
    obstacle = _obstacle(final, chosen)
    if obstacle is None:
        reason = "it was asked for" if method != "auto" else "the kernel has it"
        if method == "auto" and chosen == "madvise":
            reason = "the kernel lacks the prctl"
        return Plan(() if method == "auto" else ("--method", method), f"{chosen}: {reason}")
    if chosen == "prctl" and kernel.inherit:
        return Plan(
            ("--method", "prctl", "--no-preload"),
            f"prctl without a library: {obstacle}, and the kernel keeps the flag over exec",
        )
    if method != "auto":
        raise KsmtoolError(
            f"Method {method} cannot reach {final.path}: {obstacle}.",
            "Leave --method away to run it all the same, not opted in.",
            ExitStatus.UNSUPPORTED,
        )
    return Plan(
        (),
        f"{final.path} is not opted in: {obstacle}, and this kernel "
        + ("drops the flag on exec" if kernel.prctl else "lacks the prctl"),
        alone=True,
        warn=True,
    )


def _obstacle(final: program.Program, method: str) -> str | None:
    """Why no library of ours can be loaded into the program; None if it can."""
    if final.static:
        return "a static program loads no library"
    if final.sanitizer:
        return f"{final.sanitizer} aborts a program in which another library was loaded first"
    if final.foreign:
        return f"our library is not of its architecture, {final.machine}"
    if final.musl and method == "madvise":
        return "libksm_preload.so is linked to glibc, the program to musl"
    return None


def in_group(plan: Plan, path: str, wanted: Wanted) -> Plan:
    """Return the plan with the group in it, as far as the program at `path` can be in one.

    Raises KsmtoolError with status 4 if it cannot, and has to.
    """
    if plan.alone:
        if wanted.required:
            raise KsmtoolError(
                f"{path} cannot have the layout of group {wanted.name}: it is left alone.",
                plan.why,
                ExitStatus.UNSUPPORTED,
            )
        return replace(plan, why=f"{plan.why}; so it is not in group {wanted.name}")
    note = ""
    if wanted.follow and "--no-preload" in plan.options:
        wanted = replace(wanted, follow=False)
        note = f"--follow does not reach what {path} starts: it takes a library in LD_PRELOAD"
    return replace(plan, options=(*plan.options, *wanted.options()), note=note)


def probe() -> Kernel:
    """Ask ksm-wrapper what this kernel can; costs two program starts, about 1 ms."""
    import subprocess  # noqa: PLC0415 - 5 ms that most runs do without

    text = subprocess.run(
        [install.wrapper(), "--probe"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    answers = dict(line.split() for line in text.splitlines())
    return Kernel(*(answers.get(name) == "yes" for name in ("prctl", "inherit", "madvise")))


def turn_on() -> str:
    """Return the command that switches KSM on."""
    import shlex  # noqa: PLC0415 - rare

    try:
        install.require_trusted_ksmtool()
    except KsmtoolError:  # kernel-enable refuses what others can change
        return "echo 1 | sudo tee /sys/kernel/mm/ksm/run"
    path = install.ksmtool()
    in_roots_path = os.path.dirname(path) in ("/usr/bin", "/usr/local/bin")
    return f"sudo {'ksmtool' if in_roots_path else shlex.quote(path)} kernel-enable"


def ksm_warning(ksm: Ksm) -> str | None:
    """Return the line to print if nothing will merge whatever is opted in, else None."""
    if not ksm.available():
        return "This kernel has no KSM: nothing will merge."
    if not ksm.running():
        return f"KSM is off in this kernel: nothing will merge until: {turn_on()}"
    return None


def run(
    command: Sequence[str],
    method: str = "auto",
    explain: bool = False,
    quiet: bool = False,
    ksm: Ksm | None = None,
    environ: Mapping[str, str] = os.environ,
    wanted: Wanted | None = None,
) -> NoReturn:
    """Replace this process by the command, opted in and in the group `wanted`.

    Raises KsmtoolError, with status 4 for what cannot be done here; returns never.
    """
    ksm = ksm or Ksm()
    setting = environ.get("KSM_PRELOAD")
    target, plan = plan_for(command, method, environ, thorough=explain, wanted=wanted)

    if explain:
        for line in _explanation(target, plan, ksm, environ, command):
            _tell(line)
    elif plan.warn and not quiet:
        _tell(plan.why)
    if plan.note and not quiet:
        _tell(plan.note)
    if setting not in (None, "", "off", "madvise") and not quiet:
        _tell(f"KSM_PRELOAD={setting} means nothing: it is off, madvise, or not set.")
    warning = ksm_warning(ksm)
    if warning and not quiet and not plan.alone and setting != "off":
        _tell(warning)

    _undo_pythons_locale()
    # Python ignores these two from its start on, and what is ignored stays so over exec. What they
    # were before cannot be found out; the default is what nearly every parent gives.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    if plan.alone:
        _exec_alone(command)
    wrapper = install.wrapper()
    os.execv(wrapper, ["ksm-wrapper", *plan.options, "--", *command])


def plan_for(
    command: Sequence[str],
    method: str = "auto",
    environ: Mapping[str, str] = os.environ,
    thorough: bool = True,
    wanted: Wanted | None = None,
) -> tuple[program.Program | None, Plan]:
    """Return what the command is (None: not found) and the plan for it, in the group `wanted`.

    If not `thorough`, a plan that ksm-wrapper would find by itself has no reason, and nothing is
    probed. Raises KsmtoolError with status 4 if a forced method or required group cannot be here.
    """
    target, plan = _plan_without_group(command, method, environ, thorough)
    if wanted is None or environ.get("KSM_PRELOAD") == "off":
        return target, plan
    return target, in_group(plan, target.final.path if target else command[0], wanted)


def _plan_without_group(
    command: Sequence[str], method: str, environ: Mapping[str, str], thorough: bool
) -> tuple[program.Program | None, Plan]:
    path = program.find(command[0], environ.get("PATH"))
    target = program.inspect(path, environ.get("PATH")) if path else None
    setting = environ.get("KSM_PRELOAD")
    off = setting == "off"
    if method == "auto" and setting == "madvise":
        method = "madvise"
    if target is None:
        return None, Plan(("--method", method), "")
    # What /proc/PID/exe will say.
    verdict = policy.load().verdict(os.path.realpath(target.final.path))
    usual = not (off or target.final.privileged or _obstacle(target.final, "madvise"))
    if usual and verdict.allowed and not thorough:
        return target, Plan(("--method", method), "")
    return target, decide(target, probe(), method, off, verdict)


def _tell(text: str) -> None:
    # Where stderr is closed Python has none, and print would fall back to stdout.
    if sys.stderr is not None:
        print(f"ksmtool: {text}", file=sys.stderr, flush=True)


def _undo_pythons_locale() -> None:
    """Take LC_CTYPE out again if Python has put it in (PEP 538)."""
    try:
        with open("/proc/self/environ", "rb") as file:
            given = file.read()
    except OSError:
        return
    if b"\0LC_CTYPE=" not in b"\0" + given:
        os.environ.pop("LC_CTYPE", None)


def _exec_alone(command: Sequence[str]) -> NoReturn:
    from ksmtool.process import clear_merge_flag  # noqa: PLC0415 - rare, and costs 5 ms

    clear_merge_flag()
    try:
        os.execvp(command[0], tuple(command))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise KsmtoolError(
            f"Cannot run {command[0]}: {error.strerror}.",
            None,
            ExitStatus.NOT_FOUND if missing else ExitStatus.CANNOT_EXEC,
        ) from error


def _explanation(
    target: program.Program | None,
    plan: Plan,
    ksm: Ksm,
    environ: Mapping[str, str],
    command: Sequence[str],
) -> list[str]:
    if target is None:
        return ["program: there is none of that name in PATH"]
    kernel = probe()
    state = "not built in"
    if ksm.available():
        state = "running" if ksm.running() else "off"
    lines = [
        f"program: {target.describe()}",
        f"kernel:  prctl {_yes(kernel.prctl)}, kept over exec {_yes(kernel.inherit)}, "
        f"madvise {_yes(kernel.madvise)}; KSM is {state}",
        f"plan:    {plan.why}",
    ]
    if not plan.alone:
        shown = show(plan.options, command, environ)
        if shown.fault:
            return [*lines, f"ksm-wrapper will fail: {shown.fault}"]
        lines.append(f"preload: LD_PRELOAD={shown.preload}")
        if shown.group and shown.obstacle:
            lines.append(f"group:   not {shown.group}: {shown.obstacle}")
        elif shown.group:
            seeds = f"hash seeds {', '.join(shown.seeds)}" if shown.seeds else "no hash seed"
            lines.append(f"group:   the layout of {shown.group}, {seeds}")
    given = environ.get("LD_PRELOAD", "")
    for entry in given.replace(":", " ").split(" "):
        if "/" in entry and "$" not in entry and not os.access(entry, os.R_OK):
            lines.append(
                f"note:    your own LD_PRELOAD names {entry}, which cannot be read: passed on"
            )
    return lines


@dataclass(frozen=True)
class Shown:
    """What `ksm-wrapper --show` says it would do with a command."""

    preload: str = ""
    group: str = ""
    """The group's name, "" for none."""
    obstacle: str = ""
    """Why the program cannot have the group's layout, "" if it can."""
    seeds: tuple[str, ...] = ()
    """Names of the variables and options by which hash seeds are set."""
    fault: str = ""
    """What it fails by; nothing else is known then."""


def show(options: Sequence[str], command: Sequence[str], environ: Mapping[str, str]) -> Shown:
    """Ask ksm-wrapper what it would do; draws the secret of a group that is new."""
    import subprocess  # noqa: PLC0415

    done = subprocess.run(
        [install.wrapper(), *options, "--show", "--", *command],
        check=False,
        capture_output=True,
        text=True,
        env=dict(environ),
    )
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("ksm-wrapper: ")
        return Shown(fault=said.partition("\n")[0])
    preload = group = obstacle = ""
    seeds = []
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        if key == "LD_PRELOAD":
            preload = value
        elif key == "group":
            group, _, no = value.partition(" ")
            obstacle = no.removeprefix("no ")
        elif key == "seed":
            seeds.append(value)
    return Shown(preload, group, obstacle, tuple(seeds))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
