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
from ksmtool import boot, cli, doctor, doctor_report, examine, kinds, systemd
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
        Process(801, "fine", "/usr/bin/fine", anonymous=10000, used=10000, opted_in=True),
    ],
)
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
    file("usr/lib/libksm_preload.so", "")(root)
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
    """What has to be so for a finding, and words of its sentence and fix."""

    words: str
    fix: str = ""
    root: Callable[[Path], None] = lambda _root: None
    checkup: Callable[[Checkup], Checkup] = lambda checkup: checkup
    pid: int | None = None
    absent: int | None = None
    """The process that has not got it, if not the same before the change."""
    kernel: Kernel = NEW


CASES = {
    "ksm-missing": Case("no KSM", "CONFIG_KSM", without_ksm),
    "ksm-off": Case("something has switched it", "kernel-enable", setting("run", 0)),
    "other-manager": Case("ksmtuned has KSM", "systemctl disable --now ksmtuned", ksmtuned),
    "state-damaged": Case(
        "is damaged", "kernel-disable", file("var/lib/ksm-preload/kernel.json", "x")
    ),
    "settings-drift": Case(
        "smart_scan is 0, not 1", "sudo ksmtool kernel-enable", setting("smart_scan", 0)
    ),
    "not-kept": Case("at the next boot", "kernel-enable", not_kept),
    "slow-scan": Case("2 h", "--profile fast", setting("sleep_millisecs", 600000)),
    "nothing-opted-in": Case("No process", "ksmtool wrap", nobody_opted_in),
    "nothing-merged": Case("after 12 passes", "estimate", setting("pages_sharing", 0)),
    "machine-loss": Case("records take", "status", setting("general_profit", -2_000_000)),
    "program-loss": Case("/usr/bin/fine saves 0.0 MB", "deny /usr/bin/fine", a_loss),
    "preload-file": Case(
        "is missing",
        "sudo ksmtool global-disable",
        file("etc/ld.so.preload", "/usr/lib/libksm_preload.so\n"),
    ),
    "kill-switch": Case("is there", "sudo rm ", file("run/ksm-preload.disabled", "")),
    "policy-files": Case(
        "a mistake", "policy check", file("etc/ksm-preload/policy.d/x.conf", "nonsense\n")
    ),
    "crowded-mappings": Case("fine (801) has 8 mappings of the 10", "max_map_count=20", crowded),
    "host-of-container": Case("a container", "", file(".dockerenv", "")),
    "left-out": Case("by the policy", "allow /usr/bin/ssh-agent", called_ssh_agent, pid=OUT),
    "off-by-environment": Case(
        "KSM_PRELOAD=off",
        "env -u KSM_PRELOAD ksmtool wrap -- /usr/bin/app -x 'a b'",
        file(f"proc/{OUT}/environ", b"A=KSM_PRELOAD=of\0KSM_PRELOAD=off\0"),
        pid=OUT,
    ),
    "privileged": Case("app (800) is setuid", "", setuid, pid=OUT),
    "static": Case("is static", "ksmtool wrap -- /usr/bin/app", static, pid=OUT),
    "architecture": Case(
        "architecture, riscv", "ksmtool wrap", checkup=is_program(machine="riscv"), pid=OUT
    ),
    "musl": Case(
        "does not read /etc/ld.so.preload",
        "ksmtool wrap",
        checkup=is_program(loader="/lib/ld-musl-x86_64.so.1"),
        pid=OUT,
    ),
    "sanitizer": Case(
        "linked to libasan.so.8", "wrap", checkup=is_program(sanitizer="libasan.so.8"), pid=OUT
    ),
    "started-before": Case(
        "before /etc/ld.so.preload", "ksmtool wrap", preload_after_start, pid=OUT
    ),
    "confined": Case(
        "in a snap",
        "",
        file(f"proc/{OUT}/attr/current", "snap.a.b (enforce)\n"),
        pid=OUT,
        kernel=LOSES,
    ),
    "container": Case(
        "(docker:3f4e2a1b9c8d)",
        "ksm-wrapper /usr/bin/app",
        file(f"proc/{OUT}/cgroup", f"0::/system.slice/docker-{ID}.scope\n"),
        pid=OUT,
    ),
    "flag-lost": Case(
        "drops the flag", "ksmtool wrap", child_of_one_opted_in, pid=OUT, kernel=LOSES
    ),
    "not-opted-in": Case("app (800) is not opted in", "ksmtool wrap", pid=OUT, absent=IN),
    "shared-memory": Case(
        "41.0 of 81.9 MB are shared", "", smaps(IN, mapping("mg"), mapping("sh")), pid=IN
    ),
    "hugetlb": Case(
        "hugetlbfs", "", smaps(IN, mapping("mg"), mapping("ht", 0, 0, Private_Hugetlb=8192)), pid=IN
    ),
    "file-memory": Case("page cache", "", smaps(IN, mapping("mg", anonymous=20000)), pid=IN),
    "huge-pages": Case("transparent", "", smaps(IN, mapping("mg", AnonHugePages=20480)), pid=IN),
    "never-merges": Case("hardly anything", "", smaps(IN, mapping("mg", anonymous=1000)), pid=IN),
    "partly-opted-in": Case(
        "41.0 of 81.9 MB are opted in", "", smaps(IN, mapping("mg"), mapping("")), pid=IN
    ),
    "layout-differs": Case(
        "fine (801) and 900 apart: 5 % of their pages are equal as they are, and in a group at "
        "least 65 %",
        "ksmtool try --arms plain,wrap,group -- /usr/bin/fine -x 'a b'",
        checkup=compared(Comparison(1000, 50, 0, 500, 100)),
        pid=IN,
    ),
    "process-loss": Case("at a loss", "KSM_PRELOAD=off /usr/bin/fine", a_loss, pid=IN),
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
    assert case.fix in one.fix
    assert bool(case.fix) == bool(one.fix)
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
    assert found["ksm-off"].fix.endswith("# on the host")
    without_ksm(root)
    found = {one.id: one for one in doctor.diagnose(look(root))}
    assert found["ksm-missing"].fix == ""


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


def test_a_comment_in_the_file(root: Path) -> None:
    text = "# mine\n# off: /usr/lib/libksm_preload.so\n"
    file("etc/ld.so.preload", text)(root)
    found = [one for one in doctor.diagnose(look(root)) if one.id == "preload-file"]
    assert found
    assert {one.fix for one in found} == {"sudoedit /etc/ld.so.preload"}


def test_a_foreign_library_is_not_for_global_disable(root: Path) -> None:
    file("etc/ld.so.preload", "/usr/lib/other.so\n")(root)
    (one,) = doctor.diagnose(look(root))
    assert one.fix == "sudoedit /etc/ld.so.preload"


def test_started_after(root: Path) -> None:
    preload_after_start(root)
    os.utime(root / "etc/ld.so.preload", (1_700_000_099, 1_700_000_099))
    assert ids(look(root, OUT)) == ["not-opted-in"]
    os.utime(root / "etc/ld.so.preload", (1_700_000_101, 1_700_000_101))
    assert ids(look(root, OUT)) == ["started-before"]
    file(f"proc/{OUT}/cgroup", "0::/system.slice/app.service\n")(root)
    (one,) = doctor.diagnose(look(root, OUT))
    assert one.fix == "sudo systemctl restart app.service"


def test_started_before_systemds_drop_in(root: Path) -> None:
    preload_after_start(root)
    (root / "etc/ld.so.preload").unlink()
    path = f"{systemd.SYSTEM}/service.d/{systemd.NAME}"
    file(path, systemd.DropIn(path, True).text)(root)
    (one,) = doctor.diagnose(look(root, OUT))
    assert (one.id, one.fix) == ("started-before", "ksmtool wrap -- /usr/bin/app -x 'a b'")
    assert f"/{path}" in one.sentence
    os.utime(root / path, (1_700_000_099, 1_700_000_099))
    assert ids(look(root, OUT)) == ["not-opted-in"]


def test_a_rate_that_is_the_fastest_already(root: Path) -> None:
    setting("sleep_millisecs", 600000)(root)
    state = root / "var/lib/ksm-preload/kernel.json"
    for name, wanted in (("gentle", "balanced"), ("balanced", "fast"), ("fast", "fast --cpu 100")):
        state.write_text(f'{{"schema": 1, "profile": "{name}", "cpu": null, "found": {{}}}}')
        found = {one.id: one for one in doctor.diagnose(look(root))}
        assert found["slow-scan"].fix == f"sudo ksmtool kernel-enable --profile {wanted}"


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


def test_left_alone_when_started(root: Path) -> None:
    checkup = look(root, command=["app"])
    assert checkup.subject is not None
    assert checkup.subject.path == "/usr/bin/app"
    for change, wanted in (
        ({"privileged": "setcap"}, "privileged"),
        ({"off": True}, "off-by-environment"),
        ({"verdict": Verdict(False, "no")}, "left-out"),
    ):
        subject = replace(checkup.subject, **change)
        assert ids(replace(checkup, subject=subject)) == [wanted]


def test_to_allow_what_is_left_alone_anyway_is_no_fix(root: Path) -> None:
    checkup = look(root, command=["app"])
    assert checkup.subject is not None
    subject = replace(checkup.subject, verdict=Verdict(False, "no"))
    (one,) = doctor.diagnose(replace(checkup, subject=subject))
    assert "'allow /usr/bin/app'" in one.fix
    subject = replace(subject, privileged="setuid")
    found = doctor.diagnose(replace(checkup, subject=subject))
    assert [one.fix for one in found] == ["", ""]


def test_its_environment_and_the_policy_count(root: Path) -> None:
    shutil.copy("/bin/true", root / "usr/bin/ssh-agent")
    environ = {"PATH": "/usr/bin", "KSM_PRELOAD": "off"}
    found = examine.examine(None, ["ssh-agent"], root, NEW, 0, environ)
    assert ids(found) == ["left-out", "off-by-environment"]


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


def test_kinds() -> None:
    text = (
        mapping("mg", 100, 60, AnonHugePages=20)
        + mapping("", 10, 10)
        + mapping("sh", 7, 0)
        + mapping("io", 5, 5)
        + mapping("mg ht", 0, 0, Shared_Hugetlb=2048, Private_Hugetlb=4096)
        + mapping("", 3, 3, Swap=9).replace(" 0 \n", " 0 [stack]\n", 1)
    )
    assert kinds.parse(text.encode()) == Kinds(
        mappings=6,
        mergeable=70 * 1024,
        marked=60 * 1024,
        huge=20 * 1024,
        never=8 * 1024,
        shared=7 * 1024,
        hugetlb=6144 * 1024,
        file=40 * 1024,
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
    assert said[3].startswith("  fix: systemctl disable --now ksmtuned.service   # then sudo")
    assert said[4].startswith("  or:  leave KSM to it")
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
FINDING = {"id": str, "severity": str, "sentence": str, "evidence": dict, "fix": str}


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
    ("arguments", "status"), [(["--nonsense"], 2), (["4194305"], 1), (["--", "no-such-cmd"], 1)]
)
def test_what_cannot_be_asked(tree: Tree, arguments: list[str], status: int) -> None:
    done = run([tree.ksmtool, "doctor", *arguments])
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr


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
    assert found["layout-differs"]["fix"].startswith("ksmtool try --arms plain,wrap,group -- ")


# ---- The documentation ---------------------------------------------------------------------


def test_the_documentation_has_every_finding() -> None:
    text = (HERE.parent / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (problem|note) \|", text, re.MULTILINE)
    assert rows == [(one.id, one.severity) for one in doctor.QUESTIONS]
