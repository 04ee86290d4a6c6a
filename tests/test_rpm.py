# SPDX-License-Identifier: MIT
"""The RPM packages: built, looked at, and installed, upgraded and erased by a real rpm.

In a Debian below a root of its own with a database of rpm's: all that is not Fedora's own happens
as it would there. CONTRIBUTING.md says what that leaves out.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import HERE, need_command, run
from ksmtool import systemd
from ksmtool.kernel import Ksm
from test_chroot import ENTER, Root, archive

pytestmark = [pytest.mark.slow, pytest.mark.root]

SPEC = HERE.parent / "rpm" / "ksm-preload.spec"
FRONT, LIBRARIES = "ksm-preload", "ksm-preload-libs"
PACKAGES = ("python3-click", "python3-distro", "python3-rich", "systemd-sysv")
LIBDIR = "/usr/lib/x86_64-linux-gnu"
"""Debian's, which its loader takes for $LIB."""
I386 = "/usr/lib/i386-linux-gnu"
FIGURES = "var/lib/prometheus/node-exporter"
ENTRY = b"/usr/$LIB/libksm_preload_prctl.so\n"

# Fedora's %{optflags} and %{build_ldflags}, but for plugins and specs that only Fedora has.
FEDORA = """
-O2 -flto=auto -ffat-lto-objects -fexceptions -g -grecord-gcc-switches -pipe -Wall
-Werror=format-security -Wp,-U_FORTIFY_SOURCE,-D_FORTIFY_SOURCE=3 -Wp,-D_GLIBCXX_ASSERTIONS
-fstack-protector-strong -m64 -mtune=generic -fasynchronous-unwind-tables -fstack-clash-protection
-fcf-protection -fno-omit-frame-pointer -mno-omit-leaf-frame-pointer
"""
FEDORA_LINKER = """
-Wl,-z,relro -Wl,--as-needed -Wl,-z,pack-relative-relocs -Wl,-z,now -Wl,--build-id=sha1
"""


@dataclass(frozen=True)
class Build:
    """The two packages of a release."""

    front: Path
    libraries: Path

    @property
    def files(self) -> tuple[str, str]:
        """Return both."""
        return str(self.front), str(self.libraries)


def build(sdist: Path, top: Path, number: int, *options: str, **environment: str) -> Build:
    """Build the packages as release `number`."""
    sources = top / "SOURCES"
    sources.mkdir(parents=True)
    shutil.copy(sdist, sources)
    spec = top / SPEC.name
    spec.write_text(re.sub(r"^(Release: +)1", rf"\g<1>{number}", SPEC.read_text(), flags=re.M))
    define = ("--define", f"_topdir {top}", "--define", f"_libdir {LIBDIR}")
    done = subprocess.run(
        [need_command("rpmbuild"), "-bb", "--nodeps", *define, *options, spec],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    built = {path.name.rsplit("-", 2)[0]: path for path in top.glob("RPMS/*/*.rpm")}
    assert built.keys() == {FRONT, LIBRARIES}
    return Build(built[FRONT], built[LIBRARIES])


@pytest.fixture(scope="module")
def builds(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Build]:
    """Return release 1, as this system's rpm builds it, and 2, with Fedora's flags and %check."""
    (sdist,) = released.glob("*.tar.gz")
    flags = ("--define", f"optflags {' '.join(FEDORA.split())}")
    linker = " ".join(FEDORA_LINKER.split())
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(build, sdist, folders[0], 1, "--without", "tests")
        second = pool.submit(build, sdist, folders[1], 2, *flags, LDFLAGS=linker)
        return first.result(), second.result()


@pytest.fixture(scope="module")
def first(builds: Sequence[Build]) -> Build:
    """Return release 1."""
    return builds[0]


@pytest.fixture(scope="module")
def second(builds: Sequence[Build]) -> Build:
    """Return release 2."""
    return builds[1]


@pytest.fixture(scope="module")
def i686(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return release 1 for i686, its libraries where a loader of Debian's looks for them."""
    (sdist,) = released.glob("*.tar.gz")
    options = ("--define", "optflags -O2", "--define", f"_libdir {I386}", "--without", "tests")
    compiler = need_command("i686-linux-gnu-gcc")
    folder = tmp_path_factory.mktemp("i686")
    return build(sdist, folder, 1, "--target", "i686", *options, CC=compiler)


# ---- What is in them -----------------------------------------------------------------------


def query(package: Path, *what: str) -> list[str]:
    done = run([need_command("rpm"), "--query", "--package", *what, package])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_rpmlint_has_nothing_to_say(released: Path) -> None:
    filters = SPEC.with_suffix(".rpmlintrc")
    packages = sorted(released.glob("*.rpm"))
    assert len(packages) == 2
    done = run([need_command("rpmlint"), "--rpmlintrc", filters, SPEC, *packages])
    said = [line for line in done.stdout.splitlines() if re.search(r": [EW]: ", line)]
    assert (done.returncode, said) == (0, [])


def test_each_filter_of_rpmlint_has_a_reason() -> None:
    lines = SPEC.with_suffix(".rpmlintrc").read_text().splitlines()
    for above, line in zip(lines, lines[1:]):
        if line.startswith("addFilter"):
            assert above.startswith(("#", "addFilter")), line


def test_what_they_contain(first: Build) -> None:
    def files(package: Path) -> set[str]:
        modules = "/usr/lib/python3/dist-packages/ksmtool/"
        names = [name for name in query(package, "--list") if "/.build-id" not in name]
        assert any(name.startswith(modules) for name in names) == (package == first.front)
        kept = (name for name in names if not name.startswith(modules))
        left_out = r"/usr/share/(man|doc|licenses|bash-completion|zsh|fish)(/|$)"
        return {name for name in kept if not re.match(left_out, name)}

    assert files(first.libraries) == {
        f"{LIBDIR}/libksm_preload.so",
        f"{LIBDIR}/libksm_preload_follow.so",
        f"{LIBDIR}/libksm_preload_prctl.so",
        "/usr/sbin/ksm-rescue",
    }
    units = "/usr/lib/systemd/system"
    (version,) = query(first.front, "--queryformat=%{VERSION}")
    metadata = f"/usr/lib/python3/dist-packages/ksm_preload-{version}.dist-info"
    assert files(first.front) == {
        "/usr/bin/ksm-wrapper",
        "/usr/bin/ksmtool",
        "/usr/lib/python3/dist-packages/ksmtool",
        metadata,
        # No RECORD: with one, pip would remove what is rpm's.
        *(f"{metadata}/{name}" for name in ("LICENSE", "METADATA", "WHEEL", "entry_points.txt")),
        f"{units}/ksm-preload-export.service",
        f"{units}/ksm-preload-export.timer",
        f"{units}/ksm-preload-off.service",
        f"{units}/sysinit.target.wants/ksm-preload-off.service",
    }
    pages = {path.name for package in first.files for path in map(Path, query(Path(package), "-l"))}
    assert {"ksmtool.1.gz", "ksm-wrapper.1.gz", "ksm-rescue.8.gz"} <= pages
    for package in first.files:
        assert len(query(Path(package), "--licensefiles")) == 1
        assert query(Path(package), "--docfiles")


def test_they_do_nothing_but_when_they_go(first: Build) -> None:
    for package, names in (
        (first.front, ["preuninstall"]),
        (first.libraries, ["preuninstall", "postuninstall"]),
    ):
        said = "\n".join(query(package, "--scripts", "--triggers", "--filetriggers"))
        assert re.findall(r"^(\w+) (?:scriptlet|program)", said, re.M) == names
        for line in re.findall(r"^if .*then", said, re.M):
            assert '"$1" -eq 0' in line or '"$1" -ne 0 ] && [ ! -e /usr/lib' in line


def test_fedoras_flags_bring_no_glibc_into_the_libraries(second: Build, tmp_path: Path) -> None:
    """Its checking functions are not in musl, whose programs load them, too."""
    for package in second.files:
        unpack = f"rpm2cpio '{package}' | cpio --extract --make-directories --quiet"
        assert run(["sh", "-c", unpack], cwd=tmp_path).returncode == 0
    found = sorted((tmp_path / LIBDIR[1:]).glob("*.so"))
    assert len(found) == 3
    for library in found:
        wanted = run([need_command("nm"), "--dynamic", "--undefined-only", library]).stdout
        assert re.findall(r"(\S+_chk)\b", wanted) == [], library.name
        if library.name != "libksm_preload.so":
            assert re.findall(r" U ", wanted) == []
    # What is to be fortified is.
    wrapper = run(["nm", "--dynamic", "--undefined-only", tmp_path / "usr/bin/ksm-wrapper"]).stdout
    assert "__snprintf_chk" in wrapper


# ---- Installed, upgraded, erased -----------------------------------------------------------


@dataclass(frozen=True)
class System(Root):
    """A Debian with a database of rpm's."""

    def rpm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Have this machine's rpm work on it, inside its mounts."""
        work = f'exec rpm --root "$0" --dbpath /var/lib/rpm {" ".join(arguments)}'
        return self._enter(ENTER.replace('exec chroot "$0" "$@"', work))

    def _enter(self, script: str) -> subprocess.CompletedProcess[str]:
        isolated = ["unshare", "--mount", "--net", "--propagation=private"]
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        return run([*isolated, "sh", "-ec", script, self.folder], env={"PATH": path})

    def done(self, *arguments: str) -> None:
        """Have rpm do something, in silence."""
        said = self.rpm(*arguments)
        assert (said.returncode, said.stdout, said.stderr) == (0, "", "")

    def content(self) -> bytes | None:
        """Return what is in /etc/ld.so.preload; no program complains about it."""
        assert self("true") == ""
        return self.preload.read_bytes() if self.preload.exists() else None

    def files(self) -> dict[str, object]:
        """Return all files but rpm's own, with what can be seen of them."""
        found: dict[str, object] = {}
        for folder, folders, names in os.walk(self.folder):
            if folder == str(self.folder / "var/lib"):
                folders.remove("rpm")
            for name in (*folders, *names):
                path = Path(folder, name)
                status = path.lstat()
                content: object = None
                if stat.S_ISLNK(status.st_mode):
                    content = path.readlink()
                elif stat.S_ISREG(status.st_mode):
                    is_configuration = folder.startswith(str(self.folder / "etc"))
                    content = path.read_bytes() if is_configuration else status.st_size
                found[str(path.relative_to(self.folder))] = (status.st_mode, status.st_uid, content)
        return found


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Return it, without our packages."""
    need_command("rpm")
    root = archive("rpm", packages=PACKAGES, architectures="amd64")
    folder = tmp_path_factory.mktemp("root")
    folder.chmod(0o755)
    done = run(["tar", "-C", folder, "-xf", root])
    assert done.returncode == 0, done.stderr
    # Those in /usr are in Fedora's package `filesystem`.
    manuals = (f"usr/share/man/man{section}" for section in "1578")
    for name in ("var/lib/rpm", FIGURES, I386[1:], "usr/share/licenses", *manuals):
        (folder / name).mkdir(parents=True, exist_ok=True)
    yield System(folder)
    shutil.rmtree(folder)


@pytest.fixture
def clean(system: System) -> Iterator[System]:
    """Return it, and see that nothing is left in it after the packages are erased."""
    before = system.files()
    yield system
    left = system.rpm("-qa").stdout.split()
    if left:
        system.rpm(*ERASE, "--noscripts", "--nodeps", *left)
    after = system.files()
    differ = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    for name in reversed(differ):  # for the tests to come
        path = system.folder / name
        if name not in before:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert (left, differ) == ([], [])


# Debian's packages are not in that database, and Debian's rpm would warn of itself.
QUIETLY = "--force-debian"
INSTALL, UPGRADE, REINSTALL = ((verb, "--nodeps", QUIETLY) for verb in ("-i", "-U", "--reinstall"))
ERASE = ("-e", QUIETLY)
ENABLE = ("ksmtool", "global-enable", "--yes", "--force", "--method", "ld.so.preload")
OTHER = b"/usr/lib/x86_64-linux-gnu/libutil.so.1"

# What others may have in /etc/ld.so.preload, and what it is with our entry.
CONTENTS = {
    "no file": (None, ENTRY),
    "an entry": (OTHER + b"\n", OTHER + b"\n" + ENTRY),
    "an entry without a newline": (OTHER, OTHER + b"\n" + ENTRY[:-1]),
    "a comment": (b"# anybody's words\n", b"# anybody's words\n" + ENTRY),
    "several, a comment, blanks": (
        b"# why\n\n  " + OTHER + b" \t" + OTHER + b"\n\n",
        b"# why\n\n  " + OTHER + b" \t" + OTHER + b"\n\n" + ENTRY,
    ),
}


@pytest.mark.ksm
@pytest.mark.parametrize("found", CONTENTS)
def test_install_enable_upgrade_erase(
    clean: System, first: Build, second: Build, found: str
) -> None:
    before, enabled = CONTENTS[found]
    if before is not None:
        clean.preload.write_bytes(before)
    clean.done(*INSTALL, *first.files)
    assert clean.content() == before, "nothing is enabled by installing"
    code = "from importlib.metadata import version; print(version('ksm-preload'))"
    assert f"ksmtool {clean('python3', '-c', code)}" == clean("ksmtool", "--version")

    said = clean.run(*ENABLE)
    assert said.returncode == 0, said.stdout + said.stderr
    assert clean.content() == enabled
    assert "ksm_merge_any: yes" in clean("cat", "/proc/self/ksm_stat")
    identity = clean.preload.stat()

    clean.done(*UPGRADE, *second.files)
    assert clean.rpm("-q", FRONT).stdout == f"{second.front.stem}\n"
    assert clean.content() == enabled
    assert clean.preload.stat() == identity, "an upgrade does not touch it"
    assert "ksm_merge_any: yes" in clean("cat", "/proc/self/ksm_stat")
    clean.done(*UPGRADE, "--oldpackage", *first.files)
    assert clean.content() == enabled
    clean.done(*REINSTALL, *first.files)
    assert clean.content() == enabled

    clean.done(*ERASE, FRONT, LIBRARIES)
    assert clean.content() == before
    clean.preload.unlink(missing_ok=True)


@pytest.mark.parametrize("how", [(), ("--nodeps",)], ids=["", "--nodeps"])
@pytest.mark.parametrize("order", [(FRONT, LIBRARIES), (LIBRARIES, FRONT)], ids=" ".join)
def test_one_after_the_other(
    clean: System, first: Build, order: tuple[str, str], how: tuple[str, ...]
) -> None:
    clean.done(*INSTALL, *first.files)
    assert clean.run("ksm-rescue", "--add", ENTRY.decode().strip()).returncode == 0
    if order[0] == LIBRARIES and not how:
        said = clean.rpm(*ERASE, LIBRARIES)
        assert said.returncode != 0
        assert f"is needed by (installed) {FRONT}" in said.stderr
        assert clean.content() == ENTRY
        order = (FRONT, LIBRARIES)
    for package in order:
        clean.done(*ERASE, *how, package)
        assert clean.content() is None


def test_the_libraries_alone(clean: System, first: Build, second: Build) -> None:
    clean.done(*INSTALL, str(first.libraries))
    clean.preload.write_bytes(OTHER + b"\n" + ENTRY)
    backup, others = (
        clean.preload.with_name(f"ld.so.preload.{name}") for name in ("20261126T091500Z", "1T2Z")
    )
    backup.touch()
    others.touch()
    clean.done(*UPGRADE, str(second.libraries))
    assert clean.content() == OTHER + b"\n" + ENTRY
    assert backup.exists()
    clean.done(*ERASE, LIBRARIES)
    assert clean.content() == OTHER + b"\n"
    assert not backup.exists()
    assert others.exists()
    others.unlink()
    clean.preload.unlink()


@pytest.mark.parametrize("goes", ["i686", "x86_64"])
def test_the_entry_goes_with_the_first_architecture(
    clean: System, first: Build, second: Build, i686: Build, goes: str
) -> None:
    """Else the loader of that one would look for what is gone."""
    clean.done(*INSTALL, str(first.libraries), str(i686.libraries))
    clean.preload.write_bytes(OTHER + b"\n" + ENTRY)
    clean.done(*REINSTALL, str(i686.libraries))
    clean.done(*UPGRADE, str(second.libraries))
    assert len(clean.rpm("-qa").stdout.split()) == 2
    assert clean.content() == OTHER + b"\n" + ENTRY
    said = clean.rpm(*ERASE, f"{LIBRARIES}.{goes}")
    # Programs of that architecture complain until the entry is out, the scriptlet's too.
    lines = [line for line in said.stderr.splitlines() if not line.startswith("ERROR: ld.so: ")]
    assert (said.returncode, lines) == (0, [])
    assert clean.content() == OTHER + b"\n"
    clean.done(*ERASE, LIBRARIES)
    clean.preload.unlink()


# What is in /etc/ld.so.preload, and whether the loader opens a library of ours there.
LEFT = {
    "an entry": (ENTRY, True),
    "blanks": (b"# why\n\t/usr/$LIB/libksm_preload.so ", True),
    "a colon": (OTHER + b":/usr/$LIB/libksm_preload_follow.so\n", True),
    "a comment": (b"# " + ENTRY, False),
    "another name": (b"/usr/lib/libksm_preload.so.old /usr/lib/my-libksm_preload.so\n", False),
}


@pytest.mark.parametrize("left", LEFT)
def test_what_ksm_rescue_leaves_keeps_the_packages(clean: System, first: Build, left: str) -> None:
    """Here it takes nothing out, as if it knew none of the names."""
    content, ours = LEFT[left]
    clean.done(*INSTALL, *first.files)
    rescue = clean.folder / "usr/sbin/ksm-rescue"
    rescue.unlink()
    shutil.copy(clean.folder / "usr/bin/true", rescue)
    clean.preload.write_bytes(content)
    for packages in ((FRONT, LIBRARIES), ("--nodeps", LIBRARIES)) if ours else ():
        said = clean.rpm(*ERASE, *packages)
        assert said.returncode != 0
        assert "/etc/ld.so.preload still names a library of this package" in said.stderr
        assert len(clean.rpm("-qa").stdout.split()) == 2
    if ours:
        clean.preload.unlink()
    said = clean.rpm(*ERASE, FRONT, LIBRARIES)
    assert said.returncode == 0, said.stderr
    clean.preload.unlink(missing_ok=True)


def test_who_is_left_out_stays_so_to_the_end(clean: System, first: Build) -> None:
    """However an administrator has written it, and all of it goes."""
    clean.done(*INSTALL, *first.files)
    units = clean.folder / "etc/systemd/system"
    settings = {"a": "=no", "b": " = Off", "c": "=true", "d": "=0", "e": " = yes", "f": "="}
    for name, value in settings.items():
        file = units / f"{name}.service.d" / systemd.NAME
        file.parent.mkdir()
        file.write_text(systemd.DropIn("", on=True).text.replace("=yes", value))
    removed = clean.folder / "removed"
    program = clean.folder / "usr/bin/rm"
    program.rename(program.with_name("away"))
    program.write_text('#!/bin/sh\necho "$@" >>/removed\nexec away "$@"\n')
    program.chmod(0o755)
    try:
        clean.done(*ERASE, FRONT, LIBRARIES)
        order = re.findall(r"/(\w)\.service\.d/", removed.read_text())
    finally:
        program.with_name("away").rename(program)
        removed.unlink()
    assert order == [*"cef", *"abd"]


def test_what_cannot_be_taken_out_keeps_the_packages(clean: System, first: Build) -> None:
    """ksm-rescue refuses a link, which is somebody's arrangement."""
    clean.done(*INSTALL, *first.files)
    elsewhere = clean.preload.with_name("preload.mine")
    elsewhere.write_bytes(ENTRY)
    clean.preload.symlink_to(elsewhere.name)
    for packages in ((FRONT, LIBRARIES), ("--nodeps", LIBRARIES)):
        said = clean.rpm(*ERASE, *packages)
        assert said.returncode != 0
        assert "It is a symbolic link; edit what it names by hand." in said.stderr
        assert clean.content() == ENTRY
        assert len(clean.rpm("-qa").stdout.split()) == 2
    elsewhere.write_bytes(OTHER + b"\n")
    clean.done(*ERASE, FRONT, LIBRARIES)
    assert clean.content() == OTHER + b"\n", "others' link is not looked at"
    clean.preload.unlink()
    elsewhere.unlink()


def test_what_ksmtool_enabled_goes_with_it(clean: System, first: Build, ksm: Ksm) -> None:
    before = ksm.settings()
    clean.done(*INSTALL, *first.files)
    enable(clean)
    clean.done(*ERASE, FRONT, LIBRARIES)
    assert ksm.settings() == before
    assert not list((clean.folder / "etc/systemd/system").glob("*.d/50-ksm-preload.conf"))


def test_without_python_too(clean: System, first: Build, ksm: Ksm) -> None:
    clean.done(*INSTALL, *first.files)
    enable(clean)
    others = clean.folder / "etc/systemd/system/other.service.d/50-ksm-preload.conf"
    others.parent.mkdir()
    others.write_text("[Service]\n")
    python = clean.folder / "usr/bin/python3"
    python.rename(python.with_name("away"))
    try:
        said = clean.rpm(*ERASE, FRONT, LIBRARIES)
    finally:
        python.with_name("away").rename(python)
    assert (said.returncode, said.stdout) == (0, "")
    assert "ksm-preload: KSM stays as it is set until the next boot.\n" in said.stderr
    assert clean.content() is None
    assert others.exists()
    shutil.rmtree(others.parent)


def enable(system: System) -> None:
    """Switch on all there is, but systemd's method by hand: no systemd runs there."""
    code = "from ksmtool import machine, systemd; systemd.write(machine.drop_ins(True))"
    for command in (
        ("python3", "-c", code),
        ENABLE,
        ("ksmtool", "kernel-enable", "--profile", "gentle"),
        ("systemctl", "enable", "--quiet", "ksm-preload-export.timer"),
    ):
        done = system.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    (system.folder / FIGURES / "ksm-preload.prom").touch()
    units = system.folder / "etc/systemd/system"
    for name in (
        "ksm-preload.service",
        "service.d/50-ksm-preload.conf",
        "timers.target.wants/ksm-preload-export.timer",
    ):
        assert os.path.lexists(units / name)
