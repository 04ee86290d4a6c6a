# SPDX-License-Identifier: MIT
"""The doctor's findings for people (lines) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from ksmtool import doctor
from ksmtool.doctor import Finding
from ksmtool.examine import Checkup
from ksmtool.overview import printable

SCHEMA = 1


def lines(checkup: Checkup, findings: Sequence[Finding]) -> list[str]:
    """Return the verdict, then each finding with what puts it right."""
    said = [doctor.verdict(checkup, findings)]
    for one in findings:
        said += ["", f"{one.severity} {one.id}: {one.sentence}"]
        said += [f"  {'or:' if at else 'fix:':5}{fix}" for at, fix in enumerate(one.fixes)]
    said += [""] if checkup.unlooked else []
    said += [f"Not looked at: {what}" for what in checkup.unlooked]
    return [printable(line) for line in said]


def as_json(checkup: Checkup, findings: Sequence[Finding]) -> str:
    """Return all of it as JSON, schema 1; the numbers of `evidence` are in bytes and seconds."""
    subject = checkup.subject
    document = {
        "schema": SCHEMA,
        "time": checkup.machine.time,
        "healthy": doctor.healthy(findings),
        "verdict": doctor.verdict(checkup, findings),
        "subject": None
        if subject is None
        else {
            "pid": subject.pid,
            "name": subject.name,
            "command": list(subject.command),
            "opted_in": subject.opted_in if subject.pid is not None else None,
            "memory": asdict(subject.kinds) if subject.kinds else None,
        },
        "findings": [asdict(one) for one in findings],
        "unlooked": list(checkup.unlooked),
    }
    return json.dumps(document, indent=2)
