# SPDX-License-Identifier: MIT
"""libksm_preload.so as an interposer of malloc: what it must not change, what it has to reach."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import (
    AS_NOBODY,
    PR_SET_MEMORY_MERGE,
    SHIMS,
    SOURCE,
    Coverage,
    Tree,
    Victims,
    coverage,
    need,
    need_command,
    run,
    wait_until,
)

pytestmark = pytest.mark.ksm

MADVISE = SHIMS[2]
ERRORS = {"EPERM": 1, "EAGAIN": 11, "ENOMEM": 12, "EINVAL": 22}


@pytest.fixture(scope="session")
def trapping(victims: Victims, public: Path) -> Path:
    """Return libksm_preload.so built so that undefined behaviour is an illegal instruction."""
    library = public / "libksm_preload-ubsan.so"
    options = "-O1 -g -std=gnu11 -shared -fPIC -fvisibility=hidden -fno-builtin-malloc"
    options += " -fsanitize=undefined -fsanitize-undefined-trap-on-error -Wl,-z,now"
    done = run(
        [
            *(need_command("gcc"), *options.split(), "-o", library, SOURCE / "ksm_preload.c"),
            f"-I{victims.defaults()}",
            f"-Wl,--version-script={SOURCE / 'ksm_preload.map'}",
        ]
    )
    assert done.returncode == 0, done.stderr
    return library


def preloading(tree: Tree, shim: str) -> dict[str, str]:
    """Return the environment that loads what one of SHIMS means."""
    library, env = tree.shim(shim)
    return {"LD_PRELOAD": str(library), **env}


def three_ways(tree: Tree) -> list[dict[str, str]]:
    """Return the environments that assert_reached() compares: without us, by prctl, by madvise."""
    return [{}, preloading(tree, SHIMS[1]), preloading(tree, MADVISE)]


@pytest.fixture(params=[*SHIMS, f"{MADVISE}, built with UBSan"])
def preloaded(request: pytest.FixtureRequest, tree: Tree, trapping: Path) -> dict[str, str]:
    """Return the environment that loads one of our libraries."""
    if "UBSan" in request.param:
        return {"LD_PRELOAD": str(trapping), "KSM_PRELOAD": "madvise"}
    return preloading(tree, request.param)


@pytest.fixture
def by_madvise(tree: Tree) -> dict[str, str]:
    """Return the environment for libksm_preload.so by madvise."""
    return preloading(tree, MADVISE)


def assigned(env: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in env.items()]


def marked(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What a victim with smaps.h printed: memory -> "yes", "no" or "part"."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)


class Traced:
    """A run under strace: what it printed, and its calls of madvise(MADV_MERGEABLE)."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[object],
        env: dict[str, str],
        *,
        refuse: Sequence[object] = (),
        options: Sequence[str] = (),
    ) -> None:
        """Run `command` with `env`, under the victim `refuse` if given."""
        shutil.rmtree(folder / "traced", ignore_errors=True)
        (folder / "traced").mkdir()
        # A file for each thread: in one, their lines cut each other's in two.
        strace = [
            need_command("strace"),
            "-ff",
            "-o",
            folder / "traced" / "log",
            "-e",
            "trace=madvise",
            *options,
        ]
        self.done = run([*strace, *refuse, "/usr/bin/env", *assigned(env), *command])
        text = "".join(file.read_text() for file in sorted((folder / "traced").iterdir()))
        found = re.findall(r"madvise\((\w+), (\d+), MADV_MERGEABLE.* = (.*)", text)
        self.marks = [
            (int(start, 16), int(size), result.partition("(")[0].strip())
            for start, size, result in found
        ]
        """Address, size and result of each."""

    def results(self) -> set[str]:
        return {result for _, _, result in self.marks}


# --- what the next library promises, it keeps ---


@pytest.fixture(scope="module")
def contracts(victims: Victims) -> str:
    """Return what the victim `contracts` prints without us."""
    done = run([victims("contracts")])
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "thread calloc(2^63, 2) NULL ENOMEM",
        "child malloc(PTRDIFF_MAX + 1) NULL ENOMEM",
        "first malloc(0) memory EDOM",
        "first mmap of a bad descriptor MAP_FAILED EBADF",
    ):
        assert f"\n{line}\n" in done.stdout
    for complaint in ("lost", "is not zero", "something else", "changed"):
        assert complaint not in done.stdout
    return done.stdout


@pytest.mark.parametrize("kind", ["dynamic", "now", "no-pie"])
def test_contracts_of_malloc(
    victims: Victims, contracts: str, preloaded: dict[str, str], kind: str
) -> None:
    done = run([victims("contracts", kind)], preloaded)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == contracts


@pytest.mark.parametrize("error", ERRORS)
def test_contracts_while_madvise_fails(
    victims: Victims, contracts: str, preloaded: dict[str, str], error: str
) -> None:
    """Above all errno: a failure of ours is not the program's."""
    refuse = [victims("refuse"), "madvise", ERRORS[error], "/usr/bin/env", *assigned(preloaded)]
    done = run([*refuse, victims("contracts")])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == contracts


def test_contracts_where_there_is_no_prctl(
    victims: Victims, contracts: str, preloaded: dict[str, str]
) -> None:
    refuse = [victims("refuse"), PR_SET_MEMORY_MERGE, "22", "/usr/bin/env", *assigned(preloaded)]
    done = run([*refuse, victims("contracts")])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == contracts


# Told to keep our malloc, valgrind replaces the one behind it.  By madvise ours would then look for
# glibc's header before a block of valgrind's.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shim", "option"),
    [
        *((shim, "--soname-synonyms=somalloc=*") for shim in SHIMS),
        *((shim, "--soname-synonyms=somalloc=nouserintercepts") for shim in SHIMS[:2]),
    ],
    ids=[*(f"{shim} replaced" for shim in SHIMS), *(f"{shim} kept" for shim in SHIMS[:2])],
)
@pytest.mark.parametrize("victim", ["threads 8 4", "end exit 0"])
def test_memcheck_finds_nothing(
    victims: Victims, tree: Tree, victim: str, shim: str, option: str
) -> None:
    library, env = tree.shim(shim)
    program, *arguments = victim.split()
    valgrind = [need_command("valgrind"), "-q", "--error-exitcode=9", option]
    done = run([*valgrind, victims(program), *arguments], {**env, "LD_PRELOAD": str(library)})
    assert (done.returncode, done.stderr) == (0, "")


# --- what is marked ---

NEVER = {
    "unmergeable_mapping": "no",
    "unmergeable_block": "no",
    "unmergeable_heap": "no",
    "map_shared": "no",
    "map_shared_file": "no",
}
# The kernel's flag makes no difference here.
ONLY_BY_MADVISE_LEFT_OUT = {
    "stack": "no",
    "thread_stack": "no",
    "map_stack": "no",
    "map_growsdown": "no",
    "reserved_2_GiB": "no",
}
FAMILY = [
    *("malloc_small", "malloc_heap", "malloc", "calloc_one", "calloc_product", "realloc_null"),
    *("realloc_grown", "realloc_mremap", "reallocarray", "memalign", "memalign_wide"),
    *("aligned_alloc", "posix_memalign", "valloc", "pvalloc", "sbrk", "brk", "mmap", "mmap64"),
    *("mmap_private_file", "mmap_reserved", "mmap_fixed", "mremap_grown"),
    *("thread_small", "thread_arena", "thread_big"),
]


@pytest.mark.parametrize("first", ["small", "big"])
def test_which_memory_is_marked(victims: Victims, preloaded: dict[str, str], first: str) -> None:
    plain = marked(run([victims("marked"), first]))
    assert set(plain.values()) == {"no"}
    found = marked(run([victims("marked"), first], preloaded))
    expected = dict.fromkeys(plain, "yes") | NEVER
    if "map_hugetlb" in expected:
        expected["map_hugetlb"] = "no"
    if preloaded.get("KSM_PRELOAD") == "madvise":
        expected |= ONLY_BY_MADVISE_LEFT_OUT
    assert found == expected
    assert {found[name] for name in FAMILY} == {"yes"}


def test_break_of_a_program_without_malloc(victims: Victims, preloaded: dict[str, str]) -> None:
    found = marked(run([victims("marked"), "break"], preloaded))
    assert found == {"sbrk": "yes", "brk": "yes"}


def test_threshold_leaves_small_mappings_out(victims: Victims, by_madvise: dict[str, str]) -> None:
    found = marked(run([victims("marked")], {**by_madvise, "KSMP_MERGE_THRESHOLD": "200000"}))
    assert (found["small_mapping"], found["data"]) == ("no", "no")
    # The heap and the arenas are one thing each, and larger.
    for name in ("malloc_small", "thread_small", "mmap", "malloc", "mremap_grown"):
        assert found[name] == "yes", name


@pytest.mark.parametrize("value", ["", "0", "1", "junk", "-1"])
def test_threshold_that_leaves_nothing_out(
    victims: Victims, by_madvise: dict[str, str], value: str
) -> None:
    done = run([victims("marked")], {**by_madvise, "KSMP_MERGE_THRESHOLD": value})
    assert marked(done)["small_mapping"] == "yes"


def test_again_after_it_was_given_back(victims: Victims, preloaded: dict[str, str]) -> None:
    """Addresses that were marked once are not taken for marked for ever."""
    found = marked(run([victims("again")], preloaded))
    assert set(found) >= {"arena_first", "arena_last", "arena_of_another", "heap"}
    assert set(found.values()) == {"yes"}


def test_mappings_below_the_heap(victims: Victims, by_madvise: dict[str, str]) -> None:
    """Where the stack is unlimited the kernel lays mappings out from below."""
    bottom_up = [need_command("setarch"), "--addr-compat-layout"]
    found = marked(run([*bottom_up, victims("again")], by_madvise))
    assert set(found.values()) == {"yes"}
    found = marked(run([*bottom_up, victims("marked")], by_madvise))
    assert {found[name] for name in FAMILY} == {"yes"}


def test_folder_with_a_bracket_in_its_name(
    victims: Victims, by_madvise: dict[str, str], tmp_path: Path
) -> None:
    """/proc/self/maps has the name of a file where that of the heap stands."""
    program = tmp_path / "[heap]"
    shutil.copy(victims("marked"), program)
    found = marked(run([program], by_madvise))
    assert {found[name] for name in [*FAMILY, "data", "bss"]} == {"yes"}


# --- what the program took out ---

TAKEN_OUT = """if True:
    import ctypes, re, sys, threading
    libc, size_t = ctypes.CDLL(None), ctypes.c_size_t
    for name in ("malloc", "realloc", "sbrk"):
        getattr(libc, name).restype = size_t
    PAGE, BIG = 4096, 1 << 20
    UNMERGEABLE = 13

    def allocated(size):
        memory = libc.malloc(size_t(size))
        ctypes.memset(memory, 1, size)
        return memory

    def take_out(start, size=PAGE):
        start &= -PAGE
        assert libc.madvise(size_t(start), size_t(size), UNMERGEABLE) == 0
        return start

    def show(name, *ranges):
        marks = []
        for line in open("/proc/self/smaps"):
            if re.match("[0-9a-f]+-", line):
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
            elif line.startswith("VmFlags:"):
                if any(start < at + size and at < end for at, size in ranges):
                    marks.append(" mg" in line)
        print(name, "yes" if all(marks) else "part" if any(marks) else "no")

    # The last page of the heap, which is where the next growth begins.
    last = take_out(libc.sbrk(0) - 1)
    grown = [allocated(100_000) for _ in range(50)][-1]
    show("heap_end", (last, PAGE))
    show("heap_grown", (last + PAGE, grown - last))

    # A large block of the heap: the next one there is marked by itself.
    libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    block, behind = allocated(BIG), allocated(BIG)
    assert block < behind
    inside = take_out(block + BIG // 2)
    libc.free(size_t(block))
    again = allocated(BIG)
    assert again == block
    show("block_again", (inside, PAGE))
    show("rest_of_block", (block + PAGE, BIG // 4), (inside + PAGE, BIG // 4))

    # At the end of the heap it is given back, and what comes there next is marked on both sides.
    block = allocated(4 * BIG)
    inside_last = take_out(block + 2 * BIG)
    libc.free(size_t(block))
    assert libc.sbrk(0) < inside_last
    assert allocated(4 * BIG) == block
    show("block_regrown", (block + PAGE, BIG), (inside_last + PAGE, BIG))

    # An arena: a later thread takes over that of one that ended.
    libc.mallopt(-8, 2)  # M_ARENA_MAX

    def of_thread(work):
        result = []
        thread = threading.Thread(target=lambda: result.append(work()))
        thread.start()
        thread.join()
        return result[0]

    def use_again(arena):
        tries = (of_thread(lambda: allocated(50_000)) for _ in range(100))
        assert any(block >> 26 == arena >> 26 for block in tries)

    middle = of_thread(lambda: take_out(allocated(100_000) + 50_000))
    use_again(middle)
    show("arena_again", (middle, PAGE))
    show("rest_of_arena", (middle - 5 * PAGE, 4 * PAGE), (middle + PAGE, 4 * PAGE))

    # A copy that is loaded now has seen none of this.
    second = ctypes.CDLL(sys.argv[1])
    show("second_copy", (last, PAGE), (inside, PAGE), (middle, PAGE))

    # One block for each of very many secrets.
    blocks = of_thread(lambda: [take_out(allocated(3 * PAGE) + PAGE) for _ in range(100)])
    use_again(blocks[0])
    allocated(2 * BIG)
    show("many", *((block, PAGE) for block in blocks), (last, PAGE), (inside, PAGE), (middle, PAGE))
"""


def test_what_the_program_took_out_stays_out(preloaded: dict[str, str], tmp_path: Path) -> None:
    second = tmp_path / "second.so"
    shutil.copy(preloaded["LD_PRELOAD"], second)
    found = marked(run([sys.executable, "-I", "-c", TAKEN_OUT, second], preloaded))
    taken_out = ("heap_end", "block_again", "arena_again", "second_copy", "many")
    others = ("heap_grown", "rest_of_block", "block_regrown", "rest_of_arena")
    assert {*found} == {*taken_out, *others}
    assert {name: found[name] for name in taken_out} == dict.fromkeys(taken_out, "no")
    # By the prctl Linux 6.12 extends what was taken out where the heap grows.
    if preloaded.get("KSM_PRELOAD") == "madvise":
        assert {name: found[name] for name in others} == dict.fromkeys(others, "yes")


# --- it stops where the kernel says no ---


@pytest.mark.parametrize("error", ["EINVAL", "ENOMEM"])
def test_no_more_calls_after_the_first(
    victims: Victims, by_madvise: dict[str, str], tmp_path: Path, error: str
) -> None:
    refuse = [victims("refuse"), "madvise", ERRORS[error]]
    traced = Traced(tmp_path, [victims("marked")], by_madvise, refuse=refuse)
    assert [result for _, _, result in traced.marks] == [f"-1 {error}"]
    assert set(marked(traced.done).values()) == {"no"}


def test_goes_on_after_eagain(victims: Victims, by_madvise: dict[str, str], tmp_path: Path) -> None:
    refuse = [victims("refuse"), "madvise", ERRORS["EAGAIN"]]
    traced = Traced(tmp_path, [victims("marked")], by_madvise, refuse=refuse)
    assert len(traced.marks) > 20
    assert traced.results() == {"-1 EAGAIN"}


def test_limit_of_mappings_is_not_the_programs_failure(
    victims: Victims, preloaded: dict[str, str]
) -> None:
    plain, ours = run([victims("limit")]), run([victims("limit")], preloaded)
    need("no limit" not in plain.stdout, "vm.max_map_count is out of reach")
    assert plain.stdout == "failed 0, errno 0\n"
    assert (ours.returncode, ours.stdout, ours.stderr) == (0, plain.stdout, "")


def test_blocks_take_a_quarter_of_the_limit(victims: Victims, by_madvise: dict[str, str]) -> None:
    """Marked, they can no longer be joined; the program needs mappings as well."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    need(limit < 200_000, "vm.max_map_count is out of reach")
    plain = run([victims("limit"), "blocks"])
    ours = run([victims("limit"), "blocks"], by_madvise)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert int(plain.stdout) < 1000
    assert limit / 5 < int(ours.stdout) < limit / 4 + 1000


def test_heap_trimmed_meanwhile_is_no_limit(
    victims: Victims, by_madvise: dict[str, str], tmp_path: Path
) -> None:
    """Then ENOMEM means a hole, not vm.max_map_count."""
    delay = ["-e", "inject=madvise:delay_enter=20000"]
    traced = Traced(tmp_path, [victims("trimmed")], by_madvise, options=delay)
    assert "-1 ENOMEM" in traced.results()  # or the delay was too short
    assert set(marked(traced.done).values()) == {"yes"}


def test_mapping_gone_meanwhile_is_no_limit(
    victims: Victims, by_madvise: dict[str, str], tmp_path: Path
) -> None:
    """Another library's thread, heaptrack's for one, unmaps what we have just read of."""
    busy = victims.variant("busy", "-shared", "-fPIC")
    env = {**by_madvise, "LD_PRELOAD": f"{by_madvise['LD_PRELOAD']}:{busy}"}
    delay = ["-e", "inject=madvise:delay_enter=20000"]
    traced = Traced(tmp_path, [victims("marked"), "break"], env, options=delay)
    assert "-1 ENOMEM" in traced.results()  # or nothing was gone
    assert set(marked(traced.done).values()) == {"yes"}


# --- the ancestor's failures (ksm_preload 459df0e), one test each ---


def test_ancestor_marked_one_element_of_calloc(
    victims: Victims, by_madvise: dict[str, str]
) -> None:
    found = marked(run([victims("marked")], by_madvise))
    assert found["calloc_product"] == found["calloc_one"] == "yes"


def test_ancestor_madvised_map_failed(
    victims: Victims, by_madvise: dict[str, str], tmp_path: Path
) -> None:
    traced = Traced(tmp_path, [victims("contracts")], by_madvise)
    assert "mmap of too much MAP_FAILED ENOMEM" in traced.done.stdout
    assert traced.marks
    assert traced.results() == {"0"}
    assert all(start < 1 << 47 and size <= 1 << 30 for start, size, _ in traced.marks)


def test_ancestor_clobbered_errno(
    victims: Victims, contracts: str, by_madvise: dict[str, str], tmp_path: Path
) -> None:
    """EAGAIN does not stop the marking, so that each allocation has its failure."""
    refuse = [victims("refuse"), "madvise", ERRORS["EAGAIN"]]
    traced = Traced(tmp_path, [victims("contracts")], by_madvise, refuse=refuse)
    assert len(traced.marks) > 100
    assert traced.done.stdout == contracts


def test_ancestor_exited_where_dlsym_found_nothing(
    victims: Victims, tree: Tree, preloaded: dict[str, str]
) -> None:
    """Opened late, it comes after the libc, and there is nothing behind it."""
    ours = preloaded["LD_PRELOAD"]
    env = {name: value for name, value in preloaded.items() if name != "LD_PRELOAD"}
    done = run([victims.variant("open"), ours], env)
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(line.split() for line in done.stdout.splitlines())
    assert len(found) == 7
    assert set(found.values()) == {"missing" if ours == str(tree.prctl_library) else "ok"}


def test_ancestor_deadlocked_with_jemalloc(victims: Victims, by_madvise: dict[str, str]) -> None:
    """It called dlsym, which allocates, inside the mmap that jemalloc calls under its lock."""
    library = Path("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")
    need(library.exists(), f"no {library}")
    ours = by_madvise["LD_PRELOAD"]
    for order in (f"{ours}:{library}", f"{library}:{ours}"):
        for _ in range(20):
            done = run([victims("stress"), "1", "20"], {**by_madvise, "LD_PRELOAD": order})
            assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_ancestor_missed_members_of_the_family(
    victims: Victims, by_madvise: dict[str, str]
) -> None:
    found = marked(run([victims("marked")], by_madvise))
    for name in ("posix_memalign", "aligned_alloc", "memalign", "reallocarray", "mmap64", "brk"):
        assert found[name] == "yes", name


def test_ancestor_cut_its_threshold_to_an_int(victims: Victims, by_madvise: dict[str, str]) -> None:
    # 2^32 + 1, which is 1 as an int; and what does not even fit a size_t
    for value in ("4294967297", "9" * 30):
        found = marked(run([victims("marked")], {**by_madvise, "KSMP_MERGE_THRESHOLD": value}))
        assert (found["mmap"], found["malloc"], found["data"]) == ("no", "no", "no")


# --- threads, fork, exec ---


def test_threads_that_allocate_while_others_fork(
    victims: Victims, preloaded: dict[str, str]
) -> None:
    done = run([victims("stress"), "5", "200"], preloaded)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_a_hundred_times_two_hundred_threads(victims: Victims, preloaded: dict[str, str]) -> None:
    done = run([victims("stress"), "100", "200"], preloaded)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("arenas", ["1", "2"])
def test_threads_of_few_arenas(victims: Victims, preloaded: dict[str, str], arenas: str) -> None:
    env = {**preloaded, "MALLOC_ARENA_MAX": arenas}
    done = run([victims("stress"), "3", "100"], env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# --- who comes first ---

EARLY = [
    *("early_malloc", "early_malloc_big", "early_calloc", "early_realloc", "early_reallocarray"),
    *("early_memalign", "early_posix_memalign", "early_mmap", "early_sbrk", "early_thread"),
]


@pytest.fixture
def early_library(victims: Victims) -> Path:
    return victims.variant("early", "-shared", "-fPIC")


@pytest.mark.parametrize("position", ["before", "after"])
def test_library_that_allocates_before_us(
    victims: Victims, early_library: Path, preloaded: dict[str, str], position: str
) -> None:
    ours = preloaded["LD_PRELOAD"]
    program = [victims("end"), "exit", "0"]
    both = f"{early_library}:{ours}" if position == "before" else f"{ours}:{early_library}"
    assert marked(run(program, {"LD_PRELOAD": str(early_library)})) == dict.fromkeys(EARLY, "no")
    found = marked(run(program, {**preloaded, "LD_PRELOAD": both}))
    assert found == dict.fromkeys(EARLY, "yes")


def test_program_that_allocates_in_an_ifunc_resolver(
    victims: Victims, preloaded: dict[str, str]
) -> None:
    program = victims.variant("early", "-DPROGRAM")
    assert marked(run([program])) == dict.fromkeys(EARLY, "no")
    assert marked(run([program], preloaded)) == dict.fromkeys(EARLY, "yes")


def test_library_opened_with_deepbind(
    victims: Victims, early_library: Path, preloaded: dict[str, str]
) -> None:
    """It calls the libc's malloc past us; what it allocates the program frees."""
    plain = run([victims.variant("open"), early_library])
    done = run([victims.variant("open"), early_library], preloaded)
    assert (done.returncode, done.stderr) == (0, "")
    assert {line for line in plain.stdout.splitlines() if line.endswith("ok")} == {
        line for line in done.stdout.splitlines() if line.endswith("ok")
    }
    assert "malloc ok" in done.stdout


def test_loaded_twice(
    victims: Victims, contracts: str, preloaded: dict[str, str], tmp_path: Path
) -> None:
    first = Path(preloaded["LD_PRELOAD"])
    second = tmp_path / "second.so"
    shutil.copy(first, second)
    env = {**preloaded, "LD_PRELOAD": f"{first}:{second}"}
    done = run([victims("contracts")], env)
    assert (done.returncode, done.stdout, done.stderr) == (0, contracts, "")
    found = marked(run([victims("marked")], env))
    assert {found[name] for name in FAMILY} == {"yes"}
    assert run([victims("stress"), "2", "50"], env).stdout == "done\n"


def test_loaded_twice_costs_no_call_for_each_allocation(
    victims: Victims, by_madvise: dict[str, str], tmp_path: Path
) -> None:
    second = tmp_path / "second.so"
    shutil.copy(by_madvise["LD_PRELOAD"], second)
    once = Traced(tmp_path, [victims("contracts")], by_madvise)
    both = f"{by_madvise['LD_PRELOAD']}:{second}"
    twice = Traced(tmp_path, [victims("contracts")], {**by_madvise, "LD_PRELOAD": both})
    assert len(once.marks) <= len(twice.marks) <= 2 * len(once.marks) + 50


def test_program_without_a_debugger_entry(
    victims: Victims, preloaded: dict[str, str], contracts: str, tmp_path: Path
) -> None:
    """`lld -z rodynamic` leaves DT_DEBUG out, by which the list of libraries is found."""
    program = tmp_path / "program"
    image = bytearray(victims("contracts").read_bytes())
    offset, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
    changed = 0
    for header in range(offset, offset + 56 * count, 56):
        kind, _, start, _, _, size = struct.unpack_from("<IIQQQQ", image, header)
        for entry in range(start, start + size, 16) if kind == 2 else ():  # PT_DYNAMIC
            if struct.unpack_from("<Q", image, entry)[0] == 21:  # DT_DEBUG
                struct.pack_into("<Q", image, entry, 0x6000BEEF)  # nobody's
                changed += 1
    assert changed == 1
    program.write_bytes(image)
    program.chmod(0o755)
    assert run([program]).stdout == contracts
    done = run([program], preloaded)
    assert (done.returncode, done.stdout, done.stderr) == (0, contracts, "")


# --- how much of a program is reached ---

PYTHON = """if True:
    import sys, threading
    words = [str(i) * 3 for i in range(200000)]
    table = {i: [i] for i in range(50000)}
    large = bytearray(5 << 20)
    large[:] = b"x" * len(large)
    kept = []
    work = lambda: kept.extend([bytes(1000 + i % 50) for i in range(5000)])
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print("ready", flush=True)
    sys.stdin.read()"""

PERL = """$| = 1; my @words = map { "$_ " x ($_ % 100) } 1..100000; my %table;
$table{$_ % 7919} .= "$_," for 1..300000; my $large = "x" x 20_000_000;
print "ready\\n"; 1 while <STDIN>;"""

PHP = """$words = []; for ($i = 0; $i < 300000; $i++) $words[] = str_repeat("$i ", $i % 30);
$table = []; for ($i = 0; $i < 100000; $i++) $table["key $i"] = [$i, $i + 1];
$large = str_repeat("x", 20000000); echo "ready\\n"; while (fgets(STDIN)) ;"""

NODE = """
const table = new Map(), words = [];
for (let i = 0; i < 200000; i++) table.set('key ' + i, { number: i, text: 'text ' + i });
for (let i = 0; i < 3000; i++) words.push(Buffer.alloc(i * 5, i % 251));
console.log('ready'); process.stdin.resume();
"""


def measured_programs(victims: Victims) -> dict[str, list[object]]:
    return {
        "CPython": [sys.executable, "-I", "-c", PYTHON],
        "perl": ["perl", "-e", PERL],
        "php": ["php", "-n", "-r", PHP],
        "node": ["node", "-e", NODE],
        "16 threads": [victims("threads"), 16, 8],
    }


@contextmanager
def started(command: Sequence[object], env: dict[str, str]) -> Iterator[int]:
    """Start a program that prints `ready` and then waits for the end of its input."""
    running = subprocess.Popen(
        [str(part) for part in command],
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        yield running.pid
    finally:
        running.communicate()
    assert running.returncode == 0


def of(*pids: int) -> Coverage:
    """Return the coverage of processes together."""
    return coverage("".join(Path(f"/proc/{pid}/smaps").read_text() for pid in pids))


def assert_reached(
    found: Sequence[Coverage],
    most_mappings: Callable[[int], float] = lambda plain: 1.1 * plain + 10,
) -> None:
    """Compare a program without us, by the prctl and by madvise; `pytest -s` shows the numbers."""
    plain, by_prctl, by_madvise = found
    share = f"{by_madvise.share:.2%} of {by_madvise.anonymous_kb} kB"
    counts = f"{plain.mappings} plain, {by_prctl.mappings} prctl, {by_madvise.mappings} madvise"
    print(f"{share}, mappings: {counts}")
    assert plain.mergeable_kb == 0
    assert by_prctl.share > 0.99
    assert by_madvise.share >= 0.95 * by_prctl.share
    assert min(plain.anonymous_kb, by_madvise.anonymous_kb) > 20_000
    assert by_madvise.mappings <= most_mappings(plain.mappings)


@pytest.mark.parametrize("name", ["CPython", "perl", "php", "node", "16 threads"])
def test_madvise_reaches_what_the_prctl_does(victims: Victims, tree: Tree, name: str) -> None:
    command = measured_programs(victims)[name]
    need_command(str(command[0]))
    found = []
    for env in three_ways(tree):
        with started(command, env) as pid:
            found.append(of(pid))
    if name == "16 threads":
        # Each block above 128 KiB that glibc maps keeps a mapping of its own: it is written to
        # before it can be marked, and what was touched cannot be joined to a neighbour (mm/vma.c,
        # is_mergeable_anon_vma).  How many touch in the plain run varies.
        assert_reached(found, lambda plain: 3 * plain)
    else:
        assert_reached(found)


def test_heap_that_cannot_grow(
    victims: Victims, tree: Tree, by_madvise: dict[str, str], tmp_path: Path
) -> None:
    """The break may run into a mapping, at random; every 40 bytes were a system call there once."""
    found = []
    for env in three_ways(tree):
        with started([victims("no_break")], env) as pid:
            found.append(of(pid))
    assert_reached(found)
    # One for each piece of 128 KiB or more, 44 MB in all; there are 84,000 allocations.
    traced = Traced(tmp_path, [victims("no_break")], by_madvise)
    assert traced.results() == {"0"}
    assert 100 < len(traced.marks) < 1000


STACK_LIKE = """if True:
    import ctypes, random
    libc, source, blocks = ctypes.CDLL(None), random.Random(1), []
    libc.malloc.restype = ctypes.c_size_t
    for _ in range(100_000):
        if source.random() < 0.52:
            size = source.randrange(1000, 90_000)
            blocks.append(ctypes.c_size_t(libc.malloc(ctypes.c_size_t(size))))
            ctypes.memset(blocks[-1].value, 1, size)
        elif blocks:
            libc.free(blocks.pop())
    print(sum("[heap]" in line for line in open("/proc/self/maps")))
"""


def test_heap_that_is_trimmed_and_grows_stays_in_one_piece(by_madvise: dict[str, str]) -> None:
    """What was trimmed into marked memory and then grows would have a mapping more each time."""
    command = [sys.executable, "-I", "-c", STACK_LIKE]
    assert int(run(command).stdout) == 1
    done = run(command, by_madvise)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 10


@pytest.mark.slow
def test_madvise_reaches_what_the_prctl_does_in_redis(tree: Tree, tmp_path: Path) -> None:
    # Debian's redis-tools has the server under another name, without the service.
    server = shutil.which("redis-server") or need_command("redis-check-rdb")
    socket = tmp_path / "socket"
    ask = [need_command("redis-cli"), "-s", socket]
    options = ["--port", "0", "--save", "", "--enable-debug-command", "local"]
    found = []
    for env in three_ways(tree):
        running = subprocess.Popen(
            ["redis-server", *options, "--unixsocket", str(socket), "--dir", str(tmp_path)],
            executable=server,
            env={"PATH": os.environ["PATH"], **env},
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: run([*ask, "ping"]).stdout == "PONG\n", 20, "redis answers")
            assert run([*ask, "debug", "populate", "100000", "key", "500"]).stdout == "OK\n"
            found.append(of(running.pid))
        finally:
            running.terminate()
            running.wait()
    assert_reached(found)


@pytest.mark.slow
def test_madvise_reaches_what_the_prctl_does_in_postgresql(public_tree: Tree, public: Path) -> None:
    """The server, its helpers and a session; most of their memory is MAP_SHARED."""
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    need(bool(servers), "no postgresql")
    commands, base = servers[-1].parent, public / "postgresql"
    base.mkdir()
    os.chown(base, 65534, 65534)
    initdb = [commands / "initdb", "-D", base / "data", "-U", "tester", "-A", "trust"]
    done = run([*AS_NOBODY, *initdb], cwd=base)
    assert done.returncode == 0, done.stderr
    found = []
    for env in three_ways(public_tree):
        found.append(measured_postgresql(commands, base, {"PATH": os.environ["PATH"], **env}))
    assert_reached(found)


def measured_postgresql(commands: Path, base: Path, env: dict[str, str]) -> Coverage:
    """Start a server on a socket in `base`, let a session fill its memory, measure, stop it."""
    server = subprocess.Popen(
        [
            *(*AS_NOBODY, commands / "postgres", "-D", base / "data", "-k", base, "-h", ""),
            *("-c", "work_mem=256MB", "-c", "max_parallel_workers_per_gather=0"),
        ],
        env=env,
        stderr=subprocess.DEVNULL,
    )
    client = [commands / "psql", "-h", base, "-U", "tester", "-d", "postgres", "-qAt"]
    session = None
    try:
        wait_until(lambda: run([*client, "-c", "select 1"]).stdout == "1\n", 30, "it answers")
        session = subprocess.Popen(
            [str(part) for part in client],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert session.stdin is not None
        assert session.stdout is not None
        # A cursor that is open keeps what it has sorted.
        session.stdin.write(
            "begin; declare c cursor for select i, md5(i::text) m from generate_series(1, 300000) i"
            " order by m; fetch 1 from c;\n"
        )
        session.stdin.flush()
        assert "|" in session.stdout.readline()
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        assert len(children) >= 5
        return of(server.pid, *map(int, children))
    finally:
        if session is not None:
            session.communicate()
        server.terminate()
        server.wait()
