# SPDX-License-Identifier: MIT
"""What ksm-rescue takes from /etc/ld.so.preload, and how it edits it: the judge is the loader.

Files of all kinds are made at random. Each is given to the real ld.so in a small root, which says
by its complaints what it has tried to load in vain, and by what is loaded the rest.
"""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import machine
from conftest import Tree, Victims, need, run

pytestmark = pytest.mark.root

OURS = ("libksm_preload.so", "libksm_preload_prctl.so")
THERE = ("/l/a.so", "/l/b.so", *(f"/l/{name}" for name in OURS))
ENTRIES = ("/l/libksm_preload.so", "/l/libksm_preload_prctl.so", *OURS, "/u/$LIB/libksm_preload.so")

COMPLAINT = re.compile(
    rb"ERROR: ld\.so: object '(.*?)' from /etc/ld\.so\.preload cannot be preloaded "
    rb"\([^()]*\): ignored\.\n",
    re.DOTALL,
)

NO_FILE = 0xFFFFFFFF


@dataclass(frozen=True)
class Ended:
    """What one command of a case did."""

    status: int
    output: bytes
    file: bytes | None


@dataclass(frozen=True)
class Loads:
    """What the loader has tried: without success, in its order; and has loaded, each once."""

    missing: list[bytes]
    loaded: list[bytes]

    @staticmethod
    def said(output: bytes) -> Loads:
        """Return what the output of the program `loaded` says."""
        missing = COMPLAINT.findall(output)
        loaded = [name for name in COMPLAINT.sub(b"", output).split(b"\n") if is_there(name)]
        assert COMPLAINT.sub(b"", output).endswith(b"so.2\n"), output  # it has run
        return Loads(missing, loaded)

    @staticmethod
    def expected(names: list[bytes]) -> Loads:
        """Return what the loader does if it reads these names."""
        loaded = list(dict.fromkeys(name for name in names if is_there(name)))
        return Loads([name for name in names if not is_there(name)], loaded)

    def without_ours(self) -> Loads:
        """Return the rest."""
        return Loads(*([n for n in part if not is_ours(n)] for part in (self.missing, self.loaded)))

    def ours(self) -> list[bytes]:
        """Return those that are ours."""
        return [name for name in self.missing + self.loaded if is_ours(name)]


def is_there(name: bytes) -> bool:
    return os.fsdecode(name) in THERE


def is_ours(name: bytes) -> bool:
    return os.fsdecode(name).rsplit("/", 1)[-1] in OURS


# --- files made at random ---

NAMES = (
    *THERE,
    *OURS,
    "/m/x.so",
    "/m/y.so",
    "x",
    "/u/$LIB/libksm_preload.so",
    "/l/xlibksm_preload.so",
)
SEPARATORS = ("\n", "\n", " ", "\t", ":", "  ", " \n", "\n\n", ":\n", "\r\n", "\t:")
COMMENTS = (
    "#",
    "#",
    "# ",
    "#\n",
    "##",
    "# about\n",
    "#/m/x.so ",
    "# /l/a.so\n",
    "/m/x#y.so",
    "# a : b\n",
)
PAGE = 4096


def text(source: random.Random) -> bytes:
    """Return a file: names mostly, with what stands between and around them."""
    parts: list[bytes] = []
    comments, odd = source.choice((0, 0.1, 0.3)), source.choice((0, 0, 0.15))
    for _ in range(source.choice((1, 2, 3, 5, 8, 12, 20))):
        kind = source.random()
        if kind < odd:
            parts.append(source.choice((b"\0", b"\0", b"\r", b"\xff\xc3", b"\x7f", b"'")))
        elif kind < odd + comments:
            parts.append(os.fsencode(source.choice(COMMENTS)))
        else:
            parts.append(os.fsencode(source.choice(NAMES)))
            if source.random() < 0.9:
                parts.append(os.fsencode(source.choice(SEPARATORS)))
    result = b"".join(parts)
    if source.random() < 0.5:
        result = result.rstrip(b" \t\n:")
    if source.random() < 0.03:  # the loader maps it: a name may end where the last page does
        filler = source.choice((b"\n", b" ", b"#", b":"))
        result = filler * (PAGE + source.choice((-1, 0, 1)) - len(result)) + result
    return result or b"\n"  # one without a byte is not read


def cases(seed: str, count: int) -> Iterator[tuple[bytes, bytes]]:
    source = random.Random(seed)
    for _ in range(count):
        yield os.fsencode(source.choice(ENTRIES)), text(source)


# --- the loader ---


@dataclass(frozen=True)
class Root:
    """A root with a loader, ksm-rescue, and a program that says what is loaded."""

    folder: Path
    helper: Path

    COMMANDS = (
        "/loaded",
        "/ksm-rescue --list",
        "/ksm-rescue --add ENTRY",
        "/loaded",
        "/ksm-rescue --add ENTRY",
        "/ksm-rescue",
        "/loaded",
        "/ksm-rescue",
    )

    def run(self, given: list[tuple[bytes, bytes]]) -> Iterator[list[Ended]]:
        """Yield what the commands did, for each case of an entry and a file."""
        packed = b"".join(struct.pack("=I", len(blob)) + blob for case in given for blob in case)
        done = subprocess.run(
            [self.helper, self.folder, *self.COMMANDS],
            input=packed,
            env={},
            stdout=subprocess.PIPE,
            check=True,
        )
        at = 0

        def blob() -> bytes | None:
            nonlocal at
            (size,) = struct.unpack_from("=I", done.stdout, at)
            at += 4
            if size == NO_FILE:
                return None
            at += size
            return done.stdout[at - size : at]

        for _, file in given:
            assert blob() == file
            ended = []
            for _ in self.COMMANDS:
                status, output = blob(), blob()
                assert status is not None
                assert output is not None
                ended.append(Ended(struct.unpack("=i", status)[0], output, blob()))
            yield ended
        assert at == len(done.stdout)


LIBC = ("lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6")


@pytest.fixture
def root(public: Path, tree: Tree, victims: Victims, request: pytest.FixtureRequest) -> Root:
    """Return a root with the host's glibc, or that of the Debian suite in the parameter."""
    need(platform.machine() == "x86_64", "the roots are of x86_64")
    suite = getattr(request, "param", None)
    folder = public / f"loader-{suite}"
    if not folder.exists():
        for name in ("etc", "void", "l", *(str(Path(name).parent) for name in LIBC)):
            (folder / name).mkdir(parents=True)
        if suite is None:
            need(all(Path("/", name).exists() for name in LIBC), "no glibc in Debian's places")
            for name in LIBC:
                shutil.copy(Path("/", name), folder / name)
        else:
            with tarfile.open(machine.libc(suite)) as libc:
                for name in LIBC:
                    file = libc.extractfile(Path(name).name)
                    assert file is not None
                    (folder / name).write_bytes(file.read())
        (folder / LIBC[0]).chmod(0o755)
        for name in THERE:
            shutil.copy(victims.variant("nothing", "-shared", "-nostdlib"), folder / name[1:])
        shutil.copy(tree.rescue, folder)
        shutil.copy(victims.variant("loaded", "-nostartfiles", "-Wl,-e,begin"), folder / "loaded")
    return Root(folder, victims("preload_cases", "static"))


def judge(entry: bytes, before: bytes, ended: list[Ended]) -> list[str]:
    """Return what is wrong about one case."""
    loads, listed, added, loads_added, again, removed, loads_removed, removed_again = ended
    wrong = []

    names = [line.split(b"\t", 2) for line in listed.output.split(b"\n")[:-1]]
    first = Loads.said(loads.output)
    if listed.status != 0 or Loads.expected([name for _, _, name in names]) != first:
        wrong.append(f"it lists {listed.output!r}")
    if any((kind == b"ours") != is_ours(name) for kind, _, name in names):
        wrong.append(f"it says of others that they are ours: {listed.output!r}")

    second = Loads.said(loads_added.output)
    if added.status == 0:
        if second.without_ours() != first.without_ours() or second.ours() != [entry]:
            wrong.append(f"it adds: {added.file!r}")
        if (again.status, again.file) != (0, added.file):
            wrong.append(f"it adds again: {again.file!r}")
    elif added.file != before:
        wrong.append(f"it fails and writes {added.file!r}")

    third = Loads.said(loads_removed.output)
    if removed.status != 0 or third != first.without_ours():
        wrong.append(f"it removes: {removed.file!r}")
    if (removed_again.status, removed_again.file) != (0, removed.file):
        wrong.append(f"it removes again: {removed_again.file!r}")
    if not first.ours() and removed.file != before:
        wrong.append(f"it adds and removes: {removed.file!r}")
    # No byte of others is changed, and what of ours was in a comment may leave blanks behind.
    if added.file is not None and added.file.count(b"#") > before.count(b"#"):
        wrong.append(f"it adds a comment: {added.file!r}")
    return wrong


def compare(root: Root, seed: str, count: int) -> str:
    """Give `count` files to both; fail where they differ; return a line about it."""
    given = list(cases(seed, count))
    failures = []
    impossible = comments = 0
    for (entry, before), ended in zip(given, root.run(given)):
        impossible += ended[2].status != 0
        comments += b"#" in before
        failures += [f"{before!r}, {entry!r}: {reason}" for reason in judge(entry, before, ended)]
    if failures:
        pytest.fail("\n".join([f"{len(failures)} disagree:", *(f[-500:] for f in failures[:20])]))
    version = run(["strings", "-n8", root.folder / LIBC[1]]).stdout
    glibc = re.search(r"GNU C Library .* version ([\d.]+\d)", version)
    assert glibc is not None
    return (
        f"glibc {glibc[1]}: {count} files, {comments} of them with '#', read, added to and taken"
        f" out of as the loader does, 0 disagree; adding refused in {impossible}"
    )


def test_some(root: Root, measured: Callable[[str], None]) -> None:
    measured(compare(root, "some", 400))


@pytest.mark.slow
def test_many(root: Root, measured: Callable[[str], None]) -> None:
    measured(compare(root, "many", 6000))


@pytest.mark.slow
@pytest.mark.parametrize("root", ["bullseye", "trixie"], indirect=True)
def test_other_glibcs(root: Root, measured: Callable[[str], None]) -> None:
    measured(compare(root, "other", 3000))
