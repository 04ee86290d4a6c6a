# SPDX-License-Identifier: MIT
"""global-enable and its kin below a root of their own: what is chosen, written, put back, said.

The real file and set-uid programs: tests/vm/test_chroot.py; real boots: test_boots.py there.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import pytest

from conftest import Tree, run, wait_until
from ksmtool import cli, consent, ldpreload, machine, rehearsal, report, systemd, wrap
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.wrap import Kernel

NEW = Kernel(prctl=True, inherit=True, madvise=True)
FORGETFUL = Kernel(prctl=True, inherit=False, madvise=True)
OLD = Kernel(prctl=False, inherit=False, madvise=True)
WITHOUT = Kernel(prctl=False, inherit=False, madvise=False)

TOO_OLD = "this systemd does not have MemoryKSM= (it came with 254)"


@pytest.fixture(autouse=True)
def _installed_here(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(tree.ksmtool)])


@pytest.mark.parametrize(
    ("wanted", "kernel", "obstacle", "already", "expected"),
    [
        pytest.param("auto", NEW, None, [], "systemd", id="systemd-where-it-is-enough"),
        pytest.param("auto", NEW, TOO_OLD, [], "ld.so.preload", id="not-by-an-old-systemd"),
        pytest.param("auto", FORGETFUL, None, [], "ld.so.preload", id="not-if-exec-loses-it"),
        pytest.param("auto", OLD, TOO_OLD, [], "ld.so.preload", id="bookworm"),
        pytest.param("auto", NEW, None, ["ld.so.preload"], "ld.so.preload", id="stays-as-it-is"),
        pytest.param("auto", NEW, None, ["systemd"], "systemd", id="systemd-again"),
        pytest.param("auto", NEW, TOO_OLD, ["systemd"], "ld.so.preload", id="systemd-went-back"),
        pytest.param("ld.so.preload", NEW, None, ["systemd"], "ld.so.preload", id="as-asked"),
        pytest.param("systemd", NEW, None, [], "systemd", id="systemd-as-asked"),
        pytest.param("systemd", NEW, TOO_OLD, [], None, id="cannot-by-an-old-systemd"),
        pytest.param("systemd", FORGETFUL, None, [], None, id="cannot-if-exec-loses-it"),
        pytest.param("auto", WITHOUT, None, [], None, id="no-ksm-at-all"),
        pytest.param("ld.so.preload", WITHOUT, None, [], None, id="no-ksm-though-asked"),
    ],
)
def test_which_method(
    wanted: str, kernel: Kernel, obstacle: str | None, already: list[str], expected: str | None
) -> None:
    def choose() -> machine.Choice:
        return machine.choose(wanted, kernel, lambda: obstacle, already)

    if expected is None:
        with pytest.raises(KsmtoolError) as raised:
            choose()
        assert raised.value.status == ExitStatus.UNSUPPORTED
    else:
        choice = choose()
        assert choice.method == expected
        assert choice.why


# ---- The file's problems ----------------------------------------------------------------------


def root_with(folder: Path, text: bytes, mode: int = 0o644) -> Path:
    (folder / "etc").mkdir()
    file = folder / ldpreload.FILE
    file.write_bytes(text)
    file.chmod(mode)
    return folder


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        pytest.param(b"", 0o644, [], id="empty"),
        pytest.param(b"/usr/$LIB/good.so\n", 0o644, [], id="as-we-write-it"),
        pytest.param(b"/opt/${LIB}/multi.so\n", 0o644, [], id="below-a-triplet"),
        pytest.param(
            b"/usr/$LIB/libksm_preload_prctl.so\n", 0o644, ["_prctl.so is missing"], id="gone"
        ),
        pytest.param(b"/usr/lib/empty.so\n", 0o644, ["is no library"], id="empty-library"),
        pytest.param(b"/usr/lib/folder.so\n", 0o644, ["is no library"], id="a-folder"),
        pytest.param(b"/usr/lib/narrow.so\n", 0o644, ["another word size"], id="wrong-class"),
        pytest.param(b"/x/$ORIGIN/a.so x/b.so\n", 0o644, [], id="only-the-loader-knows"),
        pytest.param(b"/gone/a.so\n", 0o644, ["/gone/a.so is missing"], id="dangling"),
        pytest.param(b"good.so configured.so\n", 0o644, [], id="bare-names"),
        pytest.param(b"libfoo.so\n", 0o644, ["libfoo.so is missing"], id="a-bare-name-is-nowhere"),
        pytest.param(
            b"libksm_preload.so /a/libksm_preload_prctl.so\n",
            0o644,
            ["more than one copy", "/a/libksm_preload_prctl.so is missing"],
            id="two-copies",
        ),
        pytest.param(
            b"# a long first comment\n# /x/libksm_preload.so\n",
            0o644,
            ["though it is in a comment"],
            id="a-second-comment-is-loaded",
        ),
        pytest.param(b"# /x/libksm_preload.so\n", 0o644, ["A comment in /etc"], id="commented-out"),
        pytest.param(b"good.so\n", 0o600, ["readable by root only"], id="for-root-only"),
    ],
)
def test_what_is_wrong_with_the_file(
    tmp_path: Path, text: bytes, mode: int, words: list[str]
) -> None:
    root = root_with(tmp_path, text, mode)
    good = Path("/bin/true").read_bytes()
    for path, content in (
        ("usr/lib64/good.so", good),
        ("opt/lib/x86_64-linux-gnu/multi.so", good),
        ("usr/lib/x86_64-linux-gnu/c.so", good),
        ("usr/local/lib/configured.so", good),
        ("etc/ld.so.conf.d/x.conf", b"# local\n/usr/local/lib\n"),
        ("usr/lib/empty.so", b""),
        ("usr/lib/narrow.so", good[:4] + b"\1" + good[5:]),
        ("usr/lib/folder.so/x", b""),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    said = " ".join(ldpreload.problems(root))
    assert bool(said) == bool(words), said
    for word in words:
        assert word in said


def test_adding_is_for_as_long_as_the_body_ends_well(tmp_path: Path) -> None:
    root = root_with(tmp_path, b"/lib/other.so")
    entry = "/usr/$LIB/libksm_preload.so"
    seen = b""

    def fail() -> None:
        nonlocal seen
        with ldpreload.adding(entry, root):
            seen = ldpreload.content(root)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == b"/lib/other.so\n/usr/$LIB/libksm_preload.so"
    assert ldpreload.content(root) == b"/lib/other.so"
    with ldpreload.adding(entry, root) as said:
        assert said.endswith("added")
    assert [one.name for one in ldpreload.entries(root)] == ["/lib/other.so", entry]
    with ldpreload.adding(entry, root) as said:
        assert said.endswith("already")
    assert ldpreload.remove(root).endswith("removed")
    assert ldpreload.content(root) == b"/lib/other.so"


def test_nothing_stays_when_the_one_who_added_it_is_killed(tmp_path: Path) -> None:
    root = root_with(tmp_path, b"/lib/other.so\n")
    code = f"""
import os, signal, sys
from pathlib import Path
from ksmtool import ldpreload
sys.argv[0] = {sys.argv[0]!r}
with ldpreload.adding("libksm_preload.so", Path({str(root)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    wait_until(lambda: ldpreload.content(root) == b"/lib/other.so\n", 10, "the old file is back")


def test_a_library_below_a_venv_is_refused(tree: Tree) -> None:
    del tree
    with pytest.raises(KsmtoolError, match="not in the system's library folder") as raised:
        ldpreload.entry_for("libksm_preload.so")
    assert raised.value.status == ExitStatus.UNSUPPORTED


# ---- The rehearsal ----------------------------------------------------------------------------


def outcome(status: int = 0, stdout: str = "x", stderr: str = "") -> rehearsal.Outcome:
    return rehearsal.Outcome(status, stdout, stderr)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (outcome(), outcome(), []),
        (outcome(), outcome(-11), ["it ends with signal 11, not status 0."]),
        (outcome(), outcome(1), ["it ends with status 1, not status 0."]),
        (outcome(), outcome(-1000, "", "no"), ["it ends with no status (no), not status 0."]),
        (outcome(), outcome(stderr="ERROR: x\n"), ["it says: ERROR: x"]),
        (outcome(), outcome(stdout="y"), ["it prints something else."]),
        (outcome(stderr="noise"), outcome(stderr="noise"), []),
        (outcome(-1000, "", "Exec format error"), outcome(-1000, "", "Exec format error"), []),
    ],
)
def test_what_counts_as_a_difference(
    old: rehearsal.Outcome, new: rehearsal.Outcome, expected: list[str]
) -> None:
    check = rehearsal.Check("it", ("true",))
    assert rehearsal.differences([check], [old], [new]) == expected


def crash(public: Path) -> Path:
    """Return a library whose constructor kills the program."""
    source = public / "crash.c"
    source.write_text(
        "__attribute__((constructor)) static void c(void) { *(volatile int *)0 = 0; }\n"
    )
    library = public / "libksm_preload.so"
    done = run(["gcc", "-shared", "-fPIC", "-o", library, source])
    assert done.returncode == 0, done.stderr
    return library


@pytest.mark.root
def test_a_rehearsal_sees_what_a_file_would_do_and_changes_nothing(
    public: Path, public_tree: Tree
) -> None:
    before = (Path("/etc/ld.so.preload").exists(), Path("/proc/self/mountinfo").read_text())
    programs = rehearsal.checks(ldpreload.architectures())
    plain = rehearsal.run(programs)
    assert {one.status for one in plain} == {0, 2}, plain  # 2: ksm-rescue --help
    what = {check.what.partition(" ")[0] for check in programs}
    assert what >= {"a", "Python", "set-uid"}

    def differences(entry: str) -> list[str]:
        after = rehearsal.under(f"{entry}\n".encode(), programs)
        return rehearsal.differences(programs, plain, after)

    missing = differences("/no/such/library.so")
    dynamic = [check.what for check in programs if check.what != "a static program"]
    assert len(missing) == len(dynamic)
    assert all("cannot be preloaded" in one for one in missing)
    assert all("signal 11" in one for one in differences(str(crash(public)))[:3])
    # Of a library of one architecture the programs of the others complain, where there are any.
    ours = differences(str(public_tree.prctl_library))
    assert len(ours) == max(len(ldpreload.architectures()) - 1, 0), ours
    assert all("wrong ELF class" in one for one in ours)
    assert (Path("/etc/ld.so.preload").exists(), Path("/proc/self/mountinfo").read_text()) == before


@pytest.mark.root
def test_a_rehearsal_that_is_not_allowed_says_so() -> None:
    code = "from ksmtool import rehearsal; rehearsal.under(b'', [])"
    without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    done = run([*without, sys.executable, "-c", code])
    assert "Cannot try the new file in a mount namespace: unshare" in done.stderr


# ---- systemd ----------------------------------------------------------------------------------

UNITS = {
    "usr/lib/systemd/system/ssh.service": "[Service]\nExecStart=-/usr/sbin/sshd -D $OPTS\n",
    "usr/lib/systemd/system/web.service": "[Service]\nExecStart=/usr/bin/web \\\n  --fast\n",
    "usr/lib/systemd/system/two.service": "[Service]\nExecStartPre=+/usr/sbin/sshd -t\n"
    "ExecStart=/usr/bin/web\n",
    "usr/lib/systemd/system/getty@.service": "[Service]\nExecStart=-/sbin/agetty - $TERM\n",
    "usr/lib/systemd/system/named.service": "[Service]\nExecStart=!!sudoedit x\n",
    "usr/lib/systemd/system/empty.service": "[Unit]\nDescription=nothing\n",
    "usr/lib/systemd/system/overridden.service": "[Service]\nExecStart=/usr/sbin/sshd\n",
    "etc/systemd/system/overridden.service": "[Service]\nExecStart=/usr/bin/web\n",
    "usr/lib/systemd/system/user@.service": "[Service]\nExecStart=/lib/systemd/systemd --user\n",
    "usr/lib/systemd/user/agent.service": "[Service]\nExecStart=/usr/bin/gpg-agent --supervised\n",
    "usr/lib/systemd/system/linked.service": "[Service]\nExecStart=/usr/bin/link\n",
    "usr/lib/systemd/system/drop-in.service": "[Service]\nExecStart=/usr/bin/web\n",
    "etc/systemd/system/drop-in.service.d/x.conf": "[Service]\nExecStart=\nExecStart=/sbin/sshd\n",
    "run/systemd/generator/made.service": "[Service]\nExecStart=/usr/sbin/sshd -i\n",
    "usr/lib/systemd/system/blanks.service": "[Service]\n  ExecStart = /usr/sbin/sshd\n",
    "usr/lib/systemd/system/quoted.service": '[Service]\nExecStart="/opt/A B/sshd" -D\n',
    "usr/lib/systemd/system/second.service": "[Service]\nExecStart=/bin/true ; /usr/sbin/sshd\n",
    "usr/lib/systemd/system/comment.service": "[Service]\nExecStart=-\\\n# no\n/usr/sbin/sshd\n",
    "usr/lib/systemd/system/shell.service": "[Service]\nExecStart=/bin/sh -c 'exec sshd -D'\n",
    "usr/lib/systemd/system/env.service": "[Service]\nExecStart=/usr/bin/env A=b sshd\n",
    "usr/lib/systemd/system/reload.service": "[Service]\nExecReload=/usr/sbin/sshd -t\n",
    "usr/lib/systemd/system/words.service": "[Service]\nExecStart=/usr/bin/web --for sshd\n",
    "opt/far/away.service": "[Service]\nExecStart=/usr/sbin/sshd\n",
    "usr/lib/systemd/system/says-no.service": "[Service]\nExecStart=/usr/bin/web\nMemoryKSM=no\n",
    "usr/lib/systemd/system/told-no.service": "[Service]\nExecStart=/usr/bin/web\n",
    "etc/systemd/system/told-no.service.d/10-admin.conf": "[Service]\nMemoryKSM=false\n",
    "usr/lib/systemd/system/says-yes.service": "[Service]\nExecStart=/usr/sbin/sshd\nMemoryKSM=1\n",
}
DENIED = {"sshd", "agetty", "gpg-agent", "sudoedit", "systemd"}


def denied(path: str) -> bool:
    return os.path.basename(path) in DENIED


@pytest.fixture
def units(tmp_path: Path) -> Path:
    for name, text in UNITS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    programs = tmp_path / "usr/bin"
    programs.mkdir()
    (tmp_path / "etc/systemd/user").mkdir()
    (programs / "sudoedit").touch()
    (programs / "link").symlink_to("../sbin/sshd")
    (tmp_path / "etc/systemd/system/sshd.service").symlink_to("/usr/lib/systemd/system/ssh.service")
    (tmp_path / "etc/systemd/system/two.service").symlink_to("/dev/null")
    (tmp_path / "etc/systemd/system/here.service").symlink_to("/opt/far/away.service")
    return tmp_path


def off(drop_ins: list[systemd.DropIn]) -> set[str]:
    paths = {one.path.removesuffix(f"/{systemd.NAME}") for one in drop_ins if not one.on}
    return {path.removeprefix("etc/systemd/") for path in paths}


def test_sensitive_units_are_left_out(units: Path) -> None:
    chosen = systemd.wanted(denied, True, True, units)
    on = [one.path for one in chosen if one.on]
    folders = ("service.d", "user@.service.d", "says-yes.service.d")
    assert on == [f"etc/systemd/system/{folder}/{systemd.NAME}" for folder in folders]
    names = "blanks comment drop-in env getty@ here linked made named quoted reload says-no second"
    names += " shell ssh told-no"
    expected = {f"system/{name}.service.d" for name in names.split()}
    assert off(chosen) == {*expected, "user/agent.service.d"}


# As systemctl 257 prints it, shortened.
SHOWN = """\
ExecStart={ path=/usr/sbin/sshd ; argv[]=/usr/sbin/sshd -D $OPTS ; ignore_errors=no ; pid=0 }
ExecReload={ path=/bin/kill ; argv[]=/bin/kill -HUP $MAINPID ; ignore_errors=no ; pid=0 }
Id=ssh.service
FragmentPath=/no/such/file
DropInPaths=

ExecStart={ path=/opt/A B/web ; argv[]=/opt/A B/web --fast ; ignore_errors=no ; pid=0 }
Id=web@ksm.service

ExecStart={ path=/bin/true ; argv[]=/bin/true ; ignore_errors=no ; pid=0 }
ExecStart={ path=/usr/bin/env ; argv[]=/usr/bin/env gpg-agent ; ignore_errors=no ; pid=0 }
Id=two.service
"""


def test_what_systemd_says_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def systemctl(*arguments: str) -> str:
        asked.append(arguments)
        listed = "ssh.service enabled\nweb@.service static\n"
        return {"show": SHOWN, "list-units": "two.service loaded\n"}.get(arguments[0], listed)

    monkeypatch.setattr(systemd, "_systemctl", systemctl)
    monkeypatch.setattr(systemd, "runs", lambda: True)
    chosen = systemd.wanted(denied, True, False)
    assert off(chosen) == {f"system/{one}.service.d" for one in ("ssh", "two", "user@")}
    assert asked[-1][2:] == ("--", "ssh.service", "two.service", "web@ksm.service")
    monkeypatch.setattr(systemd, "_systemctl", lambda *_: "")
    with pytest.raises(KsmtoolError, match="names no program"):
        systemd.wanted(denied, True, False)


def test_logins_are_left_out_unless_they_are_asked_for(units: Path) -> None:
    assert "system/user@.service.d" in off(systemd.wanted(denied, True, False, units))


def test_a_policy_that_denies_by_default_names_those_that_are_in(units: Path) -> None:
    chosen = systemd.wanted(denied, False, False, units)
    assert {one.path.split("/")[3] for one in chosen if one.on} == {
        "overridden.service.d",
        "says-yes.service.d",
        "web.service.d",
        "words.service.d",
    }


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }


def test_drop_ins_are_written_once_and_taken_away_exactly(units: Path) -> None:
    other = units / "etc/systemd/system/ssh.service.d/own.conf"
    other.parent.mkdir()
    other.write_text("[Service]\n")
    before = snapshot(units)
    chosen = systemd.wanted(denied, True, True, units)
    assert len(systemd.write(chosen, units)) == len(chosen)
    file = units / "etc/systemd/system/service.d" / systemd.NAME
    assert file.read_text().endswith("[Service]\nMemoryKSM=yes\n")
    assert file.stat().st_mode & 0o777 == 0o644
    assert systemd.write(chosen, units) == []
    assert sorted(systemd.present(units), key=str) == sorted(chosen, key=str)
    systemd.write([], units)
    assert snapshot(units) == before


def test_a_drop_in_that_is_no_longer_wanted_goes(units: Path) -> None:
    systemd.write(systemd.wanted(denied, True, True, units), units)
    systemd.write(systemd.wanted(lambda _path: False, True, True, units), units)
    # What says no itself, still does.
    assert off(systemd.present(units)) == {"system/says-no.service.d", "system/told-no.service.d"}


def test_killed_at_any_moment_no_service_is_on_that_should_not_be(
    units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step brings its folder to the disk; what holds then is what a kill leaves."""
    chosen = systemd.wanted(denied, True, True, units)
    wrong: list[set[str]] = []
    real = os.fsync

    def look(descriptor: int) -> None:
        real(descriptor)
        there = systemd.present(units)
        all_on = any(one.on and one.unit == "service" for one in there)
        if all_on and off(there) != off(chosen):
            wrong.append(off(chosen) - off(there))

    monkeypatch.setattr(os, "fsync", look)
    systemd.write(chosen, units)
    systemd.write([], units)
    assert wrong == []


def test_what_a_killed_run_left_is_swept(units: Path) -> None:
    stale = units / f"etc/systemd/system/service.d/.{systemd.NAME}.4711.new"
    stale.parent.mkdir()
    stale.touch()
    systemd.write([], units)
    assert not stale.exists()


def test_a_file_of_our_name_that_is_not_ours_stays(units: Path) -> None:
    other = units / "etc/systemd/system/ssh.service.d" / systemd.NAME
    other.parent.mkdir()
    other.write_text("[Service]\nNice=5\n")
    before = snapshot(units)
    with pytest.raises(KsmtoolError, match="is not of ksm-preload"):
        systemd.write(systemd.wanted(denied, True, True, units), units)
    systemd.write([], units)
    assert snapshot(units) == before


def test_whatever_the_umask_users_can_read_the_drop_ins(units: Path) -> None:
    old = os.umask(0o077)
    try:
        systemd.write(systemd.wanted(denied, True, True, units), units)
    finally:
        os.umask(old)
    for one in systemd.present(units):
        assert (units / one.path).stat().st_mode & 0o777 == 0o644
        assert (units / one.path).parent.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("nth", range(12))
def test_drop_ins_are_as_before_when_a_write_fails(
    units: Path, monkeypatch: pytest.MonkeyPatch, error: int, nth: int
) -> None:
    systemd.write(systemd.wanted(lambda path: "web" in path, True, True, units), units)
    before = snapshot(units)
    real, calls = os.fsync, iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) == nth:
            raise OSError(error, os.strerror(error))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KsmtoolError, match=os.strerror(error)):
        systemd.write(systemd.wanted(denied, True, False, units), units)
    assert snapshot(units) == before


def test_drop_ins_are_as_before_when_systemd_does_not_take_them(
    units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(units)

    def refuse() -> None:
        raise KsmtoolError("no")

    monkeypatch.setattr(systemd, "reload", refuse)
    with pytest.raises(KsmtoolError, match="no"):
        machine.enable_by_systemd(systemd.wanted(denied, True, False, units), units)
    assert snapshot(units) == before


# ---- Consent ----------------------------------------------------------------------------------


def process(root: Path, pid: int, command: bytes) -> None:
    folder = root / "proc" / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(command)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (b"/usr/bin/qemu-system-x86_64\0-m\0001G\0", "a virtual machine"),
        (b"/usr/bin/containerd-shim-runc-v2\0", "a container"),
        (b"/usr/bin/conmon\0--api-version\0", "a container"),
        (b"/usr/libexec/qemu-kvm\0-name\0", "a virtual machine"),
        (b"[lxc monitor] /var/lib/incus/containers c1\0", "a container"),
        (b"qemu-img\0convert\0", None),
        (b"/usr/sbin/containerd\0", None),
        (b"grep\0qemu-system-x86_64\0", None),
        (b"", None),
    ],
)
def test_who_else_runs_here(tmp_path: Path, command: bytes, kind: str | None) -> None:
    process(tmp_path, 7, command)
    process(tmp_path, 8, command)
    tenants = consent.company(tmp_path).tenants
    if kind is None:
        assert tenants == ()
    else:
        assert len(tenants) == 1
        assert tenants[0].startswith(kind)
        assert tenants[0].endswith(", and 1 more)")


def test_consent_is_five_lines_that_fit_a_terminal() -> None:
    lines = consent.FIVE_LINES.splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= 100


@pytest.mark.root
def test_people_are_counted_not_services(tmp_path: Path) -> None:
    for pid, user in ((1, 0), (2, 33), (3, 1000), (4, 1000), (5, 1001), (6, 65534)):
        process(tmp_path, pid, b"x\0")
        os.chown(tmp_path / "proc" / str(pid), user, user)
    assert consent.company(tmp_path).people == 2


# ---- Without a system of its own ----------------------------------------------------------------


@pytest.mark.parametrize("command", ["global-enable", "global-disable"])
def test_only_root_may(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(KsmtoolError, match="Only root may") as raised:
        cli.cli.main([command], standalone_mode=False)
    assert raised.value.status == ExitStatus.NEEDS_ROOT


@pytest.mark.root
def test_enabling_from_a_venv_is_refused_and_changes_nothing(tree: Tree) -> None:
    done = run([tree.ksmtool, "global-enable", "--method", "ld.so.preload", "--yes"])
    assert done.returncode == ExitStatus.UNSUPPORTED
    assert "not in the system's library folder" in done.stderr
    assert not Path("/etc/ld.so.preload").exists()


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["", "dry-run"])
@pytest.mark.parametrize("obstacle", [None, TOO_OLD], ids=["systemd-can", "systemd-cannot"])
@pytest.mark.parametrize("method", ["auto", "systemd", "ld.so.preload"])
def test_from_a_venv_no_method_is_taken(
    method: str, obstacle: str | None, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_change(*_: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(machine, "alone", nullcontext)
    monkeypatch.setattr(wrap, "probe", lambda: NEW)
    monkeypatch.setattr(systemd, "obstacle", lambda: obstacle)
    monkeypatch.setattr(machine, "drop_ins", no_change)
    monkeypatch.setattr(machine, "rehearse", no_change)
    command = ["global-enable", "--method", method, "--yes", "--force", *options]
    with pytest.raises(KsmtoolError, match="below a home or a venv") as raised:
        cli.cli.main(command, standalone_mode=False)
    assert raised.value.status == ExitStatus.UNSUPPORTED
    assert "Install ksm-preload's package" in str(raised.value.hint)


@pytest.mark.root
def test_logins_are_systemds(tree: Tree) -> None:
    done = run([tree.ksmtool, "global-enable", "--method", "ld.so.preload", "--logins"])
    assert done.returncode == ExitStatus.USAGE
    assert "--logins is about the method systemd" in done.stderr


def test_who_started_us_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dpkg and the script that asks are counted like others, but end with us."""
    parents = {1: 0, 20: 1, 30: 20, 31: 20, os.getpid(): 30}
    for pid, parent in parents.items():
        process(tmp_path, pid, b"x\0")
        folder = tmp_path / "proc" / str(pid)
        (folder / "exe").symlink_to(f"/usr/bin/of-{pid}")
        (folder / "maps").write_text("/usr/lib/libksm_preload_prctl.so\n")
        (folder / "stat").write_text(f"{pid} (x) S {parent} 1 1\n")
    monkeypatch.setattr("ksmtool.process.opted_in", lambda *_: True)
    found = machine.processes(tmp_path)
    assert found.still == [(31, "of-31")]
    assert (found.total, found.opted_in) == (4, 4)


@pytest.mark.root
def test_nothing_to_disable(tree: Tree) -> None:
    done = run([tree.ksmtool, "global-disable"])
    assert done.returncode == 0
    assert done.stdout.startswith("Nothing of ours was enabled.\n")


def test_the_shape_of_the_json() -> None:
    status = machine.Status(
        methods=("ld.so.preload", "systemd"),
        entry="/usr/$LIB/libksm_preload.so",
        entries=(ldpreload.Entry("/usr/$LIB/libksm_preload.so", ours=True, in_comment=False),),
        problems=("One.",),
        loaded=True,
        complaint="",
        drop_ins=(systemd.DropIn(f"etc/systemd/system/service.d/{systemd.NAME}", on=True),),
        killed=False,
        processes=machine.Processes(9, 4, 1, 5, Counter({"because": 5}), [(1, "init")]),
    )
    assert json.loads(report.status_as_json(status)) == {
        "schema": 1,
        "methods": ["ld.so.preload", "systemd"],
        "preload": {
            "entry": "/usr/$LIB/libksm_preload.so",
            "entries": [{"name": "/usr/$LIB/libksm_preload.so", "ours": True, "in_comment": False}],
            "loaded": True,
            "complaint": "",
            "problems": ["One."],
        },
        "systemd": {"drop_ins": {f"/etc/systemd/system/service.d/{systemd.NAME}": True}},
        "disabled_by_kill_switch": False,
        "processes": {
            "total": 9,
            "opted_in": 4,
            "library_loaded": 5,
            "unreadable": 1,
            "left_out": {"because": 5},
        },
    }
    lines = report.status_lines(status)
    assert lines[0] == "ld.so.preload: /usr/$LIB/libksm_preload.so, programs that start now load it"
    assert "processes:     4 of 9 opted in (44 %)" in lines


def test_status_of_this_machine(tree: Tree) -> None:
    done = run([tree.ksmtool, "global-status", "--json"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["preload"]["entry"] is None
    assert found["processes"]["total"] > 0
