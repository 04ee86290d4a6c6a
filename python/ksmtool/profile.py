# SPDX-License-Identifier: MIT
"""How fast ksmd scans: profiles, as the settings that this kernel has for them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SECONDS_PER_PAGE = 2.6e-6
"""ksmd's CPU time for a page that it merges, about. One that stays as it is takes a third: in
benchmarks.scan ksmd is at 4.6 % of a CPU at the rate for 15 %."""

_SLEEP_MILLISECONDS = 20
_ADVISOR_LEAST_CPU = 10  # KSM_ADVISOR_MIN_CPU of mm/ksm.c (6.8): below it, it does not go

_ADVISOR_LATEST = 0.1
"""The most CPU seconds that ksmd may have used since boot for the advisor to be switched on.

It takes all of them for its first pass (scan_time_advisor of mm/ksm.c, 6.18: advisor_ctx.cpu_time
begins at 0), finds that dear, and goes down to 10 pages each 20 ms for the next one.
"""


@dataclass(frozen=True)
class Profile:
    """What ksmd may cost, and how soon it should have seen everything."""

    name: str
    cpu: int
    """Percent of one CPU, at most."""
    scan_seconds: int
    """What the kernel's advisor (Linux 6.8) tries to make a pass take, within that."""


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("gentle", 2, 600),
        Profile("balanced", 15, 60),
        Profile("fast", 70, 20),
    )
}

SETS = (
    "run",
    "use_zero_pages",
    "smart_scan",
    "sleep_millisecs",
    "pages_to_scan",
    "advisor_mode",
    "advisor_max_cpu",
    "advisor_target_scan_time",
)
"""All that a profile can set."""

DEFAULTS = {
    "run": "0",
    "use_zero_pages": "0",
    "smart_scan": "1",
    "sleep_millisecs": "20",
    "pages_to_scan": "100",
    "advisor_mode": "none",
    "advisor_max_cpu": "70",
    "advisor_target_scan_time": "200",
}
"""What the kernel has after boot (mm/ksm.c, 6.18)."""


def settings(
    profile: Profile,
    found: Mapping[str, str],
    cpu: int | None = None,
    ksmd_seconds: float = 0.0,
) -> dict[str, str]:
    """Return the settings of a profile for a kernel that has those of `found`.

    `cpu` is another limit, in percent of a CPU. The kernel's advisor chooses the rate where there
    is one, the limit is above the 10 % under which it never goes, and it is on already or can be
    switched on: ksmd has used `ksmd_seconds` of CPU time. Elsewhere the rate is one that comes to
    the limit.
    """
    limit = profile.cpu if cpu is None else cpu
    wanted = {"run": "1", "use_zero_pages": "1", "smart_scan": "1"}
    wanted["sleep_millisecs"] = str(_SLEEP_MILLISECONDS)
    on = found.get("advisor_mode") == "scan-time"
    if advisable(found, limit) and (on or ksmd_seconds <= _ADVISOR_LATEST):
        wanted["advisor_mode"] = "scan-time"
        wanted["advisor_max_cpu"] = str(limit)
        wanted["advisor_target_scan_time"] = str(profile.scan_seconds)
    else:
        wanted["advisor_mode"] = "none"
        wanted["pages_to_scan"] = str(pages_to_scan(limit))
    return {name: value for name, value in wanted.items() if name in found}


def advisable(found: Mapping[str, str], limit: int) -> bool:
    """Whether the kernel's advisor could keep a limit, in percent of a CPU."""
    return "advisor_mode" in found and limit > _ADVISOR_LEAST_CPU


def settling(found: Mapping[str, str]) -> dict[str, str]:
    """Return the settings by which ksmd does not pause, for a kernel that has those of `found`.

    An advisor that is on stays on, since it could not be switched on again: it is told to hurry.
    """
    wanted = {"run": "1", "sleep_millisecs": "0"}
    if found.get("advisor_mode") == "scan-time":
        return {**wanted, "advisor_max_cpu": "100", "advisor_target_scan_time": "1"}
    return {**wanted, "pages_to_scan": "1000"}


def pages_to_scan(cpu: int) -> int:
    """Return the pages for each time ksmd wakes that take `cpu` percent of one CPU.

    At most as many as the kernel's own advisor would take: above 80 % nothing more is to be had.
    """
    busy = _SLEEP_MILLISECONDS / 1000 * cpu / max(100 - cpu, 1)
    return min(max(1, round(busy / SECONDS_PER_PAGE)), _MOST_PAGES)


_MOST_PAGES = 30000
