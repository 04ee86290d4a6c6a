# SPDX-License-Identifier: MIT
"""What a program is, read from its file."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ksmtool import program

Victims = Callable[..., Path]


@pytest.mark.parametrize(
    ("kind", "static", "musl", "foreign", "machine"),
    [
        ("dynamic", False, False, False, "x86_64"),
        ("no-pie", False, False, False, "x86_64"),
        ("static", True, False, False, "x86_64"),
        ("static-pie", True, False, False, "x86_64"),
        ("musl", False, True, False, "x86_64"),
        ("musl-static", True, False, False, "x86_64"),
        ("i386", False, False, True, "i386"),
        ("aarch64", False, False, True, "aarch64"),
    ],
)
def test_kinds(
    victims: Victims, kind: str, static: bool, musl: bool, foreign: bool, machine: str
) -> None:
    found = program.inspect(str(victims("report", kind)))
    assert (found.static, found.musl, found.foreign) == (static, musl, foreign)
    assert found.machine == machine
    assert found.sanitizer is None


def test_a_sanitizers_runtime_is_seen(victims: Victims) -> None:
    found = program.inspect(str(victims("report", "asan")))
    assert found.sanitizer is not None
    assert found.sanitizer.startswith("libasan.so")


def test_it_agrees_with_readelf_on_every_program_here() -> None:
    """All of /usr/bin: an interpreter or none, as binutils see it."""
    checked = 0
    for path in sorted(Path("/usr/bin").iterdir())[::7]:
        if not path.is_file() or path.read_bytes()[:4] != b"\x7fELF":
            continue
        text = subprocess.run(
            ["readelf", "-lW", path], check=True, capture_output=True, text=True
        ).stdout
        assert program.inspect(str(path)).static is ("interpreter:" not in text), path
        checked += 1
    assert checked > 20


def script(path: Path, line: str) -> Path:
    path.write_text(f"{line}\necho\n")
    path.chmod(0o755)
    return path


def test_scripts_are_followed_to_the_program(tmp_path: Path) -> None:
    inner = script(tmp_path / "inner", "#!/bin/sh -e")
    outer = script(tmp_path / "outer", f"#! {inner} x")
    found = program.inspect(str(outer))
    assert found.final.path == "/bin/sh"
    assert found.final.machine
    assert "a script for" in found.describe()


@pytest.mark.parametrize(
    "line",
    [
        "#!/usr/bin/env sh",
        "#!/usr/bin/env -S sh -e",
        "#!/usr/bin/env -S -i sh",
        "#!/usr/bin/env -S A=1 sh",
    ],
)
def test_env_is_looked_through(tmp_path: Path, line: str) -> None:
    found = program.inspect(str(script(tmp_path / "a", line)), "/usr/bin:/bin")
    assert os.path.basename(found.final.path) == "sh"


def test_a_script_of_itself_ends(tmp_path: Path) -> None:
    path = tmp_path / "loop"
    script(path, f"#!{path}")
    assert program.inspect(str(path)).final.machine == ""


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert program.inspect(str(fifo)).machine == ""
    assert program.inspect(str(tmp_path)).machine == ""


def test_env_without_a_command(tmp_path: Path) -> None:
    assert program.inspect(str(script(tmp_path / "a", "#!/usr/bin/env -S"))).machine == ""


@pytest.mark.parametrize(
    "content",
    [b"", b"#!", b"#!\n", b"\x7fELF", b"\x7fELF" + bytes(60), b"\x7fELF\2\1" + b"\xff" * 99],
)
def test_damaged_files_are_described_not_fatal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    assert program.inspect(str(path)).path == str(path)


def test_privileges_count_only_where_they_add_some(victims: Victims, tmp_path: Path) -> None:
    path = tmp_path / "privileged"
    shutil.copy(victims("report"), path)
    path.chmod(0o4755)
    assert program.inspect(str(path)).privileged is None  # our own file
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
        path.chmod(0o4755)
        assert program.inspect(str(path)).privileged == "setuid"
        path.chmod(0o2755)
        assert program.inspect(str(path)).privileged == "setgid"


def test_find_is_execvps_search(tmp_path: Path) -> None:
    assert program.find("sh", "/nowhere:/bin") == "/bin/sh"
    assert program.find("no-such-program", "/bin") is None
    assert program.find("/no/such", "/bin") is None
    (tmp_path / "sh").write_text("not executable")
    assert program.find("sh", f"{tmp_path}:/bin") == "/bin/sh"
    (tmp_path / "dir").mkdir()
    assert program.find("dir", str(tmp_path)) is None
