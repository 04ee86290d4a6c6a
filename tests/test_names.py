# SPDX-License-Identifier: MIT
"""A process can call itself, and its file, whatever it likes: no command may fail because of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Tree, kept_running, run
from ksmtool import process

NAMES = {
    "not UTF-8": b"\xff\xfe",
    "like the fields after it": b"a) Z 1 1 (b",
    "of two lines": b"a\nb",
    "an escape sequence": b"\x1b[31mred\x07",
    "markup": b"[red]x[end]",
}


@pytest.fixture(params=list(NAMES))
def oddly_named(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Run a program of such a name, and yield its PID."""
    program = tmp_path / os.fsdecode(NAMES[request.param])
    shutil.copy("/bin/sh", program)
    with kept_running((program, "-c", "echo; read line")) as (pid,):
        yield pid


def test_who_it_is(oddly_named: int) -> None:
    assert process.parent_of(oddly_named) == os.getpid()
    assert oddly_named in process.descendants(os.getpid())
    assert process.session_of(oddly_named) == os.getsid(0)
    found = process.identity(oddly_named)
    assert found is not None
    assert (found.pid, found.parent, found.uid) == (oddly_named, os.getpid(), os.geteuid())


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["status", "--json", "--by", "app"],
        ["estimate", "PID"],
        ["estimate", "--json", "PID"],
        ["doctor", "PID"],
        ["doctor", "--json", "PID"],
        ["export"],
        ["kernel-status"],
        ["group", "list"],
    ],
    ids=" ".join,
)
def test_every_command_beside_it(tree: Tree, oddly_named: int, command: list[str]) -> None:
    words = [str(oddly_named) if word == "PID" else word for word in command]
    done = run([tree.ksmtool, *words])
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


def test_all_processes_beside_it(tree: Tree, oddly_named: int) -> None:
    done = run([tree.ksmtool, "estimate", "--all", "--sample", "0.1"])
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert "\x1b" not in done.stdout
