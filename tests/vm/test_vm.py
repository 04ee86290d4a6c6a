# SPDX-License-Identifier: MIT
"""Runs guest.py, and the tests of the shims and the wrapper, on real kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import distribution
from pathlib import Path

import pytest

import machine
from conftest import HERE, Tree, Victims

ROOT = HERE.parent

GUEST = "tests/vm/guest.py"

# Releases of Debian: the kernel, how it opts in, and what runs there (other tests want the prctl).
# The one that takes longest starts first.
KERNELS = {
    "trixie": ("6.12", "prctl", f"{GUEST} tests/test_shim.py tests/test_wrapper.py"),
    "bookworm": ("6.1", "madvise", GUEST),
    "bullseye": ("5.10", "madvise", GUEST),
}

# Of tests/programs: as what they are compiled here for there.
PROGRAMS = {
    "dynamic": "again contracts end maps marked pages refuse report start threads",
    "no-pie": "contracts report",
    "now": "contracts",
    "static": "pages report start",
    "static-pie": "report",
    "musl": "end pages report",
    "musl-static": "report",
}
MUSL = Path("/lib/ld-musl-x86_64.so.1")


def project(tree: Tree, victims: Victims, ksmtool: Path) -> Iterator[tuple[str, Path]]:
    """Yield what is added to the root: the project as installed below /usr, and its tests."""
    installed = Tree.below(Path("usr"))
    yield str(installed.wrapper), tree.wrapper
    yield str(installed.prctl_library), tree.prctl_library
    yield str(installed.madvise_library), tree.madvise_library
    yield str(installed.ksmtool), ksmtool
    for file in (ROOT / "python" / "ksmtool").glob("*.py"):
        yield f"usr/lib/python3/dist-packages/ksmtool/{file.name}", file
    for entry in distribution("ksm-preload").files or ():
        if entry.name == "METADATA":
            yield f"usr/lib/python3/dist-packages/{entry}", Path(str(entry.locate()))
    yield "init", HERE / "vm" / "init"
    others = ROOT / "pyproject.toml", ROOT / "src" / "ksm_preload.map"
    for file in (*others, *HERE.glob("*.py"), *HERE.glob("vm/*.py")):
        yield f"project/{file.relative_to(ROOT)}", file
    for kind, names in PROGRAMS.items():
        for name in names.split():
            program = victims(name, kind)
            yield f"victims/{program.name}", program
    yield f"usr{MUSL}", MUSL  # what came with musl-gcc


@pytest.fixture(scope="session")
def reports(
    request: pytest.FixtureRequest,
    tree: Tree,
    victims: Victims,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[str]]]:
    """Run the machines of the selected tests, as many at once as there are CPUs."""
    folder = tmp_path_factory.mktemp("vm")
    ksmtool, initramfs = folder / "ksmtool", folder / "initramfs"
    start = (ROOT / "python" / "ksmtool" / "ksmtool.in").read_text()
    ksmtool.write_text(start.replace("@PYTHON@", "/usr/bin/python3"))
    ksmtool.chmod(0o755)
    root = machine.base().read_bytes()
    initramfs.write_bytes(root + machine.archive(project(tree, victims, ksmtool)))

    def report(suite: str) -> str:
        version, method, files = KERNELS[suite]
        environment = {
            "KSM_TEST_KERNEL": version,
            "KSM_TEST_METHOD": method,
            "KSM_TEST_FILES": f'"{files}"',
            "KSM_TEST_VICTIMS": "/victims",
        }
        return machine.boot(machine.kernel(suite), initramfs, environment, folder / suite)

    selected = [
        str(item.callspec.params["suite"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_on_the_kernel_of
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {suite: pool.submit(report, suite) for suite in selected}
    initramfs.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("suite", KERNELS)
def test_on_the_kernel_of(suite: str, reports: dict[str, Future[str]]) -> None:
    report = reports[suite].result()
    print(report)
    if not report.endswith("\nstatus 0\n"):
        pytest.fail(f"tests failed on the kernel of {suite}, see their report", pytrace=False)
