# SPDX-License-Identifier: MIT
"""Real programs in a group: what they do is what they do plainly, at the addresses of the group.

Each task runs plainly and in a group; output, status and files have to be the same. That the
program had the group's addresses tells a library, tests/programs/member.c, which leaves a copy of
/proc/self/maps when the program starts; servers and pairs of members are looked at from outside.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import AS_NOBODY, HERE, Tree, Victims, need, need_command, run, wait_until
from test_chaining import SQL

ET_EXEC = 2
LOADER = "/lib64/ld-linux-x86-64.so.2"


# --- addresses ---


@dataclass(frozen=True)
class Mapping:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    name: str


def mappings(maps: str) -> list[Mapping]:
    """Return what the text of a /proc/PID/maps says."""
    found = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(word, 16) for word in fields[0].split("-"))
        found.append(Mapping(start, end, fields[5] if len(fields) == 6 else ""))
    return found


@dataclass(frozen=True)
class Addresses:
    """Where the kernel has put a process; 0 is nowhere."""

    program: int
    loader: int
    vdso: int
    stack: int

    @staticmethod
    def of(program: str, maps: str) -> Addresses:
        """Read the text of a /proc/PID/maps."""
        found = mappings(maps)

        def start(name: str) -> int:
            return next((one.start for one in found if one.name.endswith(name)), 0)

        stack = next((one.end for one in found if one.name == "[stack]"), 0)
        return Addresses(start(program), start(Path(LOADER).name), start("[vdso]"), stack)


def assert_is_member(program: str, maps: str, group: Group) -> None:
    """Assert that the process of that program was put where the group's are."""
    addresses = Addresses.of(program, maps)
    assert addresses.vdso == group.addresses.vdso
    assert addresses.stack == group.addresses.stack
    assert addresses.loader in (group.addresses.loader, 0)  # none in a static program
    kind = struct.unpack_from("<H", Path(program).read_bytes()[:18], 16)[0]
    if kind != ET_EXEC and addresses.loader not in (0, addresses.program):
        # A program that wants to be aligned lies that much lower.
        assert group.addresses.program - addresses.program in range(1 << 28)
    # The heap lies up to 1 GiB above the program; of one among the mappings, where others lie.
    apart = kind != ET_EXEC and addresses.loader in (0, addresses.program)
    program_at = group.addresses.program if apart else addresses.program
    for one in mappings(maps):
        assert one.name != "[heap]" or one.start - program_at in range(1, 2 << 30)


# --- a group, and how programs are started in it ---


class Group:
    """A group of its own for the tests of this file."""

    count = 0

    def __init__(
        self, wrapper: Path, user: Sequence[str], env: dict[str, str], secret: bytes = b""
    ) -> None:
        """Be a group of the user that `user` changes to; its secret is that byte, if one."""
        Group.count += 1
        self.name = f"tests-{os.getpid()}-{Group.count}"
        self.prefix = [*user, wrapper, "--group", self.name, "--group-required"]
        self.env = env
        try:
            self.look()
            if secret:  # the file is there now
                self._file().write_bytes(secret * self._file().stat().st_size)
                self.look()
        except BaseException:
            self.forget()
            raise

    def look(self) -> None:
        """Find out the addresses."""
        show = ("cat", "/proc/self/maps")
        self.addresses = Addresses.of("/cat", run([*self.prefix, *show], self.env).stdout)
        plain = Addresses.of("/cat", run(show).stdout)
        for name in ("program", "loader", "vdso", "stack"):
            assert getattr(self.addresses, name) not in (0, getattr(plain, name))

    def _file(self) -> Path:
        listed = run([*self.prefix[:-3], "--groups"], self.env).stdout.splitlines()
        return next(Path(line) for line in listed if Path(line).name == self.name)

    def forget(self) -> None:
        """Remove its file."""
        self._file().unlink()


@pytest.fixture(scope="module")
def group(tree: Tree) -> Iterator[Group]:
    need(os.uname().machine == "x86_64", "needs x86_64")
    found = Group(tree.wrapper, (), {})
    yield found
    found.forget()


# --- tasks ---


@dataclass(frozen=True)
class Place:
    """Where a task finds what it reads, and may write; it starts in `out`."""

    inputs: Path
    out: Path
    victims: Victims


@dataclass(frozen=True)
class Task:
    """A command, something that it says, and how much is the same in every run."""

    command: Callable[[Place], list[object]]
    expect: str
    status: int = 0
    then: Callable[[Place], list[object]] | None = None
    """Run plainly afterwards: mostly what the task has made."""
    env: dict[str, str] = field(default_factory=dict)
    differs: str | None = None
    """What is different in every run, in stdout and stderr: a pattern."""
    files: bool = True
    """Whether the files that it writes are the same in every run."""
    preload: bool = True
    """Whether libraries are preloaded into it: ours, and the one that tells the addresses."""


def tool(name: str, *arguments: object) -> Callable[[Place], list[object]]:
    """Return the command that is the same everywhere."""
    return lambda _place: [need_command(name), *arguments]


PYTHON = """if True:
    import hashlib, multiprocessing, subprocess, sys, threading
    found = {}
    def work(number):
        words = [f"{number} {i} " * (i % 50) for i in range(4000)]
        found[number] = hashlib.sha256("".join(sorted(words)).encode()).hexdigest()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        total = sum(pool.map(abs, range(-500, 500)))
    child = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True)
    print(sorted(found.items()), total, child.stdout)
    print("to stderr", file=sys.stderr)
    raise SystemExit(3)"""

PYTHON_EXEC = """if True:
    import os, sys
    print(sys.argv[1], flush=True)
    if sys.argv[1] != "0":
        os.execv("/proc/self/exe", [*sys.orig_argv[:-1], str(int(sys.argv[1]) - 1)])"""

PERL = r"""
use strict; use POSIX qw(floor); use List::Util qw(sum); use Digest::SHA qw(sha256_hex);
my %seen; $seen{"key $_"} = $_ * $_ for 1 .. 20000;
my $text = join ",", map { "$_=$seen{$_}" } sort keys %seen;
print sum(values %seen), " ", sha256_hex($text), " ", floor(3.7), "\n";
print scalar(() = $text =~ /(?:key (\d)\d*7=)/g), "\n";
$| = 1;
if (my $pid = fork) { waitpid $pid, 0; print "child ", $? >> 8, "\n" } else { exit 5 }
print `echo from a shell`; print STDERR "to stderr\n"; exit 7;
"""

PHP = r"""
$all = [];
for ($i = 0; $i < 50000; $i++) $all["key $i"] = ['n' => $i, 'text' => str_repeat('x', $i % 30)];
ksort($all);
echo hash('sha256', json_encode($all)), ' ', count($all), "\n";
echo preg_match_all('/"n":(\d+)7,/', json_encode($all)), "\n";
echo implode(',', array_map(fn($x) => $x ** 2, range(1, 20))), "\n";
fwrite(STDERR, "to stderr\n"); exit(4);
"""

RUBY = r"""
all = {}
50_000.times { |i| all["key #{i}"] = i * i }
threads = 4.times.map { |n| Thread.new { all.values.each_slice(7).sum { |s| s.sum % (n + 2) } } }
puts all.size, threads.map(&:value).inspect, all.keys.sort.first(3).inspect
$stdout.flush
pid = fork { exit! 5 }
Process.wait pid
puts $?.exitstatus, `echo from a shell`
f = Fiber.new { 3.times { |i| Fiber.yield i } }
puts 3.times.map { f.resume }.inspect
ObjectSpace.garbage_collect
warn 'to stderr'; exit 6
"""

NODE = """
const { Worker } = require('worker_threads');
const parts = new Map();
for (let i = 0; i < 20000; i++) parts.set('key ' + i % 997, Buffer.alloc(i % 3000, i % 251));
const text = JSON.stringify([...parts].map(([key, value]) => [key, value.length]));
console.log(text.length, require('crypto').createHash('sha256').update(text).digest('hex'));
const code = Buffer.from('0061736d01000000010601600' + '17f017f03020100' + '0503010001' +
    '070701036d756c0000' + '0a09010700200041076c0b', 'hex');
console.log('wasm', new WebAssembly.Instance(new WebAssembly.Module(code)).exports.mul(6));
const shared = new SharedArrayBuffer(4096);
const worker = new Worker('require("worker_threads").workerData[7] = 9', {
    eval: true, workerData: new Int32Array(shared) });
worker.on('exit', () => {
    console.log('worker', new Int32Array(shared)[7],
        require('child_process').execSync('echo from a shell').toString().trim());
    console.error('to stderr');
    process.exitCode = 9;
});
"""

JAVA = """
import java.util.*;
import java.util.stream.*;
class Main {
    public static void main(String[] given) throws Exception {
        Map<String, Integer> all = new HashMap<>();
        for (int i = 0; i < 100000; i++) all.put("key " + i % 5003, i);
        System.out.println(all.values().parallelStream().mapToLong(x -> x).sum());
        List<byte[]> kept = new ArrayList<>();
        for (int i = 0; i < 20000; i++) {
            kept.add(new byte[1024]);
            if (i % 3 == 0) kept.remove(0);
        }
        Thread[] threads = new Thread[8];
        int[] sums = new int[8];
        for (int t = 0; t < 8; t++) { int n = t; (threads[t] = new Thread(() -> {
            for (int i = 0; i < 1000000; i++) sums[n] += i % (n + 2); })).start(); }
        for (Thread t : threads) t.join();
        System.out.println(Arrays.toString(sums) + " " + kept.size());
        System.out.println(depth(0) > 1000);
        Process child = new ProcessBuilder("echo", "from a child").inheritIO().start();
        child.waitFor();
        System.err.println("to stderr");
        System.exit(8);
    }
    static int depth(int n) {
        try { return depth(n + 1); } catch (StackOverflowError e) { return n; }
    }
}
"""

# Say where the heap is, and how pointers into it are compressed.
HEAP = ("-Xlog:disable", "-Xlog:gc+heap+coops=debug:stdout:none")


def java(*options: str) -> Callable[[Place], list[object]]:
    """Return the command that compiles and runs JAVA."""
    return lambda place: [need_command("java"), *options, place.inputs / "Main.java"]


BASH = r"""
declare -A seen
for i in {1..3000}; do seen[$((i * 7919 % 1013))]+="$i,"; done
echo "${#seen[@]} ${seen[1]} $(printf '%s' "${seen[@]}" | wc -c)"
while read -r line; do last=$line; done < <(seq 1 500)
text=$(printf 'x%.0s' {1..200000}); echo "$last ${#text}"
sleep 0 & wait $!; (exit 4); echo $?; echo "to stderr" >&2
ulimit -s; ulimit -Hs; exec bash -c 'echo again; exit 6'
"""

SH = r"""
count=0; while [ $count -lt 5000 ]; do count=$((count + 1)); done; echo $count
seq 1 3000 | while read -r n; do case $n in *77) echo "$n";; esac; done | tr '\n' ' '
cat <<END
here $(echo nested | tr a-z A-Z)
END
f() { [ "$1" -eq 0 ] || f $(($1 - 1)); }; f 500; echo deep
(exit 4); echo $?; echo "to stderr" >&2; exit 6
"""

ZSH = r"""
typeset -A seen; for i in {1..3000}; do seen[$((i * 7919 % 1013))]=$i; done
print ${#seen} ${(j:,:)${(on)${(k)seen}}[1,5]}; print -l *(N); print $(echo nested)
print "to stderr" >&2; exit 5
"""

C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int compare(const void *a, const void *b) { return strcmp(*(char **)a, *(char **)b); }
int main(void) {
    char *words[1000];
    for (int i = 0; i < 1000; i++)
        sprintf(words[i] = malloc(20), "%d", i * 7919 % 1013);
    qsort(words, 1000, sizeof *words, compare);
    printf("sorted %s %s\n", words[0], words[999]);
    return 5;
}
"""

MAKEFILE = r"""
names := $(shell seq 1 12)
all: $(names:%=%.made)
	@cat $(sort $^) | sort -n | tail -1
	@$(MAKE) --no-print-directory -f $(firstword $(MAKEFILE_LIST)) last
%.made:
	@echo "made $*" > $@
last: ; @echo 'recursive $(words $(names))'; exit 3
.PHONY: all last
"""

CMAKE = """cmake_minimum_required(VERSION 3.10)
project(task C)
include(CheckFunctionExists)
check_function_exists(mremap HAVE_MREMAP)
add_executable(task ../task.c)
"""

AWK = r"""{ for (i = 1; i <= length($0); i += 4) seen[substr($0, i, 4)]++ }
END { for (w in seen) { n++; s += seen[w]; if (seen[w] > m) m = seen[w] }
printf "words %d of %d, at most %d, %.6f\n", n, s, m, sin(n); "echo shell" | getline x; print x
print "to stderr" > "/dev/stderr"; exit 3 }"""

SED = r"s/\([0-9]\)\([a-f]\)/\2\1/g; /^a/!d; y/abc/ABC/; $!N; P; D"

LUA = r"""
local all = {}
for i = 1, 50000 do all["key " .. i] = string.rep("x", i % 40) end
local n, size = 0, 0
for k, v in pairs(all) do n = n + 1; size = size + #v end
local c = coroutine.wrap(function() for i = 1, 5 do coroutine.yield(i * i) end end)
print(n, size, c(), c(), c(), ("%d"):rep(3, "-"):format(1, 2, 3), #collectgarbage and 0 or 1)
print(select(2, pcall(function() local function f() return f() + 1 end return f() end)) ~= nil)
io.stderr:write("to stderr\n") os.exit(5)
""".replace("#collectgarbage and 0 or 1", "collectgarbage() == 0")

LUAJIT = r"""
local ffi = require("ffi")
ffi.cdef("size_t strlen(const char *); void *malloc(size_t); void free(void *);")
local s = 0
for i = 1, 5000000 do s = (s + i * 7) % 1000003 end
local t = {}
for i = 1, 200000 do t[i] = { i, tostring(i) } end
print(s, tonumber(ffi.C.strlen("four")), #t, (select(1, jit.status())))
os.exit(5)
"""

GUILE = r"""
(define table (make-hash-table))
(do ((i 0 (+ i 1))) ((= i 20000)) (hash-set! table (number->string i) (* i i)))
(display (hash-fold (lambda (k v s) (+ v s)) 0 table)) (newline)
(display (call/cc (lambda (k) (dynamic-wind (lambda () #t) (lambda () (k (expt 2 200))) list))))
(newline) (gc) (display "to stderr\n" (current-error-port)) (exit 5)
"""

TCL = r"""
for {set i 0} {$i < 20000} {incr i} { dict set all "key $i" [expr {$i * $i}] }
puts "[dict size $all] [expr {2 ** 100}] [llength [lsort [dict keys $all *7]]]"
proc fib n { expr {$n < 2 ? $n : [fib [expr {$n - 1}]] + [fib [expr {$n - 2}]]} }
puts [fib 18]; puts [exec echo from a child]; puts stderr {to stderr}; exit 5
"""

OCAML = r"""
let table = Hashtbl.create 16;;
for i = 0 to 20000 do Hashtbl.replace table (string_of_int i) (i * i) done;;
let total = Hashtbl.fold (fun _ v s -> v + s) table 0;;
let rec depth n = if n = 0 then 0 else 1 + depth (n - 1);;
Gc.compact ();; Printf.printf "total %d depth %d\n%!" total (depth 10000);;
prerr_endline "to stderr";; exit 5;;
"""

ERLANG = (
    "Parent = self(), [spawn(fun() -> Parent ! lists:sum(lists:seq(1, N)) end)"
    " || N <- lists:seq(1, 500)],"
    "Total = lists:sum([receive X -> X end || _ <- lists:seq(1, 500)]),"
    "Table = ets:new(t, []), [ets:insert(Table, {I, I * I}) || I <- lists:seq(1, 20000)],"
    'io:format("total ~p ~p ~p~n", [Total, ets:info(Table, size), erlang:md5(<<"a">>)]), halt(5).'
)

PROLOG = (
    "numlist(1, 20000, L), sum_list(L, S), atom_codes(A, [0'a, 0'b]), X is 2 ** 200,"
    "length(B, 5), maplist(=(z), B), format('~w ~w ~w ~w~n', [S, A, X, B]), halt(5)"
)

LISP = r"""
(let ((table (make-hash-table :test 'equal)))
  (dotimes (i 20000) (setf (gethash (format nil "~d" i) table) (* i i)))
  (gc :full t)
  (format t "~d ~d ~d~%" (hash-table-count table) (loop for v being the hash-values of table sum v)
    (funcall (compile nil '(lambda (x) (expt x 50))) 7))
  (format *error-output* "to stderr~%") (finish-output) (sb-ext:exit :code 5))
"""

EMACS = r"""
(let ((table (make-hash-table :test 'equal)) (total 0))
  (dotimes (i 20000) (puthash (number-to-string i) (* i i) table))
  (maphash (lambda (_k v) (setq total (+ total v))) table)
  (with-temp-buffer
    (dotimes (i 2000) (insert (format "line %d\n" (% (* i 7919) 1013))))
    (sort-numeric-fields 2 (point-min) (point-max))
    (princ (buffer-substring (point-min) (line-end-position 1)))
    (princ (buffer-size)) (princ " "))
  (garbage-collect)
  (princ (format "total %d %s" total (shell-command-to-string "echo from a shell")))
  (message "to stderr") (kill-emacs 5))
"""

GO = r"""
package main
import ("crypto/sha256"; "fmt"; "os"; "os/exec"; "runtime"; "sort")
func main() {
	all := map[string]int{}
	for i := 0; i < 50000; i++ { all[fmt.Sprint(i)] = i * i }
	keys := []string{}
	for key := range all { keys = append(keys, key) }
	sort.Strings(keys)
	numbers := make(chan int)
	for i := 0; i < 200; i++ { go func(i int) { runtime.Gosched(); numbers <- i * len(keys) }(i) }
	total := 0
	for i := 0; i < 200; i++ { total += <-numbers }
	runtime.GC()
	big := make([]byte, 64 << 20)
	output, _ := exec.Command("echo", "from a child").Output()
	sum := sha256.Sum256([]byte(fmt.Sprint(keys)))
	fmt.Printf("total %d %x %d %s", total, sum, len(big), output)
	fmt.Fprintln(os.Stderr, "to stderr")
	os.Exit(5)
}
"""


PAGE = (
    "data:text/html,<p id=a></p><script>a.textContent = [...'cba'].sort().join('') + 6 * 7</script>"
)


def go(*options: str) -> Callable[[Place], list[object]]:
    """Return the command that runs GO, built with these options."""

    def command(place: Place) -> list[object]:
        program = place.inputs / f"go{len(options)}"
        if not program.exists():
            environment = {"GOCACHE": str(place.inputs / "gocache"), "GO111MODULE": "off"}
            source = place.inputs / "task.go"
            done = run([need_command("go"), "build", *options, "-o", program, source], environment)
            assert done.returncode == 0, done.stderr
        return [program]

    return command


STATIC_PIE = ("-buildmode=pie", "-ldflags", "-linkmode=external -extldflags -static-pie")


def precompiled(place: Place) -> list[object]:
    """Return the command that uses a precompiled header: the compiler's memory out of a file."""
    compiler = run([need_command("g++"), "-print-prog-name=cc1plus"]).stdout.strip()
    need(Path(compiler).exists(), "no cc1plus")
    header = place.inputs / "all.h"
    if not header.with_suffix(".h.gch").exists():
        header.write_text("#include <algorithm>\n#include <map>\n#include <string>\n")
        assert run([need_command("g++"), "-O2", "-x", "c++-header", header]).returncode == 0
        header.write_text("#error the precompiled header is not used\n")
        (place.inputs / "all.cpp").write_text(
            '#include "all.h"\nstd::map<std::string, int> all;\nint main() { return all["a"]; }\n'
        )
    options = ("-quiet", "-O2", "-H", "-D_GNU_SOURCE", "-o", "all.s")
    return [compiler, *options, place.inputs / "all.cpp"]


ERTS = next(Path("/usr/lib/erlang").glob("erts-*/bin"), Path("/usr/lib/erlang/erts/bin"))


def erlang(_place: Place) -> list[object]:
    """Return the command of the emulator itself; `erl` is a script that execs it."""
    root, emulator = ERTS.parents[1], ERTS / "beam.smp"
    need(emulator.exists(), "no beam.smp")
    return [
        *(emulator, "--", "-root", root, "-bindir", emulator.parent, "-progname", "erl"),
        *("--", "-home", "/", "--", "-noshell", "-noinput", "-boot", root / "bin/start_clean"),
        *("-eval", ERLANG),
    ]


def convert(_place: Place) -> list[object]:
    """Return the command of ImageMagick, with OpenMP's threads, gradients, fonts left out."""
    return [
        *(need_command("convert-im6.q16"), "rose:", "-resize", "300x", "-rotate", "30"),
        *("-blur", "0x3", "-colorspace", "Lab", "-separate", "-append", "-depth", "8"),
        *("-write", "picture.ppm", "-format", "picture %wx%h %k\\n", "info:"),
    ]


def in_folder(name: str, *arguments: object) -> Callable[[Place], list[object]]:
    """Return a command where the words @inputs and @out are the folders."""

    def command(place: Place) -> list[object]:
        folders = {"@inputs": str(place.inputs), "@out": str(place.out)}
        words = [str(argument) for argument in arguments]
        for short, folder in folders.items():
            words = [word.replace(short, folder) for word in words]
        return [need_command(name), *words]

    return command


def victim(name: str, kind: str, *arguments: object) -> Callable[[Place], list[object]]:
    return lambda place: [place.victims(name, kind), *arguments]


def shape(*options: str) -> Task:
    """Return the task that is tests/programs/shapes.c built with these options."""
    return Task(
        lambda place: [place.victims.variant("shapes", *options), "one", "two"],
        "zero 1",
        status=7,
        preload="-static-pie" not in options,
    )


TASKS = {
    # --- languages
    "python3": Task(lambda _place: [sys.executable, "-I", "-c", PYTHON], "250000", 3),
    "python3 of Debian": Task(tool("/usr/bin/python3", "-I", "-c", PYTHON), "250000", 3),
    "python3 that execs itself": Task(
        tool("/usr/bin/python3", "-I", "-c", PYTHON_EXEC, 3), "3\n2\n1\n0\n"
    ),
    "perl": Task(tool("perl", "-e", PERL), "child 5\nfrom a shell", 7),
    "php": Task(tool("php", "-d", "pcre.jit=1", "-r", PHP), "50000\n", 4),
    "php with opcache and its JIT": Task(
        in_folder(
            *("php", "-d", "zend_extension=opcache", "-d", "opcache.enable_cli=1"),
            *("-d", "opcache.jit_buffer_size=16M", "-d", "opcache.jit=1255", "@inputs/task.php"),
        ),
        "50000\n",
        4,
    ),
    "ruby": Task(tool("ruby", "-e", RUBY), "[0, 1, 2]", 6),
    "node": Task(tool("node", "-e", NODE), "worker 9 from a shell", 9),
    "java": Task(java(*HEAP, "-Xmx256m", "-XX:+UseSerialGC"), "Oops mode: 32-bit", 8),
    "java with G1": Task(java(*HEAP, "-Xmx256m", "-XX:+UseG1GC"), "Oops mode: 32-bit", 8),
    "java with ZGC": Task(java("-Xmx256m", "-XX:+UseZGC"), "from a child", 8),
    "java with a heap of 16 GB": Task(
        java(*HEAP, "-Xmx16g", "-XX:+UseParallelGC"), "Oops mode: Zero based", 8
    ),
    "java with its archive of classes at its own address": Task(
        java(
            *("-Xlog:disable", "-Xlog:gc+metaspace=info:stdout:none", "-Xshare:on", "-Xmx256m"),
            *("-XX:+UnlockDiagnosticVMOptions", "-XX:ArchiveRelocationMode=0"),
        ),
        "mapped at: [0x0000000800000000",
        8,
        differs=r"GC\(.*\n",
    ),
    "lua": Task(tool("lua5.4", "-e", LUA), "50000\t975000", 5),
    "luajit": Task(tool("luajit", "-e", LUAJIT), "200000\ttrue", 5),
    "guile": Task(tool("guile", "--no-auto-compile", "-c", GUILE), "2666466670000", 5),
    "tclsh": Task(in_folder("tclsh", "@inputs/task.tcl"), "2584\nfrom a child", 5),
    "ocaml": Task(in_folder("ocaml", "@inputs/task.ml"), "depth 10000", 5),
    "ocamlopt": Task(
        in_folder("ocamlopt", "-o", "task", "-I", "@out", "@inputs/native/task.ml"),
        "depth 10000",
        then=lambda place: [place.out / "task"],
    ),
    "erlang": Task(
        erlang,
        "total 20958500 20000",
        5,
        env={"BINDIR": str(ERTS), "ROOTDIR": "/usr/lib/erlang", "EMU": "beam"},
    ),
    "swipl": Task(tool("swipl", "-g", PROLOG, "-t", "halt"), "200010000 ab", 5),
    "sbcl": Task(
        tool("sbcl", "--noinform", "--non-interactive", "--eval", LISP), "2666466670000", 5
    ),
    "go as PIE": Task(go("-buildmode=pie"), "from a child", 5),
    "go as static PIE": Task(go(*STATIC_PIE), "from a child", 5, preload=False),
    # --- shells and editors
    "bash": Task(tool("bash", "-c", BASH), "again\n", 6),
    "dash": Task(tool("dash", "-c", SH), "here NESTED\ndeep", 6),
    "zsh": Task(tool("zsh", "-f", "-c", ZSH), "1013", 5),
    "vim": Task(
        in_folder(
            *("vim", "-u", "NONE", "-i", "NONE", "-N", "-es", "@inputs/few"),
            *("-c", "%sort", "-c", r"%s/\v(\d)([a-f])/\2\1/g", "-c", "g/^a/normal! ggdd"),
            *("-c", "r !echo from a shell", "-c", "w! edited", "-c", "1print", "-c", "cq"),
        ),
        "",
        1,
    ),
    "emacs": Task(tool("emacs", "-Q", "--batch", "--eval", EMACS), "total 2666466670000", 5),
    # --- compilers and debuggers
    "gcc": Task(
        in_folder("gcc", "-pipe", "-g", "-O2", "-o", "task", "@inputs/task.c"),
        "sorted 0 999",
        then=lambda place: [place.out / "task"],
    ),
    "gcc with LTO": Task(
        in_folder("gcc", "-flto=2", "-O2", "-o", "task", "@inputs/task.c", "-static"),
        "sorted 0 999",
        then=lambda place: [place.out / "task"],
        files=False,
    ),
    "g++": Task(
        lambda _place: [
            *(need_command("g++"), "-O1", "-pthread", "-o", "task"),
            HERE / "programs/workers.cpp",
        ],
        "worker number 7",
        then=lambda place: [place.out / "task"],
    ),
    "cc1plus with a precompiled header": Task(precompiled, "all.h.gch"),
    "clang": Task(
        in_folder("clang", "-g", "-O2", "-o", "task", "@inputs/task.c"),
        "sorted 0 999",
        then=lambda place: [place.out / "task"],
    ),
    "make": Task(in_folder("make", "-j4", "-f", "@inputs/Makefile"), "recursive 12", 2),
    "cmake": Task(
        in_folder("cmake", "-S", "@inputs/project", "-B", "@out/build"),
        "Looking for mremap - found",
        then=lambda place: [need_command("cmake"), "--build", place.out / "build"],
        differs=r"\(\d+\.\d+s\)",
        files=False,
    ),
    "gdb": Task(
        lambda place: [
            *(need_command("gdb"), "--batch", "-nx", "-iex", "set debuginfod enabled off"),
            *("-iex", "set print thread-events off", "-ex", "break main", "-ex", "run"),
            *("-ex", "print mine[0]", "-ex", "break list", "-ex", "continue"),
            *("-ex", "backtrace 1", "-ex", "print total", "-ex", "delete", "-ex", "continue"),
            place.victims("shapes"),
        ],
        "exited with code 07",
        differs=r"0x[0-9a-f]+|process \d+",
    ),
    "strace": Task(
        in_folder("strace", "-f", "-o", "log", "-c", "sh", "-c", "echo traced; exit 3"),
        "traced",
        3,
        files=False,
    ),
    "valgrind": Task(
        lambda place: [need_command("valgrind"), "-q", place.victims("shapes")], "zero 1", 7
    ),
    "qemu-aarch64": Task(
        lambda place: [
            *(need_command("qemu-aarch64"), "-L", "/usr/aarch64-linux-gnu"),
            *(place.victims("shapes", "aarch64"), "one"),
        ],
        "zero 1",
        7,
        preload=False,  # what it runs would be given our libraries
    ),
    # --- text, archives, pictures, the net
    "sqlite3": Task(tool("sqlite3", "base", SQL), "20000|", 1, files=False),
    "git clone": Task(
        in_folder("git", "clone", "--no-local", "--quiet", "@inputs/repository", "@out/clone"),
        "commit 4\n",
        then=lambda place: ["git", "-C", place.out / "clone", "log", "--format=commit %s"],
    ),
    "git fsck": Task(
        in_folder("git", "-C", "@inputs/repository", "fsck", "--full", "--strict", "--no-progress"),
        "commit 4\n",
        then=in_folder("git", "-C", "@inputs/repository", "log", "--format=commit %s"),
    ),
    "sort": Task(
        in_folder(
            *("sort", "--parallel=2", "-S", "1M", "-T", "@out", "--compress-program=gzip"),
            *("-o", "sorted", "@inputs/lines"),
        ),
        "",
    ),
    "gawk": Task(in_folder("gawk", AWK, "@inputs/lines"), "words 69596", 3),
    "mawk": Task(in_folder("mawk", AWK, "@inputs/lines"), "words 69596", 3),
    "sed": Task(in_folder("sed", SED, "@inputs/lines"), "A"),
    "jq": Task(
        tool(
            "jq",
            "-n",
            "[range(20000) | {k: tostring, v: (. * .)}] | group_by(.v % 7) | map(length)",
        ),
        "5714",
    ),
    "bc": Task(in_folder("bc", "-lq", "@inputs/pi.bc"), "3.14159265358979323846"),
    "tar with zstd": Task(
        in_folder(
            *("tar", "--zstd", "--sort=name", "--mtime=@0", "-cvf", "all.tar.zst"),
            *("-C", "@inputs", "few", "lines", "project"),
        ),
        "project/CMakeLists.txt",
    ),
    "tar -x": Task(in_folder("tar", "-xvf", "@inputs/few.tar.xz"), "few"),
    "xz": Task(in_folder("xz", "-T2", "-3", "-c", "@inputs/lines"), "7zXZ"),
    "zstd": Task(in_folder("zstd", "-T2", "-9", "-q", "@inputs/lines", "-o", "lines.zst"), ""),
    "openssl": Task(
        in_folder(
            *("openssl", "enc", "-aes-256-cbc", "-pbkdf2", "-S", "0123456789abcdef", "-pass"),
            *("pass:word", "-in", "@inputs/lines", "-out", "secret"),
        ),
        "SHA2-256(secret)= ",
        then=tool("openssl", "sha256", "secret"),
    ),
    "openssl x509": Task(
        in_folder("openssl", "x509", "-in", "@inputs/cert.pem", "-noout", "-text"),
        "CN = localhost",
    ),
    "rsync": Task(
        in_folder("rsync", "-rlpi", "--checksum", "@inputs/project", "@inputs/few", "@out/copy"),
        "project/CMakeLists.txt",
    ),
    "curl of a file": Task(in_folder("curl", "-sS", "file://@inputs/few", "-o", "got"), ""),
    "imagemagick": Task(convert, "picture "),
    "chromium": Task(
        in_folder(
            *("chromium-headless-shell", "--no-sandbox", "--headless", "--user-data-dir=@out"),
            *("--disable-gpu", "--dump-dom"),
            PAGE,
        ),
        "abc42",
        differs=r"\[\d+(?::\d+)*/\d+\.\d+:.*\n",  # its log, with times, in any order
        files=False,
    ),
    "systemd-escape": Task(tool("systemd-escape", "--template=a@.service", "/b c"), "a@-b"),
    "systemd-analyze": Task(tool("systemd-analyze", "timespan", "3months 5d"), "3month 5d"),
    # --- how programs are started
    "ld.so": Task(in_folder(LOADER, "/usr/bin/sort", "-r", "-o", "sorted", "@inputs/lines"), ""),
    "ld.so --list": Task(
        tool(LOADER, "--list", "/usr/bin/sort"), "libc.so.6", differs=r"0x\w+", preload=False
    ),
    "setpriv": Task(tool(*AS_NOBODY, "id", "-u"), "65534"),
    # --- shapes
    "PIE": shape(),
    "no PIE": shape("-no-pie"),
    "static PIE": shape("-static-pie"),
    "-z now": shape("-Wl,-z,now"),
    "executable stack": shape("-Wl,-z,execstack"),
    "64 MB of bss": shape("-DBSS=67108864"),
    "bss of a program at a fixed address": shape("-DBSS=67108864", "-no-pie"),
    "large static TLS": shape("-DTLS=8388608"),
    "1000 threads": shape("-DTHREADS=1000"),
    "large code model": shape("-mcmodel=large"),
    "segments aligned to 2 MB": shape("-Wl,-z,max-page-size=0x200000"),
    "segments aligned to 128 MB": shape("-Wl,-z,max-page-size=0x8000000"),
    "code and data in common pages": shape("-Wl,-z,noseparate-code"),
    "an address wish of its own": shape("-Wl,-Ttext-segment=0x20000000", "-pie"),
    # --- run-times that want memory at certain addresses
    "clang's ASan": Task(victim("shapes", "clang-asan"), "zero 1", 7),
    "TSan": Task(victim("shapes", "tsan"), "zero 1", 7),
    "UBSan": Task(victim("shapes", "ubsan"), "zero 1", 7),
    "gcc's ASan": Task(victim("shapes", "asan"), "zero 1", 7, preload=False),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the tasks read."""
    folder = tmp_path_factory.mktemp("inputs")
    block = random.Random(0).randbytes(1 << 20).hex()
    lines = [block[i : i + 63] for i in range(0, len(block), 63)]
    for name in ("project", "native"):
        (folder / name).mkdir()
    texts = {
        "lines": "\n".join(lines) + "\n",
        "few": "\n".join(lines[:500]) + "\n",
        "Main.java": JAVA,
        "task.php": f"<?php {PHP}",
        "task.tcl": TCL,
        "task.ml": OCAML,
        "native/task.ml": OCAML,
        "task.c": C,
        "task.go": GO,
        "Makefile": MAKEFILE,
        "project/CMakeLists.txt": CMAKE,
        "ready.tcl": "puts ready; flush stdout; gets stdin",
        "pi.bc": "scale = 400\n4 * a(1)\n2 ^ 500\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    assert run(["tar", "-C", folder, "-cJf", folder / "few.tar.xz", "few"]).returncode == 0
    request = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost")
    pair = ("-keyout", folder / "key.pem", "-out", folder / "cert.pem")
    assert run([need_command("openssl"), *request, *pair]).returncode == 0
    repository = folder / "repository"
    git = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@b"]
    run(["git", "init", "--quiet", repository])
    for number in range(5):
        for file in range(20):
            (repository / f"{file}.txt").write_text(f"{file} {number}\n" * 500)
        run([*git, "add", "."])
        assert run([*git, "commit", "--quiet", "-m", f"{number}"]).returncode == 0
    return folder


@dataclass(frozen=True)
class Outcome:
    """What can be seen of a task from outside."""

    status: int
    stdout: str
    stderr: str
    files: dict[str, str]
    then: tuple[int, str, str] | None


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of each file below a folder, without git's own of today."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and ".git/" not in str(file)
    }


def perform(
    task: Task, place: Place, prefix: Sequence[object] = (), maps: Path | None = None
) -> Outcome:
    """Carry out a task in an empty folder; leave the addresses it had first in the file `maps`."""
    shutil.rmtree(place.out, ignore_errors=True)
    place.out.mkdir()
    env = {"HOME": str(place.out), **task.env}
    if maps is not None:
        library = place.victims.variant("member", "-shared", "-fPIC")
        env |= {"LD_PRELOAD": str(library), "KSM_MAPS": str(maps), "KSM_PARENT": str(os.getpid())}
    done = run([*prefix, *task.command(place)], env, place.out)

    def same(text: str) -> str:
        return re.sub(task.differs, "", text) if task.differs else text

    then = None
    if task.then is not None:
        after = run(task.then(place), {"HOME": str(place.out)}, place.out)
        then = (after.returncode, same(after.stdout), same(after.stderr))
    files = digests(place.out) if task.files else {}
    return Outcome(done.returncode, same(done.stdout), same(done.stderr), files, then)


def assert_same(group: Group, task: Task, place: Place, maps: Path) -> None:
    plain = perform(task, place)
    assert plain.status == task.status, plain
    assert plain.stdout or plain.files or plain.then
    assert task.expect in "".join((plain.stdout, plain.stderr, *map(str, plain.then or ())))

    if not task.preload:
        assert perform(task, place, [*group.prefix, "--no-preload"]) == plain
        return
    assert perform(task, place, group.prefix, maps) == plain
    program, _, text = maps.read_text().partition("\n")
    assert_is_member(program, text, group)


# Building the standard library of Go takes some seconds.
SLOW = {"go as PIE", "go as static PIE"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TASKS]
)
def test_a_program_does_the_same_in_a_group(
    group: Group, name: str, inputs: Path, tmp_path: Path, victims: Victims
) -> None:
    place = Place(inputs, tmp_path / "out", victims)
    assert_same(group, TASKS[name], place, tmp_path / "maps")


@pytest.fixture(scope="module", params=["lowest", "highest"])
def extreme(tree: Tree, request: pytest.FixtureRequest) -> Iterator[Group]:
    """Return a group with everything as low as it can be, or almost as high."""
    found = Group(tree.wrapper, (), {}, b"\0" if request.param == "lowest" else b"\xff")
    yield found
    found.forget()


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_program_does_the_same_at_the_ends_of_the_ranges(
    extreme: Group, name: str, inputs: Path, tmp_path: Path, victims: Victims
) -> None:
    place = Place(inputs, tmp_path / "out", victims)
    assert_same(extreme, TASKS[name], place, tmp_path / "maps")


MANY = """if True:
    import hashlib, os, sys
    print(len(sys.argv), hashlib.sha256(" ".join(sys.argv).encode()).hexdigest())
    print(len(os.environ["MANY"]))"""


def test_many_arguments_arrive(extreme: Group) -> None:
    """The stack is moved by little, and holds much."""
    command = ("/usr/bin/python3", "-I", "-c", MANY, *(str(i) * 1000 for i in range(400)))
    env = {"MANY": "m" * 100000}
    plain = run(command, env)
    assert plain.stdout.startswith("401 ")
    assert run([*extreme.prefix, *command], env).stdout == plain.stdout


# --- two members ---


# Each says "ready" on stdout, then waits for a line on stdin.
WAITING: dict[str, Callable[[Place], list[object]]] = {
    "python3": lambda _place: [
        *(sys.executable, "-I", "-c"),
        "import ctypes, json, sqlite3, ssl; print('ready', flush=True); input()",
    ],
    "python3 of Debian": tool(
        "/usr/bin/python3", "-I", "-c", "import ctypes, ssl; print('ready', flush=True); input()"
    ),
    "perl": tool("perl", "-MPOSIX", "-MData::Dumper", "-e", '$| = 1; print "ready\n"; <STDIN>'),
    "php": tool("php", "-r", 'echo "ready\n"; fgets(STDIN);'),
    "ruby": tool("ruby", "-e", "$stdout.sync = true; puts :ready; gets"),
    "node": tool("node", "-e", "console.log('ready'); require('fs').readSync(0, Buffer.alloc(1))"),
    "lua": tool("lua5.4", "-e", "print('ready') io.stdout:flush() io.read()"),
    "guile": tool(
        *("guile", "--no-auto-compile", "-c"),
        '(display "ready\n") (force-output) (read-char (current-input-port))',
    ),
    "tclsh": in_folder("tclsh", "@inputs/ready.tcl"),
    "bash": tool("bash", "-c", "echo ready; read -r line"),
    "dash": tool("dash", "-c", "echo ready; read -r line"),
    "gawk": tool("gawk", 'BEGIN { print "ready"; fflush(); getline }'),
    "sqlite3": tool("sqlite3", "-interactive", "-cmd", ".print ready", ":memory:"),
    "erlang": lambda place: [
        *erlang(place)[:-2],
        *("-eval", 'io:format("ready~n"), receive never -> ok end.'),
    ],
    "shapes as static PIE": lambda place: [
        place.victims.variant("shapes", "-static-pie", "-DWAIT")
    ],
}

# Threads that start in any order map their memory in any order.
THREADED = {"erlang", "node", "ruby"}


@contextmanager
def waiting(command: Sequence[object], out: Path, env: dict[str, str]) -> Iterator[list[Mapping]]:
    """Yield where everything lies in a program that has said that it is ready."""
    with subprocess.Popen(
        [str(part) for part in command],
        env={"PATH": os.environ["PATH"], "HOME": str(out), "LC_ALL": "C", **env},
        cwd=out,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield mappings(Path(f"/proc/{process.pid}/maps").read_text())
        finally:
            process.kill()


def places(found: list[Mapping], threaded: bool) -> set[tuple[str, int]]:
    """Return where files, the heap, the stack and what is between them lie."""
    result = set()
    for one in found:
        if one.name == "[stack]":  # it has grown
            result.add((one.name, one.end))
        elif one.name == "[vsyscall]":  # the same everywhere
            continue
        elif one.name or not threaded:
            result.add((one.name, one.start))
    return result


@pytest.mark.parametrize("name", WAITING)
def test_two_members_have_the_same_addresses(
    group: Group, name: str, inputs: Path, tmp_path: Path, victims: Victims
) -> None:
    command = WAITING[name](Place(inputs, tmp_path, victims))
    env = TASKS[name].env if name in TASKS else {}
    found = []
    for prefix in (group.prefix, group.prefix, ()):
        with waiting([*prefix, *command], tmp_path, env) as where:
            found.append(places(where, name in THREADED))
    one, other, plain = found
    assert one == other
    assert one
    # Of programs at a fixed address, that is in common.
    assert not any(address > 1 << 44 for _, address in one & plain)


# --- servers ---


def children_of(pid: int) -> set[str]:
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@dataclass(frozen=True)
class Way:
    """How a server is started, and what its processes have to be."""

    prefix: Sequence[object]
    env: dict[str, str]
    group: Group | None

    def check(self, pid: int, children: int = 0) -> None:
        """Assert that the process and its children, at least that many, are members."""
        below = 0
        for process in (pid, *map(int, children_of(pid))):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                program = os.readlink(f"/proc/{process}/exe")
                maps = Path(f"/proc/{process}/maps").read_text()
                below += process != pid
                if self.group is not None:
                    assert_is_member(program, maps, self.group)
        assert below >= children


@contextmanager
def serving(
    way: Way, command: Sequence[object], folder: Path, end: int = signal.SIGTERM
) -> Iterator[int]:
    """Run a server in the foreground, yield its PID; it has to end well by the signal `end`."""
    log = folder / "output"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in (*way.prefix, *command)],
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "LC_ALL": "C", **way.env},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process.pid
            process.send_signal(end)
            assert process.wait(30) == 0, log.read_text()
        except BaseException:
            print(log.read_text(errors="replace"))
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> tuple[int, bytes]:
    """Ask a server on loopback; return its status and answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def answers(port: int) -> Callable[[], bool]:
    """Return the question whether a server answers yet."""

    def ask() -> bool:
        with suppress(OSError):
            return get(port, "/few")[0] == 200
        return False

    return ask


def changed_children(pid: int, before: set[str]) -> Callable[[], bool]:
    """Return the question whether all children are other ones now."""
    return lambda: bool(children_of(pid)) and not children_of(pid) & before


SITE = """<?php
$all = []; for ($i = 0; $i < 20000; $i++) $all["key $i"] = $i * $i;
echo hash('sha256', json_encode($all)), ' ', preg_match('/(\\d+)x/', '42x', $m), $m[1];
"""


def apache(way: Way, folder: Path, inputs: Path) -> list[object]:
    modules = sorted(Path("/usr/lib/apache2/modules").glob("libphp*.so"))
    need(modules, "no PHP for Apache")
    program = need_command("apache2")
    port = free_port()
    (folder / "site").mkdir()
    shutil.copy(inputs / "few", folder / "site")
    (folder / "site" / "all.php").write_text(SITE)
    lines = [
        f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so"
        for name in ("mpm_prefork", "authz_core", "dir", "mime", "rewrite")
    ]
    lines += [f"LoadModule php_module {modules[-1]}", "User nobody", "Group nogroup"]
    lines += ["ServerName localhost", f"Listen 127.0.0.1:{port}", f"PidFile {folder}/pid"]
    lines += [f"DocumentRoot {folder}/site", f"ErrorLog {folder}/errors", "StartServers 3"]
    lines += ["TypesConfig /dev/null", "AddHandler application/x-httpd-php .php"]
    (folder / "conf").write_text("\n".join(lines) + "\n")
    paths = ("/few", "/all.php", "/missing")
    command = [program, "-D", "FOREGROUND", "-d", folder, "-f", folder / "conf"]
    with serving(way, command, folder) as pid:
        wait_until(answers(port), 20, "Apache answers")
        said: list[object] = [get(port, path) for path in paths]
        way.check(pid, children=3)
        before = children_of(pid)
        os.kill(pid, signal.SIGUSR1)  # graceful: it loads its modules anew
        wait_until(changed_children(pid, before), 20, "Apache has new workers")
        wait_until(answers(port), 20, "Apache answers again")
        said += [get(port, path) for path in paths]
        way.check(pid, children=1)
    return said


def nginx(way: Way, folder: Path, inputs: Path) -> list[object]:
    port = free_port()
    shutil.copy(inputs / "few", folder)
    lines = [
        "user root; pcre_jit on; daemon off; worker_processes 2;",
        f"pid {folder}/pid; error_log stderr;",
    ]
    lines += ["events {}", "http { access_log off; gzip on; gzip_types *;"]
    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        lines.append(f"{name}_temp_path {folder}/{name};")
    lines += [f"server {{ listen 127.0.0.1:{port}; root {folder};"]
    lines += [r"location ~ ^/n/(\d+)$ { return 200 number-$1; } } }"]
    (folder / "conf").write_text("\n".join(lines))
    paths = ("/few", "/n/42", "/missing")
    command = [need_command("nginx"), "-p", folder, "-c", folder / "conf"]
    with serving(way, command, folder, signal.SIGQUIT) as pid:
        wait_until(answers(port), 20, "nginx answers")
        said: list[object] = [get(port, path) for path in paths]
        way.check(pid, children=2)
        before = children_of(pid)
        os.kill(pid, signal.SIGHUP)
        wait_until(changed_children(pid, before), 20, "nginx has new workers")
        said += [get(port, path) for path in paths]
        way.check(pid, children=2)
    return said


def redis(way: Way, folder: Path, _inputs: Path) -> list[object]:
    path = folder / "socket"
    options = ("--port", "0", "--unixsocket", path, "--save", "", "--dir", folder)
    script = "local n = 0 for i = 1, 1000 do n = n + redis.call('incr', 'n') end return n"
    with serving(way, [need_command("redis-server"), *options], folder) as pid:
        wait_until(path.exists, 20, "redis-server listens")
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(20)
        client.connect(str(path))
        with client, client.makefile("rwb") as stream:

            def ask(*words: str) -> str:
                stream.write(b"*%d\r\n" % len(words))
                for word in words:
                    stream.write(b"$%d\r\n%s\r\n" % (len(word), word.encode()))
                stream.flush()
                line = stream.readline().decode().strip()
                return stream.read(int(line[1:]) + 2).decode() if line[0] == "$" else line

            def saved() -> bool:
                return "rdb_bgsave_in_progress:0" in ask("info", "persistence")

            said: list[object] = [ask("ping"), ask("set", "a", "b" * 5000), ask("get", "a")]
            said += [ask("eval", script, "0"), ask("incr", "n"), ask("bgsave")]
            wait_until(saved, 20, "redis-server has saved in its child")
            said += ["rdb_last_bgsave_status:ok" in ask("info", "persistence"), ask("dbsize")]
            way.check(pid)
    assert (folder / "dump.rdb").exists()
    return said


POSTGRES_SQL = """
create table t as select i, md5(i::text) b from generate_series(1, 50000) i;
create index u on t(b); analyze t;
set jit = on; set jit_above_cost = 0; set parallel_setup_cost = 0; set parallel_tuple_cost = 0;
set min_parallel_table_scan_size = 0; set max_parallel_workers_per_gather = 2;
select count(*), max(b), sum(length(b) * i) from t where b like '%7%';
select error;
"""


def postgres(way: Way, folder: Path, _inputs: Path) -> list[object]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    need(programs, "no PostgreSQL")
    bin_folder, data = programs[-1].parent, folder / "data"
    os.chown(folder, 65534, 65534)
    init = ("-D", data, "-U", "a", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
    made = run([*way.prefix, bin_folder / "initdb", *init], way.env, folder)
    assert made.returncode == 0, made.stderr
    said: list[object] = [made.stdout, made.stderr]
    options = ("-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "fsync=off")
    ask = [bin_folder / "psql", "-X", "-h", folder, "-U", "a", "-d", "postgres", "-Atc"]
    with serving(way, [bin_folder / "postgres", *options], folder, signal.SIGINT) as pid:
        wait_until(lambda: run([*ask, "select 1"]).returncode == 0, 30, "postgres answers")
        for statement in POSTGRES_SQL.split(";\n")[:-1]:
            done = run([*ask, statement])
            said.append((done.returncode, done.stdout, done.stderr))
        way.check(pid, children=4)
    return said


MARIADB_SQL = """create database d; use d;
create table t (i int primary key, b varchar(99), key(b));
insert into t select seq, md5(seq) from seq_1_to_20000; select count(*), max(b), sum(i) from t;
select count(*) from t a join t b on a.i = b.i + 1 where a.b regexp '^[0-9]+[a-f]'; select error;"""


def mariadb(way: Way, folder: Path, _inputs: Path) -> list[object]:
    server, client = need_command("mariadbd"), need_command("mariadb")
    (folder / "data" / "mysql").mkdir(parents=True)
    common = ("--no-defaults", "--user=root", f"--datadir={folder}/data", "--skip-networking")
    tables = "".join(
        Path(f"/usr/share/mysql/{name}.sql").read_text()
        for name in ("mysql_system_tables", "mysql_performance_tables")
    )
    boot = subprocess.run(
        [str(part) for part in (*way.prefix, server, *common, "--bootstrap", "--log-warnings=0")],
        input=f"use mysql;\n{tables}".encode(),
        env={"PATH": os.environ["PATH"], **way.env},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert boot.returncode == 0, boot.stderr
    path = folder / "socket"
    options = (f"--socket={path}", "--skip-grant-tables", f"--pid-file={folder}/pid")
    with serving(way, [server, *common, *options], folder) as pid:
        ask = [client, "--no-defaults", "-S", path, "-uroot", "-N", "-e"]
        wait_until(lambda: run([*ask, "select 1"]).returncode == 0, 30, "mariadbd answers")
        done = run([*ask, MARIADB_SQL])
        way.check(pid)
    return [boot.stdout, done.returncode, done.stdout, done.stderr]


def tmux(way: Way, folder: Path, _inputs: Path) -> list[object]:
    """The server is a fork of the client that is started."""
    path = folder / "socket"
    ask = [need_command("tmux"), "-S", path]
    text = r"printf 'one\ntwo\n'; stty size; exec cat"
    new = [*ask, "-f", "/dev/null", "new-session", "-d", "-x", "60", "-y", "10", text]
    done = run([*way.prefix, *new], {**way.env, "TERM": "screen"}, folder)
    said: list[object] = [done.returncode, done.stdout, done.stderr]
    try:

        def screen() -> str:
            return run([*ask, "capture-pane", "-p"]).stdout

        wait_until(lambda: "10 60" in screen(), 20, "the pane's shell runs")
        run([*ask, "send-keys", "typed", "Enter"])
        wait_until(lambda: screen().count("typed") == 2, 20, "the pane echoes")
        pid = int(run([*ask, "display-message", "-p", "#{pid}"]).stdout)
        if way.group is not None:
            program = os.readlink(f"/proc/{pid}/exe")
            assert_is_member(program, Path(f"/proc/{pid}/maps").read_text(), way.group)
        said.append(screen())
    finally:
        run([*ask, "kill-server"])
    return said


SERVERS = {
    "apache2": (apache, " 142'), (404"),
    "nginx": (nginx, "number-42"),
    "redis-server": (redis, "+PONG"),
    "postgres": (postgres, "50000"),
    "mariadbd": (mariadb, "20000"),
    "tmux": (tmux, "one\\ntwo\\n10 60\\ntyped"),
}


@pytest.fixture
def reachable(public: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return a folder that other users reach too, with a short path for sockets."""
    folder = public / hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def nobodys(public_tree: Tree, public: Path) -> Iterator[Group]:
    """Return a group of a user without privileges."""
    need(os.geteuid() == 0, "needs root")
    folder = public / "runtime"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    found = Group(public_tree.wrapper, AS_NOBODY, {"XDG_RUNTIME_DIR": str(folder)})
    yield found
    found.forget()


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_does_the_same_in_a_group(
    request: pytest.FixtureRequest, name: str, inputs: Path, reachable: Path
) -> None:
    serve, expect = SERVERS[name]
    own: Group = request.getfixturevalue("nobodys" if name == "postgres" else "group")
    said = []
    for way in (
        Way(AS_NOBODY if name == "postgres" else (), {}, None),
        Way(own.prefix, own.env, own),
    ):
        folder = reachable / "server"
        folder.mkdir()
        said.append(serve(way, folder, inputs))
        shutil.rmtree(folder)
    plain, member = said
    assert expect in str(plain)
    assert member == plain


# --- settings that a program may have been given, or give itself ---


@pytest.mark.parametrize(
    "flag",
    [
        *("--addr-no-randomize", "--read-implies-exec", "--mmap-page-zero", "--sticky-timeouts"),
        *("--whole-seconds", "--short-inode", "--fdpic-funcptrs", "--3gb", "--32bit"),
        "--uname-2.6",
    ],
)
def test_a_personality_is_kept(group: Group, flag: str) -> None:
    setarch = (need_command("setarch"), flag)
    show = ("sh", "-c", "cat /proc/$$/personality /proc/$$/maps; uname -r")
    plain = run([*setarch, *show]).stdout.splitlines()
    member = run([*setarch, *group.prefix, *show]).stdout.splitlines()
    assert (member[0], member[-1]) == (plain[0], plain[-1])
    assert_is_member(os.path.realpath("/bin/sh"), "\n".join(member[1:-1]), group)


def test_a_32_bit_machine_is_shown_to_the_program(group: Group) -> None:
    command = (*group.prefix, "uname", "-m")
    assert run([need_command("setarch"), "linux32", *command]).stdout == "i686\n"


def test_a_member_may_ask_for_no_randomization(group: Group) -> None:
    command = (need_command("setarch"), "--addr-no-randomize", "cat", "/proc/self/maps")
    plain = run(command)
    assert "555555554000-" in plain.stdout
    assert run([*group.prefix, "--no-preload", *command]).stdout == plain.stdout


def test_the_legacy_layout_is_left_alone(group: Group) -> None:
    command = (need_command("setarch"), "--addr-compat-layout")
    done = run([*command, *group.prefix, "echo", "ran"])
    assert (done.returncode, done.stdout) == (4, "")
    assert "legacy memory layout" in done.stderr


@pytest.mark.parametrize("limit", ["1048576", "4294967296", "unlimited"])
def test_a_stack_limit_is_kept(group: Group, limit: str) -> None:
    prlimit = (need_command("prlimit"), f"--stack={limit}:unlimited")
    show = ("bash", "-c", "ulimit -s; ulimit -Hs; bash -c 'ulimit -s; ulimit -Hs'")
    plain = run([*prlimit, *show])
    assert plain.returncode == 0
    assert run([*prlimit, *group.prefix, *show]).stdout == plain.stdout


def test_a_hard_stack_limit_is_kept_or_the_reason_told(group: Group) -> None:
    """A higher one needs CAP_SYS_RESOURCE, which root in a container may not have."""
    own = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    assert own is not None
    may = int(own[1], 16) >> 24 & 1
    prlimit = (need_command("prlimit"), "--stack=8388608:8388608")
    show = ("bash", "-c", "ulimit -s; ulimit -Hs")
    member = run([*prlimit, *group.prefix, *show])
    assert (member.returncode, member.stdout) == ((0, "8192\n8192\n") if may else (4, ""))
    assert may or "the hard limit on the stack is 8388608 bytes" in member.stderr
    member = run([*prlimit, *group.prefix[:-1], *show])
    assert (member.returncode, member.stdout) == (0, "8192\n8192\n")


@pytest.mark.parametrize("limit", ["4294967296", "unlimited"])
def test_a_stack_may_grow_to_3_gib(group: Group, victims: Victims, limit: str) -> None:
    deep = victims.variant("shapes", "-DDEEP=3221225472UL")
    assert run([deep]).returncode != 7
    prlimit = (need_command("prlimit"), f"--stack={limit}:unlimited")
    plain = run([*prlimit, deep])
    assert plain.returncode == 7
    member = run([*prlimit, *group.prefix, deep])
    assert (member.returncode, member.stdout) == (7, plain.stdout)


def test_a_member_starts_a_member(group: Group) -> None:
    """And a child of a member that is not started so has its own addresses."""
    show = "cat /proc/self/maps"
    again = " ".join(map(str, group.prefix))
    done = run([*group.prefix, "sh", "-c", f"{again} {show}; echo then; {show}"])
    member, _, child = done.stdout.partition("then\n")
    assert_is_member(os.path.realpath("/bin/cat"), member, group)
    other = Addresses.of("/cat", child)
    for name in ("program", "loader", "vdso", "stack"):
        assert getattr(other, name) not in (0, getattr(group.addresses, name))


def test_a_static_program_runs_without_the_layout(group: Group, victims: Victims) -> None:
    program = victims("shapes", "static")
    plain = run([program, "one"])
    assert plain.returncode == 7
    member = run([*group.prefix[:-1], program, "one"])
    assert (member.returncode, member.stdout) == (plain.returncode, plain.stdout)
    said = member.stderr.splitlines()
    assert "runs with an ordinary layout: it is static" in said[0]
    assert said[1:] == plain.stderr.splitlines()
    done = run([*group.prefix, program, "one"])
    assert (done.returncode, done.stdout) == (4, "")


def test_busybox_does_the_same(group: Group) -> None:
    """Debian has it dynamic, and static at a fixed address: then only without --group-required."""
    command = (need_command("busybox"), "sh", "-c", SH)
    plain = run(command)
    assert "here NESTED\ndeep" in plain.stdout
    member = run([*group.prefix[:-1], *command])
    assert (member.returncode, member.stdout) == (plain.returncode, plain.stdout)
    said = [line for line in member.stderr.splitlines() if "ordinary layout" not in line]
    assert said == plain.stderr.splitlines()
    fixed = "it is static" in member.stderr
    assert run([*group.prefix, *command]).returncode == (4 if fixed else plain.returncode)


def test_a_debugger_understands_a_member(group: Group, victims: Victims, tmp_path: Path) -> None:
    """By attaching to it, and by its core."""
    program = victims.variant("shapes", "-O0", "-DWAIT")
    gdb = (need_command("gdb"), "--batch", "-nx", "-iex", "set debuginfod enabled off")
    questions = ("frame function main", "print argv[0]", "print pointer[0]", "info auxv")
    ask = [part for question in questions for part in ("-ex", question)]

    def told(prefix: Sequence[object]) -> list[str]:
        core = tmp_path / "core"
        command = [str(part) for part in (*prefix, program)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                live = run([*gdb, "-p", process.pid, *ask, "-ex", f"gcore {core}"])
            finally:
                process.kill()
        dead = run([*gdb, program, core, *ask])
        texts = (text[text.index("#") :] for text in (live.stdout, dead.stdout))
        return [re.sub(r"0x[0-9a-f]+|LWP \d+|\(process \d+\)", "...", text) for text in texts]

    plain, member = told(()), told([*group.prefix, "--no-preload"])
    for text in plain:
        assert f'"{program}"' in text
        assert "$2 = 3 " in text
        assert "AT_ENTRY" in text
    assert member == plain
