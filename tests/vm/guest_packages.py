# SPDX-License-Identifier: MIT
"""What holds from `apt install` to `apt purge`, over boots. test_packages.py boots it in QEMU.

What runs it, and how, is guest_boot.py's.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import xxhash

import guest_boot as boot
from guest_boot import output, say, wait_until
from ksmtool import process

DEBS = Path("/project/debs")
PACKAGES = ("ksm-preload", "libksm-preload")
RULES = Path("/etc/ksm-preload/policy.d/mine.conf")
KSM = Path("/sys/kernel/mm/ksm")

WORKERS = tuple(f"ksm-worker@{number}.service" for number in range(1, 21))
SAVED = 0.6
"""The least part of the workers' anonymous memory that is saved."""

BEFORE = Path("/project/before.json")
LEFT_OUT = (
    "/project",  # the test's own
    "/tmp",
    "/var/cache",
    "/var/lib/apt",
    "/var/lib/dpkg/status-old",
    "/var/lib/systemd",
    "/var/log",
    "/var/tmp",
)
"""Where boots, apt and ldconfig leave something whatever is installed."""


# --- what is there ---


def files() -> dict[str, str]:
    """Return path -> mode, owner, and the target or a hash of the content."""
    found = {}
    disk = os.lstat("/").st_dev
    for folder, folders, names in os.walk("/"):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            if path not in LEFT_OUT:
                found[path] = described(path)
        # os.walk goes where this says.
        folders[:] = [
            name
            for name in folders
            if (path := os.path.join(folder, name)) not in LEFT_OUT
            and os.lstat(path).st_dev == disk
        ]
    return found


def described(path: str) -> str:
    status = os.lstat(path)
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        content = xxhash.xxh64(Path(path).read_bytes()).hexdigest()
    return f"{status.st_mode:o} {status.st_uid}:{status.st_gid} {content}"


def settings() -> dict[str, str]:
    """Return how KSM is set, as the kernel says it."""
    return {file.name: file.read_text() for file in KSM.iterdir() if file.stat().st_mode & 0o200}


def ours() -> dict[str, str]:
    """Return the files that a command of ours has written, as they are."""
    unit = Path("/etc/systemd/system", boot.KSM_UNIT)
    written = (boot.PRELOAD_LIST, unit, RULES, *map(Path, boot.our_files()))
    return {str(file): file.read_text() for file in written if file.exists()}


def apt(*arguments: str) -> None:
    """Run apt, which has to succeed; nothing that it starts misses a library."""
    done = say("apt-get", "--yes", "--quiet", "-o", "Dpkg::Use-Pty=0", *arguments)
    assert done.returncode == 0, f"status {done.returncode}"
    assert "ERROR: ld.so" not in done.stdout + done.stderr


def install_all(which: str) -> None:
    apt("install", *map(str, sorted((DEBS / which).glob("*.deb"))))


def problems() -> set[str]:
    """Return what the doctor calls a problem."""
    said = say("ksmtool", "doctor", "--json")
    told = json.loads(said.stdout)
    assert told["schema"] == 1
    found = {one["id"] for one in told["findings"] if one["severity"] == "problem"}
    assert (said.returncode, told["healthy"]) == ((1, False) if found else (0, True))
    return found


def probe_is_opted_in() -> bool:
    """Return whether the service is that has nothing to do with us, once it is started again."""
    output("systemctl", "restart", boot.PROBE)
    return process.opted_in(boot.main_pid(boot.PROBE))


# --- what a boot does: the words of ksm_test.do ---


def before() -> None:
    """Note what is there, to compare with it at the end."""
    boot.untouched()
    BEFORE.write_text(json.dumps({"files": files(), "settings": settings()}))


def install() -> None:
    """Installing switches nothing on, and a program can be opted in at once."""
    install_all("now")
    assert ours() == {}
    assert settings() == json.loads(BEFORE.read_text())["settings"]
    assert not probe_is_opted_in()
    assert output("ksmtool", "wrap", "--quiet", "--", "python3", "-c", "print(6 * 7)") == "42"
    # An administrator's, which purging removes.
    RULES.parent.mkdir(parents=True)
    RULES.write_text("deny mine\n")


def doctor() -> None:
    """It finds what is to be done."""
    assert problems() == {"ksm-off", "nothing-opted-in"}


def healthy() -> None:
    """Now that it is done, the doctor finds nothing."""
    assert problems() == set()


def switched_on() -> None:
    """All of it is on, by itself after a boot."""
    boot.is_up()
    boot.kernel_on()
    assert boot.status()["methods"] == [boot.word("ksm_test.method")]
    assert process.opted_in(boot.main_pid(boot.PROBE))


def savings() -> None:
    """Twenty services in a group use little more memory than one, and status says so."""
    output("systemctl", "start", *WORKERS)
    shown = output("systemctl", "show", "--value", "--property=MainPID", *WORKERS)
    pids = [int(pid) for pid in shown.split()]
    assert len(pids) == len(WORKERS)
    assert all(process.opted_in(pid) for pid in pids)

    def memory() -> process.Memory:
        total = process.total(pids)
        assert total.processes == len(pids)
        return total

    first = memory()
    wait_until(lambda: memory().pss_anon <= (1 - SAVED) * first.anonymous, "memory is saved")
    total = memory()
    had, used = (size / 2**20 for size in (first.anonymous, total.pss_anon))
    print(f"{len(pids)} services in a group had {had:.0f} MB for themselves, now {used:.0f} MB")

    told = json.loads(output("ksmtool", "status", "--json", "--by", "app"))
    rows = [row for row in told["rows"] if "python3" in row["name"]]
    row = max(rows, key=lambda row: int(row["processes"]))
    print(row)
    assert told["ksm"]["merging"]
    assert row["opted_in"] >= len(pids)
    assert row["saved"] >= SAVED * total.anonymous


def upgrade() -> None:
    """All stays on as it is, for what runs and what is started."""
    was = ours()
    assert str(RULES) in was
    install_all("newer")
    versions = output("dpkg-query", "--show", "--showformat=${Version} ", *PACKAGES).split()
    assert versions == [boot.word("ksm_test.newer")] * len(PACKAGES)
    assert ours() == was
    assert settings()["run"] == "1\n"
    assert probe_is_opted_in()


def remove() -> None:
    """All is switched off, but for what runs."""
    apt("remove", *PACKAGES)
    assert ours().keys() == {str(RULES)}
    assert settings() == json.loads(BEFORE.read_text())["settings"]
    assert not probe_is_opted_in()


def removed() -> None:
    """As Debian is, but for the administrator's rules."""
    boot.untouched()
    assert settings() == json.loads(BEFORE.read_text())["settings"]
    assert ours().keys() == {str(RULES)}


def purge() -> None:
    """Nothing is left, and nobody has complained in all these boots."""
    apt("purge", *PACKAGES)
    boot.KSM_BEFORE.unlink()
    was, now = json.loads(BEFORE.read_text())["files"], files()
    different = [
        f"{name}: {was.get(name)} -> {now.get(name)}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    print(*different, sep="\n")
    assert not different
    kept = output("journalctl", "--list-boots", "--no-pager", "--quiet")
    assert len(kept.splitlines()) > 1
    boot.journal_is_clean()


DO: tuple[Callable[[], None], ...] = (
    before,
    install,
    doctor,
    healthy,
    boot.kernel_enable,
    boot.enable,
    switched_on,
    savings,
    upgrade,
    remove,
    removed,
    purge,
)

if __name__ == "__main__":
    boot.main(DO)
