# SPDX-License-Identifier: MIT
"""One version everywhere; what script/release builds, and that it builds the same again."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import HERE, Tree, committed, release, run

PROJECT = HERE.parent

# Where the version stands beside meson.build, which is where the rest gets it from.
STATED: dict[str, tuple[str, ...]] = {
    "NEWS.md": (r"\A# News\n\n## (\S+)",),
    "rpm/ksm-preload.spec": (
        r"^Version: +(\S+)",
        r"^%changelog\n\* .* - (\S+)-\d+$",
    ),
    "debian/changelog": (r"\Aksm-preload \(([^)-]+)\) unstable; urgency=medium\n",),
}


def version() -> str:
    (found,) = re.findall(r" version: '(\S+)'", (PROJECT / "meson.build").read_text())
    return str(found)


@pytest.mark.parametrize("name", STATED)
def test_one_version_in(name: str) -> None:
    text = (PROJECT / name).read_text()
    for pattern in STATED[name]:
        assert re.findall(pattern, text, re.MULTILINE) == [version()], pattern


def test_python_has_it_from_meson() -> None:
    assert re.search(r'^dynamic = \["version"\]$', (PROJECT / "pyproject.toml").read_text(), re.M)


@pytest.mark.parametrize("name", ["ksm-wrapper", "ksmtool"])
def test_the_programs_say_it(tree: Tree, name: str) -> None:
    program = tree.wrapper.with_name(name)
    assert run([program, "--version"]).stdout == f"{name} {version()}\n"


@pytest.mark.slow
def test_what_is_built(released: Path) -> None:
    names = {file.name for file in released.iterdir()}
    assert names == {
        "SHA256SUMS",
        f"ksm-preload_{version()}_amd64.deb",
        f"libksm-preload_{version()}_amd64.deb",
        f"ksm-preload-{version()}-1.x86_64.rpm",
        f"ksm-preload-libs-{version()}-1.x86_64.rpm",
        f"ksm_preload-{version()}-py3-none-manylinux_2_34_x86_64.whl",
        f"ksm_preload-{version()}.tar.gz",
    }
    sums = (released / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in sums} == names - {"SHA256SUMS"}
    for line in sums:
        digest, name = line.split("  ")
        assert hashlib.sha256((released / name).read_bytes()).hexdigest() == digest


@pytest.mark.slow
def test_built_again_it_is_the_same(
    released: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    """In a folder of another name and length, another time zone, under another umask."""
    old = os.umask(0o077)
    try:
        folder = committed(tmp_path / "again and elsewhere")
        again, seconds = release(folder, TZ="Asia/Tokyo", LANG="C.UTF-8")
    finally:
        os.umask(old)
    assert (again / "SHA256SUMS").read_text() == (released / "SHA256SUMS").read_text()
    measured(f"script/release takes {seconds:.0f} s")


def test_what_is_not_committed_is_not_released(tmp_path: Path) -> None:
    folder = committed(tmp_path / "checkout")
    (folder / "dist").mkdir()
    (folder / "dist" / "old").touch()
    (folder / "new.txt").touch()
    done = run([folder / "script" / "release"])
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"release: [A-Z][^\n]*\.\n", done.stderr)
    assert (folder / "dist" / "old").exists()


@pytest.mark.slow
def test_the_sdist_has_what_git_has(released: Path) -> None:
    """But for what is this repository's own; and it builds: the packages are made of it."""
    (sdist,) = released.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        members = [member for member in packed if member.isfile()]
    top = f"ksm_preload-{version()}/"
    assert all(member.name.startswith(top) for member in members)
    names = {member.name.removeprefix(top) for member in members}
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()
    kept = {name for name in listed if (PROJECT / name).exists()}
    assert kept - names == {".ci/run", ".gitattributes", ".gitignore"}
    assert names - kept == {"PKG-INFO"}
