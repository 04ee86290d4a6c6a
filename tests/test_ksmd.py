# SPDX-License-Identifier: MIT
"""kernel-enable and its kin on the roots of distributions, and on this machine's own kernel."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from conftest import Tree
from distributions import DISTRIBUTIONS, SETTINGS, Distribution
from ksmtool import boot, families, kernel, ksmd, owners, profile, report, state
from ksmtool.errors import ExitStatus, KsmtoolError
from ksmtool.kernel import Ksm
from ksmtool.state import State

KSMTOOL = "/usr/bin/ksmtool"


@pytest.fixture(params=DISTRIBUTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def one(name: str) -> Distribution:
    return DISTRIBUTIONS[name]


@pytest.fixture
def root(one: Distribution, tmp_path: Path) -> Path:
    return one.make(tmp_path)


def off(ksm: Ksm, unmerge: bool = False, init: str = "") -> None:
    ksmd.disable(state.read(ksm.root), unmerge, ksm, init)


class Recorder:
    """Watches what is written to KSM's files, and answers as the kernel does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[tuple[str, str]] = []
        self.fail: dict[str, int] = {}
        self.fail_once: tuple[str, int] | None = None
        real = Path.write_text
        recorder = self

        def write_text(path: Path, text: str, *arguments: object, **options: object) -> int:
            if path.parent.name == "ksm" and path.parent.parent.name == "mm":
                value = text.strip()
                if recorder.fail.get(path.name):
                    number = recorder.fail[path.name]
                    raise OSError(number, os.strerror(number))
                if recorder.fail_once and recorder.fail_once[0] == path.name:
                    number, recorder.fail_once = recorder.fail_once[1], None
                    raise OSError(number, os.strerror(number))
                recorder.written.append((path.name, value))
                if path.name == "advisor_mode":
                    # mm/ksm.c, advisor_mode_store and set_advisor_defaults (6.8)
                    chosen = {"none": "[none] scan-time", "scan-time": "none [scan-time]"}[value]
                    rate = "100" if value == "none" else "500"
                    real(path.with_name("pages_to_scan"), f"{rate}\n")
                    return real(path, f"{chosen}\n")
                mode = path.with_name("advisor_mode")
                taken = mode.exists() and "[scan-time]" in mode.read_text()
                if path.name == "pages_to_scan" and taken:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(path, text)

        monkeypatch.setattr(Path, "write_text", write_text)


@pytest.fixture
def kernel_files(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def snapshot(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else None
        for path in root.rglob("*")
    }


def test_who_else_is_found(one: Distribution, root: Path) -> None:
    found = owners.found(root)
    assert tuple(owner.name for owner in found) == one.others
    assert any(owner.conflict for owner in found) == bool(one.conflict)


FAMILIES = {
    "debian": "Debian",
    "devuan": "Debian",
    "raspberry": "Raspberry Pi OS",
    "ubuntu": "Ubuntu",
    "alma": "Fedora and RHEL",
    "fedora": "Fedora and RHEL",
    "opensuse": "SUSE",
    "sles": "SUSE",
    "arch": "Arch",
    "cachyos": "CachyOS",
    "alpine": "Alpine",
    "gentoo": "Gentoo",
    "proxmox": "Proxmox VE",
    "amazon": "Amazon Linux",
    "void": "other",
}


def test_the_family(name: str, root: Path) -> None:
    assert families.family(root).name == FAMILIES[name.partition("-")[0].partition(" ")[0]]
    assert families.pretty_name(root)
    # Not of the machine that this runs on.
    (root / "etc/os-release").unlink()
    assert families.pretty_name(root) == ""
    assert families.family(root).name in ("other", "Proxmox VE", "Raspberry Pi OS")


def test_a_kernel_without_ksm_and_what_to_do(name: str, root: Path) -> None:
    (root / "sys/kernel/mm/ksm/run").unlink()
    with pytest.raises(KsmtoolError, match="This kernel has no KSM") as raised:
        ksmd.require_host(root)
    assert raised.value.status == ExitStatus.UNSUPPORTED
    assert ("Build the kernel" in str(raised.value.hint)) == name.startswith("gentoo")


def test_a_conflict_is_refused_with_the_ways_out(one: Distribution, root: Path) -> None:
    before = snapshot(root)
    if not one.conflict:
        ksmd.require_ours(root)
        return
    with pytest.raises(KsmtoolError, match="has KSM: it ") as raised:
        ksmd.require_ours(root)
    assert raised.value.hint is not None
    assert one.conflict in raised.value.hint
    assert snapshot(root) == before


@pytest.mark.parametrize("chosen", profile.PROFILES)
def test_enable_and_back(
    one: Distribution, root: Path, kernel_files: Recorder, chosen: str
) -> None:
    ksm = Ksm(root)
    before = ksm.settings()
    changes, _ = ksmd.enable(chosen, None, ksm)
    after = ksm.settings()
    assert after["run"] == "1"
    assert {change.name: (change.old, change.new) for change in changes} == {
        name: (before[name], after[name]) for name in after if before[name] != after[name]
    }
    order = [name for name, _ in kernel_files.written]
    assert order == [name for name in kernel.SETTINGS if name in order], "not the kernel's order"
    if "advisor_mode" in before and chosen != "gentle":
        assert after["advisor_mode"] == "scan-time"
    else:
        rate = profile.pages_to_scan(profile.PROFILES[chosen].cpu)
        assert after["pages_to_scan"] == str(rate)

    kernel_files.written.clear()
    assert ksmd.enable(chosen, None, ksm) == ([], [])
    assert kernel_files.written == []

    off(ksm)
    assert ksm.settings() == before
    assert not (root / state.FILE).parent.exists()


def test_what_is_changed_later_is_told(root: Path, kernel_files: Recorder) -> None:
    ksm = Ksm(root)
    ksmd.enable("balanced", None, ksm)
    assert ksmd.status(ksm, seconds=0).drift == ()
    ksm.write("run", 0)
    found = ksmd.status(ksm, seconds=0)
    assert found.drift == (ksmd.Change("run", "0", "1"),)
    (line,) = [line for line in report.ksmd_lines(found) if line.startswith("changed: ")]
    assert line.split(maxsplit=1)[1] == "run is 0, the profile says 1"


@pytest.mark.parametrize("unmerge", [False, True])
@pytest.mark.parametrize("step", ["sysfs", "state", "boot", "reload"])
def test_when_disabling_fails_all_is_as_it_was(
    root: Path,
    kernel_files: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    unmerge: bool,
) -> None:
    ksm, init = Ksm(root), boot.init_system(root)
    ksmd.enable("fast", None, ksm, boot.files(init, KSMTOOL))
    before, real, failing = snapshot(root), Path.unlink, True

    def unlink(path: Path, missing_ok: bool = False) -> None:
        kinds = {"state": "kernel.json", "boot": "ksm-preload.service"}
        if init == "openrc" and step == "boot":
            kinds["boot"] = "ksm-preload"
        if failing and path.name == kinds.get(step) and path.exists():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(path, missing_ok)

    def reload(_command: object, _root: object) -> None:
        if step == "reload":
            raise KsmtoolError("daemon-reload failed")

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr(boot, "_call", reload)
    if step == "sysfs":
        kernel_files.fail_once = ("use_zero_pages", errno.EBUSY)
    if init in ("systemd", "openrc") or step in ("sysfs", "state"):
        with pytest.raises(KsmtoolError):
            off(ksm, unmerge, init)
    failing = False
    assert snapshot(root) == before


def test_what_was_found_first_is_what_comes_back(root: Path, kernel_files: Recorder) -> None:
    ksm = Ksm(root)
    before = ksm.settings()
    ksmd.enable("gentle", None, ksm)
    ksmd.enable("fast", 30, ksm)
    mine = {name: value for name, value in before.items() if name in profile.SETS}
    assert state.read(root) == State("fast", 30, mine)
    off(ksm)
    assert ksm.settings() == before


def test_after_a_boot_it_is_set_again(
    one: Distribution, root: Path, kernel_files: Recorder
) -> None:
    ksm = Ksm(root)
    ksmd.enable("balanced", None, ksm)
    wanted = ksm.settings()
    for name, (since, default) in SETTINGS.items():
        if since <= one.kernel:
            (ksm.folder / name).unlink()
            (ksm.folder / name).touch()
            with (ksm.folder / name).open("w") as file:
                file.write(default + "\n")
    ksmd.apply_state(ksm)
    assert ksm.settings() == wanted


ERRORS = (errno.EROFS, errno.EACCES, errno.EBUSY, errno.EINVAL, errno.ENOENT)


def test_when_a_write_fails_all_is_as_it_was(root: Path, kernel_files: Recorder) -> None:
    ksm = Ksm(root)
    before = snapshot(root)
    planned = ksmd.planned(ksm, profile.settings(profile.PROFILES["fast"], ksm.settings()))
    assert len(planned) >= 2
    for nth, change in enumerate(planned):
        for error in ERRORS if nth == 0 else (ERRORS[nth % len(ERRORS)],):
            kernel_files.fail = {change.name: error}
            with pytest.raises(KsmtoolError, match=f"Cannot set KSM's {change.name} to "):
                ksmd.enable("fast", None, ksm)
            kernel_files.fail = {}
            assert snapshot(root) == before


def test_run_of_2_is_not_set_again(root: Path, kernel_files: Recorder) -> None:
    """It would unmerge the whole machine."""
    ksm = Ksm(root)
    ksm.write("run", 2)
    ksmd.enable("gentle", None, ksm)
    kernel_files.written.clear()
    off(ksm)
    assert [value for name, value in kernel_files.written if name == "run"] == ["0"]


def test_what_no_profile_sets_is_left_to_others(root: Path, kernel_files: Recorder) -> None:
    ksm = Ksm(root)
    ksmd.enable("gentle", None, ksm)
    ksm.write("merge_across_nodes", 0)
    ksm.write("max_page_sharing", 512)
    others = {name: value for name, value in ksm.settings().items() if name not in profile.SETS}
    off(ksm)
    assert others.items() <= ksm.settings().items()


def test_without_ksm_our_files_can_be_removed(root: Path, kernel_files: Recorder) -> None:
    before, init = snapshot(root), boot.init_system(root)
    ksmd.enable("gentle", None, Ksm(root), boot.files(init, KSMTOOL))
    shutil.rmtree(root / "sys/kernel/mm/ksm")
    off(Ksm(root), init=init)
    left = {path: what for path, what in snapshot(root).items() if what is not None}
    assert left.items() <= before.items()


def test_whatever_the_umask_users_can_look(root: Path, kernel_files: Recorder) -> None:
    init = boot.init_system(root)
    old = os.umask(0o077)
    try:
        ksmd.enable("gentle", None, Ksm(root), boot.files(init, KSMTOOL))
    finally:
        os.umask(old)
    for file in (root / state.FILE, *(root / path for path in boot.ours(init, root))):
        assert os.lstat(file).st_mode & 0o444 == 0o444
        assert file.parent.stat().st_mode & 0o777 == 0o755


def test_a_state_that_cannot_be_kept_changes_nothing(root: Path, kernel_files: Recorder) -> None:
    (root / "var/lib/ksm-preload").write_text("in the way\n")
    before = snapshot(root)
    with pytest.raises(KsmtoolError, match="Cannot write /var/lib"):
        ksmd.enable("balanced", None, Ksm(root))
    assert snapshot(root) == before


def test_boot_files_that_cannot_be_written_change_nothing(
    root: Path, kernel_files: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = boot.files(boot.init_system(root), KSMTOOL)
    if files is None:
        return

    def refuse(*_: object) -> None:
        raise KsmtoolError("no")

    monkeypatch.setattr(boot, "install", refuse)
    ksm = Ksm(root)
    before = ksm.settings()
    with pytest.raises(KsmtoolError, match="no"):
        ksmd.enable("fast", None, ksm, files)
    assert ksm.settings() == before
    assert not (root / state.FILE).exists()


WHOLE = {"schema": 1, "profile": "fast", "cpu": 1, "found": {}}
DAMAGED: list[object] = [[], {}, {**WHOLE, "schema": 2}, {**WHOLE, "profile": "x"}]
DAMAGED += [{**WHOLE, "cpu": cpu} for cpu in (-500, 0, 101, True, "1")] + [{**WHOLE, "found": 1}]


def test_a_state_is_read(tmp_path: Path) -> None:
    (tmp_path / state.FILE).parent.mkdir(parents=True)
    (tmp_path / state.FILE).write_text(json.dumps(WHOLE))
    assert state.read(tmp_path) == State("fast", 1, {})


@pytest.mark.parametrize("text", ["", "{", "\udcff", *map(json.dumps, DAMAGED)])
def test_a_damaged_state(tmp_path: Path, text: str) -> None:
    file = tmp_path / state.FILE
    file.parent.mkdir(parents=True)
    file.write_bytes(os.fsencode(text))
    with pytest.raises(KsmtoolError, match="is damaged"):
        state.read(tmp_path)


def test_unmerging_wants_the_memory(root: Path, kernel_files: Recorder) -> None:
    ksm = Ksm(root)
    with (ksm.folder / "pages_sharing").open("w") as file:
        file.write("2000000\n")
    before = snapshot(root)
    with pytest.raises(KsmtoolError, match="Unmerging needs 8192 MB, and 4096 MB are available"):
        off(ksm, unmerge=True)
    assert snapshot(root) == before


# ---- At boot ----------------------------------------------------------------------------------


NEVER_BEFORE = {"momd", "mom-vdsm", "uksmd"}
"""These are in conflict, and no service of theirs sets KSM once and for all."""


def test_what_is_written_for_the_next_boot(name: str, root: Path) -> None:
    before = snapshot(root)
    init = boot.init_system(root)
    files = boot.files(init, KSMTOOL)
    if "void" in name or "devuan" in name:
        assert files is None
        assert not boot.installed(init, root)
        for line, there in (("ksmtool kernel-apply", True), ("# ksmtool kernel-apply", False)):
            (root / boot.LOCAL).write_text(f"#!/bin/sh\n{line}\n")
            assert boot.installed(init, root) is there
        return
    assert files is not None
    planned = boot.planned(files, root)
    changed = boot.install(files, root)
    assert planned == changed
    assert boot.planned(files, root) == boot.install(files, root) == []
    assert not boot.installed(init, root), "nothing is there to be run"
    (root / KSMTOOL.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    (root / KSMTOOL.lstrip("/")).touch()
    assert boot.installed(init, root)
    if init == "openrc":
        script = root / "etc/init.d/ksm-preload"
        assert stat.S_IMODE(script.stat().st_mode) == 0o755
        assert script.read_text().startswith("#!/sbin/openrc-run\n")
        assert f"\t{KSMTOOL} kernel-apply\n" in script.read_text()
        assert os.readlink(root / "etc/runlevels/default/ksm-preload") == "/etc/init.d/ksm-preload"
    else:
        unit = (root / "etc/systemd/system/ksm-preload.service").read_text()
        assert f"ExecStart={KSMTOOL} kernel-apply\n" in unit
        after = {
            name
            for line in unit.splitlines()
            if line.startswith("After=")
            for name in line.removeprefix("After=").split()
        }
        early = {"systemd-tmpfiles-setup", "sysfsutils", "rc-local"}
        of_all = {
            service for one in families.FAMILIES for m in one.known() for service in m.services
        }
        assert {f"{name}.service" for name in early | of_all - NEVER_BEFORE} <= after
    assert len(changed) == 2
    with boot.removed(init, root) as gone:
        assert sorted(gone) == sorted(changed)
    after_all = {
        path: what
        for path, what in snapshot(root).items()
        if what is not None and path != KSMTOOL.lstrip("/")
    }
    assert after_all.items() <= before.items()


@pytest.mark.parametrize("nth", range(2))
def test_when_the_boot_files_cannot_be_written_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    root = DISTRIBUTIONS["alpine"].make(tmp_path)
    before = set(snapshot(root))
    files = boot.files("openrc", KSMTOOL)
    assert files is not None

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if nth == 0:
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "symlink_to", fail)
    with pytest.raises(KsmtoolError, match="No space left"):
        boot.install(files, root)
    assert set(snapshot(root)) - before <= {"etc/init.d"}


@pytest.mark.parametrize("older", [False, True])
def test_when_the_init_system_refuses_all_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    root = DISTRIBUTIONS["debian-13"].make(tmp_path)
    files = boot.files("systemd", KSMTOOL)
    assert files is not None
    unit = root / "etc/systemd/system/ksm-preload.service"
    if older:
        unit.parent.mkdir(parents=True)
        unit.write_text(files.texts["etc/systemd/system/ksm-preload.service"] + "# older\n")
    found = snapshot(root)

    def refuse(_command: object, _root: object) -> None:
        raise KsmtoolError("systemctl daemon-reload failed: no bus")

    monkeypatch.setattr(boot, "_call", refuse)
    with pytest.raises(KsmtoolError, match="no bus"):
        boot.install(files, root)
    left = snapshot(root)
    assert {path: left[path] for path in found} == found
    assert all(left[path] is None for path in left.keys() - found.keys()), left


@pytest.mark.parametrize("what", ["another's", "masked"])
def test_a_unit_of_that_name_that_is_not_ours_stays(tmp_path: Path, what: str) -> None:
    root = DISTRIBUTIONS["debian-13"].make(tmp_path)
    unit = root / "etc/systemd/system/ksm-preload.service"
    unit.parent.mkdir(parents=True)
    if what == "masked":
        unit.symlink_to("/dev/null")
    else:
        unit.write_text("[Service]\nExecStart=/usr/local/bin/my-own\n")
    before = snapshot(root)
    files = boot.files("systemd", KSMTOOL)
    assert files is not None
    with pytest.raises(KsmtoolError, match=r"ksm-preload\.service is there, and not of ksmtool"):
        boot.install(files, root)
    with boot.removed("systemd", root) as gone:
        assert gone == []
    assert snapshot(root) == before


# ---- Managers that run, containers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("/bin/bash", "/usr/sbin/ksmtuned"), "ksmtuned"),
        (("/usr/bin/virt-handler", "-v", "2"), "KubeVirt's virt-handler"),
        (("/usr/bin/python3", "/usr/sbin/momd"), "MOM (oVirt)"),
        (("/usr/bin/python3", "-Es", "/usr/share/vdsm/vdsmd"), "MOM (oVirt)"),
        (("/usr/bin/uksmd",), "uksmd"),
        (("grep", "-r", "ksmtuned"), None),
        (("vi", "/etc/ksmtuned.conf"), None),
        (("less", "/usr/sbin/ksmtuned"), None),
    ],
)
def test_a_manager_that_runs(tmp_path: Path, words: tuple[str, ...], expected: str | None) -> None:
    one = DISTRIBUTIONS["debian-13"]
    root = one.make(tmp_path)
    one.running(root, 7, *words)
    assert [owner.name for owner in owners.found(root)] == ([expected] if expected else [])


@pytest.mark.root
def test_a_users_process_of_that_name_is_none(tmp_path: Path) -> None:
    one = DISTRIBUTIONS["debian-13"]
    root = one.make(tmp_path)
    one.running(root, 7, "/usr/sbin/ksmtuned")
    os.chown(root / "proc/7", 65534, -1)
    assert owners.found(root) == []


def test_a_masked_file_of_tmpfiles_is_none(tmp_path: Path) -> None:
    root = DISTRIBUTIONS["cachyos"].make(tmp_path)
    (root / "etc/tmpfiles.d").mkdir()
    (root / "etc/tmpfiles.d/ksm.conf").symlink_to("/dev/null")
    assert [owner.name for owner in owners.found(root)] == ["ksmd.service"]


@pytest.mark.parametrize("where", ["etc", "run"])
def test_a_masked_manager_is_none(tmp_path: Path, where: str) -> None:
    root = DISTRIBUTIONS["debian-13 with ksmtuned"].make(tmp_path)
    (root / where / "systemd/system/ksmtuned.service").symlink_to("/dev/null")
    assert [owner.name for owner in owners.found(root)] == ["ksm.service"]


@pytest.mark.parametrize(
    "sign", ["run/systemd/container", ".dockerenv", "run/.containerenv", "proc/1/environ"]
)
def test_in_a_container_nothing_is_set(tmp_path: Path, sign: str) -> None:
    root = DISTRIBUTIONS["debian-13"].make(tmp_path)
    ksmd.require_host(root)
    (root / sign).parent.mkdir(parents=True, exist_ok=True)
    (root / sign).write_text("A=b\0container=lxc\0")
    with pytest.raises(KsmtoolError, match="This is a container") as raised:
        ksmd.require_host(root)
    assert raised.value.status == ExitStatus.UNSUPPORTED
    # A machine that was made of a container's image.
    (root / "proc/self/ns").mkdir(parents=True)
    (root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    ksmd.require_host(root)


# ---- Profiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "pages"), [(1, 78), (2, 157), (10, 855), (50, 7692), (99, 30000), (100, 30000)]
)
def test_pages_for_a_share_of_a_cpu(cpu: int, pages: int) -> None:
    assert profile.pages_to_scan(cpu) == pages


def test_a_limit_below_the_advisors_is_kept_without_it() -> None:
    found = {**{name: "" for name in SETTINGS}, "advisor_mode": "none"}
    assert profile.settings(profile.PROFILES["fast"], found, 5)["advisor_mode"] == "none"
    assert profile.settings(profile.PROFILES["fast"], found, 11)["advisor_max_cpu"] == "11"


def test_the_advisor_is_not_switched_on_once_ksmd_has_worked() -> None:
    """See profile.py; what it does then is in tests/vm/guest.py."""
    found = {**{name: "" for name in SETTINGS}, "advisor_mode": "none"}
    balanced = profile.PROFILES["balanced"]
    assert profile.settings(balanced, found, None, 0.05)["advisor_mode"] == "scan-time"
    late = profile.settings(balanced, found, None, 7.0)
    assert (late["advisor_mode"], late["pages_to_scan"]) == ("none", "1357")
    found["advisor_mode"] = "scan-time"
    assert profile.settings(balanced, found, None, 7.0)["advisor_mode"] == "scan-time"


# ---- This kernel ------------------------------------------------------------------------------


@pytest.fixture
def own(ksm: Ksm, tmp_path: Path) -> Ksm:
    """This kernel's KSM, with a root of its own for our file."""
    (tmp_path / "sys").symlink_to("/sys")
    (tmp_path / "proc").symlink_to("/proc")
    (tmp_path / "var/lib").mkdir(parents=True)
    return Ksm(tmp_path)


@pytest.mark.ksm
@pytest.mark.parametrize("chosen", profile.PROFILES)
def test_this_kernel_takes_the_profiles(own: Ksm, chosen: str) -> None:
    before = own.settings()
    ksmd.enable(chosen, None, own)
    assert own.running()
    kept = json.loads((own.root / state.FILE).read_text())["found"]
    assert kept.items() <= before.items()
    off(own)
    assert own.settings() == before


@pytest.mark.ksm
def test_settling_merges_what_there_is_and_goes_back_to_the_rate(own: Ksm, tree: Tree) -> None:
    code = "b = bytearray(8 << 20); b[::4096] = b'x' * 2048; print(); input()"
    command = [str(tree.wrapper), sys.executable, "-uc", code]
    ksmd.enable("gentle", None, own)
    kept = State("gentle", None, {})
    rate = own.settings()
    before = own.counters().merged
    said: list[str] = []
    with ExitStack() as stack:
        for _ in range(2):
            # Each ends when its input does.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        ksmd.settle(own, kept, 60, lambda text, _done: said.append(text))
        assert own.counters().merged - before >= 2 * 2048 - 1
    assert own.settings() == rate
    assert said[0].startswith("settling: ")


@pytest.mark.ksm
def test_settling_that_is_interrupted_goes_back_to_the_rate(own: Ksm) -> None:
    ksmd.enable("gentle", None, own)
    kept = State("gentle", None, {})
    rate = own.settings()

    def interrupt(_text: str, _done: float) -> None:
        assert own.settings() != rate
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ksmd.settle(own, kept, 60, interrupt)
    assert own.settings() == rate


@pytest.mark.ksm
def test_settling_ends_when_the_time_is_up(own: Ksm) -> None:
    ksmd.enable("gentle", None, own)
    kept = State("gentle", None, {})
    result = ksmd.settle(own, kept, 1e-3, lambda _text, _done: None)
    assert result.end == "late"


@pytest.mark.ksm
def test_settling_ends_where_there_is_nothing_to_merge(own: Ksm) -> None:
    """ksmd sleeps then: no pass ever ends."""
    if own.counters().records:
        own.write("run", 2)
    ksmd.enable("gentle", None, own)
    result = ksmd.settle(own, State("gentle", None, {}), 60, lambda _text, _done: None)
    assert result.end == "idle"
    assert result.seconds < 30


@pytest.mark.ksm
def test_settling_leaves_the_advisor_on(own: Ksm) -> None:
    """It could not be switched on again before the next boot."""
    own.apply({"advisor_mode": "scan-time", "run": "1"})
    kept = State("fast", 60, {})
    assert kept.advised(own)
    ksmd.settle(own, kept, 60, lambda _text, _done: None)
    after = own.settings()
    assert after["advisor_mode"] == "scan-time"
    assert (after["advisor_max_cpu"], after["sleep_millisecs"]) == ("60", "20")


@pytest.mark.ksm
def test_settling_ends_when_somebody_switches_ksm_off(own: Ksm) -> None:
    ksmd.enable("gentle", None, own)

    def switch_off(_text: str, _done: float) -> None:
        own.write("run", 0)

    with pytest.raises(KsmtoolError, match="Something else has switched KSM off"):
        ksmd.settle(own, State("gentle", None, {}), 60, switch_off)
    assert not own.running()
    assert own.read("pages_to_scan") == str(profile.pages_to_scan(2))


@pytest.mark.ksm
def test_unmerging_gives_every_page_back(own: Ksm, tree: Tree) -> None:
    code = "b = bytearray(b'x' * (8 << 20)); print(flush=True); input()"
    command = [str(tree.wrapper), sys.executable, "-c", code]
    ksmd.enable("fast", None, own)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ksmd.settle(own, State("fast", None, {}), 60, lambda _text, _done: None)
        assert own.counters().pages_sharing > 2000
        off(own, unmerge=True)
        assert own.counters().pages_sharing == 0
        process.communicate(b"\n")
    assert not own.running()
