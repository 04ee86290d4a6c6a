# SPDX-License-Identifier: MIT
"""How ksm-wrapper composes LD_PRELOAD: a table, properties, and what the real loader makes of it.

The table is that of tests/unit/test_preload_list.c seen from outside.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Tree, Victims, facts, run

pytestmark = pytest.mark.ksm  # without the prctl it would be the other library

NAME = "libksm_preload_prctl.so"


@dataclass(frozen=True)
class Composer:
    """ksm-wrapper, with the spellings of its library that tests use."""

    tree: Tree
    ours: str
    """The path that it adds."""
    copy: str
    """Another readable copy."""
    gone: str
    """A path with our name where nothing is."""
    folder: Path

    def __call__(self, value: str | None) -> str:
        """Return the LD_PRELOAD that a program gets where `value` was there before."""
        env = {} if value is None else {"LD_PRELOAD": value}
        done = run([self.tree.wrapper, "--show"], env, cwd=self.folder)
        assert done.returncode == 0
        _, separator, composed = done.stdout.partition("\nLD_PRELOAD ")
        assert separator
        return composed[:-1]

    def spell(self, text: str) -> str:
        """Return `text` with {ours}, {copy} and {gone} filled in."""
        # Not str.format: ${ORIGIN} is the loader's.
        for name in ("ours", "copy", "gone"):
            text = text.replace("{" + name + "}", getattr(self, name))
        return text


@pytest.fixture(scope="module")
def compose(tree: Tree, public: Path) -> Composer:
    folder = public / "elsewhere"
    folder.mkdir()
    shutil.copy(tree.prctl_library, folder / NAME)
    gone = str(public / "gone" / NAME)
    return Composer(tree, str(tree.prctl_library), str(folder / NAME), gone, folder)


TABLE = {
    # Nothing there.
    "a variable that is not set": (None, "{ours}"),
    "an empty variable": ("", "{ours}"),
    "nothing but separators": (" : :: ", "{ours}"),
    # Others there.
    "one other library": ("/a.so", "/a.so:{ours}"),
    "others keep their order": ("/b.so:/a.so:/c.so", "/b.so:/a.so:/c.so:{ours}"),
    "spaces separate too": ("/a.so b.so:c.so", "/a.so:b.so:c.so:{ours}"),
    "empty entries vanish": (":/a.so:: /b.so: ", "/a.so:/b.so:{ours}"),
    "one of theirs twice stays twice": ("/a.so:/a.so", "/a.so:/a.so:{ours}"),
    "theirs are not made absolute": ("./a.so:lib/../b.so", "./a.so:lib/../b.so:{ours}"),
    "their variables stay": (
        "/usr/$LIB/a.so:${ORIGIN}/b.so",
        "/usr/$LIB/a.so:${ORIGIN}/b.so:{ours}",
    ),
    "a tab is part of a name": ("/a\tb.so", "/a\tb.so:{ours}"),
    "a newline is part of a name": ("/a\nb.so", "/a\nb.so:{ours}"),
    "a hash sign is part of a name": ("# /a.so", "#:/a.so:{ours}"),
    "bytes that are not UTF-8": ("/\udcff\udc80.so", "/\udcff\udc80.so:{ours}"),
    # Ours there.
    "ours is there alone": ("{ours}", "{ours}"),
    "ours is there last": ("/a.so:{ours}", "/a.so:{ours}"),
    "ours is there first and stays": ("{ours}:/a.so", "{ours}:/a.so"),
    "ours is there in the middle": ("/a.so {ours} /b.so", "/a.so:{ours}:/b.so"),
    "ours is there twice": ("/a.so:{ours}:/b.so:{ours}", "/a.so:{ours}:/b.so"),
    "ours is there three ways": ("{copy}:/a.so:" + NAME + ":{ours}", "{copy}:/a.so"),
    "a copy of ours elsewhere": ("/a.so:{copy}:/b.so", "/a.so:{copy}:/b.so"),
    "a copy of ours by a relative path": (f"./{NAME}:/a.so", f"./{NAME}:/a.so"),
    "ours by its bare name": (f"{NAME}:/a.so", f"{NAME}:/a.so"),
    "ours by $LIB": (f"/usr/$LIB/{NAME}:/a.so", f"/usr/$LIB/{NAME}:/a.so"),
    # Not ours, though it looks so.
    "a copy of ours that is gone": ("{gone}:/a.so", "{gone}:/a.so:{ours}"),
    "a copy that is gone, and ours": ("{gone}:{ours}:/a.so", "{gone}:{ours}:/a.so"),
    "a longer name": (f"{NAME}.1", f"{NAME}.1:{{ours}}"),
    "a name that ends like ours": (f"/x{NAME}", f"/x{NAME}:{{ours}}"),
    "our name as a folder": ("{copy}/a.so", "{copy}/a.so:{ours}"),
    "ours after a tab": ("\t{ours}", "\t{ours}:{ours}"),
    "our other library": ("libksm_preload.so", "libksm_preload.so:{ours}"),
}


def rows() -> list[object]:
    return [pytest.param(*row, id=name) for name, row in TABLE.items()]


@pytest.mark.parametrize(("value", "expected"), rows())
def test_composition(compose: Composer, value: str | None, expected: str) -> None:
    before = None if value is None else compose.spell(value)
    assert compose(before) == compose.spell(expected)


# What the loader does not split at, and what LD_PRELOAD can hold: anything but space, colon, NUL.
CHARACTERS = st.characters(min_codepoint=1, max_codepoint=0x2FF, blacklist_characters=" :")
THEIRS = st.text(CHARACTERS, min_size=1, max_size=12) | st.sampled_from(
    ["/a.so", "./b.so", "/usr/$LIB/c.so", f"/{NAME}/d.so", f"{NAME}.1", "{gone}"]
)
OURS = st.sampled_from(["{ours}", "{copy}", NAME, f"/usr/$LIB/{NAME}", f"$ORIGIN/{NAME}"])
SEPARATORS = st.text(" :", min_size=1, max_size=3)
ENTRIES = st.lists(st.tuples(st.booleans(), THEIRS, OURS, SEPARATORS), max_size=8)


@settings(deadline=None, max_examples=150)
@given(entries=ENTRIES, leading=st.text(" :", max_size=2))
def test_properties(
    compose: Composer, entries: list[tuple[bool, str, str, str]], leading: str
) -> None:
    parts = [
        (compose.spell(ours if is_ours else theirs), is_ours, separator)
        for is_ours, theirs, ours, separator in entries
    ]
    composed = compose(leading + "".join(text + separator for text, _, separator in parts))
    result = composed.split(":")

    # Nothing empty, one separator.
    assert "" not in result
    assert " " not in composed
    # Theirs all there, in order, as spelled; ours once, where it first was or else last.
    expected, have_ours = [], False
    for text, is_ours, _ in parts:
        if not (is_ours and have_ours):
            expected.append(text)
        have_ours = have_ours or is_ours
    assert result == expected + ([] if have_ours else [compose.ours])
    # Composing again changes nothing.
    assert compose(composed) == composed


# --- the judge is the loader ---

COMPLAINT = re.compile(
    r"ERROR: ld\.so: object '(.*?)' from LD_PRELOAD cannot be preloaded \([^()]*\): ignored\.\n",
    re.DOTALL,
)


def loads(value: str | None, victims: Victims, compose: Composer) -> tuple[list[str], list[str]]:
    """Return which entries the loader cannot load, and which files it maps, for this LD_PRELOAD."""
    env = {} if value is None else {"LD_PRELOAD": value}
    done = run([victims("report")], env, cwd=compose.folder)
    assert COMPLAINT.sub("", done.stderr) == ""
    return COMPLAINT.findall(done.stderr), sorted(facts(done)["file"])


@pytest.mark.parametrize(
    "value",
    [
        # A bare name and $LIB count as ours unseen: a user of them has us where the loader looks.
        *(value for value, _ in TABLE.values() if not re.search(rf"(^|LIB/){NAME}:", value or "")),
        "libm.so.6:/a.so libdl.so.2",
        "{copy}:libm.so.6",
    ],
)
def test_loader_tries_theirs_as_before_and_loads_ours(
    compose: Composer, victims: Victims, value: str | None
) -> None:
    before = None if value is None else compose.spell(value)
    missing, files = loads(before, victims, compose)
    missing_now, files_now = loads(compose(before), victims, compose)
    assert missing_now == missing
    ours = [file for file in files_now if file.endswith(NAME)]
    assert len(ours) == 1
    assert [file for file in files_now if file not in ours] == [
        file for file in files if not file.endswith(NAME)
    ]
