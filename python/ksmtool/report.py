# SPDX-License-Identifier: MIT
"""What is known, for people (tables and sentences) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ksmtool.group import Group
from ksmtool.kernel import PAGE_SIZE
from ksmtool.policy import DEFAULTS, Outcome, Policy, Verdict
from ksmtool.trial import ArmResult, Trial

if TYPE_CHECKING:  # the modules behind them cost start-up time that other reports do without
    from ksmtool.ksmd import Status as KsmdStatus
    from ksmtool.machine import Status

SCHEMA = 1
MB = 1e6


def as_json(trial: Trial) -> str:
    """Return the trial as JSON, schema 1: sizes in bytes, times in seconds."""
    return json.dumps({"schema": SCHEMA, **asdict(trial)}, indent=2)


def print_table(trial: Trial, console: Console) -> None:
    """Print one row for each arm, then what it means in plain words."""
    command = " ".join(" ".join(trial.command).split())
    table = Table(
        title=Text(f"{trial.copies} x {command if len(command) <= 60 else command[:57] + '...'}"),
        caption=f"MB are 10^6 bytes; pages are {PAGE_SIZE} bytes; ksmd: {trial.rate}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", no_wrap=True)
    for heading in (
        "pro-\ncess.",
        "anon.\nMB",
        "saved\nMB",
        "saved\n%",
        "dedup.\npages",
        "unique\npages",
        "volatile\npages",
        "ksmd\ns",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in trial.arms:
        table.add_row(
            arm.name,
            str(arm.memory.processes),
            _mb(arm.anonymous),
            "" if arm.saved is None else _mb(arm.saved),
            "" if arm.saved_percent is None else f"{arm.saved_percent:.1f}",
            str(arm.deduplicated_pages),
            str(arm.unique_pages),
            str(arm.volatile_pages),
            "?" if arm.ksmd_cpu_seconds is None else f"{arm.ksmd_cpu_seconds:.1f}",
        )
    console.print(table)
    for line in sentences(trial):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def sentences(trial: Trial) -> list[str]:
    """Return what the numbers say: a sentence for each arm compared with plain, then notes."""
    said = [_sentence(trial, arm) for arm in trial.arms if arm.saved is not None]
    for arm in trial.arms:
        if not arm.opted_in and arm.name != "plain":
            said.append(f"Warning: no process of arm {arm.name} was opted in.")
        if arm.members is not None and arm.members < arm.memory.processes:
            said.append(
                f"Warning: only {arm.members} of the {arm.memory.processes} processes of arm "
                f"{arm.name} have its layout: what a program execs has one of its own, unless "
                "there is --follow."
            )
        if not arm.settled:
            said.append(
                f"Warning: arm {arm.name} was still merging when the time was up, after "
                f"{arm.passes} passes: it may save more. Give it more time with --timeout."
            )
        if arm.drive_status:
            said.append(
                f"Warning: in arm {arm.name} the drive command ended with {arm.drive_status}."
            )
        if arm.anon_huge_before > arm.memory.anon_huge:
            said.append(
                f"Note: {_mb(arm.anon_huge_before - arm.memory.anon_huge)} MB of huge pages were "
                f"split in arm {arm.name}."
            )
        if arm.zero_pages:
            said.append(
                f"Note: {_mb(arm.zero_pages * PAGE_SIZE)} MB of arm {arm.name} were pages of zeros."
            )
    for arm in trial.arms:
        if arm.others_opted_in:
            said.append(
                f"Warning: {arm.others_opted_in} other processes of this machine were opted in "
                f"during arm {arm.name}: what it shares with them is in these numbers, and "
                "they may stay merged."
            )
    if any(
        arm.saved is not None and arm.saved > MB and (arm.saved_percent or 100) < 10
        for arm in trial.arms
    ):
        remedy = " A group has them in common: --arms plain,wrap,group."
        said.append(
            "Note: little is saved where pages hold pointers: each process has its own random "
            "addresses, so equal data is not equal bytes."
            + ("" if any(arm.name == "group" for arm in trial.arms) else remedy)
        )
    if trial.ksm_was_on:
        said.append("Note: KSM was on already; other programs' pages are in its counters too.")
    return said


def _sentence(trial: Trial, arm: ArmResult) -> str:
    plain = next((other for other in trial.arms if other.name == "plain"), None)
    saved = arm.saved or 0
    cpu = (
        ""
        if arm.ksmd_cpu_seconds is None
        else f", for {arm.ksmd_cpu_seconds:.1f} s of ksmd's CPU time"
    )
    records = f"and {_mb(arm.metadata)} MB of kernel memory for its records"
    if arm.metadata > saved > 0:
        records += ", more than it saved"
    if plain is None:
        return f"{arm.name}: {_mb(saved)} MB saved by the kernel's own account{cpu}."
    verb = "saved" if saved >= 0 else "lost"
    return (
        f"{arm.name}: {_mb(arm.anonymous)} MB of anonymous memory instead of "
        f"{_mb(plain.anonymous)} MB, {_mb(abs(saved))} MB "
        f"({abs(arm.saved_percent or 0):.1f} %) {verb}{cpu} {records}."
    )


def groups_as_json(groups: Sequence[Group]) -> str:
    """Return the groups as JSON, schema 1: sizes in bytes."""
    return json.dumps({"schema": SCHEMA, "groups": [asdict(group) for group in groups]}, indent=2)


def print_groups(groups: Sequence[Group], console: Console) -> None:
    """Print one row for each group, then what is not known of them."""
    if not groups:
        console.print("This user has no group: ksmtool wrap --group NAME COMMAND makes one.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("group", no_wrap=True)
    for heading in ("members", "anon.\nMB", "used\nMB", "saved\nMB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        saved = ("" if group.exact or not group.saved else "<= ") + _mb(group.saved)
        sizes = (_mb(group.anonymous), _mb(group.pss_anon), saved)
        table.add_row(Text(group.name), str(group.members), *sizes)
    console.print(table)
    notes = [
        f"Warning: {group.unreadable} of the {group.members} members of {group.name} may not be "
        "looked at: their memory is left out."
        for group in groups
        if group.unreadable
    ]
    if any(not group.exact for group in groups):
        notes.append("Note: only root can tell what merging spares from what forks share.")
    for line in notes:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def status_as_json(status: Status) -> str:
    """Return what holds for the whole machine as JSON, schema 1."""
    return json.dumps(
        {
            "schema": 1,
            "methods": list(status.methods),
            "preload": {
                "entry": status.entry,
                "entries": [asdict(entry) for entry in status.entries],
                "loaded": status.loaded,
                "complaint": status.complaint,
                "problems": list(status.problems),
            },
            "systemd": {"drop_ins": {f"/{one.path}": one.on for one in status.drop_ins}},
            "disabled_by_kill_switch": status.killed,
            "processes": {
                "total": status.processes.total,
                "opted_in": status.processes.opted_in,
                "library_loaded": status.processes.loaded,
                "unreadable": status.processes.unreadable,
                "left_out": dict(status.processes.left_out),
            },
        },
        indent=2,
    )


def status_lines(status: Status) -> list[str]:
    """Return the same as lines for a person."""
    lines = []
    if status.entry is None:
        lines.append("ld.so.preload: no entry of ksm-preload")
    else:
        really = {
            True: "programs that start now load it",
            False: "but programs do NOT load it",
            None: "whether programs load it could not be seen",
        }[status.loaded]
        lines.append(f"ld.so.preload: {status.entry}, {really}")
    if status.complaint:
        lines.append(f"problem:       the loader says: {status.complaint}")
    lines += [f"problem:       {problem}" for problem in status.problems]
    on = sum(one.on for one in status.drop_ins)
    off = len(status.drop_ins) - on
    lines.append(
        f"systemd:       {on} drop-ins with MemoryKSM=yes, {off} with no"
        if status.drop_ins
        else "systemd:       no drop-in of ksm-preload"
    )
    if status.killed:
        lines.append(
            "kill switch:   /run/ksm-preload.disabled is there: the libraries leave every program "
            "out; systemd does not look at it"
        )
    seen = status.processes
    share = 100 * seen.opted_in / max(seen.total, 1)
    lines.append(f"processes:     {seen.opted_in} of {seen.total} opted in ({share:.0f} %)")
    lines += [f"               {count} {reason}" for reason, count in seen.left_out.most_common()]
    if seen.unreadable:
        lines.append(f"               {seen.unreadable} more that may not be looked at")
    return lines


def ksmd_as_json(status: KsmdStatus) -> str:
    """Return how KSM is set as JSON, schema 1."""
    state = status.state
    return json.dumps(
        {
            "schema": 1,
            "settings": dict(status.settings),
            "merging": status.merging,
            "cpu_percent": status.cpu_percent,
            "profile": state.profile if state else None,
            "cpu_limit": state.limit if state else None,
            "init": status.boot,
            "kept_over_boots": status.kept,
            "others": [asdict(owner) for owner in status.others],
            "container": status.container,
            "distribution": status.distribution,
            "drift": [asdict(change) for change in status.drift],
        },
        indent=2,
    )


def ksmd_lines(status: KsmdStatus) -> list[str]:
    """Return the same as lines for a person."""
    lines = [f"system:    {status.distribution or '?'}"]
    if not status.settings:
        return [*lines, "KSM:       not in this kernel (CONFIG_KSM), or /sys is not mounted"]
    cpu = "" if status.cpu_percent is None else f", ksmd takes {status.cpu_percent:.1f} % of a CPU"
    lines.append(f"KSM:       {'merging' if status.merging else 'off'}{cpu}")
    state = status.state
    if state is None:
        lines.append("profile:   none of ksmtool kernel-enable")
    else:
        lines.append(f"profile:   {state.profile}, at most {state.limit} % of a CPU")
    for one in status.drift:
        lines.append(f"changed:   {one.name} is {one.old}, the profile says {one.new}")
    lines.append(
        f"boot:      {'set again' if status.kept else 'not set by us'} ({status.boot or '?'})"
    )
    for owner in status.others:
        kind = "conflict:" if owner.conflict else "also:    "
        lines.append(f"{kind}  {owner.name} {owner.does}")
    if status.container:
        lines.append("container: KSM is the host's to set")
    lines.append(
        "settings:  " + " ".join(f"{name}={value}" for name, value in status.settings.items())
    )
    return lines


def _mb(size: float) -> str:
    return f"{size / MB:.1f}"


def policy_as_json(policy: Policy, programs: Sequence[Outcome]) -> str:
    """Return the policy, and what becomes of programs, as JSON, schema 1."""
    document = {
        "schema": SCHEMA,
        "sources": [{"file": one.path, "rules": len(one.rules)} for one in policy.sources],
        "default": _verdict(policy.default()),
        "kill_switch": {"file": policy.kill_switch, "on": policy.off},
        "unreadable": policy.unreadable or None,
        "problems": [asdict(problem) for problem in policy.problems],
        "programs": [
            {
                "program": one.name,
                "executable": one.path,
                **_verdict(one.verdict),
                "note": one.note or None,
            }
            for one in programs
        ],
    }
    return json.dumps(document, indent=2)


def _verdict(verdict: Verdict) -> dict[str, str | int | None]:
    return {
        "verdict": "allow" if verdict.allowed else "deny",
        "why": verdict.why,
        "file": verdict.file or None,
        "line": verdict.line or None,
        "rule": verdict.rule or None,
    }


def policy_as_text(policy: Policy, programs: Sequence[Outcome]) -> str:
    """Return a line for each problem, source and program."""
    lines = [str(problem) for problem in policy.problems]
    for source in policy.sources:
        shipped = ", the defaults that are compiled in" if source.path == DEFAULTS else ""
        count = f"{len(source.rules)} rule{'' if len(source.rules) == 1 else 's'}"
        lines.append(f"in force: {source.path}{shipped} ({count})")
    default = policy.default()
    lines.append(f"default:  {'opted in' if default.allowed else 'left out'}, {default.why}")
    state = "is there: every program is left out" if policy.off else "is not there"
    lines.append(f"switch:   {policy.kill_switch} {state}")
    for one in programs:
        what = "opted in" if one.verdict.allowed else "left out"
        note = f", {one.note}" if one.note else ""
        lines.append(f"{one.name}: {what}, {one.verdict.why}; it is {one.path}{note}")
    return "\n".join(lines)
