# SPDX-License-Identifier: MIT
"""The Debian packages: built, looked at, installed, used, upgraded, removed and purged for real."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import boots
import packages
from boots import Boot, Step
from conftest import HERE, Victims, need, run
from ksmtool.kernel import Ksm
from packages import Built, Chroot, Debians

ROOT = HERE.parent
NOCHECK = {"DEB_BUILD_OPTIONS": "nocheck"}
slow = pytest.mark.slow

ENTRY = "/usr/$LIB/libksm_preload_prctl.so\n"
OTHERS = "# Other people's words\n/usr/lib/x86_64-linux-gnu/libother.so\n"
"""What else can be in the file; its library is there, and only amd64's programs run."""


# ---- Built -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def debians() -> Iterator[Debians]:
    """Return where Debians are unpacked; nothing of it stays."""
    need(os.geteuid() == 0, "needs root")
    # 2 GB in 50,000 files: a busy disk takes longer to delete them than all that is done with them.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 6e9
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        Path(folder).chmod(0o755)  # the builder has to get here
        yield Debians(Path(folder))


NEWER = "99"


@dataclass
class Builds:
    """What is built of this tree, each when it is first asked for."""

    debians: Debians
    _built: dict[str, Built] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Built:
        """Return one: of a suite, of "i386", "again" and elsewhere, or "newer" of these."""
        if name not in self._built:
            self._built[name] = self._build(name)
        return self._built[name]

    def _build(self, name: str) -> Built:
        newer, _, kind = name.rpartition(" ")
        suite = "trixie" if kind == "trixie" else "bookworm"
        base = self.debians.base("build", suite, "i386" if kind == "i386" else "amd64")
        chroot = self.debians.chroot(base)
        if kind == "again":
            env = {"LC_ALL": "C", "TZ": "Asia/Kolkata", "USER": "me", **NOCHECK}
            return packages.build(chroot, "srv/else/where", 0o077, env)
        personality = ("setarch", "i686") if kind == "i386" else ()
        if newer:
            return packages.build(chroot, env=NOCHECK, personality=personality, version=NEWER)
        return packages.build(chroot, personality=personality)


@pytest.fixture(scope="session")
def builds(debians: Debians) -> Builds:
    """Return what is built."""
    return Builds(debians)


@slow
@pytest.mark.parametrize("name", ["bookworm", "trixie", "i386"])
def test_built_in_a_clean_chroot(
    builds: Builds, name: str, measured: Callable[[str], None]
) -> None:
    built = builds[name]
    architecture = "i386" if name == "i386" else "amd64"
    assert [file.name.split("_")[0] for file in built.packages()] == [
        "ksm-preload",
        "libksm-preload",
    ]
    assert all(file.name.endswith(f"_{architecture}.deb") for file in built.packages())
    measured(f"all packages of {name}, built in {built.seconds:.0f} s")
    assert built.seconds < 300
    # The unit tests of the C parts ran.
    assert re.search(r"^Fail: +0", built.log, re.MULTILINE), built.log


def control(package: Path) -> dict[str, str]:
    """Return the fields of a package."""
    shown = subprocess.run(
        ["dpkg-deb", "--field", package], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return dict(re.findall(r"^(\S+): (.*(?:\n .*)*)$", shown, re.MULTILINE))


def contents(package: Path) -> dict[str, str]:
    """Return path -> mode and owner, of all but folders."""
    shown = subprocess.run(
        ["dpkg-deb", "--contents", package], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    rows = [line.split(None, 5) for line in shown.splitlines()]
    return {row[5][1:]: " ".join(row[:2]) for row in rows if row[0][0] != "d"}


@slow
@pytest.mark.parametrize("name", ["bookworm", "trixie", "i386"])
def test_sizes(builds: Builds, name: str, measured: Callable[[str], None]) -> None:
    tool, library = builds[name].packages()
    sizes = [int(control(one)["Installed-Size"]) for one in (library, tool)]
    measured(f"{name}: libksm-preload {sizes[0]} KB, ksm-preload {sizes[1]} KB installed")
    assert sizes[0] <= 60
    assert sizes[1] <= 600


@slow
@pytest.mark.parametrize("name", ["bookworm", "trixie"])
def test_what_is_in_them(builds: Builds, name: str) -> None:
    tool, library = builds[name].packages()
    assert control(library)["Multi-Arch"] == "same"
    assert control(tool)["Multi-Arch"] == "foreign"
    version = control(tool)["Version"]
    wanted = {f"libksm-preload (= {version})", "python3:any"}
    wanted |= {f"python3-{module}" for module in ("click", "distro", "rich", "xxhash")}
    assert wanted <= set(control(tool)["Depends"].split(", "))
    doc = {f"/usr/share/doc/libksm-preload/{one}" for one in ("changelog.gz", "copyright")}
    libraries = {
        f"/usr/lib/x86_64-linux-gnu/libksm_preload{one}.so" for one in ("", "_prctl", "_follow")
    }
    overrides = {"/usr/share/lintian/overrides/libksm-preload"}
    assert set(contents(library)) == doc | libraries | overrides
    files = contents(tool)
    for path, mode in {
        "/usr/bin/ksmtool": "-rwxr-xr-x root/root",
        "/usr/bin/ksm-wrapper": "-rwxr-xr-x root/root",
        "/usr/sbin/ksm-rescue": "-rwxr-xr-x root/root",
        "/usr/lib/systemd/system/ksm-preload-off.service": "-rw-r--r-- root/root",
        "/usr/lib/systemd/system/ksm-preload-export.timer": "-rw-r--r-- root/root",
        "/usr/lib/python3/dist-packages/ksmtool/default_policy": "-rw-r--r-- root/root",
        f"/usr/lib/python3/dist-packages/ksm_preload-{version}.dist-info/METADATA": (
            "-rw-r--r-- root/root"
        ),
        # ksm-preload-export.service names it.
        "/usr/share/doc/ksm-preload/export.md": "-rw-r--r-- root/root",
        "/usr/share/man/man8/ksm-rescue.8.gz": "-rw-r--r-- root/root",
    }.items():
        assert files.get(path) == mode, path
    assert {path.split("/")[1] for path in files} == {"usr"}
    assert not any(path.endswith(".pyc") or "/local/" in path for path in files)
    modules = {f"/usr/lib/python3/dist-packages/ksmtool/{file.name}" for file in MODULES}
    assert modules <= set(files)


MODULES = sorted((ROOT / "python/ksmtool").glob("*.py"))


@slow
@pytest.mark.parametrize("name", ["bookworm", "trixie"])
def test_each_library_writes_to_one_page(builds: Builds, name: str, tmp_path: Path) -> None:
    """By any compiler: what is written to is not page aligned (src/meson.build)."""
    _, library = builds[name].packages()
    assert run(["dpkg-deb", "--extract", library, tmp_path]).returncode == 0
    for file in tmp_path.rglob("*.so"):
        shown = run(["readelf", "--segments", "--wide", file]).stdout
        ((start, size),) = re.findall(r"LOAD +\S+ (\S+) \S+ \S+ (\S+) RW ", shown)
        assert int(start, 16) % 4096 + int(size, 16) <= 4096, file.name


@slow
def test_reproducible(builds: Builds) -> None:
    """In another folder, at another time, with another umask, language and time zone."""
    first, again = builds["bookworm"], builds["again"]
    assert len(first.packages()) == 2
    for package in sorted(first.folder.glob("*.deb")):
        assert (again.folder / package.name).read_bytes() == package.read_bytes(), package.name


@slow
@pytest.mark.parametrize("name", ["bookworm", "trixie"])
def test_lintian(builds: Builds, debians: Debians, name: str) -> None:
    chroot = debians.chroot(debians.base("use", "bookworm", "amd64,i386"))
    built = chroot.changed / "built"
    built.mkdir()
    for file in builds[name].folder.glob("*.*"):
        shutil.copy(file, built)
    (changes,) = built.glob("*.changes")
    options = ("--pedantic", "--tag-display-limit", "0", "--allow-root")
    said = chroot.run("lintian", *options, f"/built/{changes.name}")
    assert not re.findall(r"^[EW]: .*", said.stdout, re.MULTILINE), said.stdout
    assert (said.returncode, said.stderr) == (0, ""), said.stdout


# ---- Installed -------------------------------------------------------------------------------

DPKG = ("var/lib/dpkg/", "var/log/", "var/cache/")
"""What dpkg itself leaves behind."""
ENABLE = ("ksmtool", "global-enable", "--yes", "--force", "--method", "ld.so.preload")
PRELOAD = "etc/ld.so.preload"
LOADED = "grep -c /libksm_preload_prctl.so$ /proc/self/maps || true"
UNITS = "etc/systemd/system"
TIMER = f"{UNITS}/timers.target.wants/ksm-preload-export.timer"
ALL = ("ksm-preload", "libksm-preload:amd64", "libksm-preload:i386")


@pytest.fixture(scope="session")
def offered(builds: Builds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the packages to install, and the same with a higher version."""
    folder = tmp_path_factory.mktemp("offered")
    for name, which in (("now", ""), ("newer", "newer ")):
        (folder / name).mkdir()
        _, foreign = builds[f"{which}i386"].packages()
        for package in (*builds[f"{which}bookworm"].packages(), foreign):
            shutil.copy(package, folder / name)
    return folder


@pytest.fixture
def debian(debians: Debians, offered: Path) -> Chroot:
    """Return a Debian to install them in, with a library of others."""
    chroot = debians.chroot(debians.base("use", "bookworm", "amd64,i386"))
    shutil.copytree(offered, chroot.changed / "offered")
    library = chroot.below[0] / "usr/lib/x86_64-linux-gnu/libz.so.1"
    other = chroot.changed / "usr/lib/x86_64-linux-gnu/libother.so"
    other.parent.mkdir(parents=True)
    shutil.copy(library.resolve(), other)
    return chroot


@pytest.fixture(scope="session")
def layer(debians: Debians, offered: Path) -> tuple[Path, ...]:
    """Return the folders of a Debian with the packages installed."""
    base = debians.base("use", "bookworm", "amd64,i386")
    chroot = debians.chroot(base)
    shutil.copytree(offered, chroot.changed / "offered")
    install(chroot, "now")
    return (chroot.changed, base)


@pytest.fixture
def installed(debians: Debians, layer: tuple[Path, ...]) -> Chroot:
    """Return a Debian with the packages installed."""
    return debians.chroot(*layer)


def install(chroot: Chroot, which: str) -> None:
    """Install all packages, without a word about a library that is missing."""
    done = chroot.run("sh", "-c", f"dpkg --install /offered/{which}/*.deb")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def dpkg(chroot: Chroot, *arguments: str) -> None:
    """Run dpkg, which has to succeed, and nothing that it starts misses a library."""
    done = chroot.run("dpkg", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR: ld.so" not in done.stdout + done.stderr


def preload(chroot: Chroot) -> bytes | None:
    """Return the bytes of /etc/ld.so.preload, None if there is none."""
    file = chroot.changed / PRELOAD
    if not file.exists() or stat.S_ISCHR(file.lstat().st_mode):
        return None
    return file.read_bytes()


def put(chroot: Chroot, name: str, content: bytes) -> Path:
    """Write a file."""
    file = chroot.changed / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def state(chroot: Chroot, package: str) -> str:
    """Return what dpkg says of a package that is there."""
    return chroot("dpkg-query", "--show", "--showformat=${db:Status-Status}", package)


@slow
@pytest.mark.ksm
@pytest.mark.parametrize("others", [b"", OTHERS.encode()], ids=["no file", "a file of others"])
def test_from_install_to_purge(debian: Chroot, others: bytes) -> None:
    if others:
        put(debian, PRELOAD, others)
    before = debian.new_and_gone()

    install(debian, "now")
    assert preload(debian) == (others or None)
    assert not [name for name in debian.new_and_gone() - before if name.startswith("etc/")]

    debian(*ENABLE)
    enabled = others + ENTRY.encode()
    assert preload(debian) == enabled
    assert debian("sh", "-c", LOADED) != "0\n"

    install(debian, "newer")
    assert debian("dpkg-query", "--show", "--showformat=${Version}", "ksm-preload") == NEWER
    assert preload(debian) == enabled
    assert debian("sh", "-c", LOADED) != "0\n"

    dpkg(debian, "--remove", *ALL)
    assert preload(debian) == (others or None)
    assert debian("sh", "-c", LOADED) == "0\n"

    put(debian, "etc/ksm-preload/policy.d/mine.conf", b"deny mine\n")
    dpkg(debian, "--purge", *ALL)
    assert preload(debian) == (others or None)
    left = {name for name in debian.new_and_gone() - before if not name.startswith(DPKG)}
    assert not left


@slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"/a.so\n{ENTRY}/b.so\n", "/a.so\n/b.so\n"),
        (f"/a.so:{ENTRY}", "/a.so\n"),
        # Without a line less: the loader would read other names behind the first comment.
        (f"# one\n/a.so\n# two\n{ENTRY}", f"# one\n/a.so\n# two\n{' ' * (len(ENTRY) - 1)}\n"),
        ("/usr/lib/x86_64-linux-gnu/libksm_preload.so", None),
    ],
)
def test_only_our_entry_goes(installed: Chroot, before: str, after: str | None) -> None:
    """Written by hand, among what others have there; their libraries are missing."""
    put(installed, PRELOAD, before.encode())
    done = installed.run("dpkg", "--remove", *ALL)
    assert done.returncode == 0, done.stderr
    assert preload(installed) == (after.encode() if after else None)


def switch_everything_on(chroot: Chroot) -> None:
    """Enable both methods and KSM at boot as systemd's and OpenRC's, with the product's writers."""
    put(chroot, f"{UNITS}/default.target", b"")
    put(chroot, PRELOAD, ENTRY.encode())
    drop_ins = (
        "[DropIn(f'{SYSTEM}/service.d/{NAME}', True), DropIn(f'{USER}/a.service.d/{NAME}', False)]"
    )
    chroot("python3", "-c", f"from ksmtool.systemd import *; write({drop_ins})")
    chroot("ksmtool", "kernel-enable", "--profile", "gentle")
    openrc = "install(files('openrc', '/usr/bin/ksmtool'))"
    chroot("python3", "-c", f"from ksmtool.boot import *; {openrc}")
    link = chroot.changed / TIMER
    link.parent.mkdir(parents=True)
    link.symlink_to("/usr/lib/systemd/system/ksm-preload-export.timer")
    put(chroot, "var/lib/prometheus/node-exporter/ksm-preload.prom", b"ksm 1\n")


def traces(root: Path) -> set[str]:
    """Return what is there of what was switched on."""
    folders = [root / name for name in ("etc", "var/lib/prometheus", "var/lib/ksm-preload")]
    paths = [path for folder in folders for path in folder.rglob("*")]
    real = [path for path in paths if path.is_symlink() or path.is_file()]
    names = {str(path.relative_to(root)) for path in real}
    return {name for name in names if "ksm" in name or "ld.so.preload" in name}


@slow
@pytest.mark.ksm
@pytest.mark.parametrize("python", ["works", "is half removed", "is gone"])
def test_removing_takes_everything_back(installed: Chroot, ksm: Ksm, python: str) -> None:
    before = ksm.settings()
    switch_everything_on(installed)
    assert len(traces(installed.changed)) == 10, traces(installed.changed)
    assert ksm.settings() != before
    install(installed, "newer")
    assert len(traces(installed.changed)) == 10
    if python == "is half removed":
        installed("rm", "-r", "/usr/lib/python3/dist-packages/click")
    elif python == "is gone":
        installed("rm", *(f"/usr/bin/{name}" for name in ("python3", "py3clean", "py3compile")))
    done = installed.run("dpkg", "--remove", "ksm-preload")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = set() if python == "works" else {"var/lib/ksm-preload/kernel.json"}
    assert traces(installed.changed) == kept
    assert ("stays as it is until the next boot" in done.stderr) == (python != "works")
    assert (ksm.settings() == before) == (python == "works")
    dpkg(installed, "--purge", *ALL)
    assert not traces(installed.changed)
    assert not (installed.changed / UNITS / "service.d").is_dir()


@slow
def test_what_others_call_so_stays(installed: Chroot) -> None:
    names = [f"{UNITS}/ksm-preload.service", f"{UNITS}/service.d/50-ksm-preload.conf"]
    names.append("etc/ld.so.preload.bak")
    for name in names:
        put(installed, name, b"[Unit]\n")
    (installed.changed / PRELOAD).symlink_to("elsewhere")
    dpkg(installed, "--purge", *ALL)
    assert traces(installed.changed) == {*names, PRELOAD}


@slow
def test_purge_removes_what_edits_left(installed: Chroot) -> None:
    for name in ("ld.so.preload.20260101T000000Z", ".ld.so.preload.ksm-new", "ksm-preload/policy"):
        put(installed, f"etc/{name}", b"/a.so\n")
    dpkg(installed, "--remove", *ALL)
    assert len(traces(installed.changed)) == 3
    dpkg(installed, "--purge", *ALL)
    assert not traces(installed.changed)


@slow
@pytest.mark.parametrize("first", [("ksm-preload",), ("--force-depends", "libksm-preload:amd64")])
@pytest.mark.parametrize("reason", ["immutable", "/etc is read-only"])
def test_if_the_entry_cannot_go_the_library_stays(
    installed: Chroot, reason: str, first: tuple[str, ...]
) -> None:
    file = put(installed, PRELOAD, ENTRY.encode())
    command = f"dpkg --remove {' '.join(first)}"
    if reason == "immutable":
        subprocess.run(["chattr", "+i", file], check=True)
    else:
        command = f"mount --bind /etc /etc; mount -o remount,ro,bind /etc; {command}"
    try:
        done = installed.run("sh", "-c", command)
        assert done.returncode != 0
        assert "ksm-rescue: Cannot write /etc/ld.so.preload" in done.stderr
        assert file.read_bytes() == ENTRY.encode()
    finally:
        if reason == "immutable":
            subprocess.run(["chattr", "-i", file], check=True)
    assert state(installed, first[-1]) == "installed"
    assert installed("sh", "-c", LOADED) != "0\n"
    dpkg(installed, "--remove", *ALL)
    assert preload(installed) is None


@slow
@pytest.mark.parametrize("gone", ["libksm-preload:i386", "libksm-preload:amd64"])
def test_the_entry_goes_with_the_first_library(installed: Chroot, gone: str) -> None:
    """It means the library of each architecture, and programs of that one print an error else."""
    put(installed, PRELOAD, ENTRY.encode())
    for libc in ("/lib/x86_64-linux-gnu/libc.so.6", "/lib/i386-linux-gnu/libc.so.6"):
        assert installed.run(libc).stderr == ""
    dpkg(installed, "--remove", "--force-depends", gone)
    assert preload(installed) is None
    for libc in ("/lib/x86_64-linux-gnu/libc.so.6", "/lib/i386-linux-gnu/libc.so.6"):
        assert installed.run(libc).stderr == ""


@slow
def test_another_package_takes_the_place_of_the_library(installed: Chroot) -> None:
    """The one that depends on it stays, deconfigured, which dpkg calls an error."""
    dpkg(installed, "--purge", "libksm-preload:i386")
    put(installed, PRELOAD, ENTRY.encode())
    fields = (
        "Package: other\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    fields += "Conflicts: libksm-preload\nReplaces: libksm-preload\n"
    put(installed, "other/DEBIAN/control", fields.encode())
    installed("sh", "-c", "chmod -R go=rX /other; dpkg-deb --build /other /other.deb")
    done = installed.run("dpkg", "--auto-deconfigure", "--install", "/other.deb")
    assert "libksm-preload:amd64 in favour of other" in done.stderr
    assert "ERROR: ld.so" not in done.stderr
    assert (state(installed, "ksm-preload"), state(installed, "other")) == (
        "half-configured",
        "installed",
    )
    assert preload(installed) is None


@slow
def test_an_entry_that_nothing_can_take_out(installed: Chroot) -> None:
    dpkg(installed, "--remove", "ksm-preload")
    put(installed, PRELOAD, ENTRY.encode())
    done = installed.run("dpkg", "--remove", "libksm-preload:amd64")
    assert done.returncode != 0
    assert "Delete the entry, then remove the package." in done.stderr
    assert "ERROR: ld.so" not in done.stderr
    assert state(installed, "libksm-preload:amd64") == "installed"
    (installed.changed / PRELOAD).unlink()
    dpkg(installed, "--remove", "libksm-preload:amd64")


NO_NAME = (
    "# libksm_preload was here",
    "/usr/$LIB/libksm_preload_prctl.so\r",
    "/opt/libksm_preload.so.1",
    "/opt/xlibksm_preload.so",
)
NAMES = (
    "/usr/$LIB/libksm_preload_follow.so # for all",
    "/a.so:libksm_preload.so",
    "# one\n# /usr/$LIB/libksm_preload_prctl.so",
)


@slow
@pytest.mark.parametrize("content", [*NO_NAME, *NAMES])
def test_without_ksm_rescue(installed: Chroot, content: str) -> None:
    """A mention is no entry, and an entry keeps the library."""
    dpkg(installed, "--remove", "ksm-preload")
    put(installed, PRELOAD, f"{content}\n".encode())
    done = installed.run("dpkg", "--purge", "libksm-preload:i386", "libksm-preload:amd64")
    assert (done.returncode == 0) == (content in NO_NAME), done.stderr
    if content in NAMES:
        line = content.splitlines()[-1]
        assert f"{len(content.splitlines())}:{line}\n" in done.stderr
    assert preload(installed) == f"{content}\n".encode()


@slow
def test_ksm_rescue_is_gone(installed: Chroot) -> None:
    installed("rm", "/usr/sbin/ksm-rescue")
    put(installed, PRELOAD, ENTRY.encode())
    done = installed.run("dpkg", "--remove", "ksm-preload")
    assert done.returncode != 0
    assert "/usr/sbin/ksm-rescue is gone. Delete the entry and its mentions" in done.stderr
    (installed.changed / PRELOAD).unlink()
    dpkg(installed, "--remove", *ALL)


@slow
def test_the_rules_go_with_the_last_library(installed: Chroot) -> None:
    rules = put(installed, "etc/ksm-preload/policy.d/mine.conf", b"deny mine\n")
    for package in ("ksm-preload", "libksm-preload:amd64"):
        dpkg(installed, "--purge", package)
        assert rules.exists(), package
    dpkg(installed, "--purge", "libksm-preload:i386")
    assert not rules.parent.parent.exists()


@slow
def test_drop_ins_that_were_edited(installed: Chroot) -> None:
    """Without Python, too, which puts up with more ways to say yes and no."""
    names = [f"{UNITS}/{name}.service.d/50-ksm-preload.conf" for name in ("a", "b")]
    (mark, *_) = installed(
        "python3", "-c", "from ksmtool.systemd import *; print(DropIn('x', True).text)"
    ).splitlines()
    for name, value in zip(names, (" true", " no")):
        put(installed, name, f"{mark}\n[Service]\nMemoryKSM ={value}\n".encode())
    installed("rm", "-r", "/usr/lib/python3/dist-packages/click")
    dpkg(installed, "--remove", "ksm-preload")
    assert not traces(installed.changed)


@slow
def test_below_another_root(installed: Chroot) -> None:
    """dpkg --root, and no chroot: what is switched on here is not what is removed there."""
    put(installed, PRELOAD, ENTRY.encode())
    drop_in = f"{UNITS}/service.d/50-ksm-preload.conf"
    installed("python3", "-c", f"from ksmtool.systemd import *; write([DropIn({drop_in!r}, True)])")
    for name in ("status", "available"):
        put(installed, f"target/var/lib/dpkg/{name}", b"")
    options = ("--root=/target", "--force-script-chrootless", "--force-depends")
    installed("sh", "-c", f"dpkg {' '.join(options)} --install /offered/now/*_amd64.deb")
    put(installed, f"target/{PRELOAD}", f"/a.so\n{ENTRY}".encode())
    put(installed, "target/etc/ksm-preload/policy", b"")
    shutil.copytree(installed.changed / UNITS, installed.changed / "target" / UNITS)
    installed("dpkg", *options, "--purge", "ksm-preload", "libksm-preload")
    assert (installed.changed / "target" / PRELOAD).read_text() == "/a.so\n"
    assert traces(installed.changed / "target") == {PRELOAD}
    assert traces(installed.changed) == {PRELOAD, drop_in}
    assert preload(installed) == ENTRY.encode()


@slow
@pytest.mark.ksm
def test_autopkgtest(installed: Chroot) -> None:
    shutil.copytree(ROOT / "debian", installed.changed / "source/debian")
    done = installed.run("autopkgtest", "--no-built-binaries", "/source", "--", "null")
    results = dict(re.findall(r"^(\w+) +(PASS|FAIL|SKIP).*$", done.stdout, re.MULTILINE))
    assert results == dict.fromkeys(("wrap", "merge", "global", "foreign"), "PASS"), done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Booted ----------------------------------------------------------------------------------


PLAN = (
    Step("as Debian is, then installed", "before install doctor kernel_enable enable"),
    Step("switched on", "switched_on savings healthy upgrade"),
    Step("upgraded", "switched_on remove"),
    Step("removed", "removed purge"),
)
METHODS = {"trixie": "systemd", "bookworm": "ld.so.preload"}
BOOTED = [(suite, step.name) for suite in METHODS for step in PLAN]


@pytest.fixture(scope="session")
def booted(
    request: pytest.FixtureRequest,
    builds: Builds,
    victims: Victims,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[dict[str, Boot]]]]:
    """Run the plan on the suites of the selected tests, as many at once as there are CPUs."""
    selected = {
        str(item.callspec.params["suite"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_booted
    }
    debs = {suite: {"now": builds[suite], "newer": builds[f"newer {suite}"]} for suite in selected}

    def follow(suite: str) -> dict[str, Boot]:
        folder = tmp_path_factory.mktemp(suite)
        machines = HERE / "vm"
        files = [
            *boots.runner(folder, machines / "guest_packages.py", machines / "ksm-worker@.service")
        ]
        for name, built in debs[suite].items():
            files += [(f"project/debs/{name}/{file.name}", file) for file in built.packages()]
        one = boots.system(suite, folder, victims("real_root", "static"), files)
        words = f"ksm_test.newer={NEWER}"
        return boots.follow(
            one, (replace(step, method=METHODS[suite], append=words) for step in PLAN)
        )

    victims("real_root", "static")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {suite: pool.submit(follow, suite) for suite in selected}


@slow
@pytest.mark.parametrize(("suite", "name"), BOOTED, ids=[": ".join(step) for step in BOOTED])
def test_booted(
    suite: str,
    name: str,
    booted: dict[str, Future[dict[str, Boot]]],
    measured: Callable[[str], None],
) -> None:
    (step,) = (one for one in PLAN if one.name == name)
    done = booted[suite].result()
    boots.check(step, done)
    measured(f"{suite}, {name}: {done[name].seconds:.0f} s")
    for line in re.findall(r"^\d+ services in a group .*$", done[name].report, re.MULTILINE):
        measured(f"{suite}, {name}: {line}")
