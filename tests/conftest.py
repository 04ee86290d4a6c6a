# SPDX-License-Identifier: MIT
"""What tests share: where the installed project is, the C victims, KSM borrowed, and waiting."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ksmtool.kernel import Ksm

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
DEFAULT_POLICY = HERE.parent / "data" / "policy"

PR_SET_MEMORY_MERGE = 67
PR_GET_AUXV = 0x41555856

# Our libraries and their methods, as test ids.
SHIMS = ("libksm_preload_prctl.so", "libksm_preload.so", "libksm_preload.so by madvise")

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

# The compilers of the victims, by the word a test asks with.
COMPILERS = {
    "dynamic": ("gcc",),
    "no-pie": ("gcc", "-no-pie"),
    "static": ("gcc", "-static"),
    "static-pie": ("gcc", "-static-pie"),
    "musl": ("musl-gcc",),
    "musl-static": ("musl-gcc", "-static"),
    "asan": ("gcc", "-fsanitize=address"),
    "clang-asan": ("clang", "-fsanitize=address"),
    "ubsan": ("gcc", "-fsanitize=undefined"),
    "tsan": ("gcc", "-fsanitize=thread"),
    "now": ("gcc", "-Wl,-z,now"),
    "c++": ("g++",),
    "i386": ("i686-linux-gnu-gcc",),
    "aarch64": ("aarch64-linux-gnu-gcc",),
}

VICTIM_OPTIONS = ("-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


def pytest_configure() -> None:
    """Let SIGTERM, timeout(1)'s too, end the run in good order: KSM's settings are put back."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def need(condition: object, reason: str) -> None:
    """Skip the test with `reason` unless `condition` holds; in CI, where all is there, fail it."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"not here, but needed in CI: {reason}")
    pytest.skip(reason)


def need_command(name: str) -> str:
    """Return the path of a command, or skip."""
    path = shutil.which(name)
    need(path is not None, f"no {name}")
    return str(path)


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll `condition`; fail the test with `what` if it is not true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.01)


def run(
    command: Sequence[object],
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command with a short, known environment plus `env`; return it when it has ended."""
    done = subprocess.run(
        [str(part) for part in command],
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    # Not text=True: that takes a carriage return for a newline.
    stdout, stderr = os.fsdecode(done.stdout), os.fsdecode(done.stderr)
    return subprocess.CompletedProcess(done.args, done.returncode, stdout, stderr)


def facts(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """What the victim `report` printed: key -> values."""
    assert done.returncode == 0, done.stderr
    result: dict[str, list[str]] = defaultdict(list)
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        result[key].append(value)
    return result


def opted_in(report: dict[str, list[str]]) -> str:
    """Return how the kernel says it is opted in: "prctl", "madvise", or "no"; all signs agree."""
    flag, mergeable = report["merge"] == ["1"], set(report["small_mergeable"])
    mergeable |= set(report["large_mergeable"])
    assert mergeable == {"yes"} or (mergeable == {"no"} and not flag), report
    if report["ksm_merge_any"]:  # Linux 6.14
        assert report["ksm_merge_any"] == ["yes" if flag else "no"]
    return "prctl" if flag else "madvise" if mergeable == {"yes"} else "no"


MERGING = ("merge", "small_mergeable", "large_mergeable", "ksm_merge_any")


def without_us(report: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the report without its lines that name us or say that merging is on."""
    ours = re.compile(r"libksm_preload|^LD_PRELOAD=|^KSM_PRELOAD")
    differs = {*MERGING, "pid", "ppid", "session"}
    kept = {
        key: [value for value in values if not ours.search(value)]
        for key, values in report.items()
        if key not in differs
    }
    # Pipes have new numbers in every run, and mappings a new order.
    kept["fd"] = [re.sub(r"pipe:\[\d+\]", "a pipe", value) for value in kept["fd"]]
    kept["file"].sort()
    return {key: values for key, values in kept.items() if values}


@dataclass(frozen=True)
class Coverage:
    """How much of a process's anonymous memory carries smaps `mg`, its stack left out."""

    mergeable_kb: int
    anonymous_kb: int
    mappings: int

    @property
    def share(self) -> float:
        """Return the mergeable share, 0 to 1."""
        return self.mergeable_kb / max(self.anonymous_kb, 1)


def coverage(smaps: str) -> Coverage:
    """Return what the text of a /proc/PID/smaps says."""
    mergeable = total = mappings = anonymous = 0
    stack = False
    for line in smaps.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            mappings += 1
            stack = line.endswith("[stack]")
        elif line.startswith("Anonymous:"):
            anonymous = 0 if stack else int(line.split()[1])
            total += anonymous
        elif line.startswith("VmFlags:") and "mg" in line.split():
            mergeable += anonymous
    return Coverage(mergeable, total, mappings)


@dataclass(frozen=True)
class Tree:
    """An installation of this project."""

    wrapper: Path
    prctl_library: Path
    madvise_library: Path
    ksmtool: Path
    follow_library: Path
    rescue: Path

    @staticmethod
    def below(prefix: Path) -> Tree:
        """Return the paths that `pip install` gives below a prefix."""
        libraries = prefix / "lib" / "ksm-preload"
        return Tree(
            prefix / "bin" / "ksm-wrapper",
            libraries / "libksm_preload_prctl.so",
            libraries / "libksm_preload.so",
            prefix / "bin" / "ksmtool",
            libraries / "libksm_preload_follow.so",
            prefix / "bin" / "ksm-rescue",
        )

    def shim(self, name: str) -> tuple[Path, dict[str, str]]:
        """Return the library that one of SHIMS means, and the environment for it."""
        if name == SHIMS[0]:
            return self.prctl_library, {}
        return self.madvise_library, {"KSM_PRELOAD": "madvise" if "madvise" in name else "prctl"}

    def copy_to(self, prefix: Path) -> Tree:
        """Copy what is written in C to another prefix and return it; anybody may use the copy."""
        copy = Tree.below(prefix)
        for source, target in (
            (self.wrapper, copy.wrapper),
            (self.prctl_library, copy.prctl_library),
            (self.madvise_library, copy.madvise_library),
            (self.follow_library, copy.follow_library),
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
            target.chmod(0o755)
        return copy


class Victims:
    """The programs of tests/programs, each compiled when a test first asks for it."""

    def __init__(self, folder: Path, target: str = "") -> None:
        """Compile into `folder`, by compilers for `target`: "aarch64-linux-gnu-"."""
        self._folder = folder
        self._target = target

    def __call__(self, name: str, kind: str = "dynamic") -> Path:
        """Return the program `name`, compiled as the `kind` of COMPILERS says."""
        compiler, *options = COMPILERS[kind]
        program = self._folder / f"{name}-{kind}"
        if not program.exists():
            source = HERE / "programs" / (f"{name}.cpp" if kind == "c++" else f"{name}.c")
            self._compile([self._target + compiler, *options, *VICTIM_OPTIONS], source, program)
        return program

    def variant(self, name: str, *options: str) -> Path:
        """Return the program or library `name` compiled with more options, such as -shared."""
        file = self._folder / f"{name}{'-'.join(('', *options))}"
        if not file.exists():
            self._compile(["gcc", *VICTIM_OPTIONS, *options], HERE / "programs" / f"{name}.c", file)
        return file

    def shim(self, kind: str) -> Path:
        """Return libksm_preload_prctl.so built for another architecture."""
        compiler = COMPILERS[kind][0]
        library = self._folder / f"libksm_preload_prctl-{kind}.so"
        if not library.exists():
            need_command(compiler)
            # What the build uses (src/meson.build), as far as it changes the code.
            options = "-O2 -std=gnu11 -Wall -Wextra -Werror -ffreestanding -fvisibility=hidden"
            options += " -fno-stack-protector -shared -fPIC -nostdlib -Wl,-z,now -Wl,-z,norelro"
            options += f" -Wl,-z,noseparate-code -Wl,-z,noexecstack -I{self.defaults()}"
            self._compile([compiler, *options.split()], SOURCE / "ksm_preload_prctl.c", library)
        return library

    def defaults(self) -> Path:
        """Return a folder with the header that the build makes of data/policy."""
        header = self._folder / "policy_defaults.h"
        if not header.exists():
            made = run([sys.executable, SOURCE / "policy_defaults.py", DEFAULT_POLICY])
            assert made.returncode == 0, made.stderr
            header.write_text(made.stdout)
        return self._folder

    def rescue(self, kind: str) -> Path:
        """Return ksm-rescue built for another architecture."""
        program = self._folder / f"ksm-rescue-{kind}"
        if not program.exists():
            # What the build uses (src/meson.build), as far as it changes the code.
            options = "-O2 -std=gnu11 -Wall -Wextra -Werror -ffreestanding -fno-stack-protector"
            options += " -nostdlib -static -no-pie -Wl,-z,noexecstack"
            more = (SOURCE / name for name in ("start.c", "preload_file.c"))
            command = [COMPILERS[kind][0], *options.split(), *map(str, more)]
            self._compile(command, SOURCE / "ksm_rescue.c", program)
        return program

    @staticmethod
    def _compile(command: Sequence[str], source: Path, output: Path) -> None:
        need_command(command[0])
        done = run([*command, "-o", output, source])
        assert done.returncode == 0, f"{source.name} does not compile: {done.stderr}"


def _reason_against_ksm() -> str | None:
    if os.geteuid() != 0:
        return "needs root"
    if not Ksm().available():
        return "this kernel has no KSM"
    probe = "import ctypes, sys; p = ctypes.CDLL(None).prctl; p.argtypes = [ctypes.c_ulong] * 5; "
    probe += f"sys.exit(p({PR_SET_MEMORY_MERGE}, 1, 0, 0, 0) != 0)"
    if subprocess.run([sys.executable, "-c", probe], check=False).returncode != 0:
        return "this kernel has no PR_SET_MEMORY_MERGE"
    return None


@pytest.fixture(scope="session")
def reason_against_ksm() -> str | None:
    """Why tests with the marker `ksm` cannot run here; None if they can."""
    return _reason_against_ksm()


@pytest.fixture(autouse=True)
def _markers(request: pytest.FixtureRequest, reason_against_ksm: str | None) -> None:
    if request.node.get_closest_marker("ksm") is not None:
        need(reason_against_ksm is None, reason_against_ksm or "")
    if request.node.get_closest_marker("root") is not None:
        need(os.geteuid() == 0, "needs root")


class Rescue:
    """ksm-rescue on an etc/ld.so.preload below a folder of its own."""

    SAYS = re.compile(rb"ksm-rescue: [A-Z/][^\n]*[^.\n]\.\n")
    """One sentence."""

    def __init__(self, program: Path, root: Path, *runner: str) -> None:
        """Work on `root`, with `runner` before the program: an emulator."""
        self.program = program
        self.runner = runner
        self.root = root
        self.etc = root / "etc"
        self.file = self.etc / "ld.so.preload"
        self.etc.mkdir(parents=True, exist_ok=True)

    def command(self, *arguments: str | bytes) -> list[str | bytes]:
        """Return the command line."""
        return [*self.runner, str(self.program), "--root", str(self.root), *arguments]

    def __call__(
        self, *arguments: str | bytes, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it; return it when it has ended."""
        return subprocess.run(
            self.command(*arguments), input=stdin, capture_output=True, timeout=60, check=False
        )

    def write(self, content: bytes | None, mode: int = 0o644) -> None:
        """Make the folder anew with the file that has this content, None for no file."""
        for other in self.etc.iterdir():
            other.unlink()
        if content is not None:
            self.file.write_bytes(content)
            self.file.chmod(mode)

    def read(self) -> bytes | None:
        """Return the content, None if there is no file."""
        try:
            return self.file.read_bytes()
        except FileNotFoundError:
            return None

    def backups(self) -> list[Path]:
        """Return the copies of the file that were kept."""
        return sorted(self.etc.glob("ld.so.preload.*"))

    def left(self) -> list[str]:
        """Return the names of all other files."""
        known = {self.file, *self.backups()}
        return [file.name for file in self.etc.iterdir() if file not in known]


@pytest.fixture
def rescue(tree: Tree, tmp_path: Path) -> Rescue:
    """Return ksm-rescue for a root of its own."""
    return Rescue(tree.rescue, tmp_path / "root")


@pytest.fixture(scope="session")
def tree() -> Tree:
    """Return the project as installed beside the Python that runs the tests."""
    # Not resolved: in a venv that would be the Python it was made from.
    found = Tree.below(Path(sys.executable).parent.parent)
    for path in vars(found).values():
        assert path.exists(), f"{path} is missing: run `pip install .` in this environment"
    return found


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources without what was built in them."""
    target = tmp_path_factory.mktemp("source") / "ksm-preload"
    left_out = shutil.ignore_patterns(".venv", ".cache", ".git", "build*", ".mesonpy-*", ".*_cache")
    shutil.copytree(HERE.parent, target, ignore=left_out)
    return target


@pytest.fixture(scope="session")
def system(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the project installed below /usr, as a package would have it."""
    build = tmp_path_factory.mktemp("build")
    staged = tmp_path_factory.mktemp("staged")
    meson = Path(sys.executable).parent / "meson"
    steps: list[list[object]] = [
        [meson, "setup", build, source, "--prefix=/usr", "--libdir=lib/x86_64-linux-gnu"],
        [meson, "install", "-C", build, "--destdir", staged, "--quiet"],
    ]
    for step in steps:
        done = run(step, env={"PATH": f"{meson.parent}:{os.environ['PATH']}"})
        assert done.returncode == 0, done.stdout + done.stderr
    return staged


def as_installed(system: Path, folder: Path, script: str) -> list[str]:
    """Return a command that runs a script where `system` lies over /usr, for itself alone."""
    before = f"""
        set -e
        top={folder}
        mount -t tmpfs none $top
        mkdir $top/usr $top/usr.work $top/etc $top/etc.work
        for folder in usr etc; do
            mount -t overlay none -o \
                lowerdir=/$folder,upperdir=$top/$folder,workdir=$top/$folder.work /$folder
        done
        cp -r {system}/usr/. /usr
        PATH=/usr/bin:/usr/sbin:/bin:/sbin
    """
    return ["unshare", "--mount", "sh", "-c", before + script]


@pytest.fixture(scope="session")
def public() -> Iterator[Path]:
    """Return a folder that every user can reach, where set-uid bits and capabilities count."""
    folder = Path(tempfile.mkdtemp(prefix="ksm-preload-tests-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def public_tree(tree: Tree, public: Path) -> Tree:
    """Return a copy of the installation that an unprivileged user can reach."""
    return tree.copy_to(public / "installed")


@pytest.fixture(scope="session")
def victims(public: Path) -> Victims:
    """Return the compiled programs of tests/programs, by name."""
    # Brought along to where there is no compiler: tests/vm.
    folder = Path(os.environ.get("KSM_TEST_VICTIMS", public / "victims"))
    folder.mkdir(exist_ok=True)
    return Victims(folder)


@pytest.fixture
def ksm(reason_against_ksm: str | None) -> Iterator[Ksm]:
    """Return KSM, set to scan fast but stopped until a test writes 1 to `run`.

    All settings are put back, and no other user of ksmtool has KSM meanwhile.
    """
    need(reason_against_ksm is None, reason_against_ksm or "")
    kernel = Ksm()
    with kernel.borrowed() as found:
        wanted = {
            "advisor_mode": "none",
            "smart_scan": "0",
            "pages_to_scan": "20000",
            "sleep_millisecs": "10",
            "run": "0",
        }
        kernel.apply({name: value for name, value in wanted.items() if name in found})
        yield kernel


@pytest.fixture
def measured(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Return what prints a line into the report, also where its output is captured."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\nmeasured on {platform.release()}: {line}")

    return show


def committed(folder: Path) -> Path:
    """Make a repository in `folder` with one commit, what is in the working tree; return it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=HERE.parent,
        check=False,
        capture_output=True,
    )
    need(listed.returncode == 0, f"no repository: {os.fsdecode(listed.stderr)}")
    for name in os.fsdecode(listed.stdout).rstrip("\0").split("\0"):
        source, target = HERE.parent / name, folder / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    # The same commit each time, whoever's machine this is.
    environment = {"HOME": "/nonexistent"}
    for who in ("AUTHOR", "COMMITTER"):
        environment.update({f"GIT_{who}_{what}": "test" for what in ("NAME", "EMAIL")})
        environment[f"GIT_{who}_DATE"] = "2026-11-26T12:00:00Z"
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "-qm", "test"]):
        done = run(["git", *command], environment, folder)
        assert done.returncode == 0, done.stderr
    return folder


def release(folder: Path, **environment: str) -> tuple[Path, float]:
    """Run script/release in a repository; return its dist and how many seconds it took."""
    for command in ("rpmbuild", "git", "auditwheel", "twine"):
        need(shutil.which(command, path=_with_ours()), f"no {command}")
    start = time.monotonic()
    done = subprocess.run(
        [folder / "script" / "release"],
        env={"PATH": _with_ours(), "HOME": str(folder / ".git"), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return folder / "dist", time.monotonic() - start


def _with_ours() -> str:
    """Return PATH with the tools that script/bootstrap installs beside Python first."""
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all that script/release makes of the working tree."""
    return release(committed(tmp_path_factory.mktemp("release") / "checkout"))[0]


class Tmux:
    """A terminal of 100 columns and 30 lines with a shell in it."""

    def __init__(self, folder: Path, shell: str) -> None:
        self.socket = folder / "tmux"
        self.folder = folder
        self("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", shell)

    def __call__(self, *arguments: object) -> str:
        done = run(
            ["tmux", "-S", self.socket, *arguments], {"LC_ALL": "C.UTF-8", "SHELL": "/bin/sh"}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        self("send-keys", "-l", text)

    def key(self, name: str) -> None:
        self("send-keys", name)

    def command(self, line: str) -> None:
        self.type(line)
        self.key("Enter")

    def screen(self) -> str:
        return self("capture-pane", "-p")

    def until(self, *words: str, absent: str = "") -> str:
        """Wait until all of these are on the screen; return it."""

        def there() -> bool:
            text = self.screen()
            return all(word in text for word in words) and not (absent and absent in text)

        wait_until(there, 30, f"{words} without {absent!r} in {self.screen()}")
        return self.screen()

    def state(self) -> str:
        """Whether the other screen is on, and the cursor."""
        return self("display-message", "-p", "#{alternate_on} #{cursor_flag}").strip()


@contextmanager
def kept_running(*commands: Sequence[object], **options: Any) -> Iterator[list[int]]:
    """Run commands that say a line when their memory is there, and end them."""
    with ExitStack() as stack:
        children = []
        for command in commands:
            child = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                **options,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline()
        yield [child.pid for child in children]
