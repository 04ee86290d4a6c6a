# SPDX-License-Identifier: MIT
"""Installed as a distribution does it, and built with what Debian 12 ships."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import as_installed, need, need_command, run
from ksmtool import install
from ksmtool.errors import KsmtoolError


def test_the_layout_of_a_distribution(system: Path) -> None:
    files = {str(path.relative_to(system)) for path in system.rglob("*") if path.is_file()}
    others = {name for name in files if not name.endswith(".py") and "/ksmtool/" not in name}
    assert others == {
        "usr/bin/ksm-wrapper",
        "usr/bin/ksmtool",
        "usr/sbin/ksm-rescue",
        "usr/lib/x86_64-linux-gnu/libksm_preload.so",
        "usr/lib/x86_64-linux-gnu/libksm_preload_follow.so",
        "usr/lib/x86_64-linux-gnu/libksm_preload_prctl.so",
        "usr/lib/systemd/system/ksm-preload-export.service",
        "usr/lib/systemd/system/ksm-preload-export.timer",
        "usr/lib/systemd/system/ksm-preload-off.service",
        "usr/lib/systemd/system/sysinit.target.wants/ksm-preload-off.service",
        "usr/share/bash-completion/completions/ksm-wrapper",
        "usr/share/bash-completion/completions/ksmtool",
        "usr/share/doc/ksm-preload/examples/apparmor/usr.lib.snapd.snap-confine.real",
        "usr/share/doc/ksm-preload/examples/ksm-preload-dashboard.json",
        "usr/share/doc/ksm-preload/examples/ksm-preload.rules.yml",
        "usr/share/doc/ksm-preload/export.md",
        "usr/share/fish/vendor_completions.d/ksm-wrapper.fish",
        "usr/share/fish/vendor_completions.d/ksmtool.fish",
        "usr/share/man/man1/ksm-wrapper.1",
        "usr/share/man/man1/ksmtool.1",
        "usr/share/man/man5/ksm-preload-policy.5",
        "usr/share/man/man7/ksm_preload.7",
        "usr/share/man/man8/ksm-rescue.8",
        "usr/share/zsh/site-functions/_ksm-wrapper",
        "usr/share/zsh/site-functions/_ksmtool",
    }


def test_it_finds_its_libraries_wherever_it_is_put(system: Path) -> None:
    done = run([system / "usr/bin/ksm-wrapper", "--show"])
    library = system / "usr/lib/x86_64-linux-gnu/libksm_preload_prctl.so"
    assert done.stdout == f"method prctl\nLD_PRELOAD {library.resolve()}\n"


@pytest.mark.ksm
def test_in_the_loaders_path_the_bare_name_is_used_and_works(system: Path, tmp_path: Path) -> None:
    script = """
        ksm-wrapper --show
        ldconfig
        ksm-wrapper --show
        ksm-wrapper cat /proc/self/ksm_stat
        ksm-wrapper cat /proc/self/maps | grep -o 'libksm_preload.*'
    """
    done = run(as_installed(system, tmp_path, script))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == "LD_PRELOAD /usr/lib/x86_64-linux-gnu/libksm_preload_prctl.so"
    assert lines[3] == "LD_PRELOAD libksm_preload_prctl.so"
    assert "ksm_merge_any: yes" in lines
    assert "libksm_preload_prctl.so" in lines[-1]
    assert done.stderr == ""


@pytest.mark.slow
def test_a_wheel_by_debian_12s_own_meson_python(source: Path, tmp_path: Path) -> None:
    """With meson 1.0.1 and meson-python 0.12 of the distribution, into a new venv, and it works."""
    python = "/usr/bin/python3"
    need(run([python, "-c", "import mesonpy"]).returncode == 0, "no python3-mesonpy")
    need_command("/usr/bin/meson")
    code = f"import mesonpy; print(mesonpy.__version__, mesonpy.build_wheel({str(tmp_path)!r}))"
    done = run([python, "-c", code], cwd=source, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("ksm_preload-")
    assert wheel.name.endswith("py3-none-linux_x86_64.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("data/lib/ksm-preload/libksm_preload_prctl.so") for name in names)
    assert any(name.endswith("data/share/man/man1/ksmtool.1") for name in names)

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", venv], check=True)
    subprocess.run(
        [venv / "bin/python", "-m", "pip", "install", "--quiet", wheel],
        check=True,
        stdout=subprocess.PIPE,
    )
    explained = run([venv / "bin/ksmtool", "wrap", "--explain", "echo", "hello"])
    assert explained.stdout == "hello\n"
    assert f"LD_PRELOAD={venv}/lib/ksm-preload/libksm_preload" in explained.stderr


def test_what_is_not_there_is_said_with_each_folder_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin/ksmtool")])
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python3"))
    with pytest.raises(KsmtoolError) as raised:
        install.rescue()
    assert raised.value.message == f"ksm-rescue is not in {tmp_path}/bin or {tmp_path}/sbin."


def test_what_cannot_be_looked_at_is_not_trusted() -> None:
    with pytest.raises(KsmtoolError, match="Cannot look at /no/such: No such file"):
        install.require_trusted("/no/such")
