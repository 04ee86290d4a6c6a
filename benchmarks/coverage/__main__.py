# SPDX-License-Identifier: MIT
"""How much of a program's anonymous memory each method reaches, and how many mappings that makes.

Starts one copy of each program under no preload, libksm_preload_prctl.so and libksm_preload.so
forced to madvise, waits until it is ready, and reads smaps. Stacks are left out, as the methods
leave them out. "of prctl's": of what is mergeable by the prctl, the share that madvise reaches.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import common

from ksmtool import process
from ksmtool.trial import Arm, Fleet, Options, wait_ready

FLEET = common.FOLDER / "fleet/programs"
VICTIMS = common.FOLDER.parent / "tests/programs"


@dataclass(frozen=True)
class Seen:
    """What smaps say of a process tree, in bytes."""

    anonymous: int
    mergeable: int
    mappings: int
    """The most of any one process."""

    @property
    def share(self) -> float:
        """Of the anonymous memory, what carries the flag `mg`."""
        return self.mergeable / self.anonymous if self.anonymous else 0.0


def look(pids: list[int]) -> Seen:
    """Add up smaps over `pids`."""
    anonymous = mergeable = most = 0
    for pid in pids:
        name, size, mappings = "", 0, 0
        for line in (process.PROC / str(pid) / "smaps").read_text().splitlines():
            if re.match("[0-9a-f]+-", line):
                name, mappings = line, mappings + 1
            elif line.startswith("Anonymous:"):
                size = int(line.split()[1]) * 1024
            elif line.startswith("VmFlags:") and "[stack]" not in name:
                anonymous += size
                mergeable += size if " mg" in line else 0
        most = max(most, mappings)
    return Seen(anonymous, mergeable, most)


def programs(folder: Path) -> dict[str, tuple[list[str], Options]]:
    """Return name -> command and readiness of those that are installed."""
    by_file = Options(copies=1, ready_file=f"{folder}/ready")
    by_memory = Options(copies=1)
    threads = common.build(VICTIMS / "threads.c", folder / "threads", "-pthread")
    idle = folder / "idle.c"
    idle.write_text("#include <unistd.h>\nint main(void) { return pause(); }\n")
    found = {"idle": ([str(common.build(idle, folder / "idle"))], by_memory)}
    for name, interpreter, file in (
        ("CPython", "/usr/bin/python3", "python.py"),
        ("PHP", "/usr/bin/php", "php.php"),
        ("Perl", "/usr/bin/perl", "perl.pl"),
        ("Node", "/usr/bin/node", "node.js"),
    ):
        found[name] = ([interpreter, str(FLEET / file), f"{folder}/ready"], by_file)
    found["Redis"] = (
        ["/bin/sh", "-c", f"exec redis-server --unixsocket {folder}/redis --port 0 --save ''"
         " --loglevel warning < /dev/null"], by_memory,
    )  # fmt: skip
    found["C, 16 threads"] = (
        ["/bin/sh", "-c", f"tail -f /dev/null | exec {threads} 16 16"], by_memory,
    )  # fmt: skip
    data = folder / "postgres"
    postgres = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if postgres and os.getuid() == 0:
        data.mkdir()
        folder.chmod(0o755)
        shutil.chown(data, "postgres")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        initdb = str(postgres[-1].with_name("initdb"))
        subprocess.run(
            [*as_user, initdb, "-D", str(data), "--no-sync"], check=True, stdout=subprocess.PIPE
        )
        found["PostgreSQL"] = (
            [*as_user, str(postgres[-1]), "-D", str(data), "-k", str(data), "-h", ""], by_memory,
        )  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    parser = common.parser(__doc__.splitlines()[0])
    chosen = parser.parse_args()
    full = common.library("libksm_preload.so")
    arms = (
        Arm("plain"),
        Arm("prctl", env={"LD_PRELOAD": common.library("libksm_preload_prctl.so")}),
        Arm("madvise", env={"LD_PRELOAD": full, "KSM_PRELOAD": "madvise"}),
        *(Arm(name, env={"LD_PRELOAD": path}) for name, path in common.peers(chosen).items()),
    )
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{'':16}{'arm':22}{'anonymous':>13}{'mergeable':>11}{'of prctl' + chr(39) + 's':>11}"
          f"{'mappings':>10}{'of plain':>10}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="coverage.") as name:
        for program, (command, options) in programs(Path(name)).items():
            if shutil.which(command[0]) is None:
                print(f"{program:16}not installed", file=sys.stderr)
                continue
            seen: dict[str, Seen] = {}
            for arm in arms:
                with Fleet(command, arm, 1) as fleet:
                    wait_ready(fleet, options)
                    seen[arm.name] = look(fleet.pids())
                Path(name, "ready").unlink(missing_ok=True)
            results[program] = {}
            for arm_name, this in seen.items():
                of_prctl = this.share / seen["prctl"].share if seen["prctl"].share else 0.0
                of_plain = this.mappings / seen["plain"].mappings
                results[program][arm_name] = {**asdict(this), "of_prctl": of_prctl}
                print(
                    f"{program:16}{arm_name:22}{this.anonymous / 1e6:10.2f} MB{this.share:10.1%}"
                    f"{of_prctl:11.1%}{this.mappings:10}{of_plain:9.2f} x"
                )
    common.write_json(chosen.json, "coverage", results)


if __name__ == "__main__":
    main()
