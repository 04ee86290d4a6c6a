# SPDX-License-Identifier: MIT
"""ksm-rescue and /etc/ld.so.preload: a table of contents, properties, what hangs on a file.

What the loader makes of such files is asked in test_preload_loader.py.
"""

from __future__ import annotations

import calendar
import errno
import os
import re
import shutil
import stat
import struct
import subprocess
import time
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import AS_NOBODY, Rescue, Tree, Victims, need, need_command, run

E = b"/usr/lib/x86_64-linux-gnu/libksm_preload_prctl.so"
OTHER_PATH = b"/opt/lib/libksm_preload_prctl.so"
MADVISE = b"/usr/lib/x86_64-linux-gnu/libksm_preload.so"
ANCESTOR = b"/usr/local/share/ksm_preload/libksm_preload.so"
BY_LIB = b"/usr/$LIB/libksm_preload_prctl.so"
LIMIT = 64 * 1024

LONG = b"# " + b"-" * 80 + b"\n"
"""A comment longer than what follows it, all of which the loader then reads, comments too."""

REFUSED = b"refused"

Table = dict[str, tuple[Optional[bytes], Optional[bytes]]]

ADD: Table = {
    # Nothing there.
    "no file: it is made": (None, E + b"\n"),
    "an empty file": (b"", E + b"\n"),
    "a newline alone stays": (b"\n", b"\n" + E + b"\n"),
    "blanks alone get a line end": (b" \t", b" \t\n" + E),
    # Others there.
    "another library": (b"/a.so\n", b"/a.so\n" + E + b"\n"),
    "no newline at the end: none is added": (b"/a.so", b"/a.so\n" + E),
    "others keep their order and blanks": (
        b" /b.so:/a.so\t\n\n",
        b" /b.so:/a.so\t\n\n" + E + b"\n",
    ),
    "carriage returns are part of names": (b"/a.so\r\n", b"/a.so\r\n" + E + b"\n"),
    "bytes that are not UTF-8": (b"/\xff\xfe.so\n", b"/\xff\xfe.so\n" + E + b"\n"),
    "one of theirs twice stays twice": (b"/a.so\n/a.so\n", b"/a.so\n/a.so\n" + E + b"\n"),
    "theirs is dangling: not our business": (b"/gone/a.so\n", b"/gone/a.so\n" + E + b"\n"),
    # Ours there.
    "it is there": (E + b"\n", E + b"\n"),
    "it is there without a newline": (b"/a.so\n" + E, b"/a.so\n" + E),
    "it is there between others": (b"/a.so " + E + b":/b.so", b"/a.so " + E + b":/b.so"),
    "it is there twice: becomes one": (E + b"\n/a.so\n" + E + b"\n", b"/a.so\n" + E + b"\n"),
    "under another path: is replaced": (OTHER_PATH + b"\n/a.so\n", b"/a.so\n" + E + b"\n"),
    "under another path and itself": (OTHER_PATH + b" " + E + b"\n", E + b"\n"),
    "our other library: is replaced": (MADVISE + b"\n", E + b"\n"),
    "by $LIB: is replaced": (BY_LIB + b"\n", E + b"\n"),
    "by its bare name: is replaced": (b"libksm_preload.so\n", E + b"\n"),
    "the ancestor's: is replaced": (ANCESTOR + b"\n/a.so\n", b"/a.so\n" + E + b"\n"),
    # Not ours, though it looks so.
    "a longer name": (b"libksm_preload.so.1\n", b"libksm_preload.so.1\n" + E + b"\n"),
    "a name that ends like ours": (b"/xlibksm_preload.so\n", b"/xlibksm_preload.so\n" + E + b"\n"),
    "our name as a folder": (E + b"/a.so\n", E + b"/a.so\n" + E + b"\n"),
    "ours with a carriage return": (E + b"\r\n", E + b"\r\n" + E + b"\n"),
    # Comments: the loader takes what follows a second one for names.
    "one comment before": (b"# about\n/a.so\n", b"# about\n/a.so\n" + E + b"\n"),
    "one comment at the end": (b"/a.so # about", b"/a.so # about\n" + E),
    "ours is commented out: that stays": (b"# " + E + b"\n", b"# " + E + b"\n" + E + b"\n"),
    "ours is commented out, and loaded": (
        LONG + b"# x " + E + b"\n",
        LONG + b"# x\n" + E + b"\n",
    ),
    "last it would change how a comment is read: goes first": (
        b"# a long comment\n# b\n/a.so\n",
        E + b"\n# a long comment\n# b\n/a.so\n",
    ),
    "neither end is possible": (b"# a\n/a.so # b\n# c\n", REFUSED),
    # NULs: the loader reads no further, but for a last name without a newline.
    "behind a NUL nothing is read: goes first": (b"/a.so\0\n", E + b"\n/a.so\0\n"),
    "the very end is read, and stays the end": (b"/a.so\0 /b.so", E + b"\n/a.so\0 /b.so"),
    # Sizes.
    "up to 64 KiB": (
        b"/" + b"a" * (LIMIT - len(E) - 4) + b"\n",
        b"/" + b"a" * (LIMIT - len(E) - 4) + b"\n" + E + b"\n",
    ),
    "no room below 64 KiB": (b"/" + b"a" * (LIMIT - len(E) - 3) + b"\n", REFUSED),
    "64 KiB are no list": (b"/a.so\n" + b"\n" * (LIMIT - 6), REFUSED),
}

REMOVE: Table = {
    "no file": (None, None),
    "an empty file stays": (b"", b""),
    "blanks alone stay": (b" \n\t", b" \n\t"),
    "only others": (b"/a.so:/b.so\n", b"/a.so:/b.so\n"),
    "only ours: no file": (E + b"\n", None),
    "only ours, no newline": (E, None),
    "only ours, with blanks around": (b"  " + E + b"\t\n", None),
    "ours twice and no other": (E + b"\n" + E + b"\n", None),
    "both libraries": (MADVISE + b"\n/a.so\n" + E + b"\n", b"/a.so\n"),
    "the first line": (E + b"\n/a.so\n", b"/a.so\n"),
    "the last line": (b"/a.so\n" + E + b"\n", b"/a.so\n"),
    "the last line, no newline": (b"/a.so\n" + E, b"/a.so"),
    "a line between, empty ones stay": (b"/a.so\n\n" + E + b"\n\n/b.so\n", b"/a.so\n\n\n/b.so\n"),
    "first in a line": (E + b" /a.so\n", b"/a.so\n"),
    "last in a line": (b"/a.so " + E + b"\n", b"/a.so\n"),
    "last in a line, blanks behind": (b"/a.so " + E + b" \n", b"/a.so \n"),
    "in the middle, by colons": (b"/a.so:" + E + b":/b.so", b"/a.so:/b.so"),
    "in the middle, by runs": (b"/a.so \t" + E + b":: \t/b.so\n", b"/a.so \t/b.so\n"),
    "last without a newline": (b"/a.so:" + E, b"/a.so"),
    "by tabs": (b"\t/a.so\t" + E + b"\t/b.so\n", b"\t/a.so\t/b.so\n"),
    "the ancestor's": (b"/a.so\n" + ANCESTOR + b"\n", b"/a.so\n"),
    "by $LIB": (BY_LIB + b":/a.so\n", b"/a.so\n"),
    "by its bare name": (b"libksm_preload_prctl.so /a.so\n", b"/a.so\n"),
    "the library of --follow": (b"/usr/$LIB/libksm_preload_follow.so\n/a.so\n", b"/a.so\n"),
    "below a folder that is gone": (b"/gone/libksm_preload.so\n/a.so\n", b"/a.so\n"),
    "a longer name stays": (b"libksm_preload.so.1\n", b"libksm_preload.so.1\n"),
    "a name that ends like ours stays": (b"/xlibksm_preload.so\n", b"/xlibksm_preload.so\n"),
    "ours with a carriage return stays": (E + b"\r\n", E + b"\r\n"),
    "in capitals it is another": (E.upper() + b"\n", E.upper() + b"\n"),
    "carriage returns elsewhere stay": (b"/a.so\r\n" + E + b"\n/b\r\n", b"/a.so\r\n/b\r\n"),
    "bytes that are not UTF-8 stay": (b"\xff\xc3 " + E + b"\n\xfe", b"\xff\xc3\n\xfe"),
    "a comment above stays": (b"# about\n" + E + b"\n", b"# about\n"),
    "a comment behind it stays": (E + b" # about\n/a.so\n", b"# about\n/a.so\n"),
    "a comment that begins in its name": (b"/a.so " + E + b"#x\n", b"/a.so#x\n"),
    "a comment in the middle of another": (b"/a#" + E + b"\n", b"/a#" + E + b"\n"),
    "commented out and not read: stays": (b"#" + E + b"\n/a.so\n", b"#" + E + b"\n/a.so\n"),
    "commented out, read all the same": (
        LONG + b"# " + E + b" /a.so\n",
        LONG + b"# /a.so\n",
    ),
    "a line before a comment, whose meaning must not change": (
        b"# one\n" + E + b"\n# two\n/a.so\n",
        b"# one\n# two\n/a.so\n",
    ),
    "behind a NUL it is not read: stays": (b"/a.so\0 " + E + b"\n", b"/a.so\0 " + E + b"\n"),
    "behind a NUL, at the very end": (b"/a.so\0 " + E, b"/a.so\0"),
    "before a NUL": (E + b"\0/a.so\n", b"\0/a.so\n"),
    "many of them": ((b"/a.so\n" + E + b"\n") * 500, b"/a.so\n" * 500),
    "64 KiB less one": (E + b"\n" * (LIMIT - len(E) - 1), b"\n" * (LIMIT - len(E) - 2)),
    "64 KiB are no list": (E + b"\n" * (LIMIT - len(E)), REFUSED),
}
LIST = {
    "no file": (None, ""),
    "ours and others in their order": (
        b"/a.so:" + E + b"\tlibksm_preload.so\n/a.so",
        f"other entry /a.so, ours entry {E.decode()}, ours entry libksm_preload.so, "
        "other entry /a.so",
    ),
    "a comment is not read": (b"/a.so # /b.so\n/c.so", "other entry /a.so, other entry /c.so"),
    "a second one is": (
        b"# a long comment\n# /b.so\n/c.so\n",
        "other comment #, other comment /b.so, other entry /c.so",
    ),
    "ours in such a one": (
        LONG + b"# libksm_preload.so",
        "other comment #, ours comment libksm_preload.so",
    ),
    "a name ends where a comment begins": (
        b"/a.so#b\n/c.so",
        "other entry /a.so, other entry /c.so",
    ),
    "a NUL ends it": (b"/a.so\0/b.so\n/c.so\n", "other entry /a.so"),
    "but for the very end": (b"/a.so\0/b.so\n/c.so", "other entry /a.so, other entry /c.so"),
    "a carriage return belongs to the name": (b"/a.so\r\n", "other entry /a.so\r"),
}


def rows(table: Table) -> list[object]:
    return [pytest.param(*row, id=name) for name, row in table.items()]


def check(rescue: Rescue, old: bytes | None, new: bytes | None, *arguments: str | bytes) -> None:
    """Run one row: as told with --dry-run, done, and done again."""
    rescue.write(old)
    told = rescue("--dry-run", *arguments)
    assert rescue.read() == old
    done = rescue(*arguments)
    assert rescue.left() == []
    if new == REFUSED:
        assert rescue.read() == old
        assert (told.returncode, told.stdout) == (done.returncode, done.stdout) == (1, b"")
        assert rescue.SAYS.fullmatch(done.stderr), done.stderr
        assert rescue.backups() == []
        return
    assert rescue.read() == new
    assert (told.returncode, told.stdout, told.stderr) == (0, new or b"", b"")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b" has " in done.stdout) == (new == old)
    assert done.stdout.count(b"\n") == 1

    inode = new and rescue.file.stat().st_ino
    again = rescue(*arguments)
    assert (again.returncode, again.stderr) == (0, b"")
    assert rescue.read() == new
    assert (new and rescue.file.stat().st_ino) == inode
    assert len(rescue.backups()) <= (1 if arguments else 0)


@pytest.mark.parametrize(("old", "new"), rows(ADD))
def test_add(rescue: Rescue, old: bytes | None, new: bytes | None) -> None:
    check(rescue, old, new, "--add", E)


@pytest.mark.parametrize(("old", "new"), rows(REMOVE))
def test_remove(rescue: Rescue, old: bytes | None, new: bytes | None) -> None:
    check(rescue, old, new)


@pytest.mark.parametrize(("old", "expected"), LIST.values(), ids=LIST)
def test_list(rescue: Rescue, old: bytes | None, expected: str) -> None:
    rescue.write(old)
    done = rescue("--list")
    assert (done.returncode, done.stderr) == (0, b"")
    listed = done.stdout.decode().split("\n")
    assert listed.pop() == ""
    assert ", ".join(line.replace("\t", " ") for line in listed) == expected
    assert rescue.read() == old


# --- properties ---

PIECES = st.sampled_from(
    [b"/a.so", b"b.so", b"/xlibksm_preload.so", b"#", b"# ", b"\0", b"\r", b"\xff", b"x" * 4000]
)
OURS = st.sampled_from([E, MADVISE, BY_LIB, b"libksm_preload.so", OTHER_PATH])
SPACE = st.sampled_from([b"\n", b" ", b"\t", b":", b"\n\n", b": "])
OTHERS = st.lists(PIECES | SPACE, max_size=12).map(b"".join)
ALL = st.lists(PIECES | SPACE | OURS | st.tuples(OURS, SPACE).map(b"".join), max_size=12).map(
    b"".join
)


@pytest.fixture(scope="module")
def editor(tree: Tree, public: Path) -> Rescue:
    return Rescue(tree.rescue, public / "properties")


def names(rescue: Rescue) -> list[bytes]:
    done = rescue("--list")
    assert done.returncode == 0
    return [line.split(b"\t", 2)[2] for line in done.stdout.split(b"\n")[:-1]]


def is_ours(name: bytes) -> bool:
    base = name.rsplit(b"/", 1)[-1]
    return base in {b"libksm_preload%s.so" % kind for kind in (b"", b"_prctl", b"_follow")}


@settings(deadline=None, max_examples=120)
@given(old=OTHERS)
@example(old=b"#\n#")
def test_adding_and_removing_gives_the_old_bytes(editor: Rescue, old: bytes) -> None:
    editor.write(old)
    status = editor("--add", E).returncode
    if status == 0:
        assert editor.read() != old
        assert editor().returncode == 0
    assert (editor.read() or b"") == old


@settings(deadline=None, max_examples=120)
@given(old=ALL)
def test_others_are_read_as_before(editor: Rescue, old: bytes) -> None:
    editor.write(old)
    before = names(editor)
    others = [name for name in before if not is_ours(name)]
    if editor("--add", E).returncode == 0:
        added, after = editor.read(), names(editor)
        assert [name for name in after if not is_ours(name)] == others
        assert [name for name in after if is_ours(name)] == [E]
        assert added is not None
        assert added.count(b"#") <= old.count(b"#")
        assert editor("--add", E).returncode == 0
        assert editor.read() == added
    else:
        assert editor.read() == old
    editor.write(old)
    assert editor().returncode == 0
    removed = editor.read()
    assert names(editor) == others
    assert editor().returncode == 0
    assert editor.read() == removed
    if len(others) == len(before):
        assert (removed or b"") == old


# --- what hangs on a file ---

root_only = pytest.mark.root
SHARED = b"/a.so\n" + E + b"\n"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600, 0o664, 0o444])
def test_removing_keeps_the_mode(rescue: Rescue, mode: int) -> None:
    rescue.write(SHARED, mode)
    assert rescue().returncode == 0
    assert rescue.read() == b"/a.so\n"
    assert stat.S_IMODE(rescue.file.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o000])
def test_adding_to_what_users_cannot_read_wants_force(rescue: Rescue, mode: int) -> None:
    rescue.write(b"/a.so\n", mode)
    done = rescue("--add", E)
    assert done.returncode == 1
    assert rescue.SAYS.fullmatch(done.stderr)
    assert b"cannot be read by users" in done.stderr
    assert stat.S_IMODE(rescue.file.stat().st_mode) == mode
    assert rescue.backups() == []
    assert rescue("--add", E, "--force").returncode == 0
    assert rescue.read() == SHARED
    assert stat.S_IMODE(rescue.file.stat().st_mode) == mode | 0o444


def test_not_confirmed_gives_the_old_mode_back(rescue: Rescue) -> None:
    rescue.write(b"/a.so\n", 0o600)
    assert rescue("--add", E, "--force", "--confirm").returncode == 1
    assert rescue.read() == b"/a.so\n"
    assert stat.S_IMODE(rescue.file.stat().st_mode) == 0o600


def test_a_new_file_can_be_read_by_all_whatever_the_umask(rescue: Rescue) -> None:
    old = os.umask(0o077)
    try:
        assert rescue("--add", E).returncode == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE(rescue.file.stat().st_mode) == 0o644


@root_only
def test_the_owner_stays(rescue: Rescue) -> None:
    rescue.write(SHARED)
    os.chown(rescue.file, 12, 34)
    assert rescue().returncode == 0
    assert rescue("--add", E).returncode == 0
    status = rescue.file.stat()
    assert (status.st_uid, status.st_gid) == (12, 34)


def set_attribute(file: Path, name: str, value: bytes) -> None:
    try:
        os.setxattr(file, name, value)
    except OSError as error:
        need(error.errno not in {errno.ENOTSUP, errno.EPERM}, f"no {name} here")
        raise


@root_only
def test_attributes_stay(rescue: Rescue) -> None:
    wanted = {"user.note": b"\0bytes\xff", "user.empty": b"", "trusted.note": b"x" * 3000}
    rescue.write(SHARED)
    for name, value in wanted.items():
        set_attribute(rescue.file, name, value)
    assert rescue().returncode == 0
    assert rescue("--add", E).returncode == 0
    found = {name: os.getxattr(rescue.file, name) for name in os.listxattr(rescue.file)}
    assert {name: found.get(name) for name in wanted} == wanted


@root_only
def test_an_acl_stays(rescue: Rescue) -> None:
    # include/uapi/linux/posix_acl_xattr.h: owner rw, user 1234 rw, group r, mask rw, others r
    entries = ((1, 6, 0xFFFFFFFF), (2, 6, 1234), (4, 4, 0xFFFFFFFF), (16, 6, 0xFFFFFFFF))
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry) for entry in (*entries, (32, 4, 0xFFFFFFFF))
    )
    rescue.write(SHARED)
    set_attribute(rescue.file, "system.posix_acl_access", acl)
    mode = rescue.file.stat().st_mode
    assert rescue().returncode == 0
    assert os.getxattr(rescue.file, "system.posix_acl_access") == acl
    assert rescue.file.stat().st_mode == mode


def test_a_symbolic_link_is_refused(rescue: Rescue) -> None:
    target = rescue.root / "target"
    target.write_bytes(SHARED)
    rescue.file.symlink_to(target)
    for arguments in ((), ("--add", E), ("--list",)):
        done = rescue(*arguments)
        assert done.returncode == 1
        assert rescue.SAYS.fullmatch(done.stderr)
        assert b"symbolic link" in done.stderr
    assert rescue.file.is_symlink()
    assert target.read_bytes() == SHARED
    assert rescue.left() == []


def test_etc_as_a_symbolic_link_out_of_the_root_is_refused(tree: Tree, tmp_path: Path) -> None:
    inside, outside = Rescue(tree.rescue, tmp_path / "a"), Rescue(tree.rescue, tmp_path / "b")
    outside.write(SHARED)
    inside.etc.rmdir()
    inside.etc.symlink_to(outside.etc)
    assert inside().returncode == 1
    assert outside.read() == SHARED


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
def test_what_is_no_file_is_refused(rescue: Rescue, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(rescue.file)
    elif kind == "folder":
        rescue.file.mkdir()
    else:
        need(os.geteuid() == 0, "needs root")
        os.mknod(rescue.file, stat.S_IFSOCK | 0o644)
    before = rescue.file.lstat()
    for arguments in ((), ("--add", E), ("--list",)):
        done = rescue(*arguments)
        assert done.returncode == 1
        assert rescue.SAYS.fullmatch(done.stderr), done.stderr
    assert rescue.file.lstat().st_ino == before.st_ino
    assert rescue.left() == []


def test_another_hard_link_keeps_the_old_text(rescue: Rescue) -> None:
    rescue.write(E + b"\n" + b"/a.so\n")
    other = rescue.root / "other"
    os.link(rescue.file, other)
    assert rescue().returncode == 0
    assert rescue.read() == b"/a.so\n"
    assert other.read_bytes() == E + b"\n" + b"/a.so\n"


@root_only
def test_an_immutable_file_is_left_and_named(rescue: Rescue) -> None:
    chattr = need_command("chattr")
    rescue.write(SHARED)
    set_it = subprocess.run([chattr, "+i", rescue.file], capture_output=True, check=False)
    need(set_it.returncode == 0, "no immutable files here")
    try:
        for arguments in ((), ("--add", MADVISE)):
            done = rescue(*arguments)
            assert done.returncode == 1
            assert rescue.SAYS.fullmatch(done.stderr)
            assert b"lsattr" in done.stderr
            assert rescue.read() == SHARED
            assert rescue.backups() == []
            assert rescue.left() == []
    finally:
        subprocess.run([chattr, "-i", rescue.file], check=True)


# --- the copy that is kept ---


def test_what_others_wrote_is_kept_under_a_name_with_the_time(rescue: Rescue) -> None:
    rescue.write(SHARED)
    before = time.time()
    assert rescue("--add", MADVISE).returncode == 0
    (backup,) = rescue.backups()
    when = re.fullmatch(r"ld\.so\.preload\.(\d{8}T\d{6})Z", backup.name)
    assert when is not None
    assert backup.read_bytes() == SHARED
    said = time.strptime(when[1], "%Y%m%dT%H%M%S")
    assert int(before) <= calendar.timegm(said) <= time.time()


def test_no_copy_is_kept_of_what_ours_is_taken_out_of(rescue: Rescue) -> None:
    rescue.write(SHARED)
    assert rescue().returncode == 0
    assert rescue.read() == b"/a.so\n"
    assert rescue.backups() == []


@pytest.mark.parametrize("old", [None, b"", E + b"\n", OTHER_PATH + b"\n"])
def test_what_is_only_ours_is_not_kept(rescue: Rescue, old: bytes | None) -> None:
    rescue.write(old)
    assert rescue("--add", E).returncode == 0
    assert rescue().returncode == 0
    assert rescue.read() is None
    assert rescue.backups() == []


def test_no_copy_is_kept_where_nothing_is_changed(rescue: Rescue) -> None:
    rescue.write(b"/a.so\n")
    assert rescue().returncode == 0
    assert rescue("--dry-run", "--add", E).returncode == 0
    assert rescue("--list").returncode == 0
    assert rescue.backups() == []


# --- usage ---

WRONG = [
    ["--add", ""],
    ["--add", "/a.so"],
    ["--add", "/usr/lib/libksm_preload.so.1"],
    ["--add", "/usr/my lib/libksm_preload.so"],
    ["--add", "/usr/lib/libksm_preload.so\n/a.so"],
    ["--add", "/usr:lib/libksm_preload.so"],
    ["--add", "/usr#lib/libksm_preload.so"],
    ["--add", "/usr/\tlib/libksm_preload.so"],
    ["--add", "/usr/lib\r/libksm_preload.so"],
    ["--add"],
    ["--root"],
    ["--confirm"],
    ["--force"],
    ["--list", "--add", "libksm_preload.so"],
    ["--list", "--dry-run"],
    ["--add", "libksm_preload.so", "--confirm", "--dry-run"],
    ["--help"],
    ["--nonsense"],
    ["file"],
    [""],
]


@pytest.mark.parametrize("arguments", WRONG, ids=repr)
def test_wrong_arguments(rescue: Rescue, arguments: list[str]) -> None:
    rescue.write(SHARED)
    done = rescue(*arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    assert rescue.SAYS.fullmatch(done.stderr) or done.stderr.startswith(b"usage: ksm-rescue ")
    assert rescue.read() == SHARED


def test_an_entry_with_bytes_that_are_not_ascii(rescue: Rescue) -> None:
    entry = "/home/jürgen/lib/libksm_preload.so".encode()
    assert rescue("--add", entry).returncode == 0
    assert rescue.read() == entry + b"\n"


def test_a_root_that_is_not_there(tree: Tree, tmp_path: Path) -> None:
    for root in (tmp_path / "gone", tmp_path):
        done = subprocess.run([tree.rescue, "--root", root], capture_output=True, check=False)
        assert done.returncode == 1
        assert Rescue.SAYS.fullmatch(done.stderr)


@root_only
def test_whoever_is_not_root(tree: Tree, public: Path) -> None:
    editor = Rescue(public / "ksm-rescue", public / "not-root")
    shutil.copy(tree.rescue, editor.program)
    editor.write(SHARED)
    done = subprocess.run([*AS_NOBODY, *editor.command()], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"ksm-rescue: Cannot write /etc/ld.so.preload: Permission denied.\n"
    assert editor.read() == SHARED
    assert editor.left() == []


@pytest.mark.parametrize("files", ["1", "2", "0 1", "1 2", "0 1 2"])
@pytest.mark.parametrize("kind", ["works", "fails"])
def test_closed_files_are_not_taken_for_stdout(rescue: Rescue, files: str, kind: str) -> None:
    rescue.write(SHARED, 0o644 if kind == "works" else 0o600)
    closing = " ".join(f"{file}>&-" for file in files.split())
    add = ("--add", MADVISE) if kind == "fails" else ()
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", *rescue.command(*add)], check=False
    )
    assert done.returncode == (kind == "fails")
    assert rescue.read() == (SHARED if kind == "fails" else b"/a.so\n")
    assert rescue.left() == []


# --- the program ---


def test_it_needs_no_other_file(tree: Tree) -> None:
    readelf = need_command("readelf")
    done = run([readelf, "--wide", "--program-headers", "--dynamic", "--symbols", tree.rescue])
    assert done.returncode == 0
    assert "INTERP" not in done.stdout
    assert "DYNAMIC" not in done.stdout
    assert " UND " not in done.stdout.replace("0 NOTYPE  LOCAL  DEFAULT  UND ", "")
    assert not re.search(r"LOAD.* RWE ", done.stdout)


@pytest.mark.parametrize("arguments", [(), ("--add", E), ("--list",), ("--add", MADVISE)])
def test_valgrind_has_no_complaints(rescue: Rescue, arguments: tuple[str | bytes, ...]) -> None:
    valgrind = need_command("valgrind")
    rescue.write(LONG + b"# x " + E + b"\n")
    command = [valgrind, "--quiet", "--error-exitcode=9", *rescue.command(*arguments)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


SOME = (*list(ADD)[:7], "it is there twice: becomes one", "ours is commented out, and loaded")
SOME_REMOVED = (
    "only ours: no file",
    "a line between, empty ones stay",
    "many of them",
    "before a NUL",
)


@pytest.mark.parametrize(("kind", "emulator"), [("i386", None), ("aarch64", "qemu-aarch64")])
def test_other_architectures(
    victims: Victims, tmp_path: Path, kind: str, emulator: str | None
) -> None:
    runner = [need_command(emulator)] if emulator else []
    other = Rescue(victims.rescue(kind), tmp_path / "root", *runner)
    for name in SOME:
        check(other, *ADD[name], "--add", E)
    for name in SOME_REMOVED:
        check(other, *REMOVE[name])
    other.write(SHARED, 0o640)
    assert other().returncode == 0
    assert stat.S_IMODE(other.file.stat().st_mode) == 0o640
    assert other.backups() == []
    assert other("--add", "/jürgen/libksm_preload.so".encode(), "--force").returncode == 0
    assert len(other.backups()) == 1
    assert other("--add", E, "--confirm", stdin=b"keep\n").returncode == 0
    assert other("--add", MADVISE, "--confirm", stdin=b"").returncode == 1
    assert other.read() == SHARED
    assert other.left() == []
