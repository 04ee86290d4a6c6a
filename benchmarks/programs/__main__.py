# SPDX-License-Identifier: MIT
"""What a preloaded library costs whole programs in CPU time.

Runs sort, sqlite3, a loop in Python and redis-server under redis-benchmark, each with the same work
under no preload, libksm_preload.so by the prctl and by madvise, and the peers. The arms take turns,
each round begins with another one, and all is on one CPU. Of each run the CPU seconds of the
program and its children, user and system, are taken: the elapsed time has in it whatever else the
machine does. A ratio is of two runs of one round; printed are its median and quartiles.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import common

SQL = """
pragma journal_mode = off; pragma synchronous = off;
create table item (id integer primary key, name text, size integer);
with recursive n(i) as (select 1 union all select i + 1 from n where i < {rows})
insert into item select i, hex(i * 2654435761 % 4294967296) || ' name', i * 7919 % 10007 from n;
create index by_name on item (name);
create index by_size on item (size, name);
select count(*), sum(length(name)) from item where size between 100 and 5000;
select size, count(*), group_concat(substr(name, 1, 8)) from item
    group by size order by 2, 1 limit 3;
select a.id, b.name from item a join item b on b.name = a.name
    where a.size < 500 order by b.name limit 3;
update item set name = name || ' changed' where size % 3 = 0;
delete from item where size % 5 = 0;
select count(*), max(name) from item;
"""

Run = Callable[[dict[str, str]], float]
"""Does the work with more in the environment, and returns the CPU seconds."""


def cpu_seconds(command: Sequence[object], env: dict[str, str], text: str = "") -> float:
    """Return what a command and its children took, given `text` as input."""
    with tempfile.TemporaryFile("w+") as given:
        given.write(text)
        given.seek(0)
        running = subprocess.Popen(
            [str(word) for word in command], env=env, stdin=given, stdout=subprocess.DEVNULL
        )
    return ended(running)


def ended(running: subprocess.Popen[bytes]) -> float:
    """Wait for the end of a program; return its CPU seconds."""
    _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode != 0:
        raise SystemExit(f"{running.args!r}: status {running.returncode}")
    return usage.ru_utime + usage.ru_stime


def environment(more: dict[str, str]) -> dict[str, str]:
    """Return a short, known environment with `more` in it."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **more}


def sort(folder: Path, megabytes: int) -> Run:
    """GNU sort of a file of random lines."""
    unsorted = folder / "unsorted"
    source = random.Random(1)
    with unsorted.open("w") as file:
        while file.tell() < megabytes << 20:
            numbers = (source.getrandbits(40) for _ in range(10_000))
            file.writelines(f"{number:x} line {number % 977}\n" for number in numbers)
    command = ["sort", "-T", folder, "-o", folder / "sorted", unsorted]
    return lambda more: cpu_seconds(command, environment(more))


def sqlite(folder: Path, rows: int) -> Run:
    """The sqlite3 shell: a table filled, indexed, asked and changed."""
    base = folder / "base"

    def run(more: dict[str, str]) -> float:
        base.unlink(missing_ok=True)
        return cpu_seconds(["sqlite3", "-batch", base], environment(more), SQL.format(rows=rows))

    return run


def python(_: Path, scale: int) -> Run:
    """loop.py."""
    command = ["/usr/bin/python3", "-I", Path(__file__).with_name("loop.py"), scale]
    return lambda more: cpu_seconds(command, environment({**more, "PYTHONHASHSEED": "0"}))


def redis(folder: Path, requests: int) -> Run:
    """redis-server on a socket, asked by redis-benchmark, which has no preload."""
    socket, log = folder / "redis", folder / "redis.log"
    options = ["--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder]
    options += ["--logfile", log]
    asking = [
        "redis-benchmark",
        "-s",
        socket,
        "-q",
        "-n",
        requests,
        "-r",
        100_000,
        "-P",
        8,
        "-d",
        200,
    ]
    asking += ["-t", "set,get,incr,lpush,lpop,sadd,hset,spop"]

    def ask(*words: object) -> subprocess.CompletedProcess[bytes]:
        command = [str(word) for word in words]
        return subprocess.run(command, env=environment({}), capture_output=True, check=False)

    def run(more: dict[str, str]) -> float:
        server = subprocess.Popen(
            [str(word) for word in ("redis-server", *options)], env=environment(more)
        )
        deadline = time.monotonic() + 20
        while ask("redis-cli", "-s", socket, "ping").stdout != b"PONG\n":
            if time.monotonic() > deadline or server.poll() is not None:
                server.kill()
                raise SystemExit(f"redis-server does not answer: {log.read_text()}")
            time.sleep(0.01)
        asked = ask(*asking)
        ask("redis-cli", "-s", socket, "shutdown", "nosave")
        seconds = ended(server)
        if asked.returncode != 0:
            raise SystemExit(f"redis-benchmark: {asked.stderr.decode()}")
        return seconds

    return run


# name -> its command, what makes its runs, how much work, how much with --quick
WORK: dict[str, tuple[str, Callable[[Path, int], Run], int, int]] = {
    "sort": ("sort", sort, 25, 1),
    "sqlite3": ("sqlite3", sqlite, 150_000, 1000),
    "python": ("/usr/bin/python3", python, 15, 1),
    "redis": ("redis-benchmark", redis, 50_000, 1000),
}


def main() -> None:
    """Measure and print."""
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=21, help="runs of each (default 21)")
    options.add_argument("--only", choices=WORK, action="append", help="only these (repeatable)")
    options.add_argument("--quick", action="store_true", help="2 rounds, little work: does it run?")
    chosen = options.parse_args()
    full = common.library("libksm_preload.so")
    arms: dict[str, dict[str, str]] = {
        "no preload": {},
        "libksm_preload.so, prctl": {"LD_PRELOAD": full},
        "libksm_preload.so, madvise": {"LD_PRELOAD": full, "KSM_PRELOAD": "madvise"},
        **{name: {"LD_PRELOAD": path} for name, path in common.peers(chosen).items()},
    }
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="programs.") as name:
        for program in chosen.only or WORK:
            command, prepared, much, little = WORK[program]
            if shutil.which(command) is None:
                common.say(f"{program}: no {command} here")
                continue
            run = prepared(Path(name), little if chosen.quick else much)
            results[program] = measured(run, arms, 2 if chosen.quick else chosen.rounds)
            for arm, figures in results[program].items():
                print(
                    f"{program:9}{arm:28}{figures['seconds']:8.3f} s   {figures['median']:.3f} x "
                    f"({figures['quartile1']:.3f} - {figures['quartile3']:.3f})", flush=True,
                )  # fmt: skip
    common.write_json(chosen.json, "programs", results)


def measured(run: Run, arms: dict[str, dict[str, str]], rounds: int) -> dict[str, dict[str, float]]:
    """Run the arms in turn; return median seconds of each, and the ratios to the first."""
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    names = list(arms)
    run({})  # the files are in the page cache from here on
    for number in range(rounds):
        at = number % len(names)
        for arm in names[at:] + names[:at]:
            taken[arm].append(run(arms[arm]))
    plain = taken[names[0]]
    return {
        arm: {
            "seconds": statistics.median(times),
            **common.spread([this / base for this, base in zip(times, plain)]),
        }
        for arm, times in taken.items()
    }


if __name__ == "__main__":
    main()
