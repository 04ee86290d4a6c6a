# SPDX-License-Identifier: MIT
"""`ksmtool export`: the metrics, both formats, and those who read them: node_exporter, promtool."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from conftest import AS_NOBODY, Tree, need, need_command, run
from ksmtool import cli, export, facts, usage
from ksmtool.errors import KsmtoolError
from ksmtool.facts import MachineFacts
from ksmtool.kernel import PAGE_SIZE
from machines import MACHINES

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
UNPACKED = ROOT / ".cache/packages/usr/bin"
LAST = "6.18, v2, Kubernetes"
EVIL = 'a"b\\c\nd\re\x01\u2028\x85{}=,\u00e9'
SHOWN = 'a"b\\c\\nd\\re\\x01\\u2028\\x85{}=,\u00e9'
"""Nothing that a terminal would obey."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def machine(tmp_path: Path) -> MachineFacts:
    return made(LAST, tmp_path)


def made(name: str, tmp_path: Path) -> MachineFacts:
    return facts.gather(MACHINES[name].make(tmp_path / "machine"))


def program(*names: str) -> str:
    """Return the path of a program that script/bootstrap unpacked, or that is installed."""
    path = os.pathsep.join((str(UNPACKED), os.environ["PATH"]))
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    need(found, f"no {names[0]}: script/bootstrap test")
    return str(found)


def parsed(text: bytes) -> Samples:
    """Return what OpenMetrics says: each series once, and an end."""
    result: Samples = {}
    families = openmetrics_parser.text_string_to_metric_families
    for family in families(text.decode()):  # type: ignore[no-untyped-call]
        for sample in family.samples:
            assert sample.timestamp is None
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in result
            result[key] = sample.value
    return result


def parsed_classic(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def plain(samples: Samples) -> dict[str, float]:
    """Return the samples without labels."""
    return {name: value for (name, labels), value in samples.items() if not labels}


def labelled(samples: Samples, name: str) -> dict[str, float]:
    """Return the value for each label of a metric that has one."""
    return {
        next(iter(labels))[1]: value for (found, labels), value in samples.items() if found == name
    }


# ---- Names and values ----------------------------------------------------------------------

NAMES = {
    "ksm_available",
    "ksm_cow_copies_total",
    "ksm_enabled",
    "ksm_full_scans_total",
    "ksm_ksmd_cpu_seconds_total",
    "ksm_merging",
    "ksm_opted_in_processes",
    "ksm_pages_scanned_total",
    "ksm_pages_to_scan",
    "ksm_pages_visited_total",
    "ksm_profile_info",
    "ksm_profit_bytes",
    "ksm_readable_processes",
    "ksm_records_bytes",
    "ksm_saved_bytes",
    "ksm_seen_timestamp_seconds",
    "ksm_settings_info",
    "ksm_shared_bytes",
    "ksm_sharing_bytes",
    "ksm_swapin_copies_total",
    "ksm_unreadable_processes",
    "ksm_unshared_bytes",
    "ksm_volatile_bytes",
    "ksm_zero_bytes",
}
EACH = {
    "anonymous_bytes",
    "merged_bytes",
    "opted_in_processes",
    "processes",
    "profit_bytes",
    "saved_bytes",
}
ALL_NAMES = NAMES | {f"ksm_{by}_{name}" for by in export.BY for name in EACH}

STATE = '{"schema": 1, "profile": "balanced", "cpu": 7, "found": {}}'


def test_the_names(tmp_path: Path) -> None:
    """Rules and dashboards of others depend on them: none is ever renamed."""
    root = MACHINES[LAST].make(tmp_path / "machine")
    (root / "var/lib/ksm-preload").mkdir(parents=True)
    (root / "var/lib/ksm-preload/kernel.json").write_text(STATE)
    samples = parsed(export.openmetrics(facts.gather(root), export.BY, 20))
    assert {name for name, _labels in samples} == ALL_NAMES
    assert not any(name.startswith("node_") for name in ALL_NAMES)
    assert samples["ksm_enabled", frozenset()] == 1
    labels = frozenset({"profile": "balanced", "cpu_percent": "7"}.items())
    assert samples["ksm_profile_info", labels] == 1


def test_the_machine(machine: MachineFacts) -> None:
    some = replace(machine, unreadable=3)
    samples = plain(parsed(export.openmetrics(some, ["app"], 20)))
    assert samples == {
        "ksm_available": 1,
        "ksm_cow_copies_total": 400,
        "ksm_enabled": 0,
        "ksm_full_scans_total": 12,
        "ksm_ksmd_cpu_seconds_total": 5,
        "ksm_merging": 1,
        "ksm_opted_in_processes": 11,
        "ksm_pages_scanned_total": 90000,
        "ksm_pages_to_scan": 100,
        "ksm_pages_visited_total": 100000,
        "ksm_profit_bytes": 8100 * PAGE_SIZE - 11000 * 64,
        "ksm_readable_processes": 22,
        "ksm_records_bytes": 11000 * 64,
        "ksm_saved_bytes": 8100 * PAGE_SIZE,
        "ksm_seen_timestamp_seconds": machine.time,
        "ksm_shared_bytes": 900 * PAGE_SIZE,
        "ksm_sharing_bytes": 8100 * PAGE_SIZE,
        "ksm_swapin_copies_total": 20,
        "ksm_unreadable_processes": 3,
        "ksm_unshared_bytes": 7000 * PAGE_SIZE,
        "ksm_volatile_bytes": 300 * PAGE_SIZE,
        "ksm_zero_bytes": 0,
    }


def test_each_app(machine: MachineFacts) -> None:
    samples = parsed(export.openmetrics(machine, ["app"], 20))
    assert labelled(samples, "ksm_app_saved_bytes") == {
        "/app/worker": 8100 * PAGE_SIZE,
        "/usr/bin/redis-server": 0,
        export.REST: 0,
    }
    profit = labelled(samples, "ksm_app_profit_bytes")
    assert profit["/usr/bin/redis-server"] == -64000
    assert profit["/app/worker"] == 8100 * PAGE_SIZE - 640000
    assert labelled(samples, "ksm_app_merged_bytes")["/app/worker"] == 9000 * PAGE_SIZE
    assert labelled(samples, "ksm_app_processes")["/app/worker"] == 10
    assert labelled(samples, "ksm_app_opted_in_processes")["/usr/bin/redis-server"] == 1
    assert labelled(samples, "ksm_app_anonymous_bytes")["/usr/bin/redis-server"] == (
        1000 * PAGE_SIZE
    )


def test_a_negative_profit(machine: MachineFacts) -> None:
    """Of the machine; node_exporter's own collector fails of it."""
    loss = replace(machine, counters=replace(machine.counters, general_profit_bytes=-4096))
    for text in (export.openmetrics(loss, ["app"], 20), export.classic(loss, ["app"], 20)):
        assert b"\nksm_profit_bytes -4096.0\n" in text


def test_settings(machine: MachineFacts) -> None:
    """Without those that the kernel's advisor changes: each change would be a new series."""
    samples = parsed(export.openmetrics(machine, ["app"], 20))
    (labels,) = [dict(labels) for name, labels in samples if name == "ksm_settings_info"]
    assert labels["advisor_mode"] == "none"
    assert labels["sleep_millisecs"] == "20"
    assert set(labels) == set(machine.settings) - {"run", "pages_to_scan"}


# What each kernel does not tell.
UNTOLD = {
    "ksm_cow_copies_total": (5, 19),
    "ksm_swapin_copies_total": (5, 19),
    "ksm_zero_bytes": (6, 6),
    "ksm_pages_scanned_total": (6, 6),
    "ksm_pages_visited_total": (6, 6),
    "ksm_unit_merged_bytes": (5, 19),
    "ksm_unit_saved_bytes": (5, 19),
    "ksm_unit_profit_bytes": (6, 1),
}


@pytest.mark.parametrize("name", MACHINES)
def test_other_kernels(name: str, tmp_path: Path) -> None:
    """What is not known has no sample: a 0 would be a lie."""
    machine = made(name, tmp_path)
    samples = parsed(export.openmetrics(machine, ["unit"], 20))
    missing = {one for one, since in UNTOLD.items() if MACHINES[name].kernel < since}
    units = {f"ksm_unit_{one}" for one in EACH}
    assert {one for one, _labels in samples} == (NAMES | units) - missing - {"ksm_profile_info"}
    values = plain(samples)
    assert values["ksm_saved_bytes"] == machine.saved
    assert values["ksm_profit_bytes"] == machine.profit
    processes = labelled(samples, "ksm_unit_processes")
    assert sum(processes.values()) == len(MACHINES[name].processes)
    with_something = {one.unit or "no unit" for one in machine.processes if one.memory.opted_in}
    assert set(processes) > with_something
    assert len(processes) == len(with_something) + 1


def test_without_ksm(tmp_path: Path) -> None:
    root = MACHINES[LAST].make(tmp_path / "machine")
    shutil.rmtree(root / "sys")
    samples = plain(parsed(export.openmetrics(facts.gather(root), ["app"], 20)))
    assert samples["ksm_available"] == 0
    assert samples["ksm_merging"] == 0
    assert samples["ksm_readable_processes"] == 22
    assert not {one for one in samples if one.endswith(("saved_bytes", "profit_bytes", "scan"))}
    assert "ksm_full_scans_total" not in samples


@pytest.mark.parametrize("name", MACHINES)
def test_both_formats_say_the_same(name: str, tmp_path: Path) -> None:
    machine = made(name, tmp_path)
    text = export.classic(machine, export.BY, 3).decode()
    assert parsed_classic(text) == parsed(export.openmetrics(machine, export.BY, 3))


# ---- Labels --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 20])
def test_the_limit(machine: MachineFacts, limit: int) -> None:
    """Sums stay whole; a loss counts as much as a profit, and what has neither is not named."""
    samples = parsed(export.openmetrics(machine, ["app"], limit))
    processes = labelled(samples, "ksm_app_processes")
    assert len(processes) == min(limit, 3)
    assert sum(processes.values()) == 22
    assert export.REST in processes
    assert sum(labelled(samples, "ksm_app_saved_bytes").values()) == 8100 * PAGE_SIZE
    kept = ["/app/worker", "/usr/bin/redis-server"][: limit - 1]
    assert set(kept) <= set(processes)


def named(machine: MachineFacts, *names: str) -> MachineFacts:
    """Return one with so many processes, of programs of those names."""
    opted_in = next(one for one in machine.processes if one.memory.opted_in)
    some = [replace(opted_in, pid=at, executable=one) for at, one in enumerate(names)]
    return replace(machine, processes=tuple(some))


def test_a_program_called_as_the_rest_is(machine: MachineFacts) -> None:
    """Two series with one name would make node_exporter refuse the file."""
    evil = named(machine, export.REST, "/a", "/b", f"({export.REST})")
    for limit in (1, 2, 3, 4):
        processes = labelled(parsed(export.openmetrics(evil, ["app"], limit)), "ksm_app_processes")
        assert sum(processes.values()) == 4
        assert len(processes) == limit


def test_labels_are_escaped(machine: MachineFacts) -> None:
    text = export.openmetrics(named(machine, EVIL), ["app"], 20)
    assert labelled(parsed(text), "ksm_app_processes") == {SHOWN: 1}


def test_a_name_that_is_not_utf8(machine: MachineFacts) -> None:
    """And one that looks like what becomes of it: they are one series."""
    evil = named(machine, os.fsdecode(b"/\xff"), "/\\udcff", "/\udcfe")
    text = export.openmetrics(evil, ["app"], 20)
    assert labelled(parsed(text), "ksm_app_processes") == {"/\\udcff": 2, "/\\udcfe": 1}


# ---- Files ---------------------------------------------------------------------------------


def test_a_file_for_node_exporter(tmp_path: Path) -> None:
    file = tmp_path / "x.prom"
    old = os.umask(0o077)
    try:
        export.write(file, b"a 1\n")
        export.write(file, b"a 2\n")
    finally:
        os.umask(old)
    assert file.read_bytes() == b"a 2\n"
    assert file.stat().st_mode & 0o7777 == 0o644
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "words"),
    [("x.txt", "does not end in .prom"), ("missing/x.prom", "There is no folder")],
)
def test_a_file_that_nobody_would_read(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KsmtoolError, match=words):
        export.write(tmp_path / name, b"a 1\n")
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "x.prom"
    file.write_bytes(b"a 1\n")
    (tmp_path / f".x.prom.{os.getpid()}.new").mkdir()  # where the new one would be written
    with pytest.raises(KsmtoolError, match="Cannot write"):
        export.write(file, b"a 2\n")
    assert file.read_bytes() == b"a 1\n"


@pytest.mark.parametrize("kind", ["link", "pipe", "link to a folder"])
def test_what_others_put_where_the_new_one_is_written(kind: str, tmp_path: Path) -> None:
    """The folder can be one that another user may write to."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"keep")
    file, new = tmp_path / "x.prom", tmp_path / f".x.prom.{os.getpid()}.new"
    if kind == "pipe":
        os.mkfifo(new)
    else:
        new.symlink_to(precious if kind == "link" else tmp_path)
    export.write(file, b"a 2\n")
    assert precious.read_bytes() == b"keep"
    assert file.read_bytes() == b"a 2\n"
    assert file.is_file()
    assert not file.is_symlink()
    assert sorted(tmp_path.iterdir()) == [precious, file]


def test_several_at_once(tmp_path: Path) -> None:
    """A reader sees one that is whole, whoever wrote it."""
    file = tmp_path / "x.prom"
    whole = {number: f"a {number}\n".encode() * 1000 for number in (1, 2)}
    code = (
        "import sys; from pathlib import Path; from ksmtool import export\n"
        "for _ in range(100):\n"
        "    export.write(Path(sys.argv[1]), f'a {sys.argv[2]}\\n'.encode() * 1000)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, file, str(n)]) for n in whole]
    while any(writer.poll() is None for writer in writers):
        assert not file.exists() or file.read_bytes() in whole.values()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [file]


# ---- The command ---------------------------------------------------------------------------


def test_the_command(tree: Tree, tmp_path: Path) -> None:
    options = ["--by", "app", "--by", "user", "--by", "app", "--limit", "2"]
    done = run([tree.ksmtool, "export", *options])
    assert (done.returncode, done.stderr) == (0, "")
    samples = parsed(done.stdout.encode())
    for by in ("app", "user"):
        assert 1 <= len(labelled(samples, f"ksm_{by}_processes")) <= 2
    file = tmp_path / "ksm.prom"
    done = run([tree.ksmtool, "export", "--textfile", file, *options])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {name for name, _labels in parsed_classic(file.read_text())} == {
        name for name, _labels in samples
    }


@pytest.mark.parametrize("options", [["--by", "process"], ["--limit", "0"], ["x"]])
def test_usage_errors(tree: Tree, options: list[str]) -> None:
    assert run([tree.ksmtool, "export", *options]).returncode == 2


def test_choices_are_those_that_there_are() -> None:
    """The command line names them without importing the module."""
    assert ["process", *export.BY] == list(usage.BY) == cli._BY


def test_without_the_library() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None; sys.argv = ['ksmtool', 'export']; "
        "from ksmtool.cli import main; main()"
    )
    done = run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "ksmtool: ksmtool export needs prometheus_client, which is not installed.\n"
        "hint: apt install python3-prometheus-client, or pip install 'ksm-preload[export]'\n"
    )


# ---- node_exporter -------------------------------------------------------------------------


@contextmanager
def node_exporter(folder: Path) -> Iterator[str]:
    """Run one that reads `folder` and nothing else, and yield its address: any free port."""
    command = [
        program("prometheus-node-exporter", "node_exporter"),
        "--web.listen-address=127.0.0.1:0",
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={folder}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield _address(process.stderr)
        finally:
            process.send_signal(signal.SIGTERM)


def _address(said: IO[str]) -> str:
    lines = []
    for line in said:
        lines.append(line)
        found = re.search(r"(?i)listening on.*address=(127\.0\.0\.1:\d+)", line)
        if found:
            return found[1]
    pytest.fail(f"node_exporter has ended: {''.join(lines)}")


def scraped(folder: Path) -> Samples:
    with node_exporter(folder) as address:
        url = f"http://{address}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return parsed_classic(answer.read().decode())


@pytest.mark.parametrize("name", MACHINES)
def test_node_exporter_reads_all_of_it(name: str, tmp_path: Path) -> None:
    machine = made(name, tmp_path)
    some = named(machine, EVIL, os.fsdecode(b"/\xff"))
    machine = replace(machine, processes=machine.processes + some.processes)
    folder = tmp_path / "textfile"
    folder.mkdir()
    export.write(folder / "ksm-preload.prom", export.classic(machine, export.BY, 20))
    found = scraped(folder)
    assert plain(found)["node_textfile_scrape_error"] == 0
    wanted = parsed(export.openmetrics(machine, export.BY, 20))
    assert SHOWN in labelled(wanted, "ksm_app_processes")
    assert {key: value for key, value in found.items() if key[0].startswith("ksm_")} == wanted


def test_node_exporter_does_not_read_openmetrics(machine: MachineFacts, tmp_path: Path) -> None:
    """Why a file is in another format than stdout; once this fails, it need not be."""
    folder = tmp_path / "textfile"
    folder.mkdir()
    export.write(folder / "ksm-preload.prom", export.openmetrics(machine, ["app"], 20))
    found = scraped(folder)
    assert plain(found)["node_textfile_scrape_error"] == 1
    assert not any(name.startswith("ksm_") for name, _labels in found)


# ---- promtool, rules, dashboard ------------------------------------------------------------


def promtool(*arguments: object, given: bytes = b"") -> str:
    """Run it, and return what it said; it has to be content."""
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


def test_promtool_finds_no_fault_with_names_and_types(machine: MachineFacts) -> None:
    assert promtool("check", "metrics", given=export.classic(machine, export.BY, 20)) == ""


RULES = DATA / "ksm-preload.rules.yml"
RULE_TESTS = ROOT / "tests/ksm-preload.rules.test.yml"


def test_the_rules() -> None:
    promtool("check", "rules", RULES)
    promtool("test", "rules", RULE_TESTS)


def test_each_alert_is_seen_to_fire() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES.read_text())
    tests = RULE_TESTS.read_text()
    assert len(alerts) == 6
    for one in alerts:
        assert re.search(rf"alertname: {one}\n +exp_alerts:\n +- exp_labels", tests), one
        assert re.search(rf"alertname: {one}\W+exp_alerts: \[\]", tests), one


DASHBOARD = json.loads((DATA / "ksm-preload-dashboard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
VARIABLES = [one["query"] for one in DASHBOARD["templating"]["list"][1:]]


def test_metrics_of_rules_and_dashboard_exist() -> None:
    rules = "\n".join(
        line for line in RULES.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    shown = json.dumps([EXPRESSIONS, VARIABLES])
    for text in (rules, shown):
        used = set(re.findall(r"\bksm_(?!preload)\w+", text))
        assert used
        assert used <= ALL_NAMES


def test_the_dashboard(tmp_path: Path) -> None:
    """Its queries are PromQL, and its panels do not lie on each other."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _y in cells) < 24
    rules = [
        {"record": f"x:{at}", "expr": one.replace("$instance", ".*")}
        for at, one in enumerate(EXPRESSIONS)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", file)


# ---- Documentation -------------------------------------------------------------------------


def test_the_documentation() -> None:
    """docs/export.md lists what there is, in the words of the metrics themselves."""
    text = (ROOT / "docs/export.md").read_text()
    rows = re.findall(r"^\| `(ksm_\S+)` \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    wanted = [(one.name, one.kind, one.help) for one in export.MACHINE]
    wanted += [(name, "info", help_) for name, (help_, _labels) in export.INFOS.items()]
    wanted += [(f"ksm_app_{one.name}", one.kind, f"{one.help}.") for one in export.EACH]
    assert rows == wanted


# ---- systemd -------------------------------------------------------------------------------

SERVICE = (DATA / "ksm-preload-export.service.in").read_text()


def test_the_units(tree: Tree, tmp_path: Path) -> None:
    verify = need_command("systemd-analyze")
    service = tmp_path / "ksm-preload-export.service"
    service.write_text(
        SERVICE.replace("@BINDIR@", str(tree.ksmtool.parent)).replace("@DOCDIR@", "/usr/share/doc")
    )
    timer = Path(shutil.copy(DATA / "ksm-preload-export.timer", tmp_path))
    done = run([verify, "verify", "--man=no", service, timer])
    complaints = [line for line in done.stderr.splitlines() if "ksm-preload-export" in line]
    assert (done.returncode, complaints) == (0, [])


@pytest.mark.root
def test_the_capabilities_are_enough(tree: Tree, public_tree: Tree, tmp_path: Path) -> None:
    """To look at others' processes, and without them it is not."""
    (words,) = re.findall(r"^CapabilityBoundingSet=(.*)$", SERVICE, re.MULTILINE)
    some = ",".join(f"+{one.lower().removeprefix('cap_')}" for one in words.split())
    need_command("setpriv")
    with subprocess.Popen(
        [*AS_NOBODY, public_tree.wrapper, "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE
    ) as sleeping:
        try:
            assert sleeping.stdout is not None
            sleeping.stdout.readline()
            need(_nobodys(tree, tmp_path), "this root may not look at others' processes")
            seen = [_nobodys(tree, tmp_path, f"-all,{some}"), _nobodys(tree, tmp_path, "-all")]
        finally:
            sleeping.kill()
    assert seen[0] >= 1
    assert seen[1] == 0


def _nobodys(tree: Tree, folder: Path, capabilities: str = "") -> float:
    """Return how many processes of nobody are seen with so many capabilities, "" for ours."""
    file = folder / "x.prom"
    options = ["--textfile", file, "--by", "user", "--limit", "1000"]
    limited = ["setpriv", f"--bounding-set={capabilities}"] if capabilities else []
    done = run([*limited, tree.ksmtool, "export", *options])
    assert (done.returncode, done.stderr) == (0, "")
    return labelled(parsed_classic(file.read_text()), "ksm_user_processes").get("nobody", 0)
