# SPDX-License-Identifier: MIT
"""`ksmtool doctor`: each finding on a root that has it and on one that has not, and live."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from conftest import HERE, Tree, run
from ksmtool import boot, cli, doctor, doctor_report, examine, kinds, policy, process, systemd
from ksmtool.compare import Comparison
from ksmtool.doctor import Finding
from ksmtool.errors import KsmtoolError
from ksmtool.examine import Checkup
from ksmtool.facts import Pace
from ksmtool.kernel import Ksm
from ksmtool.kinds import Kinds
from ksmtool.policy import Verdict
from ksmtool.program import Program
from ksmtool.state import State
from ksmtool.wrap import Kernel
from machines import ID, MACHINES, Process

LAST = MACHINES["6.18, v2, Kubernetes"]
MACHINE = replace(
    LAST,
    processes=[
        *LAST.processes,
        Process(800, "app", "/usr/bin/app", anonymous=10000, used=10000),
        Process(801, "fine", "/usr/bin/fine", "/init.scope", anonymous=10000, used=10000,
                records=10000, opted_in=True),
    ],
)  # fmt: skip
OUT, IN = 800, 801

NEW = Kernel(prctl=True, inherit=True, madvise=True)
LOSES = Kernel(prctl=True, inherit=False, madvise=True)
OLD = Kernel(prctl=False, inherit=False, madvise=True)


def mapping(flags: str, rss: int = 40000, anonymous: int = 40000, **more: int) -> str:
    """Return one mapping as in smaps; sizes are in kB."""
    sizes = {"Rss": rss, "Anonymous": anonymous, **more}
    return (
        "7f0000000000-7f0002710000 rw-p 00000000 00:00 0 \n"
        + "".join(f"{name}: {size:8d} kB\n" for name, size in sizes.items())
        + f"VmFlags: rd wr mr mw me ac sd {flags}\n"
    )


@pytest.fixture
def root(tmp_path: Path, tree: Tree) -> Path:
    """Return a machine of which nothing is to be said."""
    assert tree.rescue.exists()
    root = MACHINE.make(tmp_path / "root")
    ksm = Ksm(root)
    wanted = State("balanced", None, {"run": "0"})
    for name, value in wanted.settings(ksm).items():
        (ksm.folder / name).write_text(f"{value}\n")
    (ksm.folder / "pages_unshared").write_text("12000\n")  # all that is opted in has records
    state = root / "var/lib/ksm-preload/kernel.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"schema": 1, "profile": "balanced", "cpu": null, "found": {"run": "0"}}')
    (root / "run/systemd/system").mkdir(parents=True)
    files = boot.files("systemd", "/usr/bin/ksmtool")
    assert files is not None
    for path, text in files.texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    for path, target in files.links.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/lib").mkdir(exist_ok=True)
    (root / "usr/bin/ksmtool").write_text("")
    for pid, name, mark in ((OUT, "app", ""), (IN, "fine", "mg")):
        shutil.copy("/bin/true", root / "usr/bin" / name)
        folder = root / f"proc/{pid}"
        (folder / "smaps").write_text(mapping(mark))
        (folder / "maps").write_text("7f0000000000-7f0002710000 rw-p 00000000 00:00 0\n")
        (folder / "environ").write_bytes(b"XKSM_PRELOAD=off\0")
        (folder / "auxv").write_bytes(struct.pack("QQQQ", 23, 0, 0, 0))
        (folder / "cmdline").write_bytes(f"/usr/bin/{name}\0-x\0a b\0".encode())
        (folder / "root").symlink_to(root)
    (root / "proc/sys/vm").mkdir()
    (root / "proc/sys/vm/max_map_count").write_text("65530\n")
    (root / "proc/stat").write_text("cpu 1 2 3\nbtime 1700000000\n")
    return root


def look(
    root: Path, pid: int | None = None, command: Sequence[str] = (), kernel: Kernel = NEW
) -> Checkup:
    environ = {"PATH": "/usr/bin"}
    return examine.examine(pid, command, root, kernel, seconds=0, environ=environ)


def ids(checkup: Checkup) -> list[str]:
    return [one.id for one in doctor.diagnose(checkup)]


@pytest.mark.parametrize(("pid", "command"), [(None, ()), (IN, ()), (None, ("app", "-x"))])
def test_nothing_to_say(root: Path, pid: int | None, command: Sequence[str]) -> None:
    checkup = look(root, pid, command)
    assert doctor.diagnose(checkup) == []
    assert doctor.verdict(checkup, []).startswith("Healthy: KSM is on")
    assert checkup.unlooked == ()


# ---- Every finding -------------------------------------------------------------------------


def file(path: str, text: str | bytes) -> Callable[[Path], None]:
    """Return what writes a file below a root."""

    def write(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, str):
            (root / path).write_text(text)
        else:
            (root / path).write_bytes(text)

    return write


def setting(name: str, value: object) -> Callable[[Path], None]:
    return file(f"sys/kernel/mm/ksm/{name}", f"{value}\n")


def smaps(pid: int, *mappings: str) -> Callable[[Path], None]:
    return file(f"proc/{pid}/smaps", "".join(mappings))


def without_ksm(root: Path) -> None:
    shutil.rmtree(root / "sys/kernel/mm/ksm")


def ksmtuned(root: Path) -> None:
    wants = root / "etc/systemd/system/multi-user.target.wants"
    (wants / "ksmtuned.service").symlink_to("/usr/lib/systemd/system/ksmtuned.service")


def not_kept(root: Path) -> None:
    (root / "etc/systemd/system/multi-user.target.wants/ksm-preload.service").unlink()


def nobody_opted_in(root: Path) -> None:
    for stat in root.glob("proc/*/ksm_stat"):
        stat.write_text("ksm_rmap_items 0\nksm_merge_any: no\nksm_mergeable: no\n")
    for name in ("shared", "sharing", "unshared", "volatile"):
        setting(f"pages_{name}", 0)(root)
    setting("general_profit", 0)(root)


def nothing_equal(root: Path) -> None:
    setting("pages_sharing", 0)(root)
    setting("pages_unshared", 25000)(root)


def a_loss(root: Path) -> None:
    stat = "ksm_rmap_items 20000\nksm_zero_pages 0\nksm_merging_pages 0\n"
    file(f"proc/{IN}/ksm_stat", stat + "ksm_merge_any: yes\nksm_mergeable: yes\n")(root)


def crowded(root: Path) -> None:
    file("proc/sys/vm/max_map_count", "10\n")(root)
    file(f"proc/{IN}/maps", "x\n" * 8)(root)


def called_ssh_agent(root: Path) -> None:
    (root / f"proc/{OUT}/exe").unlink()
    (root / f"proc/{OUT}/exe").symlink_to("/usr/bin/ssh-agent")


def setuid(root: Path) -> None:
    file(f"proc/{OUT}/auxv", struct.pack("QQQQ", 6, 4096, 23, 1))(root)
    (root / "usr/bin/app").chmod(0o4755)


def static(root: Path) -> None:
    shutil.copy(Tree.below(Path(sys.executable).parent.parent).rescue, root / "usr/bin/app")


def preload_after_start(root: Path) -> None:
    shutil.copy("/bin/true", root / "usr/lib/libksm_preload.so")
    file("etc/ld.so.preload", "/usr/lib/libksm_preload.so\n")(root)
    started = 100 * os.sysconf("SC_CLK_TCK")
    file(f"proc/{OUT}/stat", f"800 (a) b) S 1 {'0 ' * 17}{started} 0 0\n")(root)


def child_of_one_opted_in(root: Path) -> None:
    status = root / f"proc/{OUT}/status"
    status.write_text(status.read_text().replace("PPid:\t1\n", f"PPid:\t{IN}\n"))


def is_program(**what: str) -> Callable[[Checkup], Checkup]:
    """Return what makes the program one of another kind."""

    def change(checkup: Checkup) -> Checkup:
        assert checkup.subject is not None
        assert checkup.subject.program is not None
        program: Program = replace(checkup.subject.program, **what)  # type: ignore[arg-type]
        return replace(checkup, subject=replace(checkup.subject, program=program))

    return change


def compared(comparison: Comparison) -> Callable[[Checkup], Checkup]:
    def change(checkup: Checkup) -> Checkup:
        assert checkup.subject is not None
        subject = replace(checkup.subject, twin=900, comparison=comparison)
        return replace(checkup, subject=subject)

    return change


@dataclass(frozen=True)
class Case:
    """What has to be so for a finding, words of its sentence, and its fixes."""

    words: str
    fixes: tuple[str, ...] = ()
    root: Callable[[Path], None] = lambda _root: None
    checkup: Callable[[Checkup], Checkup] = lambda checkup: checkup
    pid: int | None = None
    absent: int | None = None
    """The process that has not got it, if not the same before the change."""
    kernel: Kernel = NEW


ENABLE = "sudo ksmtool kernel-enable"
WRAP = "ksmtool wrap -- /usr/bin/app -x 'a b'"
LOCAL = "/etc/ksm-preload/policy.d"


def rule(text: str) -> str:
    return f"sudo mkdir -p {LOCAL}; echo '{text}' | sudo tee -a {LOCAL}/local.conf"


CASES = {
    "ksm-missing": Case(
        "no KSM",
        ("grep CONFIG_KSM= /boot/config-$(uname -r)   # it takes a kernel with CONFIG_KSM=y",),
        without_ksm,
    ),
    "ksm-off": Case("something has switched it", (ENABLE,), setting("run", 0)),
    "other-manager": Case(
        "ksmtuned has KSM",
        (
            "sudo systemctl disable --now ksmtuned.service   # then sudo ksmtool kernel-enable",
            "sudoedit /etc/ksmtuned.conf && sudo systemctl restart ksmtuned.service   "
            "# KSM_THRES_COEF=95 leaves KSM to it",
        ),
        ksmtuned,
    ),
    "state-damaged": Case(
        "is damaged",
        ("sudo ksmtool kernel-disable && sudo ksmtool kernel-enable",),
        file("var/lib/ksm-preload/kernel.json", "x"),
    ),
    "settings-drift": Case("smart_scan is 0, not 1", (ENABLE,), setting("smart_scan", 0)),
    "not-kept": Case("at the next boot", (ENABLE,), not_kept),
    "slow-scan": Case("2 h", (f"{ENABLE} --profile fast",), setting("sleep_millisecs", 600000)),
    "nothing-opted-in": Case(
        "No process",
        ("ksmtool wrap -- CMD   # one program", "sudo ksmtool global-enable   # all that start"),
        nobody_opted_in,
    ),
    "nothing-merged": Case("after 12 passes", ("sudo ksmtool estimate --all",), nothing_equal),
    "machine-loss": Case(
        "records take",
        ("sudo ksmtool status --by app --sort profit   # leave out those with a loss",),
        setting("general_profit", -2_000_000),
    ),
    "program-loss": Case("/usr/bin/fine saves 0.0 MB", (rule("deny /usr/bin/fine"),), a_loss),
    "preload-file": Case(
        "is missing",
        ("sudo ksmtool global-disable",),
        file("etc/ld.so.preload", "/usr/lib/libksm_preload.so\n"),
    ),
    "kill-switch": Case(
        "is there", ("sudo rm /run/ksm-preload.disabled",), file("run/ksm-preload.disabled", "")
    ),
    "policy-files": Case(
        "a mistake",
        ("ksmtool policy check",),
        file("etc/ksm-preload/policy.d/x.conf", "nonsense\n"),
    ),
    "crowded-mappings": Case(
        "fine (801) has 8 mappings of the 10",
        (
            "sudo sysctl vm.max_map_count=20   # until the next boot; a line in /etc/sysctl.d "
            "keeps it",
        ),
        crowded,
    ),
    "host-of-container": Case("a container", (), file(".dockerenv", "")),
    "left-out": Case(
        "by the policy", (rule("allow /usr/bin/ssh-agent"),), called_ssh_agent, pid=OUT
    ),
    "off-by-environment": Case(
        "KSM_PRELOAD=off",
        (f"env -u KSM_PRELOAD {WRAP}",),
        file(f"proc/{OUT}/environ", b"A=KSM_PRELOAD=of\0KSM_PRELOAD=off\0"),
        pid=OUT,
    ),
    "privileged": Case("app (800) is setuid", (), setuid, pid=OUT),
    "static": Case("is static", (WRAP,), static, pid=OUT),
    "architecture": Case(
        "architecture, riscv", (WRAP,), checkup=is_program(machine="riscv"), pid=OUT
    ),
    "musl": Case(
        "does not read /etc/ld.so.preload",
        (WRAP,),
        checkup=is_program(loader="/lib/ld-musl-x86_64.so.1"),
        pid=OUT,
    ),
    "sanitizer": Case(
        "linked to libasan.so.8", (WRAP,), checkup=is_program(sanitizer="libasan.so.8"), pid=OUT
    ),
    "confined": Case(
        "in a snap",
        (),
        file(f"proc/{OUT}/attr/current", "snap.a.b (enforce)\n"),
        pid=OUT,
        kernel=LOSES,
    ),
    "container": Case(
        "(docker:3f4e2a1b9c8d)",
        ("ksm-wrapper /usr/bin/app -x 'a b'   # in the container, as its entry point",),
        file(f"proc/{OUT}/cgroup", f"0::/system.slice/docker-{ID}.scope\n"),
        pid=OUT,
    ),
    "flag-lost": Case("drops the flag", (WRAP,), child_of_one_opted_in, pid=OUT, kernel=LOSES),
    "started-before": Case("before /etc/ld.so.preload", (WRAP,), preload_after_start, pid=OUT),
    "not-opted-in": Case("app (800) is not opted in", (WRAP,), pid=OUT, absent=IN),
    "shared-memory": Case(
        "41.0 of 81.9 MB are shared", (), smaps(IN, mapping("mg"), mapping("sh")), pid=IN
    ),
    "hugetlb": Case(
        "hugetlbfs", (), smaps(IN, mapping("mg"), mapping("ht", 0, 0, Private_Hugetlb=8192)), pid=IN
    ),
    "file-memory": Case("page cache", (), smaps(IN, mapping("mg", anonymous=20000)), pid=IN),
    "huge-pages": Case("transparent", (), smaps(IN, mapping("mg", AnonHugePages=20480)), pid=IN),
    "never-merges": Case("hardly anything", (), smaps(IN, mapping("mg", anonymous=1000)), pid=IN),
    "partly-opted-in": Case(
        "41.0 of 81.9 MB are opted in", (), smaps(IN, mapping("mg"), mapping("")), pid=IN
    ),
    "layout-differs": Case(
        "fine (801) and 900 apart: 5 % of their pages are equal as they are, and in a group at "
        "least 65 %",
        ("ksmtool try --arms plain,wrap,group -- /usr/bin/fine -x 'a b'",),
        checkup=compared(Comparison(1000, 50, 0, 500, 100)),
        pid=IN,
    ),
    "process-loss": Case(
        "at a loss", ("KSM_PRELOAD=off ksm-wrapper /usr/bin/fine -x 'a b'",), a_loss, pid=IN
    ),
}


def test_every_question_has_a_case() -> None:
    assert list(CASES) == [one.id for one in doctor.QUESTIONS]


@pytest.mark.parametrize("name", CASES)
def test_finding(root: Path, name: str) -> None:
    case = CASES[name]
    assert name not in ids(look(root, case.absent or case.pid, kernel=case.kernel))
    case.root(root)
    findings = doctor.diagnose(case.checkup(look(root, case.pid, kernel=case.kernel)))
    (one,) = (one for one in findings if one.id == name)
    assert case.words in one.sentence
    assert tuple(fix.replace(str(root), "") for fix in one.fixes) == case.fixes
    assert one.sentence.rstrip().endswith(".")
    assert one.severity == next(each.severity for each in doctor.QUESTIONS if each.id == name)


# ---- Both sides of what decides ------------------------------------------------------------


def test_a_reason_is_enough(root: Path) -> None:
    """What is explained is not said to be unexplained."""
    assert ids(look(root, OUT)) == ["not-opted-in"]
    static(root)
    assert ids(look(root, OUT)) == ["static"]


@pytest.mark.parametrize("kernel", [NEW, OLD])
def test_a_kernel_that_has_no_flag_to_lose_or_keeps_it(root: Path, kernel: Kernel) -> None:
    child_of_one_opted_in(root)
    assert ids(look(root, OUT, kernel=kernel)) == ["not-opted-in"]


def test_the_measured_pace_counts_more_than_the_settings(root: Path) -> None:
    setting("sleep_millisecs", 600000)(root)
    slow = look(root)
    assert "slow-scan" in ids(slow)
    assert "slow-scan" not in ids(replace(slow, pace=Pace(1.0, 3.0, 3599.0)))
    assert "slow-scan" in ids(replace(slow, pace=Pace(1.0, 3.0, 3600.0)))


def test_a_first_pass_is_as_long_as_what_is_before_it(root: Path) -> None:
    """ksmd has a record of a tenth so far: all of it takes ten times as long."""
    for name in ("shared", "sharing", "volatile"):
        setting(f"pages_{name}", 0)(root)
    setting("pages_unshared", 2100)(root)
    checkup = look(root)
    assert doctor.pass_seconds(replace(checkup, pace=Pace(1.0, 3.0, 400.0))) == 4000.0
    assert "slow-scan" in ids(replace(checkup, pace=Pace(1.0, 3.0, 400.0)))
    # Passes that ended while one looked are as long as they were.
    assert doctor.pass_seconds(replace(checkup, pace=Pace(1.0, 3.0, 0.4))) == 0.4
    setting("pages_unshared", 0)(root)
    assert "slow-scan" not in ids(look(root))
    setting("sleep_millisecs", 600000)(root)
    assert "slow-scan" in ids(look(root))


@pytest.mark.parametrize(
    ("unshared", "run", "wanted"), [(11_000, 1, True), (9_000, 1, False), (11_000, 0, False)]
)
def test_no_word_on_a_loss_before_all_was_looked_at(
    root: Path, unshared: int, run: int, wanted: bool
) -> None:
    """Of 21,000 pages ksmd has records of 9300 and `unshared`, after passes from before."""
    a_loss(root)
    setting("general_profit", -2_000_000)(root)
    setting("pages_unshared", unshared)(root)
    setting("run", run)(root)
    assert ("machine-loss" in ids(look(root))) is wanted
    assert ("program-loss" in ids(look(root))) is wanted
    assert ("process-loss" in ids(look(root, IN))) is wanted
    nothing_equal(root)
    setting("pages_unshared", unshared + 8100)(root)
    assert ("nothing-merged" in ids(look(root))) is wanted


@pytest.mark.parametrize(("zeros", "wanted"), [(10_000, True), (12_000, False)])
def test_no_loss_of_a_program_before_it_was_looked_at(root: Path, zeros: int, wanted: bool) -> None:
    """Of its 10,000 pages; those that became zeros are not among them any more."""
    file(
        f"proc/{IN}/ksm_stat",
        f"ksm_rmap_items 20000\nksm_zero_pages {zeros}\nksm_merging_pages 0\n"
        "ksm_merge_any: yes\nksm_mergeable: yes\n",
    )(root)
    checkup = look(root, IN)
    assert checkup.subject is not None
    assert checkup.subject.facts is not None
    one = replace(checkup.subject.facts, profit=-2_000_000)
    everyone = tuple(one if each.pid == IN else each for each in checkup.machine.processes)
    machine = replace(checkup.machine, processes=everyone)
    checkup = replace(checkup, machine=machine, subject=replace(checkup.subject, facts=one))
    assert ("process-loss" in ids(checkup)) is wanted
    assert ("program-loss" in ids(replace(checkup, subject=None))) is wanted


def test_no_pass_takes_time_while_ksmd_rests(root: Path) -> None:
    setting("sleep_millisecs", 600000)(root)
    setting("run", 0)(root)
    assert "slow-scan" not in ids(look(root))


def test_a_profit_takes_some_passes(root: Path) -> None:
    setting("general_profit", -2_000_000)(root)
    setting("full_scans", 2)(root)
    a_loss(root)
    assert not {"machine-loss", "program-loss", "process-loss"} & set(ids(look(root, IN)))
    assert "program-loss" not in ids(look(root))


def test_off_is_said_once(root: Path) -> None:
    setting("run", 0)(root)
    assert ids(look(root)) == ["ksm-off"]


def test_off_as_it_was_found(root: Path) -> None:
    (root / "var/lib/ksm-preload/kernel.json").unlink()
    setting("run", 0)(root)
    (one,) = doctor.diagnose(look(root))
    assert (one.id, one.sentence) == ("ksm-off", "KSM is off, so nothing is merged.")


def test_in_a_container_it_is_the_hosts_to_set(root: Path) -> None:
    file(".dockerenv", "")(root)
    setting("run", 0)(root)
    found = {one.id: one for one in doctor.diagnose(look(root))}
    assert found["ksm-off"].fixes == ("sudo ksmtool kernel-enable   # on the host",)
    without_ksm(root)
    found = {one.id: one for one in doctor.diagnose(look(root))}
    assert found["ksm-missing"].fixes == ()


def test_who_looks_from_within_a_container_is_in_it(root: Path) -> None:
    file(f"proc/{OUT}/cgroup", f"0::/docker/{ID}\n")(root)
    assert ids(look(root, OUT)) == ["container"]
    file(".dockerenv", "")(root)
    assert ids(look(root, OUT)) == ["not-opted-in", "host-of-container"]


def test_on_by_somebody_until_the_next_boot(root: Path) -> None:
    not_kept(root)
    (root / "var/lib/ksm-preload/kernel.json").unlink()
    assert ids(look(root)) == ["not-kept"]
    file("etc/tmpfiles.d/ksm.conf", "w! /sys/kernel/mm/ksm/run - - - - 1\n")(root)
    assert ids(look(root)) == []


def test_many_may_not_be_looked_at(root: Path) -> None:
    """Where they may be opted in, nobody says that none is."""
    nobody_opted_in(root)
    setting("run", 0)(root)
    checkup = look(root)
    assert "nothing-opted-in" in ids(checkup)
    some = replace(checkup, machine=replace(checkup.machine, unreadable=3))
    assert "nothing-opted-in" not in ids(some)
    hidden = replace(checkup, machine=replace(checkup.machine, hidden=True))
    assert "nothing-opted-in" not in ids(hidden)


def test_processes_that_are_hidden(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "hides", lambda _proc: True)
    (said,) = look(root).unlooked
    assert "/proc hides the processes of others" in said


def test_a_comment_in_the_file(root: Path) -> None:
    text = "# mine\n# off: /usr/lib/libksm_preload.so\n"
    file("etc/ld.so.preload", text)(root)
    found = [one for one in doctor.diagnose(look(root)) if one.id == "preload-file"]
    assert found
    assert {one.fixes[0] for one in found} == {"sudoedit /etc/ld.so.preload"}


@pytest.mark.parametrize("make", ["symlink", "folder"])
def test_the_file_is_no_file(root: Path, make: str) -> None:
    path = root / "etc/ld.so.preload"
    path.symlink_to("elsewhere") if make == "symlink" else path.mkdir()
    checkup = look(root)
    (one,) = doctor.diagnose(checkup)
    assert (one.id, one.fixes) == (
        "preload-file",
        ("sudo mv /etc/ld.so.preload /etc/ld.so.preload.old",),
    )
    assert f"a {make}" in one.sentence
    assert checkup.unlooked == ()


def test_a_foreign_library_is_not_for_global_disable(root: Path) -> None:
    file("etc/ld.so.preload", "/usr/lib/other.so\n")(root)
    (one,) = doctor.diagnose(look(root))
    assert one.fixes == ("sudoedit /etc/ld.so.preload",)


def test_started_after(root: Path) -> None:
    preload_after_start(root)
    # btime is a whole number of seconds.
    os.utime(root / "etc/ld.so.preload", (1_700_000_101, 1_700_000_101))
    assert ids(look(root, OUT)) == ["not-opted-in"]
    os.utime(root / "etc/ld.so.preload", (1_700_000_102, 1_700_000_102))
    assert ids(look(root, OUT)) == ["started-before"]
    file(f"proc/{OUT}/cgroup", "0::/system.slice/app.service\n")(root)
    (one,) = doctor.diagnose(look(root, OUT))
    assert one.fixes == ("sudo systemctl restart app.service",)


def test_started_before_systemds_drop_in(root: Path) -> None:
    preload_after_start(root)
    (root / "etc/ld.so.preload").unlink()
    path = f"{systemd.SYSTEM}/service.d/{systemd.NAME}"
    file(path, systemd.DropIn(path, True).text)(root)
    (one,) = doctor.diagnose(look(root, OUT))
    assert (one.id, one.fixes) == ("started-before", (WRAP,))
    assert f"/{path}" in one.sentence
    os.utime(root / path, (1_700_000_099, 1_700_000_099))
    assert ids(look(root, OUT)) == ["not-opted-in"]


def test_a_rate_that_is_the_fastest_already(root: Path) -> None:
    setting("sleep_millisecs", 600000)(root)
    state = root / "var/lib/ksm-preload/kernel.json"
    for name, wanted in (("gentle", "balanced"), ("balanced", "fast"), ("fast", "fast --cpu 100")):
        state.write_text(f'{{"schema": 1, "profile": "{name}", "cpu": null, "found": {{}}}}')
        found = {one.id: one for one in doctor.diagnose(look(root))}
        assert found["slow-scan"].fixes == (f"{ENABLE} --profile {wanted}",)


def test_with_the_library_it_was_reached(root: Path) -> None:
    preload_after_start(root)
    file(f"proc/{OUT}/maps", "7f0000000000-7f0000001000 r-xp 0 0:0 1 /usr/lib/libksm_preload.so\n")(
        root
    )
    (one,) = doctor.diagnose(look(root, OUT))
    assert one.id == "not-opted-in"
    assert "has our library" in one.sentence


@pytest.mark.parametrize(
    ("path", "text", "word"),
    [
        ("cgroup", "0::/user.slice/snap.a.b-1.scope\n", "a snap"),
        ("root/.flatpak-info", "", "a flatpak"),
        ("attr/current", "/usr/bin/app (enforce)\n", "the AppArmor profile /usr/bin/app"),
        ("attr/current", "/usr/bin/app (complain)\n", ""),
        ("attr/current", "unconfined\n", ""),
    ],
)
def test_confinement(root: Path, path: str, text: str, word: str) -> None:
    file(f"proc/{OUT}/{path}", text)(root)
    subject = look(root, OUT).subject
    assert subject is not None
    assert subject.confinement == word
    # The kernel's flag goes through all of them.
    assert "confined" not in ids(look(root, OUT))


def test_little_memory_of_a_kind_is_not_worth_a_word(root: Path) -> None:
    smaps(IN, mapping("mg"), mapping("sh", 4000, 0), mapping("ht", 0, 0, Private_Hugetlb=960))(root)
    assert ids(look(root, IN)) == []


def stat_with_zeros(pages: int) -> Callable[[Path], None]:
    text = f"ksm_rmap_items 10000\nksm_zero_pages {pages}\nksm_merging_pages 0\n"
    return file(f"proc/{IN}/ksm_stat", text + "ksm_merge_any: yes\nksm_mergeable: yes\n")


def test_what_is_nothing_for_ksm(root: Path) -> None:
    def found() -> list[str]:
        findings = doctor.diagnose(look(root, IN))
        return [one.severity for one in findings if one.id == "never-merges"]

    smaps(IN, mapping("mg", anonymous=1000))(root)
    assert found() == ["problem"]
    stat_with_zeros(100)(root)
    assert found() == ["note"]  # something is saved
    stat_with_zeros(1000)(root)
    assert found() == []
    stat_with_zeros(0)(root)
    smaps(IN, mapping("mg", anonymous=1000, Swap=4000))(root)
    assert found() == []
    smaps(IN, mapping("mg", 9700, 0))(root)
    assert found() == []  # little of anything
    smaps(IN, mapping("mg", 9800, 0))(root)
    assert found() == ["problem"]


def test_each_number_just_below_what_is_said(root: Path) -> None:
    crowded(root)
    file(f"proc/{IN}/maps", "x\n" * 7)(root)
    assert ids(look(root)) == []
    (root / "proc/sys/vm/max_map_count").unlink()
    for size, wanted in ((976, []), (977, ["hugetlb"])):  # 999,424 and 1,000,448 bytes
        huge = mapping("ht", 0, 0, Private_Hugetlb=size)
        smaps(IN, mapping("mg", 8000, 8000), huge)(root)
        assert ids(look(root, IN)) == wanted


def test_a_group_that_gives_little(root: Path) -> None:
    checkup = look(root, IN)
    assert ids(compared(Comparison(1000, 900, 0, 90, 0))(checkup)) == []
    small = compared(Comparison(1000, 50, 0, 500, 100))(checkup)
    assert ids(small) == ["layout-differs"]
    assert small.subject is not None
    subject = replace(small.subject, kinds=Kinds(mergeable=1_600_000, marked=1_600_000))
    assert ids(replace(small, subject=subject)) == []


# ---- A program that is yet to be started ---------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "what", "wanted"),
    [
        (NEW, {"loader": None}, []),
        (LOSES, {"loader": None}, ["static"]),
        (OLD, {"loader": None}, ["static"]),
        (NEW, {"machine": "riscv"}, []),
        (LOSES, {"machine": "riscv"}, ["architecture"]),
        (LOSES, {"machine": "riscv", "loader": None}, ["static"]),
        (NEW, {"sanitizer": "libasan.so.8"}, []),
        (OLD, {"sanitizer": "libasan.so.8"}, ["sanitizer"]),
        (LOSES, {"loader": "/lib/ld-musl-x86_64.so.1"}, []),
        (OLD, {"loader": "/lib/ld-musl-x86_64.so.1"}, ["musl"]),
        (OLD, {}, []),
    ],
)
def test_what_can_be_opted_in(
    root: Path, kernel: Kernel, what: dict[str, str], wanted: list[str]
) -> None:
    checkup = is_program(**what)(look(root, command=["app"], kernel=kernel))
    assert ids(checkup) == wanted


NO = Verdict(False, "no", policy.DEFAULTS, 7, "deny app")


def test_left_alone_when_started(root: Path) -> None:
    checkup = look(root, command=["app"])
    assert checkup.subject is not None
    assert checkup.subject.path == "/usr/bin/app"
    for change, wanted in (
        ({"privileged": "setcap"}, "privileged"),
        ({"off": True}, "off-by-environment"),
        ({"verdict": NO}, "left-out"),
    ):
        subject = replace(checkup.subject, **change)
        assert ids(replace(checkup, subject=subject)) == [wanted]


def test_to_allow_what_is_left_alone_anyway_is_no_fix(root: Path) -> None:
    checkup = look(root, command=["app"])
    assert checkup.subject is not None
    subject = replace(checkup.subject, verdict=NO)
    (one,) = doctor.diagnose(replace(checkup, subject=subject))
    assert one.fixes == (rule("allow /usr/bin/app"),)
    subject = replace(subject, privileged="setuid")
    found = doctor.diagnose(replace(checkup, subject=subject))
    assert [one.fixes for one in found] == [(), ()]


def test_its_environment_and_the_policy_count(root: Path) -> None:
    shutil.copy("/bin/true", root / "usr/bin/ssh-agent")
    environ = {"PATH": "/usr/bin", "KSM_PRELOAD": "off"}
    found = examine.examine(None, ["ssh-agent"], root, NEW, 0, environ)
    assert ids(found) == ["left-out", "off-by-environment"]


def test_an_earlier_rule_is_to_be_edited(root: Path) -> None:
    """The first that matches counts: one that is added to local.conf would come after it."""
    called_ssh_agent(root)
    file("etc/ksm-preload/policy.d/a.conf", "# mine\ndeny ssh-agent\nallow fine\n")(root)
    (one,) = doctor.diagnose(look(root, OUT))
    edit = f"sudoedit {root}/etc/ksm-preload/policy.d/a.conf   # line "
    assert (one.id, one.fixes) == ("left-out", (f"{edit}2",))
    a_loss(root)
    (one,) = doctor.diagnose(look(root))
    assert (one.id, one.fixes) == ("program-loss", (f"{edit}3",))
    file("etc/ksm-preload/policy.d/a.conf", "default deny\nallow worker\n")(root)
    assert doctor.diagnose(look(root))[0].fixes == ()  # is denied, once it is started again
    (root / f"proc/{OUT}/exe").unlink()
    (root / f"proc/{OUT}/exe").symlink_to("/usr/bin/[")
    (one,) = doctor.diagnose(look(root, OUT))
    assert one.fixes == (rule("allow /usr/bin/[[]"),)


@pytest.mark.parametrize("path", ["/usr/bin/a\nallow *", "/usr/bin/a\x1b[2J", "/usr/bin/a "])
def test_no_rule_for_a_path_that_is_more_than_one_word(root: Path, path: str) -> None:
    a_loss(root)
    (root / f"proc/{IN}/exe").unlink()
    (root / f"proc/{IN}/exe").symlink_to(path)
    (one,) = doctor.diagnose(look(root))
    assert (one.id, one.fixes) == ("program-loss", ())


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (b"/usr/bin/app\0-x\0\0\0\0", "/usr/bin/app -x"),
        (b"/usr/bin/app\0a\nb\x1b[2J\xff'\0", r"/usr/bin/app $'a\nb\x1b[2J\xff\''"),
        (b"/usr/bin/link\0", "/usr/bin/link"),
        (b"/usr/bin/fine\0", "CMD"),
        (b"-app\0", "CMD"),
        (b"./app\0", "CMD"),
        (b"app: worker 1\0\0\0", "CMD"),
        (b"", "CMD"),
    ],
)
def test_a_command_line_that_can_be_typed(root: Path, words: bytes, wanted: str) -> None:
    (root / "usr/bin/link").symlink_to("app")
    file(f"proc/{OUT}/cmdline", words)(root)
    (one,) = doctor.diagnose(look(root, OUT))
    assert one.fixes == (f"ksmtool wrap -- {wanted}",)
    if wanted != "CMD":
        done = run(["bash", "-c", f"printf '%s\\0' {wanted}"])
        assert os.fsencode(done.stdout).rstrip(b"\0") == words.rstrip(b"\0")


EDIT = "sudo systemctl edit 'a@my\\x2db.service'   # [Service] "
AGAIN = "ExecStart= alone, then ExecStart=ksm-wrapper and its command; then restart it"


def test_a_service_is_started_by_systemd(root: Path) -> None:
    checkup = look(root, OUT)
    assert checkup.subject is not None
    assert checkup.subject.facts is not None
    facts = checkup.subject.facts

    def fixes(unit: str, **more: object) -> tuple[str, ...]:
        subject = replace(checkup.subject, facts=replace(facts, unit=unit), **more)  # type: ignore[type-var]
        (one,) = doctor.diagnose(replace(checkup, subject=subject))
        return one.fixes

    unit = r"a@my\x2db.service"
    every = "sudo ksmtool global-enable   # all that start; then restart it"
    assert fixes(unit) == (every, EDIT + AGAIN)
    assert fixes(unit, off=True) == (f"{EDIT}UnsetEnvironment=KSM_PRELOAD; then restart it",)
    assert fixes(unit, before="/x") == (r"sudo systemctl restart 'a@my\x2db.service'",)
    for other in ("user@1000.service", "session-1.scope", "a.service of user 7", "a\n.service"):
        assert fixes(other) == (WRAP,)
        assert fixes(other, before="/x") == (WRAP,)
    subject = replace(checkup.subject, facts=replace(facts, unit=unit))
    enabled = replace(checkup, subject=subject, methods=("ld.so.preload",))
    assert doctor.diagnose(enabled)[0].fixes == (EDIT + AGAIN,)


@pytest.mark.parametrize(
    ("loaded", "how"), [(True, "Environment=KSM_PRELOAD=off"), (False, "MemoryKSM=no")]
)
def test_a_service_with_a_loss(root: Path, loaded: bool, how: str) -> None:
    a_loss(root)
    checkup = look(root, IN)
    assert checkup.subject is not None
    assert checkup.subject.facts is not None
    facts = replace(checkup.subject.facts, unit="fine.service")
    subject = replace(checkup.subject, facts=facts, loaded=loaded)
    (one,) = doctor.diagnose(replace(checkup, subject=subject))
    wanted = f"sudo systemctl edit fine.service   # [Service] {how}; then restart it"
    assert (one.id, one.fixes) == ("process-loss", (wanted,))


def test_another_reason_counts_more_than_age(root: Path) -> None:
    preload_after_start(root)
    static(root)
    assert ids(look(root, OUT)) == ["static"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/usr/bin", "is a folder"),
        ("/dev/null", "is no regular file"),
        ("{tmp}/text", "is not executable"),
        ("{tmp}/script", "/no/such is missing"),
        ("{tmp}/env", "what the first line of"),
    ],
)
def test_what_cannot_be_run(tmp_path: Path, path: str, words: str) -> None:
    for name, text in (("script", "#!/no/such\n"), ("env", "#!/usr/bin/env no-such-x\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "text").write_text("")
    (tmp_path / "text").chmod(0o644)
    with pytest.raises(KsmtoolError, match=words) as raised:
        examine.examine(None, [path.format(tmp=tmp_path)], kernel=NEW, seconds=0)
    assert raised.value.status == 1


def test_a_thread_stands_for_its_process(root: Path) -> None:
    folder = root / "proc/805"
    folder.mkdir()
    (folder / "status").write_text(f"Name:\tx\nState:\tS (sleeping)\nTgid:\t{OUT}\nPid:\t805\n")
    checkup = look(root, 805)
    assert checkup.subject is not None
    assert checkup.subject.pid == OUT


@pytest.mark.root
def test_root_is_not_told_to_use_sudo(root: Path) -> None:
    """Its first thread has ended: there is no way to it."""
    path = root / f"proc/{OUT}/status"
    text = (
        path.read_text().replace("S (sleeping)", "Z (zombie)").replace("Threads:\t1", "Threads:\t2")
    )
    path.write_text("".join(line for line in text.splitlines(True) if "VmRSS" not in line))
    with pytest.raises(KsmtoolError, match="may not be looked at") as raised:
        look(root, OUT)
    assert raised.value.hint is None


def test_no_such_program(root: Path) -> None:
    with pytest.raises(KsmtoolError, match="There is no program nothing"):
        look(root, command=["nothing"])


# ---- Processes that end --------------------------------------------------------------------


def test_no_such_process(root: Path) -> None:
    with pytest.raises(KsmtoolError, match="There is no process 4711"):
        look(root, 4711)
    with pytest.raises(KsmtoolError, match="There is no process 41 "):
        look(root, 41)  # ksmd


def test_one_that_ends_meanwhile(root: Path) -> None:
    (root / f"proc/{IN}/smaps").unlink()
    checkup = look(root, IN)
    assert ids(checkup) == []
    assert checkup.unlooked == (f"Process {IN} ended while it was looked at.",)


@pytest.mark.parametrize(
    "name", ["environ", "auxv", "stat", "cgroup", "cmdline", "exe", "root", "attr/current"]
)
def test_any_file_may_be_gone(root: Path, name: str) -> None:
    path = root / f"proc/{OUT}/{name}"
    if os.path.lexists(path):
        path.unlink()
    assert ids(look(root, OUT)) == ["not-opted-in"]


# ---- Kinds of memory -----------------------------------------------------------------------


def read_only(name: str, rss: int) -> str:
    """Return a shared mapping of a file that is only read."""
    text = mapping("ms", rss, 0).replace("rd wr mr mw", "rd mr")
    return text.replace("00:00 0 \n", f"08:01 7 {name}\n", 1)


def test_kinds() -> None:
    text = (
        mapping("mg", 100, 60, AnonHugePages=20)
        + mapping("", 10, 10)
        + mapping("sh", 7, 0)
        + read_only("/usr/lib/locale/locale-archive", 30)
        + "".join(read_only(name, 1) for name in ("/memfd:x", "/SYSV0", "/dev/zero", ""))
        + mapping("io", 5, 5)
        + mapping("mg ht", 0, 0, Shared_Hugetlb=2048, Private_Hugetlb=4096)
        + mapping("", 3, 3, Swap=9).replace(" 0 \n", " 0 [stack]\n", 1)
    )
    assert kinds.parse(text.encode()) == Kinds(
        mappings=11,
        mergeable=70 * 1024,
        marked=60 * 1024,
        huge=20 * 1024,
        never=8 * 1024,
        shared=11 * 1024,
        hugetlb=6144 * 1024,
        file=70 * 1024,
        swapped=9 * 1024,
    )
    assert kinds.parse(b"") == Kinds()


def test_kinds_of_this_process() -> None:
    """What is in RAM is what smaps_rollup says; mappings are those of maps."""
    found = kinds.of_process(os.getpid())
    assert found is not None
    rollup = Path("/proc/self/smaps_rollup").read_text()
    rss = int(re.findall(r"^Rss: +(\d+) kB", rollup, re.MULTILINE)[0]) * 1024
    assert abs(found.resident - rss) <= rss * 0.02
    assert abs(found.mappings - kinds.mappings(os.getpid())) <= 10
    assert kinds.of_process(2**22 + 1) is None
    assert kinds.mappings(2**22 + 1) == 0
    assert kinds.most_mappings() > 1000
    assert kinds.most_mappings(Path("/nowhere")) == 0


# ---- Words and JSON ------------------------------------------------------------------------


def test_problems_come_first_and_decide() -> None:
    note, problem = Finding("a", "note", "A."), Finding("b", "problem", "B.")
    assert doctor.healthy([note])
    assert not doctor.healthy([note, problem])


def test_a_note_that_is_asked_for_before_a_problem_comes_after(root: Path) -> None:
    not_kept(root)
    file("run/ksm-preload.disabled", "")(root)
    assert ids(look(root)) == ["kill-switch", "not-kept"]


def test_lines(root: Path) -> None:
    ksmtuned(root)
    not_kept(root)
    checkup = look(root)
    findings = doctor.diagnose(checkup)
    assert [one.severity for one in findings] == ["problem", "note"]
    said = doctor_report.lines(checkup, findings)
    assert said[:3] == [
        "Not healthy: 1 problem; 1 note.",
        "",
        "problem other-manager: ksmtuned has KSM: it (package ksmtuned) switches KSM off each "
        "minute while virtual machines do not use most of the memory, and sets its rate.",
    ]
    assert said[3].startswith("  fix: sudo systemctl disable --now ksmtuned.service   # then sudo")
    assert said[4].startswith("  or:  sudoedit /etc/ksmtuned.conf && sudo systemctl restart ")
    assert said[6].startswith("note not-kept: ")


def test_no_name_moves_the_cursor(root: Path) -> None:
    checkup = look(root, OUT)
    assert checkup.subject is not None
    checkup = replace(checkup, subject=replace(checkup.subject, name="a\x1b[2J"))
    said = doctor_report.lines(checkup, doctor.diagnose(checkup))
    assert all(line.isprintable() for line in said)


SHAPE = {
    "schema": int,
    "time": float,
    "healthy": bool,
    "verdict": str,
    "subject": dict,
    "findings": list,
    "unlooked": list,
}
SUBJECT = {"pid": int, "name": str, "command": list, "opted_in": bool, "memory": dict}
MEMORY = [
    *("mappings", "mergeable", "marked", "huge", "never", "shared", "hugetlb", "file", "swapped"),
]
FINDING = {"id": str, "severity": str, "sentence": str, "evidence": dict, "fixes": list}


def has_shape(found: Mapping[str, object], shape: Mapping[str, type]) -> None:
    assert list(found) == list(shape)
    for name, kind in shape.items():
        assert isinstance(found[name], kind), name


def test_the_shape_of_the_json(root: Path) -> None:
    a_loss(root)
    checkup = look(root, IN)
    document = json.loads(doctor_report.as_json(checkup, doctor.diagnose(checkup)))
    has_shape(document, SHAPE)
    has_shape(document["subject"], SUBJECT)
    assert list(document["subject"]["memory"]) == MEMORY
    assert document["schema"] == 1
    assert [one["id"] for one in document["findings"]] == ["process-loss"]
    for one in document["findings"]:
        has_shape(one, FINDING)
    assert document["findings"][0]["evidence"] == {
        "saved": 0,
        "profit": -64 * 20000,
        "merged": 0,
    }
    alone = look(root)
    assert json.loads(doctor_report.as_json(alone, []))["subject"] is None
    program = look(root, command=["app"])
    subject = json.loads(doctor_report.as_json(program, []))["subject"]
    assert (subject["pid"], subject["opted_in"], subject["memory"]) == (None, None, None)


# ---- The command ---------------------------------------------------------------------------


def test_exit_statuses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = examine.examine

    def instead(pid: int | None, command: Sequence[str]) -> Checkup:
        asked.append((pid, tuple(command)))
        return original(None, (), root, NEW, 0)

    monkeypatch.setattr(examine, "examine", instead)
    call = CliRunner().invoke
    assert call(cli.cli, ["doctor"]).exit_code == 0
    not_kept(root)
    assert call(cli.cli, ["doctor", "12", "--json"]).exit_code == 0  # a note
    setting("run", 0)(root)
    done = call(cli.cli, ["doctor", "--json", "--", "ls", "--help"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["healthy"] is False
    assert call(cli.cli, ["doctor", "--", "12", "x"]).exit_code == 1
    assert asked == [(None, ()), (12, ()), (None, ("ls", "--help")), (None, ("12", "x"))]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--nonsense"], 2),
        (["4194305"], 1),
        (["1" * 5000], 1),
        (["1" * 19], 1),
        (["--", "no-such-cmd"], 1),
    ],
)
def test_what_cannot_be_asked(tree: Tree, arguments: list[str], status: int) -> None:
    done = run([tree.ksmtool, "doctor", *arguments])
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(("ksmtool: ", "Usage: "))


def test_the_command(tree: Tree) -> None:
    done = run([tree.ksmtool, "doctor"])
    assert done.stderr == ""
    assert done.stdout.startswith("Healthy" if done.returncode == 0 else "Not healthy")
    named = set(re.findall(r"^(?:problem|note) ([a-z-]+): ", done.stdout, re.MULTILINE))
    assert named <= set(CASES)


def test_a_program_live(tree: Tree) -> None:
    done = run([tree.ksmtool, "doctor", "--json", "--", tree.rescue, "--help"])
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert document["subject"]["command"] == [str(tree.rescue), "--help"]
    assert done.returncode == (0 if document["healthy"] else 1)


BUSY = "d = [{str(i): [i, str(i)]} for i in range(40000)]; print(flush=True); input()"


@pytest.mark.root
def test_two_processes_live(tree: Tree) -> None:
    """Pages full of pointers, which only a group makes equal; and who they are."""
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for one in pair:
            assert one.stdout is not None
            assert one.stdout.readline() == "\n"
        started = time.monotonic()
        done = run([tree.ksmtool, "doctor", pair[0].pid, "--json"])
        assert time.monotonic() - started < 60
    finally:
        for one in pair:
            one.communicate("\n")
    document = json.loads(done.stdout)
    found = {one["id"]: one for one in document["findings"]}
    assert done.returncode == 1
    assert document["subject"]["opted_in"] is False
    assert document["subject"]["command"] == [sys.executable, "-c", BUSY]
    assert "not-opted-in" in found
    evidence = found["layout-differs"]["evidence"]
    assert evidence["group_share"] > evidence["equal_share"] + 0.1
    assert found["layout-differs"]["fixes"][0].startswith("ksmtool try --arms plain,wrap,group -- ")


# ---- The documentation ---------------------------------------------------------------------


def test_the_documentation_has_every_finding() -> None:
    text = (HERE.parent / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (problem|note) \|", text, re.MULTILINE)
    assert rows == [(one.id, one.severity) for one in doctor.QUESTIONS]
