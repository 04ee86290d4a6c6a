# SPDX-License-Identifier: MIT
"""What has to hold for groups on a real kernel, x86_64 or aarch64. test_vm.py runs it in QEMU."""

from __future__ import annotations

import os
import platform
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from conftest import AS_NOBODY, Tree, Victims, facts, run, wait_until
from ksmtool import process
from ksmtool.kernel import PAGE_SIZE, Ksm
from test_shim import PLAIN, Way, holding

METHOD = os.environ["KSM_TEST_METHOD"]
"""How this kernel opts in by itself."""

UNSUPPORTED = 4

REGIONS = ("program", "ld.so", "libc", "vdso", "heap", "stack")

Report = dict[str, list[str]]


@pytest.fixture(scope="session")
def reason_against_ksm() -> None:
    """Every kernel here has KSM: conftest asks for the prctl too."""


@pytest.fixture
def group() -> str:
    """Return the name of a group that nobody has used."""
    return f"g{secrets.token_hex(8)}"


@pytest.fixture(params=["dynamic", "static-pie", "no-pie"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def moves(kind: str) -> set[str]:
    """Return the regions of a program of that kind that its group places."""
    absent = {"static-pie": {"ld.so", "libc"}, "no-pie": {"program"}}
    return set(REGIONS) - absent.get(kind, set())


def member(tree: Tree, group: str, *options: str) -> Way:
    """Return how to start a program in a group, or it does not start."""
    return Way((tree.wrapper, "--group", group, "--group-required", *options))


def places(report: Report, program: str = "/whereabouts-") -> dict[str, int]:
    """Return where each region begins, or for the stack ends. Each has a line, and one only."""
    patterns = {
        "program": re.escape(program),
        "ld.so": r"/ld-[^/]*\.so",
        "libc": r"/libc\.so",
        "vdso": r"\[vdso\]",
        "heap": r"\[heap\]",
        "stack": r"\[stack\]",
    }
    found = {}
    for region, pattern in patterns.items():
        lines = [line for line in report["map"] if re.search(pattern, line)]
        if lines:
            start = lines[0].partition("-")[0]
            end = lines[-1].partition("-")[2].partition(" ")[0]
            found[region] = int(end if region == "stack" else start, 16)
    return found


def addresses(report: Report) -> dict[str, int]:
    """Return the addresses that the program uses itself."""
    return {name: int(value, 0) for name, value in (line.split() for line in report["at"])}


def is_whole(report: Report) -> None:
    """Check that all that program and kernel say of its memory is one and the same."""
    for key in ("cmdline", "environ", "auxv", "grows"):
        assert report[key] == ["yes"], key
    used = addresses(report)
    spans: dict[str, list[tuple[int, int]]] = {"[heap]": [], "[stack]": [], "[vdso]": []}
    for line in report["map"]:
        bounds, *rest = line.split()
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if rest[-1] in spans:
            spans[rest[-1]].append((low, high))
    for name, label in (
        *((name, "[heap]") for name in ("malloc",)),
        *((name, "[stack]") for name in ("stack", "execfn", "random")),
        ("vdso", "[vdso]"),
    ):
        assert any(low <= used[name] < high for low, high in spans[label]), (name, label)
    assert any(low < used["break"] <= high for low, high in spans["[heap]"])
    assert report["platform"] == [platform.machine()]


def settings(report: Report) -> Report:
    """Return what an exec in a group may not change."""
    keys = ("stack_limit", "personality", "child", "pending", "blocked", "TracerPid:", "Name:")
    return {key: report[key] for key in (*keys, "execfn")}


# --- one layout for a group ---


def test_members_agree_and_nobody_else(
    tree: Tree, victims: Victims, kind: str, group: str, measured: Callable[[str], None]
) -> None:
    program = victims("whereabouts", kind)
    ours, again, others = (
        facts(member(tree, name).run([program])) for name in (group, group, f"{group}.other")
    )
    plain = facts(PLAIN.run([program]))
    for report in (ours, again, others, plain):
        is_whole(report)
        assert settings(report) == settings(plain)

    # Not a byte differs but for AT_RANDOM's, which stay secret.
    assert ours.pop("random") != again.pop("random")
    assert ours == again

    where = places(ours)
    for stranger in (places(others), places(plain)):
        assert stranger.keys() == where.keys()
        same = {region for region in where if where[region] == stranger[region]}
        assert same == set(where) - moves(kind)
    shown = ", ".join(f"{region} {address:#x}" for region, address in where.items())
    measured(f"{kind} in a group: {shown}")
    shown = ", ".join(f"{region} {address:#x}" for region, address in places(plain).items())
    measured(f"{kind} plain: {shown}")


def test_a_members_layout_is_random_in_many_bits(
    tree: Tree, victims: Victims, kind: str, group: str, measured: Callable[[str], None]
) -> None:
    """A bit that varies fails to do so in 24 groups once in 8 million."""
    program = victims("whereabouts", kind)
    found = [
        places(facts(member(tree, f"{group}.{number}").run([program]))) for number in range(24)
    ]
    varied = {
        region: bin(_or(place[region] ^ found[0][region] for place in found)).count("1")
        for region in found[0]
    }
    measured(f"{kind}: bits that vary: {varied}")
    least = {"program": 28, "ld.so": 28, "libc": 28, "vdso": 28, "heap": 18, "stack": 22}
    if platform.machine() == "aarch64":  # what is in files is aligned for pages of 64 KiB
        least["libc"] = 24
        least["program"] = 24 if kind == "static-pie" else 28
    for region in moves(kind):
        assert varied[region] >= least[region]
    # So it is the group's as well, not drawn by the kernel beside it.
    first = "program" if kind == "static-pie" else "ld.so"
    assert len({place["vdso"] - place[first] for place in found}) <= 16


def test_a_long_command_line_and_environment(tree: Tree, victims: Victims, group: str) -> None:
    """On x86_64 the kernel looks for a place for the vdso above the stack pointer first."""
    command, env = [victims("whereabouts"), *["x" * 100_000] * 10], {"LONG": "y" * 100_000}
    ours, again = (facts(member(tree, group).run(command, env)) for _ in range(2))
    is_whole(ours)
    assert places(ours) == places(again)
    short = places(facts(member(tree, group).run([victims("whereabouts")])))
    assert {**places(ours), "stack": 0} == {**short, "stack": 0}


def _or(numbers: Iterator[int]) -> int:
    result = 0
    for number in numbers:
        result |= number
    return result


@pytest.mark.parametrize("limit", ["1234", "65536", "unlimited"])
def test_settings_are_those_before(tree: Tree, victims: Victims, group: str, limit: str) -> None:
    command = ["sh", "-c", f'ulimit -Ss {limit} && exec "$@"', "sh"]
    ours, plain = (
        facts(run([*command, *way.prefix, victims("whereabouts")]))
        for way in (member(tree, group), PLAIN)
    )
    number = str(2**64 - 1) if limit == "unlimited" else str(int(limit) * 1024)
    assert ours["stack_limit"][0].split()[0] == number
    assert settings(ours) == settings(plain)
    is_whole(ours)


def wrappers() -> set[str]:
    """Return the processes of ksm-wrapper and its helpers, also those that only wait for init."""
    return {path.parent.name for path in Path("/proc").glob("[0-9]*/comm") if _is_wrapper(path)}


def _is_wrapper(comm: Path) -> bool:
    try:
        return comm.read_text() == "ksm-wrapper\n"
    except OSError:  # ended meanwhile
        return False


def test_no_process_is_left_and_the_pid_is_the_programs(tree: Tree, group: str) -> None:
    command = [*map(str, member(tree, group).prefix), "sh", "-c", "echo $$; read line"]
    before = wrappers()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == f"{started.pid}\n"
        # The helper lets go before it ends.
        wait_until(lambda: wrappers() <= before, 10, "no helper is left")
        status = Path(f"/proc/{started.pid}/status").read_text()
        assert re.search(r"^TracerPid:\t0$", status, re.MULTILINE)
        assert Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text() == ""
        started.communicate("\n")
    assert started.returncode == 0


def test_an_unprivileged_user_under_yama(tree: Tree, victims: Victims, group: str) -> None:
    """The usual setting of most distributions: only a parent may trace, or who was named."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    before = scope.read_text()
    scope.write_text("1")
    try:
        command = [*AS_NOBODY, *member(tree, group).prefix, victims("whereabouts")]
        ours, again = facts(run(command)), facts(run(command))
    finally:
        scope.write_text(before)
    plain = facts(run([*AS_NOBODY, victims("whereabouts")]))
    is_whole(ours)
    assert settings(ours) == settings(plain)
    assert places(ours) == places(again)
    assert not set(places(ours).items()) & set(places(plain).items())


# --- what members start ---


def test_a_fork_keeps_the_layout(tree: Tree, victims: Victims, kind: str, group: str) -> None:
    program = victims("whereabouts", kind)
    ours = facts(member(tree, group).run([program]))
    child = facts(member(tree, group).run([program, "--fork"]))
    is_whole(child)
    assert places(child) == places(ours)


CHAINS = {
    "exec": ("sh", "-c", 'exec "$@"', "sh"),
    "fork and exec": ("sh", "-c", '"$@"; exit $?', "sh"),
    "env and setsid": ("env", "A=b", "setsid", "--wait"),
    "nohup in a pipe": ("sh", "-c", 'nohup "$@" | cat', "sh"),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_an_exec_loses_the_layout_without_follow(
    tree: Tree, victims: Victims, chain: str, group: str
) -> None:
    program = victims("whereabouts")
    ours = facts(member(tree, group).run([program]))
    started = facts(member(tree, group).run([*CHAINS[chain], program]))
    plain = facts(PLAIN.run([program]))
    is_whole(started)
    assert settings(started) == settings(plain)
    assert not set(places(started).items()) & set(places(ours).items())


@pytest.mark.parametrize("chain", CHAINS)
def test_an_exec_keeps_the_layout_with_follow(
    tree: Tree, victims: Victims, chain: str, group: str
) -> None:
    program, way = victims("whereabouts"), member(tree, group, "--follow")
    ours, followed = facts(way.run([program])), way.run([*CHAINS[chain], program])
    plain = facts(PLAIN.run([program]))
    assert followed.stderr in ("", "nohup: ignoring input\n")
    started = facts(followed)
    is_whole(started)
    assert {**settings(started), "execfn": []} == {**settings(plain), "execfn": []}
    assert places(started) == places(ours)


def test_follow_through_a_script(tree: Tree, victims: Victims, group: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh -e\n{victims('whereabouts')}\nexit 0\n")
    script.chmod(0o755)
    way = member(tree, group, "--follow")
    ours = facts(way.run([victims("whereabouts")]))
    assert places(facts(way.run([script]))) == places(ours)
    assert places(facts(way.run(["sh", "-c", f"{script} & wait $!"]))) == places(ours)


# --- who is a member ---


def test_members_are_listed(tree: Tree, victims: Victims, group: str) -> None:
    pages = [[victims("pages", kind), 1, 1, 1] for kind in ("dynamic", "static-pie")]
    ours, others = member(tree, group), member(tree, f"{group}.other")
    started = [(way, command) for way in (ours, others, PLAIN) for command in pages]
    with holding(started) as pids:
        for name, expected in ((group, pids[:2]), (f"{group}.other", pids[2:4])):
            done = run([tree.wrapper, "--group", name, "--members"])
            assert (done.returncode, done.stderr) == (0, "")
            assert sorted(map(int, done.stdout.split())) == sorted(expected)
    done = run([tree.wrapper, "--group", group, "--members"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- merging ---

PYTHON = """
import sys
table = {str(number): [number, str(number)] for number in range(40_000)}
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["pointers", "python3"])
def program(request: pytest.FixtureRequest, victims: Victims) -> Sequence[object]:
    if request.param == "pointers":
        return [victims("pointers"), 1000]
    return [sys.executable, "-c", PYTHON]


def wait_for_scans(ksm: Ksm, count: int) -> None:
    """Wait until ksmd has gone over everything so many times more."""
    wanted = ksm.counters().full_scans + count
    wait_until(lambda: ksm.counters().full_scans >= wanted, 120, f"{count} whole scans")


def test_members_merge_what_others_cannot(
    tree: Tree, program: Sequence[object], group: str, ksm: Ksm, measured: Callable[[str], None]
) -> None:
    shares = {}
    for name, way in (("apart", Way((tree.wrapper,))), ("group", member(tree, group))):
        ksm.write("run", 2)
        wait_until(lambda: ksm.counters().pages_sharing == 0, 60, "nothing merged")
        with holding([(way, program)] * 2) as pids:
            assert [process.opted_in(pid) for pid in pids] == [True, True]
            before = process.total(pids).pss_anon
            ksm.write("run", 1)
            # A page is merged in its second scan at the latest, if it does not change.
            wait_for_scans(ksm, 4)
            after, merged = process.total(pids).pss_anon, ksm.counters().pages_sharing
        shares[name] = (before - after) / (before / 2)
        measured(
            f"{name}: {merged} pages sharing, Pss_Anon {before / PAGE_SIZE:.0f} -> "
            f"{after / PAGE_SIZE:.0f} pages: {shares[name]:.0%} of one"
        )
    assert shares["apart"] < 0.5
    assert shares["group"] > 0.8


# --- when it cannot be done ---


def test_a_static_program_runs_as_ever(tree: Tree, victims: Victims, group: str) -> None:
    program = victims("whereabouts", "static")
    done = run([tree.wrapper, "--group", group, program])
    is_whole(facts(done))
    assert done.stderr == (
        f"ksm-wrapper: {program} runs with an ordinary layout: "
        "it is static and not position-independent\n"
    )
    done = member(tree, group).run([program])
    assert (done.returncode, done.stdout) == (UNSUPPORTED, "")


@pytest.mark.parametrize("required", [False, True])
def test_a_failure_at_any_step_leaves_no_half_moved_process(
    tree: Tree,
    victims: Victims,
    kind: str,
    group: str,
    required: bool,
    measured: Callable[[str], None],
) -> None:
    program = victims("whereabouts", kind)
    faulty = tree.wrapper.with_name("ksm-wrapper-faults")
    plain, ours = facts(PLAIN.run([program])), facts(member(tree, group).run([program]))
    options = ["--group", group, *(["--group-required"] if required else [])]
    steps, ran = 0, 0
    while True:
        steps += 1
        done = run([faulty, *options, program], {"KSM_FAIL_AT": str(steps)})
        if done.stderr == "":
            break
        assert done.stderr.count("\n") == 1, done.stderr
        if done.stdout:
            ran += 1
            report = facts(done)
            is_whole(report)
            assert settings(report) == settings(plain)
            here = places(report)
            assert not {here[region] for region in moves(kind)} & set(places(ours).values())
        else:
            assert (required, done.returncode) == (True, UNSUPPORTED), done.stderr
    # Past the last step: as without a fault.
    assert places(facts(done)) == places(ours)
    measured(f"{kind}, required {required}: {steps - 1} steps, after {ran} of them it ran")
    assert steps > 20
    assert ran == (0 if required else steps - 1)


def test_last_no_tracing_at_all(tree: Tree, victims: Victims, group: str) -> None:
    """This setting cannot be taken back before the machine's end: the last test."""
    Path("/proc/sys/kernel/yama/ptrace_scope").write_text("3")
    program = victims("whereabouts")
    done = run([tree.wrapper, "--group", group, program])
    assert done.stderr.startswith(f"ksm-wrapper: {program} runs with an ordinary layout: ")
    assert "kernel.yama.ptrace_scope" in done.stderr
    is_whole(facts(done))
    assert settings(facts(done)) == settings(facts(PLAIN.run([program])))
    assert member(tree, group).run([program]).returncode == UNSUPPORTED
