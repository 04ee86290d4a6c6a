# SPDX-License-Identifier: MIT
"""Boots real Debian systems with everything opted in, and without: what guest_boot.py checks."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

import boots
from conftest import HERE, Victims, run

ROOT = HERE.parent

OFF = "ksm_preload=off"
RESCUE = "init=/usr/sbin/ksm-rescue"
DIES = r"segfault at 0 .* in libksm_preload.*\n(.*\n)*.*Attempted to kill init"


@dataclass(frozen=True)
class Step:
    """One boot of a disk, on which the steps before have left their traces."""

    name: str
    do: str
    """What guest_boot.py does, in this order."""
    method: str = "ld.so.preload"
    """How it is enabled."""
    append: str = ""
    end: str = "status 0"
    console: str = ""
    """What is said on the console, as a pattern."""

    @property
    def words(self) -> str:
        """Return what is added to the kernel's command line."""
        words = (f"ksm_test.do={self.do.replace(' ', ',')}", f"ksm_test.method={self.method}")
        return " ".join((*words, self.append))


BROKEN = (
    Step("disabled again", "disabled kernel_as_found ksmtuned enable_list break_library"),
    Step("broken on purpose", "disabled", end="panic", console=DIES),
    Step("rescued", "rescued enable_list", append=RESCUE),
    Step("switched off by the kernel's command line", "switched_off", append=OFF),
)

PLANS = {
    "trixie": (
        Step("as Debian is", "plain kernel_enable enable", "systemd"),
        Step("enabled by systemd", "enabled kernel_on disable enable_list", "systemd"),
        Step("enabled by ld.so.preload", "enabled kernel_on kernel_disable disable"),
        *BROKEN,
    ),
    "bookworm": (
        Step("as Debian is", "plain kernel_enable enable"),
        Step("enabled by ld.so.preload", "enabled kernel_on kernel_disable disable"),
        *BROKEN,
    ),
}
STEPS = [(suite, step.name) for suite, steps in PLANS.items() for step in steps]

UNITS = "etc/systemd/system"
PACKAGES = "usr/lib/python3/dist-packages"


def installed(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files that a distribution's package has."""
    bin_folder = Path(sys.executable).parent
    build, staged = folder / "build", folder / "staged"
    native = folder / "native"
    native.write_text("[binaries]\npython = '/usr/bin/python3'\n")
    options = ("--prefix=/usr", "--libdir=lib/x86_64-linux-gnu", "-Dinstall_layout=system")
    for command in (
        [
            "setup",
            *options,
            f"-Dpython.purelibdir=/{PACKAGES}",
            f"--native-file={native}",
            build,
            ROOT,
        ],
        ["install", "-C", build, "--destdir", staged, "--quiet"],
    ):
        environment = {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
        done = run([bin_folder / "meson", *command], environment)
        assert done.returncode == 0, done.stdout + done.stderr
    for file in sorted(staged.rglob("*")):
        if (file.is_symlink() or file.is_file()) and file.suffix != ".pyc":
            yield str(file.relative_to(staged)), file
    # Meson alone does not say which version it is.
    for entry in distribution("ksm-preload").files or ():
        if entry.name == "METADATA":
            yield f"{PACKAGES}/{entry}", Path(str(entry.locate()))


def for_the_test(folder: Path, victims: Victims) -> Iterator[tuple[str, Path]]:
    """Yield what is there for guest_boot.py, which runs at every boot, and what it breaks."""
    yield "project/tests/vm/guest_boot.py", HERE / "vm" / "guest_boot.py"
    yield "project/broken.so", victims.variant("broken", "-shared", "-fPIC")
    for name in ("ksm-test.service", "ksm-probe.service"):
        yield f"{UNITS}/{name}", HERE / "vm" / name
        wanted = folder / name
        wanted.symlink_to(f"../{name}")
        yield f"{UNITS}/multi-user.target.wants/{name}", wanted


@pytest.fixture(scope="session")
def files(victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """Return what is added to every disk."""
    folder = tmp_path_factory.mktemp("files")
    return [*installed(folder), *for_the_test(folder, victims)]


def system(
    suite: str, folder: Path, files: list[tuple[str, Path]], victims: Victims
) -> boots.System:
    """Return a system on a new disk."""
    return boots.system(suite, folder, victims("real_root", "static"), files)


@pytest.fixture(scope="session")
def booted(
    request: pytest.FixtureRequest,
    files: list[tuple[str, Path]],
    victims: Victims,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[dict[str, boots.Boot]]]]:
    """Run the plans of the selected tests, as many at once as there are CPUs.

    A plan ends with the first boot that does not end as it should.
    """
    selected = {
        str(item.callspec.params["suite"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_boot
    }

    def follow(suite: str) -> dict[str, boots.Boot]:
        folder = tmp_path_factory.mktemp(suite)
        one, done = system(suite, folder, files, victims), {}
        for step in PLANS[suite]:
            done[step.name] = one.boot(step.words)
            if done[step.name].end != step.end:
                break
        one.disk.unlink()
        return done

    victims("real_root", "static")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {suite: pool.submit(follow, suite) for suite in PLANS if suite in selected}


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "name"), STEPS, ids=[": ".join(step) for step in STEPS])
def test_boot(suite: str, name: str, booted: dict[str, Future[dict[str, boots.Boot]]]) -> None:
    done = booted[suite].result()
    (step,) = (one for one in PLANS[suite] if one.name == name)
    if name not in done:
        pytest.fail(f"not reached: {suite} failed at {list(done)[-1]!r}", pytrace=False)
    print(done[name])
    if done[name].end != step.end:
        pytest.fail(f"{done[name].end} instead of {step.end}, see the report", pytrace=False)
    assert re.search(step.console, done[name].console)
    assert "ERROR: ld.so" not in done[name].console


# --- the harness itself: what goes wrong is seen ---


@pytest.mark.slow
def test_what_goes_wrong_is_seen(
    files: list[tuple[str, Path]], victims: Victims, tmp_path: Path
) -> None:
    one = system("trixie", tmp_path, files, victims)

    panics = one.boot("init=/bin/false")
    print(panics)
    assert panics.end == "panic"
    assert "Attempted to kill init" in panics.console

    hangs = one.boot("init=/bin/sleep -- infinity", seconds=15)
    assert hangs.end == "no status: QEMU was stopped after 15 s"

    silent = one.boot("init=/bin/systemctl -- poweroff --force --force")
    print(silent)
    assert silent.end.startswith("no status: QEMU ended with status 0")

    # Without the rest of the system.
    fails = one.boot("ksm_test.do=fail systemd.unit=ksm-test.service")
    print(fails)
    assert fails.end == "status 1"
    assert "AssertionError: on purpose" in fails.report
    one.disk.unlink()
