# SPDX-License-Identifier: MIT
"""The rules for snap-confine's AppArmor profile: well formed, and about our libraries."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from conftest import HERE, need, run

RULES = HERE.parent / "data/apparmor/usr.lib.snapd.snap-confine.real"
UNPACKED = HERE.parent / ".cache/packages"


def test_the_parser_takes_them_in_a_profile(tmp_path: Path) -> None:
    unpacked = UNPACKED / "sbin/apparmor_parser"
    parser = unpacked if unpacked.exists() else shutil.which("apparmor_parser")
    need(parser is not None, "no apparmor_parser")
    base = UNPACKED / "etc/apparmor.d" if parser == unpacked else Path("/etc/apparmor.d")
    profile = tmp_path / "profile"
    profile.write_text(f'#include <tunables/global>\n/usr/bin/one {{\n  #include "{RULES}"\n}}\n')
    done = run([parser, "--skip-kernel-load", "--skip-cache", "--base", base, profile])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["usr/lib/x86_64-linux-gnu", "usr/lib/i386-linux-gnu", "lib64"])
@pytest.mark.parametrize("name", ["", "_prctl", "_follow"])
def test_they_name_each_library_wherever_a_package_has_it(folder: str, name: str) -> None:
    (rule,) = [line for line in RULES.read_text().splitlines() if line.endswith(".so mr,")]
    braces = rule.removesuffix(" mr,").replace("@{multiarch}", "*-linux-gnu*")
    patterns = run(["bash", "-c", f"set -f; printf '%s\\n' {braces}"]).stdout.splitlines()
    path = f"/{folder}/libksm_preload{name}.so"
    assert any(fnmatchcase(path, pattern) for pattern in patterns), patterns
