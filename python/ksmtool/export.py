# SPDX-License-Identifier: MIT
"""What is known of the machine as metrics for Prometheus; needs the extra `ksm-preload[export]`.

Names and units follow Prometheus's conventions: bytes and seconds, `_total` for what only grows.
All begin with `ksm_`; those of node_exporter's own collector begin with `node_ksmd_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from ksmtool import atomic, usage
from ksmtool.errors import KsmtoolError
from ksmtool.facts import MachineFacts, ProcessFacts
from ksmtool.kernel import PAGE_SIZE
from ksmtool.usage import Row

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

BY = ("app", "unit", "container", "user")
"""What there are series for; processes come and go, and each would leave a series behind."""
REST = "(rest)"
"""The name of the series that stands for all that did not fit."""
SUFFIX = ".prom"
"""Of the files that node_exporter reads."""

_Of = TypeVar("_Of")
_NOT_SETTINGS = ("run", "pages_to_scan")
"""Metrics of their own: a label that changes makes a new series, and the advisor changes these."""


@dataclass(frozen=True)
class Metric(Generic[_Of]):
    """A number of something, and how to get it."""

    name: str
    help: str
    value: Callable[[_Of], float | None]
    """None for what this kernel does not tell: there is no sample then."""

    @property
    def kind(self) -> str:
        """Return counter or gauge."""
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def unit(self) -> str:
        """Return the unit, "" for a plain number."""
        last = self.name.removesuffix("_total").rpartition("_")[2]
        return last if last in ("bytes", "seconds") else ""


def _pages(count: Callable[[MachineFacts], int]) -> Callable[[MachineFacts], float | None]:
    """Return what gives the bytes of so many pages; there are none without KSM."""
    return lambda one: count(one) * PAGE_SIZE if one.available else None


MACHINE: tuple[Metric[MachineFacts], ...] = (
    Metric(
        "ksm_seen_timestamp_seconds",
        "When all this was looked at, in seconds since 1970.",
        lambda one: one.time,
    ),
    Metric("ksm_available", "1 if this kernel has KSM, else 0.", lambda one: one.available),
    Metric(
        "ksm_enabled",
        "1 if ksmtool kernel-enable is in force, else 0.",
        lambda one: one.setup.state is not None,
    ),
    Metric("ksm_merging", "1 if ksmd runs, else 0.", lambda one: one.merging),
    Metric(
        "ksm_saved_bytes",
        "Page frames that are not needed because of merging.",
        lambda one: one.saved if one.available else None,
    ),
    Metric(
        "ksm_profit_bytes",
        "What is saved less the kernel's records (general_profit); negative for a loss.",
        lambda one: one.profit if one.available else None,
    ),
    Metric(
        "ksm_records_bytes",
        "Kernel memory for ksmd's records of the pages it looks at.",
        lambda one: one.saved - one.profit if one.available else None,
    ),
    Metric(
        "ksm_shared_bytes",
        "Pages that are kept in the place of equal ones (pages_shared).",
        _pages(lambda one: one.counters.pages_shared),
    ),
    Metric(
        "ksm_sharing_bytes",
        "Pages that are spared because of those (pages_sharing).",
        _pages(lambda one: one.counters.pages_sharing),
    ),
    Metric(
        "ksm_unshared_bytes",
        "Pages that were looked at and have no equal (pages_unshared).",
        _pages(lambda one: one.counters.pages_unshared),
    ),
    Metric(
        "ksm_volatile_bytes",
        "Pages that change too fast to be merged (pages_volatile).",
        _pages(lambda one: one.counters.pages_volatile),
    ),
    Metric(
        "ksm_zero_bytes",
        "Pages of zeros that KSM made the kernel's own one (ksm_zero_pages).",
        # Counted since the release that counts what ksmd visits.
        lambda one: None if one.sample.visited is None else one.counters.zero_pages * PAGE_SIZE,
    ),
    Metric(
        "ksm_ksmd_cpu_seconds_total",
        "CPU time of ksmd since boot.",
        lambda one: one.sample.cpu_seconds,
    ),
    Metric(
        "ksm_full_scans_total",
        "Passes of ksmd over all opted-in memory; from 0 again after everything is unmerged.",
        lambda one: one.counters.full_scans if one.available else None,
    ),
    Metric(
        "ksm_pages_scanned_total",
        "Pages that ksmd has looked at (pages_scanned).",
        lambda one: one.counters.pages_scanned,
    ),
    Metric(
        "ksm_pages_visited_total",
        "Pages that ksmd has looked at, or skipped by smart_scan.",
        lambda one: one.sample.visited,
    ),
    Metric(
        "ksm_cow_copies_total",
        "Merged pages that were copied because they were written to (cow_ksm).",
        lambda one: one.copied.get("cow_ksm"),
    ),
    Metric(
        "ksm_swapin_copies_total",
        "Merged pages that were copied when they were swapped in (ksm_swpin_copy).",
        lambda one: one.copied.get("ksm_swpin_copy"),
    ),
    Metric(
        "ksm_pages_to_scan",
        "Pages that ksmd looks at before each rest (pages_to_scan).",
        lambda one: int(one.settings["pages_to_scan"]) if one.available else None,
    ),
    Metric(
        "ksm_opted_in_processes",
        "Processes that are opted in to KSM.",
        lambda one: one.opted_in,
    ),
    Metric(
        "ksm_readable_processes",
        "Processes that could be looked at, opted in or not.",
        lambda one: len(one.processes),
    ),
    Metric(
        "ksm_unreadable_processes",
        "Processes that could not be looked at and are in no other number of processes.",
        lambda one: one.unreadable,
    ),
)

INFOS: Mapping[str, tuple[str, Callable[[MachineFacts], dict[str, str]]]] = {
    "ksm_settings_info": (
        "The kernel's settings of KSM, without run and pages_to_scan.",
        lambda one: {
            name: value for name, value in one.settings.items() if name not in _NOT_SETTINGS
        },
    ),
    "ksm_profile_info": (
        "The profile of ksmtool kernel-enable, and its limit in percent of a CPU.",
        lambda one: (
            {"profile": one.setup.state.profile, "cpu_percent": str(one.setup.state.limit)}
            if one.setup.state
            else {}
        ),
    ),
}
"""What is a text: the value is 1, the texts are labels."""

EACH: tuple[Metric[Row], ...] = (
    Metric("processes", "Processes", lambda row: row.processes),
    Metric("opted_in_processes", "Processes that are opted in to KSM", lambda row: row.opted_in),
    Metric(
        "anonymous_bytes",
        "Anonymous memory, each page in every process that has it",
        lambda row: row.anonymous,
    ),
    Metric(
        "merged_bytes",
        "Mappings of merged pages, the copies that stay among them",
        # Where this is not counted, nothing is known to be saved.
        lambda row: None if row.saved is None else row.merged,
    ),
    Metric("saved_bytes", "Its part of ksm_saved_bytes", lambda row: row.saved),
    Metric(
        "profit_bytes",
        "What it saves less the kernel's records of it; negative for a loss",
        lambda row: row.profit,
    ),
)
"""Of each app, unit, container or user: what follows `ksm_app_` and so on."""


def _require() -> None:
    """Raise KsmtoolError if prometheus_client is missing."""
    try:
        import prometheus_client.openmetrics  # noqa: F401, PLC0415
    except ImportError as error:
        raise KsmtoolError(
            "ksmtool export needs prometheus_client, which is not installed.",
            "apt install python3-prometheus-client, or pip install 'ksm-preload[export]'",
        ) from error


def openmetrics(machine: MachineFacts, by: Iterable[str], limit: int) -> bytes:
    """Return all of it as OpenMetrics 1.0. Raises KsmtoolError if prometheus_client is missing."""
    _require()
    from prometheus_client.openmetrics.exposition import generate_latest  # noqa: PLC0415

    return _generated(generate_latest, machine, by, limit)


def classic(machine: MachineFacts, by: Iterable[str], limit: int) -> bytes:
    """Return the same in Prometheus's text format 0.0.4. Raises KsmtoolError as `openmetrics`.

    It is the only one that node_exporter's textfile collector reads: for a file with the type
    `info` it has an error and no metric.
    """
    _require()
    from prometheus_client.exposition import generate_latest  # noqa: PLC0415

    return _generated(generate_latest, machine, by, limit)


def write(file: Path, content: bytes) -> None:
    """Put `content` where node_exporter reads it. Raises KsmtoolError, and the old file is there.

    The folder has to be there: one that is made because of a slip is one that nobody reads.
    """
    if file.suffix != SUFFIX:
        raise KsmtoolError(
            f"{file} does not end in {SUFFIX}: node_exporter reads no other files of its folder."
        )
    if not file.parent.is_dir():
        raise KsmtoolError(
            f"There is no folder {file.parent}.",
            "It is what node_exporter is given with --collector.textfile.directory; "
            "/var/lib/prometheus/node-exporter on Debian.",
        )
    try:
        atomic.write(file, content)
    except OSError as error:
        raise KsmtoolError(f"Cannot write {file}: {error.strerror}.") from error


def rows(processes: Iterable[ProcessFacts], by: str, limit: int) -> list[Row]:
    """Return at most `limit` rows, the largest profits and losses; the last stands for the rest.

    So do those of which KSM has nothing: each would leave a series behind for having been there.
    Its name is REST, or that in more brackets if something is called so.
    """
    found = usage.rows(map(_labelled, processes), by)
    found.sort(key=lambda row: (abs(row.profit or row.saved or 0), _known(row)), reverse=True)
    names = {row.name for row in found}
    rest = REST
    while rest in names:
        rest = f"({rest})"
    known = sum(map(_known, found))
    shown = usage.limited(found, min(limit, known + 1))
    return [replace(row, name=rest) if row.rest else row for row in shown]


def _known(row: Row) -> bool:
    """Whether KSM has anything of it."""
    return bool(row.opted_in or row.merged or row.profit)


def _labelled(one: ProcessFacts) -> ProcessFacts:
    """Return it with names that are UTF-8: a file may have any, but one label spoils them all.

    Before processes are put together, so that no two series have the same label.
    """
    return replace(
        one,
        name=_escaped(one.name),
        executable=_escaped(one.executable),
        unit=_escaped(one.unit),
        container=_escaped(one.container),
        user=_escaped(one.user),
    )


def _escaped(text: str) -> str:
    """Return it with what is no character to be shown as \\x1b, \\udcff and so on."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


@dataclass(frozen=True, eq=False)  # the library keeps it in a dictionary
class _Collector:
    """What the library takes families from."""

    machine: MachineFacts
    by: Sequence[str]
    limit: int

    def collect(self) -> Iterator[Family]:
        for metric in MACHINE:
            value = metric.value(self.machine)
            if value is not None:
                yield _family(metric, metric.name, metric.help, {(): value}, ())
        for name, (help_, labels) in INFOS.items():
            yield from _info(name, help_, labels(self.machine))
        for by in self.by:
            found = rows(self.machine.processes, by, self.limit)
            for each in EACH:
                known: dict[tuple[str, ...], float] = {}
                for row in found:
                    value = each.value(row)
                    if value is not None:
                        known[row.name,] = value
                if known:
                    help_ = f"{each.help}, by {by}."
                    yield _family(each, f"ksm_{by}_{each.name}", help_, known, (by,))


def _family(
    metric: Metric[_Of],
    name: str,
    help_: str,
    values: Mapping[tuple[str, ...], float],
    labels: Sequence[str],
) -> Family:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

    family: CounterMetricFamily | GaugeMetricFamily
    if metric.kind == "counter":
        family = CounterMetricFamily(name, help_, labels=labels, unit=metric.unit)
    else:
        family = GaugeMetricFamily(name, help_, labels=labels, unit=metric.unit)
    for names, value in values.items():
        family.add_metric(names, float(value))
    return family


def _info(name: str, help_: str, labels: Mapping[str, str]) -> Iterator[Family]:
    from prometheus_client.core import InfoMetricFamily  # noqa: PLC0415

    if labels:
        yield InfoMetricFamily(name.removesuffix("_info"), help_, value=dict(labels))


def _generated(
    generate: Callable[..., bytes], machine: MachineFacts, by: Iterable[str], limit: int
) -> bytes:
    from prometheus_client import CollectorRegistry  # noqa: PLC0415

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(machine, tuple(dict.fromkeys(by)), limit))
    return generate(registry)
