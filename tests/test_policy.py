# SPDX-License-Identifier: MIT
"""The policy: one table for both readers, C against Python, and whose files are trusted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conftest import (
    DEFAULT_POLICY,
    HERE,
    SOURCE,
    Victims,
    need,
    need_command,
    run,
)
from ksmtool import policy, program
from policy_cases import ALLOW, CASES, DENY, Case


def by_python(text: bytes, path: bytes) -> str:
    source = policy.Source("file", policy.parse(text)[0])
    verdict = policy.Policy((source,), (), "/switch", off=False).verdict(os.fsdecode(path))
    return ALLOW if verdict.allowed else DENY


class Reader:
    """policy.h, asked through a pipe."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def __call__(self, text: bytes | None, path: bytes, piece: int = 1 << 20) -> str:
        """Return what it says: allow, deny or a complaint; None asks the compiled-in defaults."""
        length = -1 if text is None else len(text)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        record = b"%d %d %d\n" % (len(path), length, piece) + path + (text or b"")
        while record:
            record = record[stdin.write(record) or 0 :]
        return stdout.readline().decode().strip()

    def end(self) -> int:
        """Close it and return its status."""
        self._process.communicate()
        return self._process.returncode


@pytest.fixture(scope="session")
def by_c(victims: Victims) -> Iterator[Reader]:
    folder = victims.defaults()
    options = [f"-I{SOURCE}", f"-I{folder}", "-Wall", "-Wextra", "-Werror"]
    sanitized = [need_command("gcc"), "-O1", "-g", "-fsanitize=address,undefined", *options]
    built = run([*sanitized, "-o", folder / "policy", HERE / "programs" / "policy.c"])
    assert built.returncode == 0, built.stderr
    reader = Reader(folder / "policy")
    yield reader
    assert reader.end() == 0


# --- the rules ---


def test_the_tables_names_are_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_in_python(case: Case) -> None:
    assert by_python(case.text, case.path) == case.expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_in_c(case: Case, by_c: Reader) -> None:
    for piece in (1 << 20, 1, 7):
        assert by_c(case.text, case.path, piece) == case.expected


# Few letters, so that patterns match now and then.
PATTERNS = st.lists(
    st.sampled_from(
        [b"a", b"b", b"/", b"*", b"?", b"[", b"]", b"!", b"-", b" ", b"[ab]", b"[!a-]"]
    ),
    max_size=10,
).map(b"".join)
LINES = st.one_of(
    st.builds(lambda word, p: word + b" " + p, st.sampled_from([b"deny", b"allow"]), PATTERNS),
    st.sampled_from(
        [b"default deny", b"default allow", b"", b"#", b"deny", b"default a", b"\tdeny a"]
    ),
    st.binary(max_size=20),
)
TEXTS = st.lists(LINES, max_size=8).map(b"\n".join)
PATHS = st.text("ab/-]! ", min_size=1, max_size=8).map(str.encode)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TEXTS, PATHS, st.integers(1, 40))
@example(b"deny [", b"/a", 1)
def test_c_and_python_say_the_same(by_c: Reader, text: bytes, path: bytes, piece: int) -> None:
    assert by_c(text, path, piece) == by_python(text, path)


@settings(max_examples=500, deadline=None)
@given(PATTERNS, PATHS)
def test_c_and_python_match_the_same(by_c: Reader, pattern: bytes, path: bytes) -> None:
    text = b"deny " + pattern
    assert by_c(text, path) == by_python(text, path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"refuse a", "'refuse' is none of deny, allow, default."),
        (b"deny", "deny lacks its argument."),
        (b"allow \t", "allow lacks its argument."),
        (b"default", "default lacks its argument."),
        (b"default no", "default takes one word, allow or deny."),
        (b"default deny all", "default takes one word, allow or deny."),
        (b"deny [a", "A set that begins with [ is never closed by ]."),
        (b"deny a\0", "There is a NUL byte in the line."),
        (b"#" * 512, "The line is longer than 511 bytes."),
        (b"deny\xffa b", "'deny\\udcffa' is none of deny, allow, default."),
    ],
)
def test_problems_are_named_with_their_line(line: bytes, words: str) -> None:
    rules, wrong = policy.parse(b"# fine\n\n" + line + b"\nallow a\n")
    assert wrong == [(3, words)]
    assert [(rule.line, str(rule)) for rule in rules] == [(4, "allow a")]


# --- the defaults ---


def shipped() -> Sequence[policy.Rule]:
    rules, wrong = policy.parse(DEFAULT_POLICY.read_bytes())
    assert wrong == []
    return rules


def test_the_defaults_are_what_both_readers_have() -> None:
    assert Path(policy.DEFAULTS).read_bytes() == DEFAULT_POLICY.read_bytes()
    rules = shipped()
    assert len({rule.argument for rule in rules}) == len(rules) > 120
    assert {rule.word for rule in rules} == {"deny"}


def words(text: str) -> list[str]:
    return text.split()


LEFT_OUT = words("""
    su su-rs sudo sudo-rs sudo.ws doas pkexec polkitd polkit-agent-helper-1 login sulogin agetty
    passwd unix_chkpwd systemd systemd-logind systemd-executor systemd-nspawn init runsvdir atd
    sssd sssd_nss krb5kdc kinit smbd gdm-session-worker sddm-greeter lightdm greetd xdm
    xrdp-sesman cockpit-session gnome-shell xfce4-screensaver fprintd swaylock slock vlock
    physlock bwrap chroot nsenter unshare schroot incusd incus-agent crio k3s k3s-server kubelet
    apptainer singularity flatpak flatpak-session-helper mariadbd-safe mysqld_safe cron crond ssh
    sshd sshd-session sshd-auth ssh-agent ssh-add ssh-keygen scp sftp gpg gpg-agent scdaemon
    pinentry-gtk-2 openssl age step step-ca vault bao stunnel4 wg openvpn charon tailscaled
    wpa_supplicant NetworkManager cryptsetup pcscd keyctl softhsm2-util gnome-keyring-daemon
    kwalletd5 kwalletd6 secret-tool keepassxc keepassxc-cli bw rbw-agent op firefox firefox-esr
    chrome google-chrome-stable chromium chromium-browser chromium-headless-shell brave opera
    vivaldi-bin thunderbird evolution WebKitWebProcess QtWebEngineProcess signal-desktop
    qemu-system-x86_64 kvm libvirtd VirtualBoxVM firecracker dockerd containerd-shim-runc-v2 runc
    crun podman conmon lxc-start mariadbd mysqld gdb strace ltrace valgrind perf perf_6.1 ld.so
    ld-linux-x86-64.so.2 ld-linux.so.2 ld-linux-aarch64.so.1 ld-2.31.so ld-musl-x86_64.so.1
    libc.so jackd pipewire pipewire-pulse pulseaudio
""")
# Which begin or end like one that is left out, and what most machines run.
LET_IN = words("""
    python3.11 node ruby3.1 perl php8.2 lua5.4 java bash dash sh zsh busybox redis-server postgres
    nginx apache2 php-fpm8.2 httpd sqlite3 mysql mariadb mysqldump beam.smp erl guile sbcl sum
    sudoku suspend login-time passwdqc page agenda stage agent opt openssl-tool opal operator
    stepmania steam bwa bwidget wget wgetpaste pass passenger-core vaultier consult sshfs sshguard
    gpgv gpgconf chromium-bsu chromedriver chromecast operapp electrum firefoxpwa gdmap gdbm_dump
    gdbserver perfect perl5 performer kvmtool qemu virtiofsd lxcfs lxpanel lxterminal podcast
    runcible dockerize crunch containers systemctl journalctl initdb init-d-script initctl runsv
    xdmx atdtool gnome-shell-calendar-server greetings sudo.pl fakechroot unshared nsenter2
    schrootd bwrapx criu kubectl slocker mysqld_multi incron crontab cronolog kinite smbclient
    evolution2 thunderbolt vivaldiweb kwallet-query straceg ltracer valgrind-listener jackd2
    pulseaudio-dlna pipewireless libc.so.6 ld ld.bfd ld.gold ldd ldconfig lldb libtool charonx
""")


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out_by_default(name: str, by_c: Reader) -> None:
    path = b"/usr/bin/" + name.encode()
    assert (by_c(None, path), by_python(DEFAULT_POLICY.read_bytes(), path)) == (DENY, DENY)


@pytest.mark.parametrize("name", LET_IN)
def test_let_in_by_default(name: str, by_c: Reader) -> None:
    path = b"/usr/bin/" + name.encode()
    assert (by_c(None, path), by_python(DEFAULT_POLICY.read_bytes(), path)) == (ALLOW, ALLOW)


def test_the_compiled_defaults_are_the_file(by_c: Reader) -> None:
    """Sorted and cut by first bytes, they still say the same of a name made of each rule."""
    text = DEFAULT_POLICY.read_bytes()
    names = [re.sub(rb"[*]", b"", rule.argument) for rule in shipped()]
    names += [re.sub(rb"\[(.).*?\]", rb"\1", name) for name in names]
    names += [name + b"x" for name in names] + [name[:-1] for name in names] + [b"\xc3", b"~", b"!"]
    for name in names:
        path = b"/x/" + name
        assert by_c(None, path) == by_python(text, path), name


@pytest.mark.parametrize(
    "rule", ["allow a", "default deny", "deny /a", "deny *a", "deny [a]", "deny ä"]
)
def test_a_default_that_cannot_be_found_stops_the_build(rule: str, tmp_path: Path) -> None:
    file = tmp_path / "policy"
    file.write_text(f"deny b\n{rule}\n")
    done = run([sys.executable, SOURCE / "policy_defaults.py", file])
    assert done.returncode != 0
    assert f"cannot be a default, which is found by its first byte: {rule}" in done.stderr


# --- whose files are trusted: by Python below a folder, by C in a mount namespace ---


def as_is(_folder: Path) -> None:
    pass


def change(name: str, mode: int | None = None, owner: int | None = None) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        if owner is not None:
            os.chown(folder / name, owner, -1)
        if mode is not None:
            (folder / name).chmod(mode)

    return changed


def in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replaced(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return replaced


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


# Name: files, what is done to them, what becomes of `report`, and of ssh, which the defaults deny.
FOLDERS: dict[str, tuple[dict[str, str], Callable[[Path], object], str, str]] = {
    "no folder": ({}, shutil.rmtree, ALLOW, DENY),
    "an empty folder": ({}, as_is, ALLOW, DENY),
    "an empty policy replaces the defaults": ({"policy": ""}, as_is, ALLOW, ALLOW),
    "a policy": ({"policy": "deny report*\n"}, as_is, DENY, ALLOW),
    "a drop-in comes before the defaults": (
        {"policy.d/a.conf": "allow ssh\n"}, as_is, ALLOW, ALLOW),
    "a drop-in leaves the defaults": ({"policy.d/a.conf": "deny report*\n"}, as_is, DENY, DENY),
    "a drop-in comes before the policy": (
        {"policy.d/a.conf": "allow report*\n", "policy": "deny *\n"}, as_is, ALLOW, DENY),
    "drop-ins by their names": (
        {"policy.d/b.conf": "deny *\n", "policy.d/a.conf": "allow *\n"}, as_is, ALLOW, ALLOW),
    "... capitals first": (
        {"policy.d/a.conf": "deny *\n", "policy.d/B.conf": "allow *\n"}, as_is, ALLOW, ALLOW),
    "... digits as bytes": (
        {"policy.d/9.conf": "deny *\n", "policy.d/10.conf": "allow *\n"}, as_is, ALLOW, ALLOW),
    "... bytes above 127 last": (
        {"policy.d/z.conf": "allow *\n", "policy.d/\xe4.conf": "deny *\n"}, as_is, ALLOW, ALLOW),
    "... a prefix": (
        {"policy.d/a.conf": "allow *\n", "policy.d/a.b.conf": "deny *\n"}, as_is, DENY, DENY),
    "the first default in any file": (
        {"policy.d/a.conf": "# none\n", "policy.d/b.conf": "default deny\n",
         "policy": "default allow\n"}, as_is, DENY, DENY),
    "a default does not end the defaults": (
        {"policy.d/a.conf": "default allow\n"}, as_is, ALLOW, DENY),
    "only .conf": (
        {"policy.d/a": "deny *\n", "policy.d/a.conf~": "deny *\n", "policy.d/a.confx": "deny *\n",
         "policy.d/README": "deny *\n", "policy.d/conf": "deny *\n"}, as_is, ALLOW, DENY),
    "none that begin with a dot": (
        {"policy.d/.a.conf": "deny *\n", "policy.d/.conf": "deny *\n"}, as_is, ALLOW, DENY),
    "the longest name": ({f"policy.d/{'a' * 250}.conf": "deny *\n"}, as_is, DENY, DENY),
    "very many drop-ins": (
        {f"policy.d/{i:03}{'x' * 150}.conf": f"deny {i}\n" for i in range(60)}
        | {"policy.d/059z.conf": "deny report*\n"}, as_is, DENY, DENY),
    "files are texts of their own": (
        {"policy.d/a.conf": "deny rep", "policy.d/b.conf": "ort*\n"}, as_is, ALLOW, DENY),
    "a line across read(2)s": (
        {"policy": "#" * 1020 + "\ndeny report*\n" + "#" * 3000}, as_is, DENY, ALLOW),
    "a large policy": ({"policy": "deny x\n" * 20000 + "deny report*\n"}, as_is, DENY, ALLOW),
    "a path": ({"policy": "deny /*/report*\n"}, as_is, DENY, ALLOW),
    "another path": ({"policy": "deny /no/report-dynamic\n"}, as_is, ALLOW, ALLOW),
    "a policy that all may write": (
        {"policy": "deny report*\n"}, change("policy", 0o646), ALLOW, DENY),
    "a policy that its group may write": (
        {"policy": "deny report*\n"}, change("policy", 0o664), ALLOW, DENY),
    "a policy of somebody else's": (
        {"policy": "deny report*\n"}, change("policy", owner=65534), ALLOW, DENY),
    "a policy that only root may read": (
        {"policy": "deny report*\n"}, change("policy", 0o600), DENY, ALLOW),
    "a drop-in that all may write": (
        {"policy.d/a.conf": "deny *\n", "policy.d/b.conf": "deny report*\n"},
        change("policy.d/a.conf", 0o666), DENY, DENY),
    "a drop-in of somebody else's": (
        {"policy.d/a.conf": "deny *\n"}, change("policy.d/a.conf", owner=65534), ALLOW, DENY),
    "policy.d that all may write": (
        {"policy.d/a.conf": "deny *\n"}, change("policy.d", 0o777), ALLOW, DENY),
    "policy.d of somebody else's": (
        {"policy.d/a.conf": "deny *\n"}, change("policy.d", owner=65534), ALLOW, DENY),
    "... which does not concern the policy": (
        {"policy.d/a.conf": "allow *\n", "policy": "deny report*\n"},
        change("policy.d", 0o777), DENY, ALLOW),
    "policy is a FIFO": ({"policy": ""}, in_place("policy", os.mkfifo), ALLOW, DENY),
    "policy is a folder": ({"policy": ""}, in_place("policy", Path.mkdir), ALLOW, DENY),
    "policy is a device": ({"policy": ""}, in_place("policy", link("/dev/zero")), ALLOW, DENY),
    "policy is a symlink": (
        {"other": "deny report*\n"}, in_place("policy", link("other")), DENY, ALLOW),
    "policy is a symlink to what is not root's alone": (
        {"other": "deny report*\n"},
        lambda path: (change("other", 0o666)(path), link("other")(path / "policy")),
        ALLOW, DENY),
    "policy is dangling": ({"policy": ""}, in_place("policy", link("no")), ALLOW, DENY),
    "policy is a symlink to itself": (
        {"policy": ""}, in_place("policy", link("policy")), ALLOW, DENY),
    "policy.d is a file": ({"policy.d": "deny *\n"}, as_is, ALLOW, DENY),
    "policy.d is a FIFO": ({"policy": ""}, lambda path: os.mkfifo(path / "policy.d"), ALLOW, ALLOW),
    "policy.d is a symlink": (
        {"more/a.conf": "deny report*\n"}, in_place("policy.d", link("more")), DENY, DENY),
    "a drop-in is a FIFO": (
        {"policy.d/a.conf": "", "policy.d/b.conf": "deny report*\n"},
        in_place("policy.d/a.conf", os.mkfifo), DENY, DENY),
    "a drop-in is a folder": (
        {"policy.d/a.conf": ""}, in_place("policy.d/a.conf", Path.mkdir), ALLOW, DENY),
    "a drop-in is dangling": (
        {"policy.d/a.conf": ""}, in_place("policy.d/a.conf", link("no")), ALLOW, DENY),
    "the folder is a file": (
        {}, in_place("", lambda path: path.write_text("deny *\n")), ALLOW, DENY),
}  # fmt: skip


def make(root: Path, files: dict[str, str], then: Callable[[Path], object] = as_is) -> Path:
    """Write files below root/etc/ksm-preload and return that folder."""
    folder = root / "etc/ksm-preload"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    for name, text in files.items():
        path = folder / os.fsdecode(name.encode("latin-1"))
        path.parent.mkdir(exist_ok=True)
        path.parent.chmod(0o755)
        path.write_text(text)
        path.chmod(0o644)
    then(folder)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_in_python(name: str, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "needs root to make files that are trusted")
    files, then, report, ssh = FOLDERS[name]
    make(tmp_path, files, then)
    found = policy.load(tmp_path)
    for path, expected in (("/v/report-dynamic", report), ("/usr/bin/ssh", ssh)):
        verdict = found.verdict(path)
        assert (ALLOW if verdict.allowed else DENY) == expected, (path, verdict)


UNTRUSTED = {
    "a policy that all may write": "policy: Not read: others than root may write it (mode 0646).",
    "a policy of somebody else's": "policy: Not read: it belongs to user 65534, not to root.",
    "policy is a FIFO": "policy: Not read: it is not a regular file.",
    "policy is dangling": "policy: Not read: No such file or directory.",
    "policy is a symlink to itself": "policy: Not read: Too many levels of symbolic links.",
    "policy.d that all may write": "policy.d: Not read: others than root may write it (mode 0777).",
    "policy.d is a file": "policy.d: Not read: it is not a folder.",
    "a drop-in of somebody else's": (
        "policy.d/a.conf: Not read: it belongs to user 65534, not to root."
    ),
    "a policy that only root may read": (
        "policy: Other users' programs cannot read it (mode 0600), so they are left out."
    ),
    "a policy": "",
    "no folder": "",
}


@pytest.mark.parametrize("name", UNTRUSTED)
def test_what_is_not_trusted_is_said(name: str, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "needs root to make files that are trusted")
    files, then, _, _ = FOLDERS[name]
    folder = make(tmp_path, files, then)
    said = [str(problem) for problem in policy.load(tmp_path).problems]
    assert said == ([f"{folder}/{UNTRUSTED[name]}"] if UNTRUSTED[name] else [])


def test_a_folder_of_somebody_elses_is_said(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "needs root to make files that are trusted")
    folder = make(tmp_path, {"policy": ""})
    folder.chmod(0o770)
    assert [str(problem) for problem in policy.load(tmp_path).problems] == [
        f"{folder}: Others than root may remove files from it.",
        f"{folder}: Not every user may enter it: other users' programs are left out.",
    ]


@pytest.mark.parametrize("name", ["", "policy.d", "policy.d/a.conf", "policy"])
def test_what_may_not_be_read_leaves_programs_out_in_python(name: str, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "needs root to make files that are trusted")
    # Not below tmp_path, which other users may not enter.
    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        files = {"policy.d/a.conf": "allow a\n", "policy": "allow *\n"}
        make(Path(root), files, change(name, 0o700 if name in ("", "policy.d") else 0o600))
        os.seteuid(65534)
        try:
            found = policy.load(root)
        finally:
            os.seteuid(0)
        assert not found.verdict("/bin/b").allowed
        assert found.verdict("/bin/a").allowed is (name == "policy")
        assert found.unreadable.startswith(f"{root}/etc/ksm-preload/{name}")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("deny a # why", "A comment is a line of its own: here the # is part of the pattern."),
        ("allow a\t# why", "A comment is a line of its own: here the # is part of the pattern."),
        ("deny a#b", ""),
        ('deny "a b"', "The quote is part of the pattern: a name with blanks needs none."),
        ("deny 'a'", "The quote is part of the pattern: a name with blanks needs none."),
        ("deny it's", ""),
        ("deny {root}/link/x", "{none} {root}/real/x."),
        ("deny {root}/real/../real/x", "{none} {root}/real/x."),
        ("deny {root}/link", "{none} {root}/real."),
        ("deny {root}/link/*", ""),
        ("deny {root}/real/x", ""),
        ("deny {root}/no/x", ""),
        ("deny link/x", ""),
        ("default deny", ""),
    ],
)
def test_likely_mistakes_are_said(rule: str, said: str, tmp_path: Path) -> None:
    need(os.geteuid() == 0, "needs root to make files that are trusted")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    words = {"root": tmp_path, "none": "It can match no program: without symlinks this path is"}
    folder = make(tmp_path, {"policy.d/a.conf": "\n" + rule.format(**words)})
    found = policy.load(tmp_path)
    assert found.problems == []
    expected = [f"{folder}/policy.d/a.conf:2: {said.format(**words)}"] if said else []
    assert [str(problem) for problem in policy.doubts(found)] == expected


def test_what_is_no_drop_in_by_its_name_is_said(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "needs root to make files that are trusted")
    names = ("b", "a.conf", "a.conf~", ".hidden", ".a.conf", "README", "a.conf.bak")
    folder = make(tmp_path, {f"policy.d/{name}": "" for name in names})
    assert [str(problem) for problem in policy.load(tmp_path).problems] == [
        f"{folder}/policy.d/{name}: Not read: its name does not end in .conf."
        for name in ("a.conf.bak", "b")
    ]


@pytest.mark.parametrize(
    ("kind", "said"), [("static", True), ("static-pie", True), ("dynamic", False)]
)
def test_what_a_static_program_keeps_is_said(kind: str, said: bool, victims: Victims) -> None:
    for text, expected in (("default deny", said), ("", False)):
        source = policy.Source("file", policy.parse(text.encode())[0])
        rules = policy.Policy((source,), (), "/switch", off=False)
        outcome = policy.outcome(rules, str(victims("end", kind)), None)
        assert outcome is not None
        assert outcome.note == (policy.STATIC if expected else "")


def test_the_loader_is_not_alone() -> None:
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    need(loader.exists(), f"no {loader}")
    found = program.inspect(str(loader))
    assert (found.static, found.alone) == (True, False)


def test_the_kill_switch_in_python(tmp_path: Path) -> None:
    assert not policy.load(tmp_path).off
    (tmp_path / "run").mkdir()
    assert not policy.load(tmp_path).off
    (tmp_path / "run/ksm-preload.disabled").touch()
    found = policy.load(tmp_path)
    assert found.off
    verdict = found.verdict("/bin/true")
    assert not verdict.allowed
    assert verdict.why == f"{tmp_path}/run/ksm-preload.disabled is there"


def test_verdict_names_the_line(tmp_path: Path) -> None:
    need(os.geteuid() == 0, "needs root to make files that are trusted")
    folder = make(tmp_path, {"policy.d/a.conf": "# one\n\ndeny /opt/*\n", "policy": "default deny"})
    found = policy.load(tmp_path)
    verdict = found.verdict("/opt/x/y (deleted)")
    assert verdict == policy.Verdict(
        False, f'"deny /opt/*" in {folder}/policy.d/a.conf:3', f"{folder}/policy.d/a.conf", 3,
        "deny /opt/*",
    )  # fmt: skip
    assert found.verdict("/bin/x").why == f'"default deny" in {folder}/policy:1'
