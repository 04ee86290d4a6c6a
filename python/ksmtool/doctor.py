# SPDX-License-Identifier: MIT
"""What is wrong, and the command that puts it right: from facts to findings. Pure.

One function for each question, all of them in QUESTIONS; docs/doctor.md has the same list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ksmtool import policy, usage
from ksmtool.examine import Checkup, Subject, quoted
from ksmtool.facts import ProcessFacts
from ksmtool.kernel import PAGE_SIZE, RECORD_BYTES
from ksmtool.machine import PRELOAD
from ksmtool.overview import duration, mb

SLOW_PASS_SECONDS = 3600.0
SOON_PASSES = 3
"""A page is merged the second time that it is looked at: before that many passes, nothing is said
of what merging came to."""
LOOKED_AT = 0.9
"""The part of opted-in memory of which ksmd has to have records for that: passes are counted from
the boot on, also those before anything was opted in."""
LEAST_LOSS = 1_000_000
"""Bytes by which something has to be at a loss for that to be said."""
CROWDED = 0.8
"""The part of vm.max_map_count from which on that is said."""
LITTLE = 0.1
"""The part of memory under which a kind is not worth a word, and a comparison neither."""
LEAST_MEMORY = 1_000_000
"""Bytes of a kind of memory under which nothing is said of it."""
LEAST_PROGRAM = 10_000_000
"""Bytes of a process under which it is not said to be nothing for KSM."""

PROBLEM, NOTE = "problem", "note"
ENABLE = "sudo ksmtool kernel-enable"


class Answer(NamedTuple):
    """What a question finds."""

    sentence: str
    fixes: tuple[str, ...] = ()
    evidence: Mapping[str, float | str] = {}
    severity: str = ""
    """If it is another than the question's."""


Ask = Callable[[Checkup], Iterable[Answer]]


@dataclass(frozen=True)
class Question:
    """What is looked for."""

    id: str
    severity: str
    ask: Ask


@dataclass(frozen=True)
class Finding:
    """Something that keeps KSM from working, or from saving what it could."""

    id: str
    """Stable: for programs and docs/doctor.md."""
    severity: str
    """"problem", which makes the exit status 1, or "note"."""
    sentence: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    """The numbers behind it, sizes in bytes."""
    fixes: tuple[str, ...] = ()
    """Commands of which each puts it right by itself; what else is to be done is behind a #."""


def diagnose(checkup: Checkup) -> list[Finding]:
    """Return all findings: problems first, otherwise in the order of QUESTIONS."""
    found = [
        Finding(
            one.id,
            answer.severity or one.severity,
            answer.sentence,
            answer.evidence,
            tuple(fix for fix in answer.fixes if fix),
        )
        for one in QUESTIONS
        for answer in one.ask(checkup)
    ]
    return sorted(found, key=lambda finding: finding.severity != PROBLEM)


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether none of them is a problem."""
    return all(finding.severity != PROBLEM for finding in findings)


def verdict(checkup: Checkup, findings: Iterable[Finding]) -> str:
    """Return one sentence on all of it."""
    found = list(findings)
    problems = sum(finding.severity == PROBLEM for finding in found)
    notes = len(found) - problems
    rest = f"; {_count(notes, 'note')}" if notes else ""
    if problems:
        return f"Not healthy: {_count(problems, 'problem')}{rest}."
    subject = checkup.subject
    if subject is None:
        return f"Healthy: KSM is on and saves {mb(checkup.machine.profit)} MB{rest}."
    if subject.pid is None:
        return f"Healthy: KSM is on, and {subject.name} can be opted in{rest}."
    return f"Healthy: KSM is on, and {_called(subject)} is opted in{rest}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _called(subject: Subject) -> str:
    return subject.name if subject.pid is None else f"{subject.name} ({subject.pid})"


# ---- The machine ---------------------------------------------------------------------------


def _ksm_missing(checkup: Checkup) -> Iterator[Answer]:
    if checkup.machine.available:
        return
    if checkup.machine.setup.container:
        yield Answer("There is no /sys/kernel/mm/ksm in this container: KSM is the host's.")
        return
    advice = f" {checkup.no_ksm}" if checkup.no_ksm else ""
    yield Answer(
        f"This kernel has no KSM: it was built without CONFIG_KSM, or /sys is not mounted.{advice}",
        ("grep CONFIG_KSM= /boot/config-$(uname -r)   # it takes a kernel with CONFIG_KSM=y",),
    )


def _ksm_off(checkup: Checkup) -> Iterator[Answer]:
    machine = checkup.machine
    if not machine.available or machine.merging:
        return
    if machine.setup.container:
        yield Answer(
            "KSM is off, so nothing is merged; this is a container, and KSM is the host's to set.",
            ("sudo ksmtool kernel-enable   # on the host",),
        )
    elif machine.setup.state is not None:
        yield Answer(
            "KSM is off, so nothing is merged: something has switched it off since ksmtool "
            "kernel-enable.",
            (ENABLE,),
        )
    else:
        yield Answer("KSM is off, so nothing is merged.", (ENABLE,))


def _other_manager(checkup: Checkup) -> Iterator[Answer]:
    for owner in checkup.machine.setup.others:
        if owner.conflict:
            yield Answer(f"{owner.name} has KSM: it {owner.does}.", owner.choices)


def _state_damaged(checkup: Checkup) -> Iterator[Answer]:
    if checkup.machine.setup.problem:
        yield Answer(
            checkup.machine.setup.problem,
            ("sudo ksmtool kernel-disable && sudo ksmtool kernel-enable",),
        )


def _settings_drift(checkup: Checkup) -> Iterator[Answer]:
    # KSM off has a question of its own.
    changes = [change for change in checkup.drift if change.name != "run"]
    state = checkup.machine.setup.state
    if changes and state:
        said = ", ".join(f"{one.name} is {one.old}, not {one.new}" for one in changes)
        yield Answer(
            f"KSM is not set as ksmtool kernel-enable set it (profile {state.profile}): {said}.",
            (ENABLE,),
            {change.name: change.old for change in changes},
        )


def _not_kept(checkup: Checkup) -> Iterator[Answer]:
    setup = checkup.machine.setup
    if not checkup.machine.merging or setup.container or checkup.kept:
        return
    if setup.state is not None:
        yield Answer(
            "Nothing sets KSM at the next boot: what ksmtool kernel-enable wrote for that is gone.",
            (ENABLE,),
        )
    elif not setup.others:
        yield Answer("KSM is on until the next boot only.", (ENABLE,))


_FASTER = {"gentle": "balanced", "balanced": "fast", "fast": "fast --cpu 100"}


def _slow_scan(checkup: Checkup) -> Iterator[Answer]:
    machine = checkup.machine
    seconds = pass_seconds(checkup)
    if seconds is None or seconds < SLOW_PASS_SECONDS:
        return
    state = machine.setup.state
    faster = _FASTER[state.profile] if state else "balanced"
    yield Answer(
        f"A pass over all opted-in memory takes about {duration(seconds)}, and merging takes two "
        "at least.",
        () if machine.setup.container else (f"{ENABLE} --profile {faster}",),
        {
            "pass_seconds": seconds,
            "pages": _pages(checkup),
            "pages_to_scan": int(machine.settings.get("pages_to_scan", 0)),
            "sleep_millisecs": int(machine.settings.get("sleep_millisecs", 0)),
        },
    )


def pass_seconds(checkup: Checkup) -> float | None:
    """Return what a pass takes: as measured, or by the settings if ksmd rested all the while.

    In the first pass records grow as fast as ksmd looks: then the memory that it has before it says
    more. Once a pass takes less than it was watched for, it is known.
    """
    machine, measured = checkup.machine, checkup.pace.pass_seconds
    if not machine.merging:
        return measured
    pages = _pages(checkup)
    if measured is not None:
        known = measured < checkup.pace.seconds or not machine.counters.records
        return measured if known else measured * pages / machine.counters.records
    rate = int(machine.settings.get("pages_to_scan", 0))
    rest = int(machine.settings.get("sleep_millisecs", 0)) / 1000
    return pages / rate * rest if rate and pages else None


def _pages(checkup: Checkup) -> int:
    """Return what ksmd has to look at in a pass, about."""
    return max(checkup.machine.counters.records, _opted_in_pages(checkup))


def _opted_in_pages(checkup: Checkup) -> int:
    opted_in = (one.memory for one in checkup.machine.processes if one.memory.opted_in)
    return sum(memory.anonymous for memory in opted_in) // PAGE_SIZE


def _settled(checkup: Checkup) -> bool:
    """Whether ksmd has been over what is opted in often enough for a word on what came of it."""
    machine = checkup.machine
    if not machine.merging or machine.counters.full_scans < SOON_PASSES:
        return False
    return machine.counters.records >= LOOKED_AT * _opted_in_pages(checkup)


def _looked_at(processes: Iterable[ProcessFacts]) -> bool:
    """Whether ksmd has records of nearly all that these processes have, merged zeros aside."""
    memory = [one.memory for one in processes]
    records = sum(one.rmap_items - one.zero_pages for one in memory)
    return records * PAGE_SIZE >= LOOKED_AT * sum(one.anonymous for one in memory)


def _nothing_opted_in(checkup: Checkup) -> Iterator[Answer]:
    machine = checkup.machine
    if checkup.subject is not None or not machine.available:
        return
    # Those that may not be looked at can be opted in, too; ksmd's records are of all.
    if machine.opted_in or machine.counters.records:
        return
    if (machine.unreadable or machine.hidden) and not machine.merging:
        return
    yield Answer(
        "No process is opted in, so there is nothing to merge.",
        ("ksmtool wrap -- CMD   # one program", "sudo ksmtool global-enable   # all that start"),
        {"processes": len(machine.processes)},
    )


def _nothing_merged(checkup: Checkup) -> Iterator[Answer]:
    machine = checkup.machine
    counters = machine.counters
    if counters.records and not counters.merged and _settled(checkup):
        yield Answer(
            f"Nothing is merged after {counters.full_scans} passes over {counters.records} pages: "
            "what is opted in has no equal pages.",
            ("sudo ksmtool estimate --all",),
            {"full_scans": counters.full_scans, "records": counters.records},
        )


def _machine_loss(checkup: Checkup) -> Iterator[Answer]:
    machine = checkup.machine
    if machine.profit <= -LEAST_LOSS and _settled(checkup):
        yield Answer(
            f"KSM takes more memory than it gives: {mb(machine.saved)} MB are saved, and ksmd's "
            f"records take {mb(machine.saved - machine.profit)} MB.",
            ("sudo ksmtool status --by app --sort profit   # leave out those with a loss",),
            {"saved": machine.saved, "profit": machine.profit},
        )


def _program_loss(checkup: Checkup) -> Iterator[Answer]:
    machine = checkup.machine
    if checkup.subject is not None or not _settled(checkup):
        return
    for row in usage.rows(machine.processes, "app", "profit"):
        members = [one for one in machine.processes if usage.BY["app"](one) == row.name]
        if row.profit is not None and row.profit <= -LEAST_LOSS and _looked_at(members):
            yield Answer(
                f"{row.name} saves {mb(row.saved or 0)} MB, less than ksmd's records of it take.",
                _decide("deny", row.name, replace(checkup.rules, off=False).verdict(row.name)),
                {"saved": row.saved or 0, "profit": row.profit, "processes": row.processes},
            )


def _decide(word: str, path: str, verdict: policy.Verdict) -> tuple[str, ...]:
    """Return what makes the policy deny or allow a program of which it now has this verdict."""
    if verdict.allowed == (word == "allow"):
        return ()
    if not verdict.allowed and not verdict.rule:
        return ("ksmtool policy check",)  # a file cannot be read
    # The first rule that matches counts: one that is added behind it would do nothing.
    if verdict.file not in ("", policy.DEFAULTS) and not verdict.rule.startswith("default "):
        return (f"sudoedit {quoted(verdict.file)}   # line {verdict.line}",)
    if not path.startswith("/") or not path.isprintable() or path != path.strip():
        return ()
    folder = "/etc/ksm-preload/policy.d"
    # As themselves: in a pattern they stand for others.
    pattern = re.sub(r"[*?[]", r"[\g<0>]", path)
    rule = quoted(f"{word} {pattern}")
    return (f"sudo mkdir -p {folder}; echo {rule} | sudo tee -a {folder}/local.conf",)


def _preload_file(checkup: Checkup) -> Iterator[Answer]:
    for sentence in checkup.preload:
        ours = "libksm_preload" in sentence
        missing = "every program prints" in sentence
        fix = "sudo ksmtool global-disable" if ours and missing else "sudoedit /etc/ld.so.preload"
        if "readable by root only" in sentence:
            fix = "sudo chmod 644 /etc/ld.so.preload"
        elif "no regular file" in sentence:
            fix = "sudo mv /etc/ld.so.preload /etc/ld.so.preload.old"
        yield Answer(sentence, (fix,))


def _kill_switch(checkup: Checkup) -> Iterator[Answer]:
    if checkup.rules.off:
        yield Answer(
            f"{checkup.rules.kill_switch} is there, so no program that starts is opted in.",
            (f"sudo rm {checkup.rules.kill_switch}",),
        )


def _policy_files(checkup: Checkup) -> Iterator[Answer]:
    wrong = checkup.rules.problems
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        yield Answer(
            f"The policy has a mistake: {wrong[0]}{more}",
            ("ksmtool policy check",),
            {"mistakes": len(wrong)},
        )


def _crowded_mappings(checkup: Checkup) -> Iterator[Answer]:
    most, crowd = checkup.most_mappings, checkup.crowd
    subject = checkup.subject
    name, count = (crowd.name, crowd.mappings) if crowd else ("", 0)
    pid = crowd.pid if crowd else 0
    if subject is not None and subject.kinds is not None and subject.pid is not None:
        name, pid, count = subject.name, subject.pid, subject.kinds.mappings
    if most and count >= CROWDED * most:
        yield Answer(
            f"{name} ({pid}) has {count} mappings of the {most} that the kernel allows; with all "
            "of them used, mmap fails there.",
            (
                f"sudo sysctl vm.max_map_count={2 * most}   # until the next boot; a line in "
                "/etc/sysctl.d keeps it",
            ),
            {"pid": pid, "mappings": count, "max_map_count": most},
        )


def _in_container(checkup: Checkup) -> Iterator[Answer]:
    if checkup.machine.setup.container and checkup.machine.available:
        yield Answer(
            "This is a container: KSM is the host's, and merges over all of its containers."
        )


# ---- Why a program is not opted in ---------------------------------------------------------


def _out(checkup: Checkup) -> Subject | None:
    """Return the program if it is not opted in, or is yet to be started."""
    subject = checkup.subject
    return subject if subject is not None and not subject.opted_in else None


def _flag_suffices(checkup: Checkup) -> bool:
    """Whether `ksmtool wrap` opts in without a library: the kernel keeps its flag over exec."""
    return checkup.kernel is not None and checkup.kernel.prctl and checkup.kernel.inherit


def _by_wrap(checkup: Checkup, subject: Subject) -> tuple[str, ...]:
    """Return what opts in what takes no library."""
    return _wrapped(subject) if _flag_suffices(checkup) else ()


def _service(subject: Subject) -> str:
    """Return the service that can be started anew for it, "" for none: not a whole session."""
    unit = subject.facts.unit if subject.facts else ""
    whole = unit.startswith("user@") or not unit.endswith(".service") or not unit.isprintable()
    return "" if whole else quoted(unit)


def _edited(unit: str, how: str) -> str:
    return f"sudo systemctl edit {unit}   # [Service] {how}; then restart it"


def _wrapped(subject: Subject) -> tuple[str, ...]:
    """Return how to start it anew so that it is opted in: by systemd what systemd has started."""
    unit = _service(subject)
    if unit:
        return (_edited(unit, "ExecStart= alone, then ExecStart=ksm-wrapper and its command"),)
    return (f"ksmtool wrap -- {subject.again}",)


def _obstructed(checkup: Checkup) -> Subject | None:
    """Return the program if it is not opted in for want of a library.

    One that is yet to be started needs none where the kernel keeps its flag.
    """
    subject = _out(checkup)
    if subject is None or subject.loaded or subject.program is None:
        return None
    return None if subject.pid is None and _flag_suffices(checkup) else subject


def _left_out(checkup: Checkup) -> Iterator[Answer]:
    subject = _out(checkup)
    if subject is not None and not subject.verdict.allowed:
        yield Answer(
            f"{_called(subject)} is left out by the policy: {subject.verdict.why}. That is right "
            "for all that keeps secrets.",
            () if subject.privileged else _decide("allow", subject.path, subject.verdict),
        )


def _off_by_environment(checkup: Checkup) -> Iterator[Answer]:
    subject = _out(checkup)
    if subject is not None and subject.off:
        yield Answer(
            f"KSM_PRELOAD=off in its environment leaves {_called(subject)} out.",
            (
                _edited(unit, "UnsetEnvironment=KSM_PRELOAD")
                if (unit := _service(subject))
                else f"env -u KSM_PRELOAD ksmtool wrap -- {subject.again}",
            ),
        )


def _privileged(checkup: Checkup) -> Iterator[Answer]:
    subject = _out(checkup)
    if subject is not None and subject.privileged:
        yield Answer(
            f"{_called(subject)} is {subject.privileged}, so it is left alone: its memory is not "
            "for programs of less privilege to merge with."
        )


def _static(checkup: Checkup) -> Iterator[Answer]:
    subject = _obstructed(checkup)
    if subject is not None and subject.program is not None and subject.program.final.static:
        yield Answer(_without_library(checkup, subject, "is static"), _by_wrap(checkup, subject))


def _without_library(checkup: Checkup, subject: Subject, what: str) -> str:
    drops = "this kernel lacks the prctl or drops its flag at exec (Linux 6.7 keeps it)"
    how = "the kernel's flag opts it in without one" if _flag_suffices(checkup) else drops
    return f"{_called(subject)} {what}, so it loads no library of ours; {how}."


def _architecture(checkup: Checkup) -> Iterator[Answer]:
    subject = _obstructed(checkup)
    final = subject.program.final if subject is not None and subject.program else None
    if subject is not None and final is not None and final.foreign and not final.static:
        yield Answer(
            _without_library(checkup, subject, f"is of another architecture, {final.machine}"),
            _by_wrap(checkup, subject),
        )


def _musl(checkup: Checkup) -> Iterator[Answer]:
    subject = _obstructed(checkup)
    if subject is None or subject.program is None or not subject.program.final.musl:
        return
    if subject.pid is None and (checkup.kernel is None or checkup.kernel.prctl):
        return  # LD_PRELOAD reaches it: the library for the prctl needs no libc
    why = "the library for this kernel is linked to glibc"
    if checkup.kernel is None or checkup.kernel.prctl:
        why = "musl's loader does not read /etc/ld.so.preload"
    yield Answer(
        f"{_called(subject)} is linked to musl: {why}.",
        _wrapped(subject) if checkup.kernel is None or checkup.kernel.prctl else (),
    )


def _sanitizer(checkup: Checkup) -> Iterator[Answer]:
    subject = _obstructed(checkup)
    final = subject.program.final if subject is not None and subject.program else None
    if subject is not None and final is not None and final.sanitizer:
        yield Answer(
            _without_library(checkup, subject, f"is linked to {final.sanitizer}"),
            _by_wrap(checkup, subject),
        )


def _confined(checkup: Checkup) -> Iterator[Answer]:
    subject = _out(checkup)
    if subject is None or not subject.confinement or subject.loaded:
        return
    if PRELOAD in checkup.methods or not _flag_suffices(checkup):
        yield Answer(
            f"{_called(subject)} runs in {subject.confinement}, which may keep our library from "
            "being opened.",
            _by_wrap(checkup, subject),
        )


def _containered(checkup: Checkup) -> Iterator[Answer]:
    subject = _out(checkup)
    if checkup.machine.setup.container:
        return  # the same one, as a rule: on cgroup v1 it sees its own name
    if subject is not None and subject.container and not subject.loaded:
        yield Answer(
            f"{_called(subject)} runs in a container ({subject.container}), which has its own "
            "/etc/ld.so.preload: nothing of the host opts it in.",
            (f"ksm-wrapper {subject.again}   # in the container, as its entry point",),
        )


def _flag_lost(checkup: Checkup) -> Iterator[Answer]:
    subject = _out(checkup)
    kernel = checkup.kernel
    if subject is None or not subject.parent_opted_in or subject.loaded or kernel is None:
        return
    if kernel.prctl and not kernel.inherit:
        yield Answer(
            f"What started {_called(subject)} is opted in, but this kernel drops the flag at exec "
            "(Linux 6.7 keeps it).",
            _wrapped(subject),
        )


_REASONS: tuple[Ask, ...] = (
    _left_out,
    _off_by_environment,
    _privileged,
    _static,
    _architecture,
    _musl,
    _sanitizer,
    _confined,
    _containered,
    _flag_lost,
)


def _unexplained(checkup: Checkup) -> Subject | None:
    """Return the process that is not opted in if none of the reasons holds."""
    subject = _out(checkup)
    if subject is None or subject.pid is None:
        return None
    return None if any(list(reason(checkup)) for reason in _REASONS) else subject


def _is_older(subject: Subject) -> bool:
    return bool(subject.before) and not subject.loaded


def _started_before(checkup: Checkup) -> Iterator[Answer]:
    subject = _unexplained(checkup)
    if subject is not None and _is_older(subject):
        unit = _service(subject)
        yield Answer(
            f"{_called(subject)} was started before {subject.before} was written.",
            (f"sudo systemctl restart {unit}",) if unit else _wrapped(subject),
        )


def _not_opted_in(checkup: Checkup) -> Iterator[Answer]:
    subject = _unexplained(checkup)
    if subject is not None and not _is_older(subject):
        every = _service(subject) and not checkup.methods and not subject.loaded
        yield Answer(
            f"{_called(subject)} has our library and is not opted in: the kill switch was there "
            "when it started, or it has no mapping as large as KSMP_MERGE_THRESHOLD."
            if subject.loaded
            else f"{_called(subject)} is not opted in.",
            (
                "sudo ksmtool global-enable   # all that start; then restart it" if every else "",
                *_wrapped(subject),
            ),
        )


# ---- Memory of the wrong kind --------------------------------------------------------------


def _kind(checkup: Checkup, name: str, sentence: str) -> Iterator[Answer]:
    """Yield an answer if this kind of memory is a part of all that is worth a word."""
    kinds = checkup.subject.kinds if checkup.subject else None
    if kinds is None:
        return
    size = getattr(kinds, name)
    if size >= LEAST_MEMORY and size >= LITTLE * kinds.resident:
        yield Answer(
            f"{mb(size)} of {mb(kinds.resident)} MB {sentence}",
            (),
            {name: size, "resident": kinds.resident},
        )


def _shared_memory(checkup: Checkup) -> Iterator[Answer]:
    return _kind(checkup, "shared", "are shared memory, which KSM leaves alone.")


def _hugetlb(checkup: Checkup) -> Iterator[Answer]:
    return _kind(checkup, "hugetlb", "are huge pages of hugetlbfs, which KSM leaves alone.")


def _file_memory(checkup: Checkup) -> Iterator[Answer]:
    return _kind(
        checkup, "file", "are pages of files, which the page cache shares without KSM if equal."
    )


def _huge_pages(checkup: Checkup) -> Iterator[Answer]:
    return _kind(
        checkup,
        "huge",
        "are in transparent huge pages: KSM splits one where a part of it is equal to another.",
    )


def _never_merges(checkup: Checkup) -> Iterator[Answer]:
    subject = checkup.subject
    kinds = subject.kinds if subject else None
    if subject is None or kinds is None or subject.facts is None:
        return
    # What is swapped out, and zeros that were merged, are no more in RAM; they may be merged, too.
    away = kinds.swapped + subject.facts.memory.zero_pages * PAGE_SIZE
    mergeable, whole = kinds.mergeable + away, kinds.resident + away
    if whole >= LEAST_PROGRAM and mergeable < LITTLE * whole:
        yield Answer(
            f"KSM can gain hardly anything of {_called(subject)}: {mb(mergeable)} of "
            f"{mb(whole)} MB are memory that it may merge.",
            (),
            {"mergeable": mergeable, "whole": whole},
            NOTE if subject.facts.saved else PROBLEM,
        )


def _partly_opted_in(checkup: Checkup) -> Iterator[Answer]:
    subject = checkup.subject
    kinds = subject.kinds if subject and subject.opted_in else None
    if subject is None or kinds is None:
        return
    rest = kinds.mergeable - kinds.marked
    if rest >= LEAST_MEMORY and rest >= LITTLE * kinds.mergeable:
        yield Answer(
            f"{mb(kinds.marked)} of {mb(kinds.mergeable)} MB are opted in: the rest was mapped "
            "before, in small mappings, or taken out by the program.",
            (),
            {"marked": kinds.marked, "mergeable": kinds.mergeable},
        )


# ---- Nothing equal, and a loss -------------------------------------------------------------


def _layout_differs(checkup: Checkup) -> Iterator[Answer]:
    subject = checkup.subject
    found = subject.comparison if subject else None
    if subject is None or found is None or subject.kinds is None:
        return
    more = found.group_share - found.equal_share
    if more < LITTLE or more * subject.kinds.mergeable < LEAST_MEMORY:
        return
    yield Answer(
        f"Address-space randomization keeps {_called(subject)} and {subject.twin} apart: "
        f"{100 * found.equal_share:.0f} % of their pages are equal as they are, and in a group at "
        f"least {100 * found.group_share:.0f} % would be (what hash seeds make different is not "
        "in that: for Python and Perl much more).",
        (f"ksmtool try --arms plain,wrap,group -- {subject.again}",),
        {
            "pid": subject.twin or 0,
            "pages": found.pages,
            "equal_share": found.equal_share,
            "group_share": found.group_share,
        },
    )


def _process_loss(checkup: Checkup) -> Iterator[Answer]:
    subject = checkup.subject
    one = subject.facts if subject else None
    if subject is None or one is None or one.profit is None or one.profit > -LEAST_LOSS:
        return
    if _settled(checkup) and _looked_at([one]):
        unit = _service(subject)
        # The library heeds the variable; without it, only systemd takes back what it has set.
        how = "Environment=KSM_PRELOAD=off" if subject.loaded else "MemoryKSM=no"
        yield Answer(
            f"{_called(subject)} is merged at a loss: it saves {mb(one.saved or 0)} MB, and ksmd's "
            f"records of it take {mb(one.memory.rmap_items * RECORD_BYTES)} MB.",
            (_edited(unit, how) if unit else f"KSM_PRELOAD=off ksm-wrapper {subject.again}",),
            {
                "saved": one.saved or 0,
                "profit": one.profit,
                "merged": one.memory.merging_pages * PAGE_SIZE,
            },
        )


QUESTIONS = (
    Question("ksm-missing", PROBLEM, _ksm_missing),
    Question("ksm-off", PROBLEM, _ksm_off),
    Question("other-manager", PROBLEM, _other_manager),
    Question("state-damaged", PROBLEM, _state_damaged),
    Question("settings-drift", PROBLEM, _settings_drift),
    Question("not-kept", NOTE, _not_kept),
    Question("slow-scan", PROBLEM, _slow_scan),
    Question("nothing-opted-in", PROBLEM, _nothing_opted_in),
    Question("nothing-merged", NOTE, _nothing_merged),
    Question("machine-loss", PROBLEM, _machine_loss),
    Question("program-loss", NOTE, _program_loss),
    Question("preload-file", PROBLEM, _preload_file),
    Question("kill-switch", PROBLEM, _kill_switch),
    Question("policy-files", NOTE, _policy_files),
    Question("crowded-mappings", PROBLEM, _crowded_mappings),
    Question("host-of-container", NOTE, _in_container),
    Question("left-out", PROBLEM, _left_out),
    Question("off-by-environment", PROBLEM, _off_by_environment),
    Question("privileged", PROBLEM, _privileged),
    Question("static", PROBLEM, _static),
    Question("architecture", PROBLEM, _architecture),
    Question("musl", PROBLEM, _musl),
    Question("sanitizer", PROBLEM, _sanitizer),
    Question("confined", PROBLEM, _confined),
    Question("container", PROBLEM, _containered),
    Question("flag-lost", PROBLEM, _flag_lost),
    Question("started-before", PROBLEM, _started_before),
    Question("not-opted-in", PROBLEM, _not_opted_in),
    Question("shared-memory", NOTE, _shared_memory),
    Question("hugetlb", NOTE, _hugetlb),
    Question("file-memory", NOTE, _file_memory),
    Question("huge-pages", NOTE, _huge_pages),
    Question("never-merges", PROBLEM, _never_merges),
    Question("partly-opted-in", NOTE, _partly_opted_in),
    Question("layout-differs", NOTE, _layout_differs),
    Question("process-loss", PROBLEM, _process_loss),
)
"""All that is looked for: machine, program, memory."""
