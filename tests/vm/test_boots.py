# SPDX-License-Identifier: MIT
"""Boots real Debian systems with everything opted in, and without: what guest_boot.py checks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import pytest

import boots
from boots import Step
from conftest import HERE, Victims, run

ROOT = HERE.parent

OFF = "ksm_preload=off"
RESCUE = "init=/usr/sbin/ksm-rescue"
DIES = r"segfault at 0 .* in libksm_preload.*\n(.*\n)*.*Attempted to kill init"


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


@pytest.fixture(scope="session")
def files(victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """Return what is added to every disk."""
    folder = tmp_path_factory.mktemp("files")
    broken = victims.variant("broken", "-shared", "-fPIC")
    runner = boots.runner(folder, HERE / "vm" / "guest_boot.py")
    return [*installed(folder), *runner, ("project/broken.so", broken)]


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
        one = system(suite, tmp_path_factory.mktemp(suite), files, victims)
        return boots.follow(one, PLANS[suite])

    victims("real_root", "static")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {suite: pool.submit(follow, suite) for suite in PLANS if suite in selected}


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "name"), STEPS, ids=[": ".join(step) for step in STEPS])
def test_boot(suite: str, name: str, booted: dict[str, Future[dict[str, boots.Boot]]]) -> None:
    (step,) = (one for one in PLANS[suite] if one.name == name)
    boots.check(step, booted[suite].result())


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
