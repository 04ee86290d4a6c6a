# SPDX-License-Identifier: MIT
"""Runs guest.py, guest_group.py and the tests of the shims and the wrapper on real kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

import machine
from conftest import HERE, Tree, Victims, need_command, run

ROOT = HERE.parent

GUEST = "tests/vm/guest.py"
GROUP = "tests/vm/guest_group.py"  # ends with what cannot be undone


@dataclass(frozen=True)
class Machine:
    """A release of Debian: its kernel, how that opts in, and what runs there."""

    suite: str
    version: str
    method: str
    files: str
    architecture: machine.Architecture = machine.AMD64


MORE = "tests/test_shim.py tests/test_wrapper.py"  # other tests want the prctl
# Those that take longest start first.
KERNELS = {
    "trixie": Machine("trixie", "6.12", "prctl", f"{GUEST} {MORE} {GROUP}"),
    "bookworm": Machine("bookworm", "6.1", "madvise", f"{GUEST} {GROUP}"),
    "bullseye": Machine("bullseye", "5.10", "madvise", f"{GUEST} {GROUP}"),
    "trixie-arm64": Machine("trixie", "6.12", "prctl", GROUP, machine.ARM64),
    "bookworm-arm64": Machine("bookworm", "6.1", "madvise", GROUP, machine.ARM64),
}

# Of tests/programs: as what they are compiled here for there.
PROGRAMS = {
    "dynamic": "again contracts end maps marked pages pointers refuse report start threads"
    " whereabouts",
    "no-pie": "contracts whereabouts report",
    "now": "contracts",
    "static": "pages whereabouts report start",
    "static-pie": "pages whereabouts report",
    "musl": "end pages report",
    "musl-static": "report",
}
AARCH64 = "aarch64-linux-gnu-"
INSTALLED = Tree.below(Path("usr"))
FOLLOW = "libksm_preload_follow.so"
MUSL = Path("/lib/ld-musl-x86_64.so.1")


# ... and of these what guest_group.py runs, for other architectures.
GROUP_PROGRAMS = {
    "dynamic": "pages whereabouts pointers",
    "no-pie": "whereabouts",
    "static": "whereabouts",
    "static-pie": "pages whereabouts",
}


def build(folder: Path, target: str = "", options: str = "") -> Path:
    """Build what is written in C once more, for a target such as AARCH64."""
    arguments = ["--prefix=/usr", "-Dinstall_layout=wheel", "-Dwerror=true", f"-Dc_args={options}"]
    if target:
        cross, family = folder.with_suffix(".cross"), target.partition("-")[0]
        cross.write_text(
            f"[binaries]\nc = '{need_command(f'{target}gcc')}'\n"
            f"[host_machine]\nsystem = 'linux'\nendian = 'little'\n"
            f"cpu_family = '{family}'\ncpu = '{family}'\n"
        )
        arguments.append(f"--cross-file={cross}")
    for command in (["setup", *arguments, folder, ROOT], ["compile", "-C", folder]):
        done = run([need_command("meson"), *command])
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "src"


def project(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield what is added to every root: what of the project is in Python, and its tests."""
    start = (ROOT / "python" / "ksmtool" / "ksmtool.in").read_text()
    ksmtool = folder / "ksmtool"
    ksmtool.write_text(start.replace("@PYTHON@", "/usr/bin/python3"))
    ksmtool.chmod(0o755)
    yield str(INSTALLED.ksmtool), ksmtool
    for file in (ROOT / "python" / "ksmtool").glob("*.py"):
        yield f"usr/lib/python3/dist-packages/ksmtool/{file.name}", file
    yield "usr/lib/python3/dist-packages/ksmtool/default_policy", ROOT / "data" / "policy"
    for entry in distribution("ksm-preload").files or ():
        if entry.name == "METADATA":
            yield f"usr/lib/python3/dist-packages/{entry}", Path(str(entry.locate()))
    yield "init", HERE / "vm" / "init"
    others = ROOT / "pyproject.toml", ROOT / "src" / "ksm_preload.map"
    for file in (*others, *HERE.glob("*.py"), *HERE.glob("vm/*.py")):
        yield f"project/{file.relative_to(ROOT)}", file


def compiled(
    victims: Victims, programs: dict[str, str], built: dict[str, Path], faulty: Path
) -> Iterator[tuple[str, Path]]:
    """Yield what is added for one architecture: what is in C."""
    wrapper, prctl_library = INSTALLED.wrapper, INSTALLED.prctl_library
    follow_library = prctl_library.with_name(FOLLOW)
    libraries = (prctl_library, INSTALLED.madvise_library, follow_library)
    for file in (wrapper, INSTALLED.rescue, *libraries):
        yield str(file), built[file.name]
    yield f"{wrapper}-faults", faulty
    for kind, names in programs.items():
        for name in names.split():
            program = victims(name, kind)
            yield f"victims/{program.name}", program


@pytest.fixture(scope="session")
def initramfs(
    tree: Tree, victims: Victims, public: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[machine.Architecture], Path]]:
    """Return what makes the root for an architecture, once."""
    folder = tmp_path_factory.mktemp("roots")
    made: dict[str, Path] = {}

    def make(architecture: machine.Architecture) -> Path:
        if architecture.debian in made:
            return made[architecture.debian]
        files = [*project(folder)]
        if architecture is machine.AMD64:
            built = {file.name: file for file in vars(tree).values()}
            faulty = build(folder / "faulty", options="-DKSM_FAULTS") / "ksm-wrapper"
            files += compiled(victims, PROGRAMS, built, faulty)
            files.append((f"usr{MUSL}", MUSL))  # what came with musl-gcc
        else:
            source = build(folder / "arm64", AARCH64)
            built = {file.name: file for file in source.iterdir()}
            faulty = build(folder / "arm64-faulty", AARCH64, "-DKSM_FAULTS") / "ksm-wrapper"
            of_target = public / "arm64"
            of_target.mkdir(exist_ok=True)
            files += compiled(Victims(of_target, AARCH64), GROUP_PROGRAMS, built, faulty)
        root = folder / f"{architecture.debian}.initramfs"
        root.write_bytes(machine.base(architecture).read_bytes() + machine.archive(files))
        return made.setdefault(architecture.debian, root)

    yield make
    for root in made.values():
        root.unlink()


@pytest.fixture(scope="session")
def reports(
    request: pytest.FixtureRequest,
    initramfs: Callable[[machine.Architecture], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[str]]]:
    """Run the machines of the selected tests, as many at once as there are CPUs."""
    folder = tmp_path_factory.mktemp("vm")
    selected = [
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_on_the_kernel_of
    ]
    roots = {name: initramfs(KERNELS[name].architecture) for name in selected}

    def report(name: str) -> str:
        one = KERNELS[name]
        environment = {
            "KSM_TEST_KERNEL": one.version,
            "KSM_TEST_METHOD": one.method,
            "KSM_TEST_FILES": f'"{one.files}"',
            "KSM_TEST_VICTIMS": "/victims",
        }
        kernel = machine.kernel(one.suite, one.architecture)
        return machine.boot(kernel, roots[name], environment, folder / name, one.architecture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(report, name) for name in selected}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_on_the_kernel_of(name: str, reports: dict[str, Future[str]]) -> None:
    report = reports[name].result()
    print(report)
    if not report.endswith("\nstatus 0\n"):
        pytest.fail(f"tests failed on the kernel of {name}, see their report", pytrace=False)
