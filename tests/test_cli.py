# SPDX-License-Identifier: MIT
"""The command line as a person meets it."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import Tree, run

ROOT = Path(__file__).parent.parent


def test_help_names_every_command_and_the_security_domain(tree: Tree) -> None:
    done = run([tree.ksmtool, "--help"])
    assert done.returncode == 0
    assert "programs that trust each" in " ".join(done.stdout.split())
    for command in ("wrap", "try"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
        assert run([tree.ksmtool, command, "--help"]).returncode == 0


def test_one_version_everywhere(tree: Tree) -> None:
    version = re.search(r"version: '(.*?)'", (ROOT / "meson.build").read_text())
    assert version
    assert run([tree.ksmtool, "--version"]).stdout == f"ksmtool {version[1]}\n"
    assert run([tree.wrapper, "--version"]).stdout == f"ksm-wrapper {version[1]}\n"
    assert version[1] in (ROOT / "NEWS.md").read_text()


def test_an_unknown_command_is_usage(tree: Tree) -> None:
    done = run([tree.ksmtool, "warp", "true"])
    assert done.returncode == 2
    assert "No such command 'warp'" in done.stderr


def test_python_m_ksmtool(tree: Tree) -> None:
    python = tree.ksmtool.parent / "python3"
    assert run([python, "-m", "ksmtool", "wrap", "-q", "echo", "hi"]).stdout == "hi\n"


def test_every_source_file_has_its_licence_line() -> None:
    done = run(["git", "ls-files"], cwd=ROOT)
    wanted = re.compile(
        r"(\.(py|c|h|map|toml|js|pl|php)|meson\.build|meson_options\.txt)$|^(script|man|data/(completions|apparmor))/"
    )
    for name in done.stdout.splitlines():
        if wanted.search(name):
            assert "SPDX-License-Identifier: MIT" in (ROOT / name).read_text(), name
