# SPDX-License-Identifier: MIT
"""What has to hold on a booted Debian whose programs all opt in. test_boots.py boots it in QEMU.

ksm-test.service runs this once the system is up: the functions that `ksm_test.do=` of the kernel's
command line names, in that order. The report goes to the second serial port and ends in `status N`.
"""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ksmtool import process

PRELOAD_LIST = Path("/etc/ld.so.preload")
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
BROKEN = Path("/project/broken.so")
DISABLED = Path("/run/ksm-preload.disabled")
OFF_UNIT = "ksm-preload-off.service"
KSM_UNIT = "ksm-preload.service"
KSM_BEFORE = Path("/var/lib/ksm-before.json")
UNIT_FOLDERS = (Path("/etc/systemd"), Path("/run/systemd"))

BY_LIST, BY_SYSTEMD = "ld.so.preload", "systemd"

PROBE = "ksm-probe"
"""The service that stands for all that have nothing to do with us."""

PRIVATE = ("sshd", "sshd of a login", "sudo", "gpg-agent")
"""What holds other people's secrets: the shipped policy leaves it out."""

# Each of a package that is on every Debian; they say nothing on stderr.
EVERYDAY = (
    "ls -l / | grep usr; cat /etc/hostname; ps -e | sort | tail -n 1; python3 -c 'print(6 * 7)'"
)

SECONDS = 120


def word(name: str) -> str:
    """Return the value of one word of the kernel's command line, "" if it has none."""
    for one in Path("/proc/cmdline").read_text().split():
        key, _, value = one.partition("=")
        if key == name:
            return value
    return ""


def say(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command; it and what it says are in the report."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    print("$", *command)
    print(done.stdout + done.stderr, end="")
    return done


def output(*command: str) -> str:
    """Return what a command prints; it has to succeed and to say nothing on stderr."""
    done = say(*command)
    assert (done.returncode, done.stderr) == (0, ""), f"{command}: status {done.returncode}"
    return done.stdout.rstrip("\n")


def changed(*command: str) -> None:
    """Change the system; the command has to succeed and to say what it did."""
    done = say(*command)
    assert done.returncode == 0, f"{command}: status {done.returncode}"
    assert done.stdout


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll `condition` and return what it returns once that is true."""
    deadline = time.monotonic() + SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)
    return result


# --- what runs, and how ---


def named(name: str, pids: Iterator[int] | Sequence[int] | None = None) -> list[int]:
    """Return the processes of a name, of all or of some."""
    if pids is None:
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if name_of(pid) == name]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def main_pid(unit: str) -> int:
    return int(output("systemctl", "show", "--value", "--property=MainPID", unit))


class Console:
    """alice's login on a terminal: `login`, PAM, her own systemd, and a shell."""

    PROMPT = b"<ready>"

    def __init__(self) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execv("/bin/login", ["login", "-f", "alice"])
        self.said = b""

    def begin(self) -> None:
        """Wait for the shell."""
        self._read_to(b"$ ")
        # Not as it is echoed.
        self.ask("stty -echo; PS1='<''ready>'")

    def ask(self, line: str) -> str:
        """Let the shell run a line, and return what was written to the terminal."""
        os.write(self._terminal, line.encode() + b"\n")
        return self._read_to(self.PROMPT)

    def end(self) -> None:
        os.write(self._terminal, b"exit\n")
        _, status = os.waitpid(self.pid, 0)
        os.close(self._terminal)
        assert status == 0, f"login ended with {status}"

    def _read_to(self, mark: bytes) -> str:
        text = b""

        def marked() -> bool:
            nonlocal text
            if select.select([self._terminal], [], [], 0)[0]:
                try:
                    read = os.read(self._terminal, 4096)
                except OSError:  # login opens the terminal anew, and in between nobody has it
                    read = b""
                text += read
                self.said += read
            return mark in text

        wait_until(marked, f"{mark!r} on the terminal")
        return text.replace(b"\r\n", b"\n").decode()[: -len(mark)]


@contextmanager
def console() -> Iterator[Console]:
    one = Console()
    try:
        one.begin()
        yield one
        one.end()
    finally:
        said = one.said.decode(errors="replace").replace("\r", "")
        print(f"--- on alice's terminal ---\n{said}\n---")


@contextmanager
def ssh() -> Iterator[int]:
    """Log alice in by her key, and yield the shell's PID there."""
    command = ["runuser", "-u", "alice", "--", "ssh", "-o", "BatchMode=yes", "127.0.0.1"]
    with subprocess.Popen(
        [*command, "echo $$; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stderr is not None
        said = client.stdout.readline()
        if said:
            yield int(said)
        client.stdin.close()
        errors = client.stderr.read()
    assert (client.returncode, errors) == (0, "")


def processes() -> dict[str, bool]:
    """Log in and start what a system has; return for each whether it is opted in."""
    found = {"a service": process.opted_in(main_pid(PROBE))}
    with console() as terminal:
        said = terminal.ask(f"{{ {EVERYDAY}; }} 2>/tmp/alice.err; cat /tmp/alice.err; id -un")
        assert said.endswith("\n42\nalice\n"), "not clean on stderr"
        said = terminal.ask("systemctl --user is-system-running --wait; sudo -n id -un")
        assert said == "running\nroot\n", said

        found["the shell of a login"] = process.opted_in(
            named("bash", process.descendants(terminal.pid))[0]
        )
        said = terminal.ask("systemd-run --user --quiet --unit=probe sleep infinity")
        assert said == "", said
        said = terminal.ask("systemctl --user show --value --property=MainPID probe")
        sleeping = int(said)
        found["a service of alice"] = process.opted_in(sleeping)
        terminal.ask("systemctl --user stop probe")

        terminal.ask("sudo -n sleep infinity &")
        sleeping = wait_until(
            lambda: named("sleep", process.descendants(terminal.pid)), "sudo has started sleep"
        )[0]
        sudo = named("sudo", process.descendants(terminal.pid))
        found["sudo"] = any(process.opted_in(pid) for pid in sudo)
        terminal.ask("sudo -n pkill -x sleep; wait")

        said = terminal.ask("gpgconf --launch gpg-agent && echo launched")
        assert said == "launched\n", said
        found["gpg-agent"] = process.opted_in(named("gpg-agent")[0])
        terminal.ask("gpgconf --kill gpg-agent")

    daemon = main_pid("ssh")
    found["sshd"] = process.opted_in(daemon)
    with ssh() as shell:
        of_login = [pid for pid in process.descendants(daemon) if name_of(pid).startswith("sshd")]
        assert of_login
        found["sshd of a login"] = any(process.opted_in(pid) for pid in of_login)
        found["a program by ssh"] = process.opted_in(shell)
    for name, opted_in in found.items():
        print(f"{name}: {'opted in' if opted_in else 'not opted in'}")
    return found


def all_opted_in() -> dict[int, str]:
    """Return PID and name of every process that is opted in now."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return {pid: name_of(pid) for pid in pids if process.opted_in(pid)}


# --- what holds at each boot ---


def is_up() -> None:
    """Every unit is up, and nobody complains about us or about what ld.so could not load."""
    said = say("systemctl", "is-system-running", "--wait")
    failed = output("systemctl", "--failed", "--no-legend", "--plain")
    for unit in failed.splitlines():
        say("systemctl", "status", "--no-pager", "--lines=30", unit.split()[0])
    assert (said.stdout, failed) == ("running\n", "")
    assert output("systemctl", "is-active", "multi-user.target") == "active"
    journal_is_clean("--boot")


def journal_is_clean(*options: str) -> None:
    """Nobody complains about us in the journal, nor about what ld.so could not load."""
    errors = output("journalctl", *options, "--priority=err", "--no-pager", "--quiet")
    assert "ksm" not in errors.lower()
    everything = subprocess.run(
        ["journalctl", *options, "--no-pager"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "ERROR: ld.so" not in everything.stdout


def our_files() -> list[str]:
    """Return what global-enable may leave in the folders of units."""
    return sorted(
        str(file)
        for folder in UNIT_FOLDERS
        for kind in ("*.conf", "*.service")
        for file in folder.rglob(kind)
        if file.is_file() and ("libksm_preload" in (text := file.read_text()) or "KSM=" in text)
    )


def status() -> dict[str, Any]:
    """Return what ksmtool says is set globally."""
    told: dict[str, Any] = json.loads(output("ksmtool", "global-status", "--json"))
    assert told["schema"] == 1
    return told


# --- what a boot does: the words of ksm_test.do ---


def untouched() -> None:
    """Nothing is opted in and nothing of ours is left, and everything works."""
    is_up()
    assert all_opted_in() == {}
    assert not PRELOAD_LIST.exists()
    assert our_files() == []


def plain() -> None:
    """As Debian is: what the other boots are compared with."""
    untouched()
    assert set(processes().values()) == {False}


def disabled() -> None:
    """As if we had never been enabled, and ksmtool says so."""
    untouched()
    assert status()["methods"] == []


def enable() -> None:
    """Enable by the method that ksmtool chooses itself."""
    changed("ksmtool", "global-enable", "--yes")
    assert status()["methods"] == [word("ksm_test.method")]


def enable_list() -> None:
    """Enable by the file, whatever is best here."""
    changed("ksmtool", "global-enable", "--yes", "--method", BY_LIST)
    assert "libksm_preload" in PRELOAD_LIST.read_text()


def enabled() -> None:
    """Programs are opted in, those of the policy are not, and everything works."""
    is_up()
    method = word("ksm_test.method")
    told = status()
    assert told["methods"] == [method]
    assert PRELOAD_LIST.exists() == (told["preload"]["entry"] is not None) == (method == BY_LIST)
    assert bool(our_files()) == bool(told["systemd"]["drop_ins"]) == (method == BY_SYSTEMD)
    names = all_opted_in().values()
    print(f"{len(names)} opted in:", *sorted(set(names)))
    assert told["processes"]["opted_in"] > 0

    found = processes()
    wrong = [name for name in PRIVATE if found[name]]
    assert not wrong, f"opted in against the policy: {wrong}"
    # By systemd what people start after a login is left out, unless asked for.
    people = ("the shell of a login", "a service of alice", "a program by ssh")
    expected = {"a service": True, **dict.fromkeys(people, method == BY_LIST)}
    assert {name: found[name] for name in expected} == expected


def disable() -> None:
    changed("ksmtool", "global-disable")
    assert not PRELOAD_LIST.exists()
    assert our_files() == []


def kernel_enable() -> None:
    """KSM on, and kept on; what was set before is noted for the boots to come."""
    KSM_BEFORE.write_text(json.dumps(kernel()["settings"]))
    changed("ksmtool", "kernel-enable", "--profile", "fast")
    assert kernel_is_on()


def kernel_is_on() -> bool:
    told = kernel()
    settings = told["settings"]
    # Linux 6.8 has the advisor; without it the limit is a number of pages.
    rate = (
        ("advisor_mode", "scan-time") if "advisor_mode" in settings else ("sleep_millisecs", "20")
    )
    assert settings[rate[0]] == rate[1]
    assert (told["profile"], told["drift"]) == ("fast", [])
    assert (told["init"], told["kept_over_boots"], told["others"]) == ("systemd", True, [])
    return bool(told["merging"] and settings["run"] == "1" and settings["use_zero_pages"] == "1")


def kernel_on() -> None:
    """KSM is on by itself after a boot, set as it was asked for."""
    assert kernel_is_on()
    assert output("systemctl", "is-active", KSM_UNIT) == "active"
    assert output("systemctl", "show", "--value", "--property=Result", KSM_UNIT) == "success"


def kernel_disable() -> None:
    changed("ksmtool", "kernel-disable")
    kernel_as_found()


def kernel_as_found() -> None:
    """KSM is set as it was before, and nothing of ours is there to change that."""
    told = kernel()
    assert told["settings"] == json.loads(KSM_BEFORE.read_text())
    assert (told["profile"], told["kept_over_boots"], told["merging"]) == (None, False, False)
    assert say("systemctl", "cat", KSM_UNIT).returncode == 1


def ksmtuned() -> None:
    """Debian's ksmtuned is seen, told with the ways out, and not fought; the way out is one."""
    before = kernel()["settings"]
    output("systemctl", "--quiet", "enable", "--now", "ksmtuned.service")
    wait_until(lambda: named("ksmtuned"), "ksmtuned runs")
    told = kernel()
    assert [(one["name"], one["conflict"]) for one in told["others"]] == [("ksmtuned", True)]
    said = say("ksmtool", "kernel-enable")
    assert (said.returncode, said.stdout) == (1, "")
    assert "ksmtuned has KSM: it " in said.stderr
    way_out = "sudo systemctl disable --now ksmtuned.service"
    assert way_out in said.stderr
    output(*way_out.split(), "--quiet")
    changed("ksmtool", "kernel-enable", "--profile", "fast")
    assert kernel()["merging"]
    changed("ksmtool", "kernel-disable")
    output("systemctl", "stop", "ksm.service")
    assert kernel()["settings"]["run"] == before["run"]


def kernel() -> dict[str, Any]:
    """Return what ksmtool says of KSM."""
    told: dict[str, Any] = json.loads(output("ksmtool", "kernel-status", "--json"))
    assert told["schema"] == 1
    return told


def break_library() -> None:
    """Let our libraries kill every program, at once: nothing can be started after this."""
    for name in ("libksm_preload.so", "libksm_preload_prctl.so"):
        library = LIBRARIES / name
        shutil.copy(library, BROKEN.with_name(name))
        # Those that run keep the old one.
        shutil.copy(BROKEN, library.with_suffix(".new"))
        library.with_suffix(".new").rename(library)
    for command in ("/bin/true", "/bin/systemctl"):
        assert subprocess.run([command], check=False).returncode == -11, f"{command} still works"


def rescued() -> None:
    """Back, with all units, though our libraries are still broken; then repair them."""
    is_up()
    assert not PRELOAD_LIST.exists() or "libksm_preload" not in PRELOAD_LIST.read_text()
    for name in ("libksm_preload.so", "libksm_preload_prctl.so"):
        shutil.copy(BROKEN.with_name(name), LIBRARIES / f"{name}.new")
        (LIBRARIES / f"{name}.new").rename(LIBRARIES / name)


def switched_off() -> None:
    """Enabled, but what the kernel's command line says counts: from early in the boot."""
    is_up()
    assert PRELOAD_LIST.exists()
    assert DISABLED.exists()
    said = output(
        "systemctl", "show", "--value", "--property=ExecMainExitTimestampMonotonic", OFF_UNIT
    )
    since = int(said) / 1e6
    late = {pid: name for pid, name in all_opted_in().items() if started(pid) > since}
    assert late == {}, f"opted in after {since:.1f} s: {late}"
    assert set(processes().values()) == {False}


def started(pid: int) -> float:
    """Return how many seconds after the kernel a process has started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def fail() -> None:
    """See that a failure is seen."""
    raise AssertionError("on purpose")


DO: tuple[Callable[[], None], ...] = (
    plain,
    disabled,
    enable,
    enable_list,
    enabled,
    disable,
    kernel_enable,
    kernel_on,
    kernel_disable,
    kernel_as_found,
    ksmtuned,
    break_library,
    rescued,
    switched_off,
    fail,
)


def main(stages: Iterable[Callable[[], None]] = DO) -> None:
    """Do what the command line says, report, and switch the machine off."""
    known = {one.__name__: one for one in stages}
    # People log in by a getty, which is left out: login would inherit what this service has.
    process.clear_merge_flag()
    wanted = word("ksm_test.do").split(",")
    result = 0
    try:
        for name in wanted:
            start = time.monotonic()
            print(f"== {name}, {start:.0f} s after the kernel", flush=True)
            known[name]()
            print(f"== {name} holds, {time.monotonic() - start:.1f} s", flush=True)
    except Exception:  # the report is all that anybody sees
        traceback.print_exc()
        result = 1
    print(f"status {result}", flush=True)
    if "break_library" in wanted:
        os.sync()
        for key in "uo":  # all file systems read-only, off
            Path("/proc/sysrq-trigger").write_text(key)
    else:
        # Nothing in the report behind the status, such as that there is no D-Bus yet.
        subprocess.run(["systemctl", "poweroff"], stderr=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
