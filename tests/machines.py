# SPDX-License-Identifier: MIT
"""Roots of running machines as far as KSM goes: processes, their memory, cgroups, counters.

A table that makes folders with the files that each kernel has, in the shape in which it has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distributions import SETTINGS
from ksmtool.kernel import PAGE_SIZE

ID = "3f4e2a1b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f"
SHORT = ID[:12]
POD = "1a2b3c4d-5e6f-7a8b-9c0d-1e2f3a4b5c6d"


@dataclass(frozen=True)
class Process:
    """One that runs; sizes are in pages."""

    pid: int
    name: str
    executable: str
    cgroup: str = "/init.scope"
    """The path in the hierarchy of systemd."""
    others: str = ""
    """cgroup v1: the path in every other hierarchy, the same if ""."""
    uid: int = 0
    anonymous: int = 1000
    used: int = 1000
    """Pss_Anon."""
    merging: int = 0
    records: int = 0
    zeros: int = 0
    opted_in: bool = False
    unit: str = ""
    """What is to be found out, as `container`."""
    container: str = ""
    saved: int = 0
    """What is to be found out on a kernel that tells."""

    def status(self) -> str:
        """Return /proc/PID/status."""
        size = (self.anonymous + 500) * PAGE_SIZE // 1024
        return (
            f"Name:\t{self.name}\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t{self.pid}\n"
            f"Ngid:\t0\nPid:\t{self.pid}\nPPid:\t1\nTracerPid:\t0\n"
            f"Uid:\t{self.uid}\t{self.uid}\t{self.uid}\t{self.uid}\nGid:\t0\t0\t0\t0\n"
            f"VmPeak:\t{size:8d} kB\nVmSize:\t{size:8d} kB\nVmRSS:\t{size:8d} kB\n"
            f"RssAnon:\t{size:8d} kB\nThreads:\t1\n"
        )

    def rollup(self) -> str:
        """Return /proc/PID/smaps_rollup."""
        page = PAGE_SIZE // 1024
        return (
            "55d0c0e9d000-7ffe1b5d5000 ---p 00000000 00:00 0                          [rollup]\n"
            f"Rss:            {(self.anonymous + 500) * page:8d} kB\n"
            f"Pss:            {(self.used + 100) * page:8d} kB\n"
            f"Pss_Anon:       {self.used * page:8d} kB\n"
            f"Anonymous:      {self.anonymous * page:8d} kB\n"
            "AnonHugePages:         0 kB\nSwapPss:               0 kB\n"
        )

    def stat(self, kernel: tuple[int, int]) -> str:
        """Return /proc/PID/ksm_stat."""
        said = f"ksm_rmap_items {self.records}\n"
        if kernel >= (6, 6):
            said += f"ksm_zero_pages {self.zeros}\n"
        if kernel >= (6, 4):
            profit = (self.merging + self.zeros) * PAGE_SIZE - self.records * 64
            said += f"ksm_merging_pages {self.merging}\nksm_process_profit {profit}\n"
        if kernel >= (6, 14):
            yes = "yes" if self.opted_in else "no"
            said += f"ksm_merge_any: {yes}\nksm_mergeable: {yes}\n"
        return said

    def smaps(self) -> str:
        """Return /proc/PID/smaps, without most of the lines."""
        mark = " mg" if self.opted_in else ""
        return "".join(
            f"{at:x}000-{at + 1:x}000 rw-p 00000000 00:00 0 \nRss:    4 kB\n"
            f"VmFlags: rd wr mr mw me ac sd{mark}\n"
            for at in range(0x55D0, 0x55D0 + 100)
        )


CONTROLLERS = ("devices", "freezer", "memory", "cpu,cpuacct", "pids", "blkio", "net_cls,net_prio")


@dataclass(frozen=True)
class Machine:
    """One that runs."""

    kernel: tuple[int, int]
    cgroup: str
    """v1, hybrid or v2."""
    processes: Sequence[Process]
    users: str = "root:x:0:0:root:/root:/bin/bash\nanna:x:1000:1000::/home/anna:/bin/bash\n"
    settings: dict[str, str] = field(default_factory=dict)

    def make(self, root: Path) -> Path:
        """Make it below `root`, and return that."""
        proc = root / "proc"
        proc.mkdir(parents=True)
        (proc / "meminfo").write_text("MemTotal:        8000000 kB\nMemAvailable: 4000000 kB\n")
        copies = "cow_ksm 400\nksm_swpin_copy 20\n" if self.kernel >= (5, 19) else ""
        (proc / "vmstat").write_text(f"nr_free_pages 123\n{copies}thp_split_page 7\n")
        (root / "etc").mkdir()
        (root / "etc/passwd").write_text(self.users)
        self._make_ksm(root)
        for one in self.processes:
            self._make_process(proc / str(one.pid), one)
        # Threads of the kernel, a zombie, and what is no process.
        for pid, name, state in ((2, "kthreadd", "S"), (41, "ksmd", "S"), (77, "gone", "Z")):
            folder = proc / str(pid)
            folder.mkdir()
            head = f"Name:\t{name}\nUmask:\t0000\nState:\t{state}\nTgid:\t{pid}\nPid:\t{pid}\n"
            tail = "PPid:\t0\nTracerPid:\t0\nUid:\t0\t0\t0\t0\nThreads:\t1\n"
            (folder / "status").write_text(head + tail)
            (folder / "comm").write_text(f"{name}\n")
            (folder / "cmdline").write_text("")
            (folder / "schedstat").write_text("5000000000 1 1\n")
        (proc / "sys").mkdir()
        return root

    def _make_ksm(self, root: Path) -> None:
        folder = root / "sys/kernel/mm/ksm"
        folder.mkdir(parents=True)
        settings = {"run": "1", **self.settings}
        for name, (since, default) in SETTINGS.items():
            if since <= self.kernel:
                (folder / name).write_text(settings.get(name, default) + "\n")
        shared, sharing = self.shared, self.mappings - self.shared
        counters = {
            "full_scans": ((2, 6), 12),
            "pages_shared": ((2, 6), shared),
            "pages_sharing": ((2, 6), sharing),
            "pages_unshared": ((2, 6), 7000),
            "pages_volatile": ((2, 6), 300),
            "ksm_zero_pages": ((6, 6), self.zeros),
            "general_profit": ((6, 4), (sharing + self.zeros) * PAGE_SIZE - self.records * 64),
            "pages_scanned": ((6, 6), 90000),
            "pages_skipped": ((6, 7), 10000),
        }
        for name, (since, value) in counters.items():
            if since <= self.kernel:
                (folder / name).write_text(f"{value}\n")

    @property
    def mappings(self) -> int:
        """Return the mappings of merged pages."""
        return sum(one.merging for one in self.processes)

    @property
    def shared(self) -> int:
        """Return the pages behind them: what is not saved."""
        return self.mappings - sum(one.saved - self._zeros(one) for one in self.processes)

    def _zeros(self, one: Process) -> int:
        return one.zeros if self.kernel >= (6, 6) else 0

    @property
    def zeros(self) -> int:
        """Return the zero pages that KSM made."""
        return sum(map(self._zeros, self.processes))

    @property
    def records(self) -> int:
        """Return what ksmd keeps a record of."""
        return sum(one.records for one in self.processes)

    def _make_process(self, folder: Path, one: Process) -> None:
        folder.mkdir()
        (folder / "status").write_text(one.status())
        (folder / "statm").write_text(f"9000 {one.anonymous + 500} 0 0 0 0 0\n")
        (folder / "smaps_rollup").write_text(one.rollup())
        (folder / "smaps").write_text(one.smaps())
        (folder / "comm").write_text(f"{one.name}\n")
        (folder / "cmdline").write_text(f"{one.executable}\0")
        (folder / "exe").symlink_to(one.executable)
        (folder / "cgroup").write_text(self._cgroup(one))
        if self.kernel >= (5, 19):
            (folder / "ksm_merging_pages").write_text(f"{one.merging}\n")
        if self.kernel >= (6, 1):
            (folder / "ksm_stat").write_text(one.stat(self.kernel))

    def _cgroup(self, one: Process) -> str:
        if self.cgroup == "v2":
            return f"0::{one.cgroup}\n"
        lines = [
            f"{number}:{name}:{one.others or one.cgroup}\n"
            for number, name in enumerate(CONTROLLERS, 2)
        ]
        lines.reverse()
        lines.append(f"1:name=systemd:{one.cgroup}\n")
        lines.append("0::/\n" if self.cgroup == "v1" else f"0::{one.cgroup}\n")
        return "".join(lines)


def pool(first: int, count: int, name: str, executable: str, **more: object) -> list[Process]:
    """Return equal workers that have 900 of 1000 pages in common, merged."""
    saved = 900 * (count - 1) // count
    some: dict[str, object] = {"merging": 900, "records": 1000, "saved": saved, "opted_in": True}
    some["used"] = 1000 - saved
    return [
        Process(pid, name, executable, **{**some, **more})  # type: ignore[arg-type]
        for pid in range(first, first + count)
    ]


INIT = Process(1, "systemd", "/usr/lib/systemd/systemd", unit="init.scope")
# Forked, nothing merged: what they have in common is not KSM's doing.
FORKED = [
    Process(
        pid,
        "postgres",
        "/usr/lib/postgresql/15/bin/postgres",
        "/system.slice/system-postgresql.slice/postgresql@15-main.service",
        used=100,
        unit="postgresql@15-main.service",
    )
    for pid in range(300, 310)
]

MACHINES = {
    "5.10, v1, Docker": Machine(
        (5, 10),
        "v1",
        [
            INIT,
            *FORKED,
            *pool(
                *(500, 2, "php-fpm8.2", "/usr/sbin/php-fpm8.2"),
                cgroup=f"/docker/{ID}",
                container=f"docker:{SHORT}",
            ),
        ],
    ),
    "5.10, v2, Docker": Machine(
        (5, 10),
        "v2",
        [
            INIT,
            *pool(
                *(500, 3, "node", "/usr/local/bin/node"),
                cgroup=f"/system.slice/docker-{ID}.scope",
                unit=f"docker-{ID}.scope",
                container=f"docker:{SHORT}",
            ),
        ],
    ),
    "6.1, v2, Podman": Machine(
        (6, 1),
        "v2",
        [
            INIT,
            *FORKED,
            *pool(
                *(500, 4, "gunicorn", "/usr/bin/python3.11"),
                cgroup="/user.slice/user-1000.slice/user@1000.service/user.slice/"
                f"libpod-{ID}.scope/container",
                uid=1000,
                unit=f"libpod-{ID}.scope of user 1000",
                container=f"podman:{SHORT}",
            ),
            Process(
                *(600, "conmon", "/usr/bin/conmon"),
                cgroup="/user.slice/user-1000.slice/user@1000.service/user.slice/"
                f"libpod-conmon-{ID}.scope",
                uid=1000,
                unit=f"libpod-conmon-{ID}.scope of user 1000",
            ),
        ],
    ),
    "6.1, hybrid, Kubernetes": Machine(
        (6, 1),
        "hybrid",
        [
            INIT,
            *pool(
                *(500, 2, "java", "/usr/lib/jvm/java-17/bin/java"),
                cgroup=f"/kubepods/burstable/pod{POD}/{ID}",
                container=f"kubernetes:{SHORT}",
            ),
        ],
    ),
    "6.12, v2, LXC": Machine(
        (6, 12),
        "v2",
        [
            INIT,
            *FORKED,
            *pool(
                *(500, 5, "apache2", "/usr/sbin/apache2"),
                cgroup="/lxc.payload.web/system.slice/apache2.service",
                uid=100033,
                unit="apache2.service in lxc:web",
                container="lxc:web",
                zeros=10,
                saved=900 * 4 // 5 + 10,
            ),
            *pool(
                *(700, 2, "apache2", "/usr/sbin/apache2"),
                cgroup="/lxc/101/ns/system.slice/apache2.service",
                uid=100033,
                unit="apache2.service in lxc:101",
                container="lxc:101",
            ),
        ],
    ),
    "6.18, v2, Kubernetes": Machine(
        (6, 18),
        "v2",
        [
            INIT,
            *FORKED,
            *pool(
                *(500, 10, "worker", "/app/worker"),
                cgroup="/kubepods.slice/kubepods-burstable.slice/"
                f"kubepods-burstable-pod{POD.replace('-', '_')}.slice/cri-containerd-{ID}.scope",
                unit=f"cri-containerd-{ID}.scope",
                container=f"kubernetes:{SHORT}",
            ),
            # Looked at, and nothing found: a loss.
            Process(
                *(900, "redis-server", "/usr/bin/redis-server"),
                cgroup="/system.slice/redis-server.service",
                records=1000,
                opted_in=True,
                unit="redis-server.service",
            ),
        ],
    ),
}
