# SPDX-License-Identifier: MIT
"""The wheel, as pip installs it into a clean venv of Debian's Python, in a root of its own."""

from __future__ import annotations

import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest

import machine
from conftest import need, run
from test_chroot import ENTER, archive

pytestmark = [pytest.mark.slow]

# Debian's suites with their Pythons; the wheel is built on the machine that runs the tests.
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}


@pytest.fixture(scope="module")
def wheel(released: Path) -> Path:
    """Return the wheel that script/release makes."""
    (found,) = released.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """Return what the wheel says of itself."""
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(packed.read(name))


def test_its_tag_is_what_its_symbols_say(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
        (tags,) = (packed.read(name) for name in packed.namelist() if name.endswith("/WHEEL"))
    programs = [file for file in tmp_path.rglob("*") if file.is_file()]
    programs = [file for file in programs if file.read_bytes().startswith(b"\x7fELF")]
    assert sorted(file.name for file in programs) == [
        "ksm-rescue",
        "ksm-wrapper",
        "libksm_preload.so",
        "libksm_preload_follow.so",
        "libksm_preload_prctl.so",
    ]
    newest = (2, 0)
    for file in programs:
        told = run(["readelf", "--dynamic", "--version-info", "--wide", file]).stdout
        assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", told)) <= {"libc.so.6"}, file.name
        versions = re.findall(r"GLIBC_(\d+)\.(\d+)", told)
        newest = max([newest, *((int(major), int(minor)) for major, minor in versions)])
    tag = f"py3-none-manylinux_{newest[0]}_{newest[1]}_x86_64"
    assert wheel.stem.endswith(tag)
    assert f"\nTag: {tag}\n" in tags.decode()


def test_what_it_says_of_itself(metadata: Message) -> None:
    assert metadata["Name"] == "ksm-preload"
    assert metadata["Requires-Python"] == ">=3.9"
    assert metadata["Author"] or metadata["Author-Email"]
    assert "KSM" in metadata["Keywords"].split(",")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# ksm-preload\n")
    assert "License :: OSI Approved :: MIT License" in metadata.get_all("Classifier", [])
    assert "MIT License" in metadata["License"]


def test_it_brings_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        assert any(name.endswith("LICENSE") for name in packed.namelist())


# ---- In a venv -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Venv:
    """A venv in the root of a Debian."""

    folder: Path

    def __call__(self, *command: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a program of it, which ends with `status`.

        In the machine's own network namespace, so that sysfs is its own, and with it the lock by
        which one has KSM at a time.
        """
        done = subprocess.run(
            [
                *("unshare", "--mount", "--propagation=private", "sh", "-ec", ENTER),
                *map(str, (self.folder, *command)),
            ],
            env={"PATH": "/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=900,
            check=False,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done


def dependencies(metadata: Message, python: str) -> Path:
    """Return a folder with what the wheel depends on, as wheels for that Python, from the cache."""
    wanted = [it for it in metadata.get_all("Requires-Dist", []) if "extra" not in it]
    recipe = hashlib.sha256("\0".join(wanted).encode()).hexdigest()[:12]
    folder = machine.CACHE / f"wheels-{python}-{recipe}"
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        download: Sequence[object] = (
            *(sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"),
            *("--python-version", python, "--dest", unfinished, *wanted),
        )
        done = subprocess.run(
            [str(word) for word in download], check=False, capture_output=True, text=True
        )
        need(done.returncode == 0, f"cannot download wheels for Python {python}: {done.stderr}")
        unfinished.rename(folder)
    return folder


@pytest.fixture(scope="module", params=PYTHONS)
def venv(
    request: pytest.FixtureRequest,
    wheel: Path,
    metadata: Message,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Venv]:
    """Return a venv with the wheel and what it depends on, and nothing else."""
    need(os.geteuid() == 0, "needs root")
    suite = request.param
    root = archive(f"venv-{suite}", suite, ("python3-venv",), "amd64")
    folder = tmp_path_factory.mktemp(suite)
    done = run(["tar", "-C", folder, "-xf", root])
    assert done.returncode == 0, done.stderr
    shutil.copytree(dependencies(metadata, PYTHONS[suite]), folder / "wheels")
    shutil.copy(wheel, folder / "wheels")
    made = Venv(folder)
    made("/usr/bin/python3", "-m", "venv", "/venv")
    made("pip", "install", "--quiet", "--no-index", "--find-links=/wheels", "ksm-preload")
    yield made
    shutil.rmtree(folder)


def test_pip_has_no_complaint(venv: Venv) -> None:
    assert venv("pip", "check").stdout == "No broken requirements found.\n"
    assert venv("ksmtool", "--version").stdout == venv("ksm-wrapper", "--version").stdout.replace(
        "ksm-wrapper", "ksmtool"
    )


@pytest.mark.ksm
def test_wrap(venv: Venv) -> None:
    said = venv("ksmtool", "wrap", "--explain", "cat", "/proc/self/ksm_stat", "/proc/self/maps")
    assert "ksm_merge_any: yes" in said.stdout
    assert "/venv/lib/ksm-preload/libksm_preload_prctl.so" in said.stdout
    assert "LD_PRELOAD=/venv/lib/ksm-preload/libksm_preload_prctl.so" in said.stderr
    by_madvise = venv("ksmtool", "wrap", "-q", "--method", "madvise", "cat", "/proc/self/maps")
    assert "/venv/lib/ksm-preload/libksm_preload.so" in by_madvise.stdout


@pytest.mark.ksm
def test_try_finds_what_is_equal(venv: Venv) -> None:
    """Each of four copies makes the same 8 MiB, of which three need not be there."""
    program = "import time; made = b''.join(i.to_bytes(4, 'big') for i in range(2 << 20)); "
    program += "open('/tmp/ready.{i}', 'w').close(); time.sleep(600)"
    trial = ("ksmtool", "try", "-n", "4", "--json", "--ready-file", "/tmp/ready.{i}", "--")
    result = json.loads(venv(*trial, "python3", "-c", program).stdout)
    arms = {arm["name"]: arm for arm in result["arms"]}
    assert arms.keys() == {"plain", "wrap"}
    assert arms["wrap"]["opted_in"] is True
    assert arms["wrap"]["saved"] > 0.9 * 3 * (8 << 20)


# Were it not refused, it would be written to a file of that root.
def test_global_enable_refuses_and_says_why(venv: Venv) -> None:
    for command in (
        (),
        ("--method", "ld.so.preload"),
        ("--method", "ld.so.preload", "--dry-run"),
        ("--method", "systemd"),
    ):
        said = venv("ksmtool", "global-enable", "--yes", "--force", *command, status=4)
        assert "a library below a home or a venv can be changed or removed by others" in said.stderr
        assert "hint: Install ksm-preload's package" in said.stderr
        assert "works without" not in said.stderr
        assert not (venv.folder / "etc/ld.so.preload").exists()


def test_global_disable_and_status_work_from_it(venv: Venv) -> None:
    """What is to be undone can be undone."""
    preload = venv.folder / "etc/ld.so.preload"
    preload.write_text("# mine\n")
    venv("ksm-rescue", "--add", "/usr/$LIB/libksm_preload_prctl.so")
    status = json.loads(venv("ksmtool", "global-status", "--json").stdout)
    assert status["methods"] == ["ld.so.preload"]
    venv("ksmtool", "global-disable")
    assert preload.read_text() == "# mine\n"
    for file in preload.parent.glob("ld.so.preload*"):
        file.unlink()
