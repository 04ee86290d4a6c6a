# SPDX-License-Identifier: MIT
"""global-enable in a Debian with programs of two architectures, below a root of its own.

The real /etc/ld.so.preload, loader and set-uid programs, in a private mount namespace.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pytest

import machine
from conftest import HERE, Victims, need, run
from ksmtool.kernel import Ksm
from test_boots import installed

pytestmark = [pytest.mark.slow, pytest.mark.ksm]

PACKAGES = ("libc6:i386", "openrc", "python3-click", "python3-distro", "python3-rich", "sudo")
PRCTL = "/usr/$LIB/libksm_preload_prctl.so"
I386 = "usr/lib/i386-linux-gnu"

ENTER = """
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount -t sysfs sys "$0/sys"
mount --bind /dev "$0/dev"
mount -t tmpfs tmp "$0/run"
exec chroot "$0" "$@"
"""


@dataclass(frozen=True)
class Root:
    """A Debian with the project installed."""

    folder: Path

    @property
    def preload(self) -> Path:
        """Return its /etc/ld.so.preload."""
        return self.folder / "etc/ld.so.preload"

    def __call__(self, *command: str, clean: bool = True) -> str:
        """Run a command in there and return what it prints; `clean`: it succeeds in silence."""
        done = self.run(*command)
        if clean:
            assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in there."""
        enter = [
            "unshare",
            "--mount",
            "--net",
            "--propagation=private",
            "sh",
            "-ec",
            ENTER,
            self.folder,
        ]
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        return run([*enter, *command], env={"PATH": path, "KSM_PRELOAD_VERBOSE": ""})


def archive(
    name: str = "chroot",
    suite: str = "bookworm",
    packages: Sequence[str] = PACKAGES,
    architectures: str = "amd64,i386",
) -> Path:
    """Return the archive of a root, from the cache if it is there."""

    def keep(packed: tarfile.TarFile, output: IO[bytes]) -> None:
        with tarfile.open(fileobj=output, mode="w", format=tarfile.GNU_FORMAT) as copy:
            for member in packed:
                if not member.isdev():
                    copy.addfile(member, packed.extractfile(member) if member.isreg() else None)

    left_out = (f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in machine.LEFT_OUT)
    content = ("--variant=minbase", f"--include={','.join(packages)}", *left_out)
    architecture = replace(machine.AMD64, debian=architectures)
    return machine.made(name, (*content, suite, "-"), keep, architecture)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, victims: Victims) -> Iterator[Root]:
    """Return the root, with our libraries for both architectures."""
    need(os.geteuid() == 0, "needs root")
    folder = tmp_path_factory.mktemp("root")
    folder.chmod(0o755)
    for parent in folder.parents[:2]:
        parent.chmod(0o755)  # of pytest: 0700, and a user's program has to get here
    done = run(["tar", "-C", folder, "-xf", archive()])
    assert done.returncode == 0, done.stderr
    for name, file in installed(tmp_path_factory.mktemp("installed")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target, follow_symlinks=False)
    library = folder / I386 / "libksm_preload_prctl.so"
    shutil.copy(victims.shim("i386"), library)
    shutil.copy(victims("report", "i386"), folder / "report-i386")
    shutil.copy(victims("report"), folder / "report-amd64")
    victim = victims.variant("broken", "-shared", "-fPIC")
    shutil.copy(victim, folder / "broken.so")
    yield Root(folder)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _as_found(root: Root) -> Iterator[None]:
    """Leave neither a file nor a backup behind."""
    yield
    for file in (root.folder / "etc").glob("*ld.so.preload*"):
        file.unlink()
    shutil.rmtree(root.folder / "etc/ksm-preload", ignore_errors=True)


ENABLE = ("ksmtool", "global-enable", "--yes", "--force", "--method", "ld.so.preload")


def enabled(root: Root) -> bool:
    return root.preload.exists() and PRCTL in root.preload.read_text()


def merges(text: str) -> bool:
    """Whether the victim `report` says that its process is opted in."""
    return "\nmerge 1\n" in f"\n{text}"


def test_both_architectures_are_opted_in_and_back(root: Root) -> None:
    before = {str(path) for path in (root.folder / "etc").rglob("*")}
    said = root.run(*ENABLE)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "entry of ksm-preload added" in said.stdout
    assert root.preload.read_text() == f"{PRCTL}\n"
    assert root.preload.stat().st_mode & 0o7777 == 0o644
    for name in ("report-amd64", "report-i386"):
        assert merges(root(f"/{name}")), name
        assert merges(root("su", "-s", "/bin/sh", "nobody", "-c", f"/{name}")), name
    status = json.loads(root("ksmtool", "global-status", "--json"))
    assert status["methods"] == ["ld.so.preload"]
    assert status["preload"]["loaded"] is True
    assert status["preload"]["complaint"] == ""

    assert "entry of ksm-preload removed" in root("ksmtool", "global-disable")
    for name in ("report-amd64", "report-i386"):
        assert not merges(root(f"/{name}")), name
    assert {str(path) for path in (root.folder / "etc").rglob("*")} == before
    assert "Nothing of ours was enabled" in root("ksmtool", "global-disable")


def test_set_uid_programs_start_in_silence_and_stay_out(root: Root) -> None:
    root.run(*ENABLE)
    # A set-uid program started by a user, under the flag of its parent.
    inner = "grep -c libksm_preload_prctl /proc/self/maps"
    said = root.run("setpriv", "--reuid=65534", "--clear-groups", "su", "--version")
    assert (said.returncode, said.stderr) == (0, "")
    shutil.copy(root.folder / "report-amd64", root.folder / "report-suid")
    (root.folder / "report-suid").chmod(0o4755)
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    assert root(*as_nobody, "sh", "-c", inner) == "2\n"
    assert merges(root(*as_nobody, "/report-amd64"))
    assert not merges(root(*as_nobody, "/report-suid"))


def test_enabling_twice_changes_nothing_more(root: Root) -> None:
    root.run(*ENABLE)
    first = root.preload.stat().st_mtime_ns, root.preload.read_bytes()
    said = root.run(*ENABLE)
    assert said.returncode == 0
    assert "Enabled already" in said.stdout
    assert (root.preload.stat().st_mtime_ns, root.preload.read_bytes()) == first


def test_a_missing_architecture_is_found_before_anything_is_written(root: Root) -> None:
    library = root.folder / I386 / "libksm_preload_prctl.so"
    away = library.with_suffix(".away")
    library.rename(away)
    try:
        said = root.run(*ENABLE)
    finally:
        away.rename(library)
    assert said.returncode == 1
    assert "/lib/i386-linux-gnu/libc.so.6" in said.stderr
    assert "Nothing was written." in said.stderr
    assert "libksm-preload:i386" in said.stderr
    assert not root.preload.exists()


def test_an_architecture_that_lost_its_library_is_a_problem(root: Root) -> None:
    """As one of which a libc was installed after global-enable."""
    root.run(*ENABLE)
    assert "i386" not in root("ksmtool", "global-status")
    library = root.folder / I386 / "libksm_preload_prctl.so"
    away = library.with_suffix(".away")
    library.rename(away)
    try:
        status = json.loads(root("ksmtool", "global-status", "--json"))
    finally:
        away.rename(library)
    assert (status["preload"]["loaded"], status["preload"]["complaint"]) == (True, "")
    (problem,) = status["preload"]["problems"]
    assert problem.startswith("Programs for /lib/i386-linux-gnu/libc.so.6 print an error")
    assert "libksm-preload:i386" in problem


def broken(root: Root) -> Callable[[], None]:
    """Put a library there that kills every program; return what puts ours back."""
    library = root.folder / "usr/lib/x86_64-linux-gnu/libksm_preload_prctl.so"
    good = library.with_suffix(".good")
    library.rename(good)
    shutil.copy(root.folder / "broken.so", library)
    return lambda: (good.replace(library), None)[1]


def test_a_broken_library_is_found_before_anything_is_written(root: Root) -> None:
    repair = broken(root)
    try:
        said = root.run(*ENABLE)
    finally:
        repair()
    # The loader, asked for the library's path, dies of it already.
    assert said.returncode == 1
    assert not root.preload.exists()
    assert "preloaded, programs die of signal 11." in said.stderr
    assert len(said.stderr.splitlines()) == 2, said.stderr


def test_a_library_that_breaks_after_the_rehearsal_is_taken_back(root: Root) -> None:
    """The checks after the commit see what the rehearsal could not."""
    root.preload.write_text("# other people's words\n")
    before = root.preload.read_bytes()
    code = """
import os, shutil, sys
sys.argv = ["/usr/bin/ksmtool"]
from ksmtool import machine, rehearsal
real = rehearsal.under
def then_break(*arguments):
    result = real(*arguments)
    library = "/usr/lib/x86_64-linux-gnu/libksm_preload_prctl.so"
    shutil.copy("/broken.so", library + ".new")
    os.rename(library + ".new", library)
    return result
rehearsal.under = then_break
try:
    tried = machine.rehearse("/usr/$LIB/libksm_preload_prctl.so")
    machine.enable_by_preload(tried)
except machine.KsmtoolError as error:
    print(error.message)
"""
    library = root.folder / "usr/lib/x86_64-linux-gnu/libksm_preload_prctl.so"
    good = library.read_bytes()
    try:
        said = root.run("python3", "-c", code)
    finally:
        library.write_bytes(good)
    assert "ends with signal 11" in said.stdout, said.stdout + said.stderr
    assert "is as it was" in said.stdout
    assert root.preload.read_bytes() == before


def test_a_broken_machine_is_rescued(root: Root) -> None:
    root.run(*ENABLE)
    repair = broken(root)
    try:
        assert root.run("/bin/true").returncode != 0
        said = root.run("/usr/sbin/ksm-rescue")
        assert (said.returncode, said.stderr) == (0, "")
        assert not root.preload.exists()
        assert root.run("/bin/true").returncode == 0
    finally:
        repair()


def test_what_others_have_in_the_file_stays(root: Root) -> None:
    other = "/usr/lib/other.so"
    shutil.copy(root.folder / "usr/lib/x86_64-linux-gnu/libksm_preload.so", root.folder / other[1:])
    root.preload.write_text(f"{other}\n")
    before = root.preload.read_bytes()
    root("true", clean=False)  # i386 programs complain about it; no matter
    said = root.run(*ENABLE)
    assert said.returncode == 0, said.stdout + said.stderr
    assert root.preload.read_text() == f"{other}\n{PRCTL}\n"
    assert [file.read_bytes() for file in (root.folder / "etc").glob("ld.so.preload.*")] == [before]
    root.run("ksmtool", "global-disable")
    assert root.preload.read_bytes() == before
    (root.folder / other[1:]).unlink()


def test_the_policy_of_the_machine_counts(root: Root) -> None:
    policy = root.folder / "etc/ksm-preload/policy"
    policy.parent.mkdir()
    policy.write_text("deny report-amd64\n")
    root.run(*ENABLE)
    assert not merges(root("/report-amd64"))
    assert merges(root("/report-i386"))
    assert "deny report-amd64" in root("ksmtool", "policy", "check", "/report-amd64")


def test_it_wants_a_yes(root: Root) -> None:
    said = root.run(*(word for word in ENABLE if word != "--yes"))
    assert said.returncode == 1
    assert "security" not in said.stderr
    assert "--yes gives it." in said.stderr
    assert "ksmtool global-disable" in said.stdout
    assert not root.preload.exists()


def test_tenants_are_a_no_without_force(root: Root) -> None:
    code = "import os; os.execv('/bin/sleep', ['qemu-system-x86_64', '60'])"
    enable = " ".join(word for word in ENABLE if word != "--force")
    said = root.run("sh", "-c", f'python3 -c "{code}" & {enable}; s=$?; kill $!; exit $s')
    assert said.returncode == 1
    assert "a virtual machine (qemu-system-x86_64, PID " in said.stderr
    assert "--force" in said.stderr
    assert not root.preload.exists()


def readme_lines(first: str) -> list[str]:
    """Return the lines of the console block of README that begins with a command."""
    readme = (HERE.parent / "README.md").read_text()
    (block,) = re.findall(rf"```console\n(# {first}.*?)```", readme, re.DOTALL)
    return str(block).splitlines()


def test_what_readme_shows_of_the_kernel(root: Root, ksm: Ksm) -> None:
    before = ksm.settings()
    for line in readme_lines("ksmtool kernel-enable"):
        root(*line.removeprefix("# ").split(), clean=False)
    assert ksm.settings() == before


def test_what_readme_shows(root: Root) -> None:
    lines = readme_lines("ksmtool global-enable")
    assert len(lines) == 5
    for line in lines:
        done = root.run(
            "sh", "-c", f"{line.removeprefix('# ')} {'--force' * ('global-enable' in line)}"
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert not root.preload.exists()


def test_whatever_the_umask(root: Root) -> None:
    said = root.run("sh", "-c", f"umask 077; {' '.join(ENABLE)}")
    assert said.returncode == 0, said.stdout + said.stderr
    assert root.preload.stat().st_mode & 0o777 == 0o644


def test_a_file_for_root_only_is_refused(root: Root) -> None:
    root.preload.write_text("/usr/lib/other.so\n")
    root.preload.chmod(0o600)
    said = root.run(*ENABLE)
    assert said.returncode == 1
    assert "chmod 644 /etc/ld.so.preload" in said.stderr
    assert root.preload.stat().st_mode & 0o777 == 0o600
    assert root.preload.read_text() == "/usr/lib/other.so\n"


def test_one_run_at_a_time(root: Root) -> None:
    done = root.run("flock", "/run/ksm-preload.lock", *ENABLE)
    assert done.returncode == 1
    assert done.stderr == "ksmtool: Another global-enable or global-disable is under way.\n"


def test_status_for_a_user(root: Root) -> None:
    root.run(*ENABLE)
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    said = root(*as_nobody, "ksmtool", "global-status")
    assert "programs that start now load it" in said
    assert "problem" not in said


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full"])
def test_without_standard_streams(root: Root, redirection: str) -> None:
    for command in (" ".join(ENABLE), "ksmtool global-status", "ksmtool global-disable"):
        said = root.run("sh", "-c", f"{command} {redirection}")
        assert "Traceback" not in said.stderr + said.stdout
    assert not root.preload.exists()


@pytest.mark.parametrize("init", ["", "systemd", "openrc"])
def test_kernel_enable_and_back(root: Root, ksm: Ksm, init: str) -> None:
    """KSM of this very kernel, which the fixture keeps for us and sets back.

    In its own network namespace sysfs has files of its own, and the fixture's lock does not count.
    """
    levels, sign = root.folder / "etc/runlevels", root.folder / "etc/systemd/system/default.target"
    if init == "systemd":
        sign.parent.mkdir(parents=True, exist_ok=True)
        sign.touch()
    elif not init:
        levels.rename(levels.with_name("no-runlevels"))
    before = ksm.settings()
    files = {str(path) for path in (root.folder / "etc").rglob("*")}
    assert "run: 0 -> 1" in root("ksmtool", "kernel-enable", "--profile", "gentle", "--dry-run")
    assert ksm.settings() == before
    said = root("ksmtool", "kernel-enable", "--profile", "gentle")
    assert "run: 0 -> 1" in said
    assert ("rc.local" in said) == (init == "")
    status = json.loads(root("ksmtool", "kernel-status", "--json"))
    assert (status["merging"], status["profile"]) == (True, "gentle")
    assert status["kept_over_boots"] == bool(init)
    ksm.write("run", 0)
    if init == "openrc":
        states = " ".join(f"/run/openrc/{name}" for name in ("exclusive", "started", "starting"))
        start = f"mkdir -p {states}; touch /run/openrc/softlevel"
        start = f"{start}; rc-service --nodeps ksm-preload start"
        assert "run: 0 -> 1" in root("sh", "-c", start)
        assert "ksm-preload" in root("rc-update", "show", "default")
        ksm.write("run", 0)
    assert "run: 0 -> 1" in root("ksmtool", "kernel-apply")
    assert "KSM is set so already" in root("ksmtool", "kernel-enable", "--profile", "gentle")
    root("ksmtool", "kernel-disable")
    assert ksm.settings() == before
    left = {str(path) for path in (root.folder / "etc").rglob("*")} - files
    assert all(Path(path).is_dir() for path in left), left
    if init == "systemd":
        sign.unlink()
    elif not init:
        levels.with_name("no-runlevels").rename(levels)


def test_kernel_commands_for_a_user(root: Root) -> None:
    def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
        return root.run("su", "-s", "/bin/sh", "nobody", "-c", f"ksmtool {command}")

    for command in ("kernel-enable", "kernel-disable"):
        assert as_nobody(f"{command} --dry-run").returncode == 0
        said = as_nobody(command)
        assert (said.returncode, said.stdout) == (3, "")
        assert said.stderr == "ksmtool: Only root may set KSM.\nhint: Run it with sudo.\n"
    status = json.loads(as_nobody("kernel-status --json").stdout)
    assert (status["profile"], status["drift"]) == (None, [])
    assert status["distribution"].startswith("Debian GNU/Linux 12")


def test_a_dry_run_changes_nothing(root: Root) -> None:
    said = root(*ENABLE, "--dry-run")
    assert said.endswith(f"/etc/ld.so.preload would be:\n{PRCTL}\n")
    assert "Nothing of ours" in root("ksmtool", "global-disable", "--dry-run")
    assert not root.preload.exists()
    root.run(*ENABLE)
    assert f"{PRCTL} would be removed" in root("ksmtool", "global-disable", "--dry-run")
    assert enabled(root)
