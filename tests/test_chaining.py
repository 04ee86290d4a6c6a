# SPDX-License-Identifier: MIT
"""The libraries beside other preloaded ones; docs/chaining.md is the table for people.

Each cell runs a program with another library, and again with one of ours beside it. What the
program does has to be the same, and the kernel has to say that it is opted in: a third library,
tests/programs/witness.c, leaves a copy of /proc/self/smaps when a process ends.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import (
    HERE,
    SHIMS,
    Coverage,
    Tree,
    Victims,
    coverage,
    need,
    need_command,
    run,
)

pytestmark = pytest.mark.ksm

DOCUMENT = HERE.parent / "docs" / "chaining.md"


# --- what is beside us ---


@dataclass(frozen=True)
class Other:
    """Another preloaded library, and the environment that it wants."""

    file: str
    env: dict[str, str] = field(default_factory=dict)


OTHERS = {
    "libjemalloc2": Other("libjemalloc.so.2"),
    "libtcmalloc-minimal4": Other("libtcmalloc_minimal.so.4"),
    "libtcmalloc4": Other("libtcmalloc.so.4"),
    "libmimalloc2.0": Other("libmimalloc.so.2"),
    "libfaketime": Other(
        "faketime/libfaketime.so.1",
        # V8 waits for a clock that does not stand still.
        {"FAKETIME": "2001-02-03 04:05:06", "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
    ),
    "libeatmydata1": Other("libeatmydata.so.1"),
    # The key is that of a daemon, which Bench.run starts.
    "fakeroot": Other("libfakeroot/libfakeroot-sysv.so", {"FAKEROOTKEY": ""}),
    "heaptrack": Other("heaptrack/libheaptrack_preload.so", {"DUMP_HEAPTRACK_OUTPUT": "/dev/null"}),
    "a stdio interposer": Other("chatty.c"),
}

POSITIONS = ("before", "after")

# Where not all memory is followed, and why. (The prctl has no such cells.)
PARTLY = {
    (
        "libtcmalloc-minimal4",
        "before",
    ): "it takes memory by __sbrk and system calls, past everybody",
    ("libtcmalloc4", "before"): "it takes memory by __sbrk and system calls, past everybody",
    ("heaptrack", "after"): "whether memory that heaptrack hands on is glibc's cannot be known",
}


def find_library(file: str) -> Path:
    """Return a library of the system by its path below the folder of libraries, or skip."""
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"):
        if (found := Path(folder, file)).exists():
            return found
    need(False, f"no {file}")
    raise AssertionError


# --- what is run ---


@dataclass(frozen=True)
class Program:
    """A command that writes below `out` and reads `inputs`."""

    command: Callable[[Path, Path, Victims], list[object]]
    status: int = 0


PYTHON = """if True:
    import hashlib, sys, threading, time
    found = {}
    def work(number):
        words = [f"{number} {i} " * (i % 50) for i in range(4000)]
        found[number] = hashlib.sha256("".join(sorted(words)).encode()).hexdigest()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    large = bytearray(3 << 20)
    print(sorted(found.items()), len(large), time.gmtime().tm_year > 2000)
    print("to stderr", file=sys.stderr)
    raise SystemExit(3)"""

BASH = r"""
declare -A seen
for i in {1..3000}; do seen[$((i * 7919 % 1013))]+="$i,"; done
echo "${#seen[@]} ${seen[1]} $(printf '%s' "${seen[@]}" | wc -c)"
while read -r line; do last=$line; done < <(seq 1 500)
text=$(printf 'x%.0s' {1..200000}); echo "$last ${#text}"
(exit 4); echo $?; echo "to stderr" >&2
exit 6
"""

NODE = """
const parts = new Map();
for (let i = 0; i < 20000; i++) parts.set('key ' + i % 997, Buffer.alloc(i % 3000, i % 251));
const text = JSON.stringify([...parts].map(([key, value]) => [key, value.length]));
console.log(text.length, require('crypto').createHash('sha256').update(text).digest('hex'));
console.error('to stderr');
process.exitCode = 9;
"""

SQL = """
create table t(a integer primary key, b text);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 20000)
insert into t select i, hex(i * 7919) || printf('%.*c', i % 100, 'x') from n;
create index u on t(b);
select count(*), max(b), sum(length(b)) from t;
select b from t order by b desc limit 3;
select error;
"""

PROGRAMS = {
    # Not resolved: a venv's Python knows by its path where its modules are.
    "python3": Program(lambda _inputs, _out, _victims: [sys.executable, "-I", "-c", PYTHON], 3),
    "bash": Program(lambda _inputs, _out, _victims: [need_command("bash"), "-c", BASH], 6),
    "sort": Program(
        lambda inputs, out, _victims: [
            *(need_command("sort"), "--parallel=2", "-o", out / "sorted"),
            inputs / "lines",
        ]
    ),
    "a threaded C++ program": Program(
        lambda _inputs, _out, victims: [victims("workers", "c++")], 5
    ),
    "node": Program(lambda _inputs, _out, _victims: [need_command("node"), "-e", NODE], 9),
    "sqlite3": Program(
        lambda _inputs, out, _victims: [need_command("sqlite3"), out / "base", SQL], 1
    ),
    "apache2 -t": Program(
        lambda inputs, _out, _victims: [
            *(need_command("apache2"), "-t", "-d", inputs, "-f", inputs / "apache.conf")
        ]
    ),
    "git clone": Program(
        lambda inputs, out, _victims: [
            *(need_command("git"), "clone", "--no-local", "--quiet"),
            *(inputs / "repository", out / "clone"),
        ]
    ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the programs read."""
    folder = tmp_path_factory.mktemp("inputs")
    write_lines(folder / "lines", 20)
    modules = "".join(
        f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"
        for name in ("mpm_event", "authz_core", "dir", "mime", "rewrite")
    )
    (folder / "apache.conf").write_text(
        f"ServerName localhost\nListen 127.0.0.1:1\nPidFile {folder}/pid\n{modules}"
        f"TypesConfig /dev/null\nDocumentRoot {folder}\nErrorLog {folder}/log\n"
    )
    repository = folder / "repository"
    git = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b"]
    run(["git", "init", "--quiet", repository])
    for number in range(5):
        for name in range(20):
            (repository / f"{name}.txt").write_text(f"{name} {number}\n" * 500)
        run([*git, "add", "."])
        assert run([*git, "commit", "--quiet", "-m", f"{number}"]).returncode == 0
    return folder


def write_lines(file: Path, megabytes: int) -> None:
    """Write a file of random lines, the same in every run."""
    block = random.Random(0).randbytes(megabytes << 19).hex()
    file.write_text("\n".join(block[i : i + 63] for i in range(0, len(block), 63)))


@contextmanager
def faked(wanted: bool) -> Iterator[dict[str, str]]:
    """Run faked, the daemon that fakeroot's library asks; yield the environment for it.

    A new one for each run: it remembers inodes, and the next run's files have the same.
    """
    if not wanted:
        yield {}
        return
    key, pid = run([need_command("faked-sysv")]).stdout.strip().split(":")
    try:
        yield {"FAKEROOTKEY": key, "FAKED_MODE": "unknown-is-root"}
    finally:
        os.kill(int(pid), signal.SIGTERM)


# --- a cell ---


@dataclass(frozen=True)
class Outcome:
    """What can be seen of a program from outside."""

    status: int
    stdout: str
    stderr: str
    files: str
    """A digest of the names and contents of all that was written."""


def digest(folder: Path) -> str:
    """Return one word for all files below a folder, without git's own of today."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and ".git/" not in str(file):
            total.update(str(file.relative_to(folder)).encode() + b"\0")
            total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


@dataclass(frozen=True)
class Seen:
    """A process as the witness saw it at its end."""

    name: str
    flag: bool
    coverage: Coverage


class Bench:
    """Runs programs with preloaded libraries and a witness."""

    def __init__(self, folder: Path, inputs: Path, victims: Victims, tree: Tree) -> None:
        """Run in subfolders of `folder`."""
        self._folder, self._inputs, self.victims, self.tree = folder, inputs, victims, tree
        self._plain: dict[tuple[str, str], Outcome] = {}

    def other(self, name: str) -> tuple[Path, dict[str, str]]:
        """Return another's library and its environment."""
        other = OTHERS[name]
        if other.file.endswith(".c"):
            return self.victims.variant(other.file[:-2], "-shared", "-fPIC"), other.env
        return find_library(other.file), other.env

    def run(
        self,
        program: Program,
        libraries: list[Path],
        env: dict[str, str],
        prefix: tuple[object, ...] = (),
    ) -> tuple[Outcome, list[Seen]]:
        """Run a program with these libraries; return how it went, and its processes."""
        out, seen = self._folder / "out", self._folder / "seen"
        for folder in (out, seen):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        witness = self.victims.variant("witness", "-shared", "-fPIC")
        with faked("FAKEROOTKEY" in env) as more:
            done = run(
                [*prefix, *program.command(self._inputs, out, self.victims)],
                {
                    "LD_PRELOAD": ":".join(map(str, [*libraries, witness])),
                    "KSM_WITNESS": str(seen),
                    **env,
                    **more,
                },
            )
        outcome = Outcome(done.returncode, done.stdout, done.stderr, digest(out))
        return outcome, [self._read(file) for file in sorted(seen.iterdir())]

    @staticmethod
    def _read(file: Path) -> Seen:
        flag, _, smaps = file.read_text().partition("\n")
        return Seen(file.name.rpartition(".")[0], flag == "1", coverage(smaps))

    def plain(self, program_name: str, other_name: str) -> Outcome:
        """Return how a program goes with the other library only."""
        key = (program_name, other_name)
        if key not in self._plain:
            library, env = self.other(other_name)
            outcome, seen = self.run(PROGRAMS[program_name], [library], env)
            assert outcome.status == PROGRAMS[program_name].status, outcome
            assert seen, "the witness was not loaded"
            assert not any(one.flag or one.coverage.mergeable_kb for one in seen)
            self._plain[key] = outcome
        return self._plain[key]


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, inputs: Path, victims: Victims, tree: Tree
) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), inputs, victims, tree)


def assert_opted_in(seen: list[Seen], shim: str, partly: bool = False) -> None:
    """All processes are opted in by the method that the shim stands for."""
    assert seen, "no process left its mappings: it was killed, or the witness was not loaded"
    for one in seen:
        found = one.coverage
        if "madvise" not in shim:
            assert one.flag, one
            assert found.mergeable_kb == found.anonymous_kb > 0, one
        else:
            assert not one.flag, one
            assert found.mergeable_kb > 0, one
            if not partly:
                # A page at the heap's end, the stacks of threads, and the data of libraries that
                # came by dlopen: 392 KiB of libcrypto alone.  Larger programs: test_malloc.py.
                missing = found.anonymous_kb - found.mergeable_kb
                assert found.share >= 0.95 or missing <= 640, one


# A subshell of bash under heaptrack 1.4 was seen, once in some hundred runs, to wait for ever in
# heaptrack_stop when it exited: for heaptrack's own lock, which another thread held at the fork.
LEFT_OUT = {("bash", "heaptrack")}

CELLS = [
    pytest.param(*cell, id=f"{cell[0]} with {cell[1]} {cell[2]} {cell[3]}")
    for cell in (
        (program, other, position, shim)
        for program in PROGRAMS
        for other in OTHERS
        for position in POSITIONS
        for shim in SHIMS
        if (program, other) not in LEFT_OUT
    )
]


@pytest.mark.parametrize(("program", "other", "position", "shim"), CELLS)
def test_same_as_without_us_and_opted_in(
    bench: Bench, program: str, other: str, position: str, shim: str
) -> None:
    theirs, their_env = bench.other(other)
    ours, our_env = bench.tree.shim(shim)
    libraries = [theirs, ours] if position == "before" else [ours, theirs]
    outcome, seen = bench.run(PROGRAMS[program], libraries, {**their_env, **our_env})
    assert outcome == bench.plain(program, other)
    assert "ksm" not in outcome.stderr
    assert "ld.so" not in outcome.stderr
    assert_opted_in(seen, shim, partly=(other, position) in PARTLY)


# --- larger, and slower ---


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file of 100 MB."""
    folder = tmp_path_factory.mktemp("large")
    write_lines(folder / "lines", 100)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shim", SHIMS[1:])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    "other", ["libjemalloc2", "libtcmalloc-minimal4", "libmimalloc2.0", "heaptrack"]
)
def test_sort_of_100_mb(
    tmp_path: Path,
    large: Path,
    victims: Victims,
    tree: Tree,
    other: str,
    position: str,
    shim: str,
) -> None:
    bench = Bench(tmp_path, large, victims, tree)
    theirs, their_env = bench.other(other)
    ours, our_env = bench.tree.shim(shim)
    libraries = [theirs, ours] if position == "before" else [ours, theirs]
    plain, _ = bench.run(PROGRAMS["sort"], [theirs], their_env)
    outcome, seen = bench.run(PROGRAMS["sort"], libraries, {**their_env, **our_env})
    assert outcome == plain
    assert_opted_in(seen, shim, partly=(other, position) in PARTLY)


# --- tools that start the program themselves ---


def assert_same_under(
    bench: Bench, tool: tuple[object, ...], program: str, shim: str, partly: bool
) -> None:
    ours, env = bench.tree.shim(shim)
    plain, _ = bench.run(PROGRAMS[program], [], {}, tool)
    outcome, seen = bench.run(PROGRAMS[program], [ours], env, tool)
    assert plain.status == PROGRAMS[program].status
    assert outcome == plain
    assert_opted_in([one for one in seen if "valgrind" not in one.name], shim, partly)


# valgrind puts its own malloc in the place of every library's, ours too, and its memory is its own.
UNDER_VALGRIND = [
    pytest.param(
        program,
        shim,
        id=f"{program} with {shim}",
        marks=[] if program == "a threaded C++ program" else [pytest.mark.slow],
    )
    for program in (
        "bash",
        "sqlite3",
        "python3",
        "a threaded C++ program",
        "apache2 -t",
        "git clone",
    )
    for shim in SHIMS
]


@pytest.mark.parametrize(("program", "shim"), UNDER_VALGRIND)
def test_same_under_valgrind(bench: Bench, program: str, shim: str) -> None:
    tool = (need_command("valgrind"), "-q", "--trace-children=no")
    assert_same_under(bench, tool, program, shim, partly=True)


@pytest.mark.parametrize("shim", SHIMS)
def test_same_under_the_command_fakeroot(bench: Bench, shim: str) -> None:
    tool = (need_command("fakeroot"),)
    assert_same_under(bench, tool, "git clone", shim, partly=False)


@pytest.mark.parametrize("shim", SHIMS)
def test_same_under_the_command_heaptrack(bench: Bench, tmp_path: Path, shim: str) -> None:
    """It tells how much was allocated, and where it wrote that: numbers differ from run to run."""
    ours, env = bench.tree.shim(shim)
    tool = (need_command("heaptrack"), "--raw", "--output", tmp_path / "trace")
    program = PROGRAMS["a threaded C++ program"]

    def told(outcome: Outcome) -> list[str]:
        lines = outcome.stdout.splitlines()
        return [line if "worker number" in line else re.sub(r"\d+", "N", line) for line in lines]

    plain, _ = bench.run(program, [], {}, tool)
    outcome, seen = bench.run(program, [ours], env, tool)
    assert "worker number 7" in outcome.stdout
    assert told(outcome) == told(plain)
    assert (outcome.status, outcome.stderr) == (plain.status, plain.stderr)
    assert_opted_in([one for one in seen if one.name.startswith("workers")], shim)


# --- programs built with a sanitizer ---


def sanitized(victims: Victims, kind: str) -> Program:
    return Program(lambda _inputs, _out, _victims: [victims("threads", kind), 4, 1])


@pytest.mark.parametrize("shim", SHIMS)
@pytest.mark.parametrize("kind", ["ubsan", "tsan", "clang-asan"])
def test_same_in_a_sanitized_program(bench: Bench, victims: Victims, kind: str, shim: str) -> None:
    ours, env = bench.tree.shim(shim)
    plain, _ = bench.run(sanitized(victims, kind), [], {})
    outcome, seen = bench.run(sanitized(victims, kind), [ours], env)
    assert plain.stdout == "ready\n"
    assert outcome == plain
    # A sanitizer's own allocator takes its memory by system calls.
    assert_opted_in(seen, shim, partly=True)


@pytest.mark.parametrize("shim", SHIMS)
def test_gcc_asan_refuses_any_library_before_its_own(
    bench: Bench, victims: Victims, shim: str
) -> None:
    ours, env = bench.tree.shim(shim)
    refusal = "ASan runtime does not come first in initial library list"
    plain, _ = bench.run(sanitized(victims, "asan"), [], {})  # the witness is enough
    outcome, seen = bench.run(sanitized(victims, "asan"), [ours], env)
    assert refusal in plain.stderr
    assert refusal in outcome.stderr
    assert outcome.status == plain.status == 1
    assert not seen


@pytest.mark.parametrize("shim", SHIMS)
@pytest.mark.parametrize("way", ["with its library first", "told not to check"])
def test_gcc_asan_program(bench: Bench, victims: Victims, way: str, shim: str) -> None:
    ours, env = bench.tree.shim(shim)
    program = sanitized(victims, "asan")
    first: list[Path] = []
    if way == "told not to check":
        env = {**env, "ASAN_OPTIONS": "verify_asan_link_order=0"}
    else:
        first = [Path(run(["gcc", "-print-file-name=libasan.so"]).stdout.strip()).resolve()]
    plain, _ = bench.run(program, first, env)
    outcome, seen = bench.run(program, [*first, ours], env)
    assert (outcome.stdout, outcome.stderr, outcome.status) == ("ready\n", "", 0)
    assert outcome == plain
    assert_opted_in(seen, shim, partly=True)


# --- an allocator that is not glibc's is not read as glibc's ---


@pytest.mark.parametrize("other", ["libtcmalloc-minimal4", "libtcmalloc4", "libmimalloc2.0"])
def test_blocks_of_another_allocator_are_not_read(
    bench: Bench, victims: Victims, tmp_path: Path, other: str
) -> None:
    """All export __libc_malloc. The word before a block of theirs is no header, or not mapped."""
    theirs, _ = bench.other(other)
    ours, env = bench.tree.shim("libksm_preload.so by madvise")
    env = {**env, "LD_PRELOAD": f"{ours}:{theirs}", "TCMALLOC_SKIP_SBRK": "1"}
    set_them = [part for name, value in env.items() for part in ("-E", f"{name}={value}")]
    logs = ("-o", tmp_path / "log")
    strace = [need_command("strace"), "-ff", *logs, "-e", "trace=madvise", *set_them]
    for _ in range(3):
        done = run([victims("threads"), "4", "40"], env)
        assert (done.returncode, done.stdout) == (0, "ready\n")
    assert run([*strace, victims("threads"), "4", "40"]).returncode == 0
    text = "".join(file.read_text() for file in tmp_path.iterdir())
    calls = re.findall(r"madvise\(\w+, (\d+), MADV_MERGEABLE\) += (\S+)", text)
    assert calls
    assert {result for _, result in calls} == {"0"}
    assert max(int(size) for size, _ in calls) <= 1 << 30


def test_the_table_for_people_has_all_rows() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    for name in [*OTHERS, "valgrind", "ASan", "UBSan", "TSan"]:
        assert any(name in row for row in rows), name
    for (name, position), reason in PARTLY.items():
        assert any(name in row and reason in row for row in rows), (name, position)
