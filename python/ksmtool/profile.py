# SPDX-License-Identifier: MIT
"""How fast ksmd scans: profiles, as the settings that this kernel has for them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SECONDS_PER_PAGE = 2.6e-6
"""ksmd's CPU time for a page it looks at, about; benchmarks/scan measures it."""

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
    why: str


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("gentle", 2, 600, "for laptops and for what rarely changes"),
        Profile("balanced", 15, 60, "for servers"),
        Profile("fast", 70, 20, "for many short-lived processes, where memory is what lacks"),
    )
}
SETTLING = Profile("settle", 100, 1, "until what is there is merged")


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
    advisor = found.get("advisor_mode", "")
    usable = advisor == "scan-time" or (advisor and ksmd_seconds <= _ADVISOR_LATEST)
    if usable and limit > _ADVISOR_LEAST_CPU and profile is not SETTLING:
        wanted["advisor_mode"] = "scan-time"
        wanted["advisor_max_cpu"] = str(limit)
        wanted["advisor_target_scan_time"] = str(profile.scan_seconds)
    else:
        wanted["advisor_mode"] = "none"
        wanted["pages_to_scan"] = str(pages_to_scan(limit))
    return {name: value for name, value in wanted.items() if name in found}


def pages_to_scan(cpu: int) -> int:
    """Return the pages for each time ksmd wakes that take `cpu` percent of one CPU."""
    if cpu >= 100:
        return 30000  # as much as the kernel's own advisor would give it
    busy = _SLEEP_MILLISECONDS / 1000 * cpu / (100 - cpu)
    return max(1, round(busy / SECONDS_PER_PAGE))
