# SPDX-License-Identifier: MIT
"""The manual pages: their form, every command, option and variable; their examples work."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import SOURCE, Tree, as_installed, need_command, run
from ksmtool import boot, ldpreload, policy, state, systemd
from ksmtool.cli import cli

MAN = Path(__file__).parent.parent / "man"
PAGES = sorted(MAN.iterdir())
KSMTOOL = (MAN / "ksmtool.1").read_text()
WRAPPER = (MAN / "ksm-wrapper.1").read_text()


def named(page: Path) -> str:
    return page.name


# ---- Form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_mandoc_finds_nothing(page: Path) -> None:
    done = run([need_command("mandoc"), "-Tlint", "-Wwarning", page])
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_man_warns_of_nothing(page: Path) -> None:
    command = [need_command("man"), "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page]
    done = run(command, env={"LC_ALL": "C.UTF-8", "MANWIDTH": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_pages_of_ours_that_are_referred_to_are_there_and_all_of_them_are() -> None:
    ours = {f"{page.stem}.{page.suffix[1:]}" for page in PAGES}
    found = set()
    for page in PAGES:
        for name, section in re.findall(r"^\.Xr (ksm\S+) (\d)", page.read_text(), re.MULTILINE):
            assert f"{name}.{section}" in ours, page
            found.add(f"{name}.{section}")
    assert found == ours


# ---- What is in them -----------------------------------------------------------------------


def commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{before}{name} ")
        elif not command.hidden:
            yield f"{before}{name}", command


COMMANDS = dict(commands(cli))


def sections(page: str) -> dict[str, str]:
    """Return the text of ksmtool(1) by command: a heading goes on with capitals or an option."""
    texts = re.split(r"^\.Ss ", page.partition(".Sh COMMANDS\n")[2], flags=re.MULTILINE)[1:]
    found = {}
    for text in texts:
        heading, _, rest = text.partition("\n")
        name = re.match(r"[a-z -]*[a-z]", heading)
        assert name, heading
        found[name[0]] = rest.partition("\n.Sh ")[0]
    return found


SECTIONS = sections(KSMTOOL)


def documented(section: str) -> dict[str, tuple[bool, str]]:
    """Return the options of a page or section: whether each takes a value, and what is said."""
    found = {}
    for item in re.split(r"^\.It ", section, flags=re.MULTILINE)[1:]:
        heading, _, text = item.partition("\n")
        flags, _, value = heading.partition(" Ar ")
        for flag in re.findall(r"Fl (?:Fl )?\S+|(?<=, )Fl \S+", flags):
            spelt = flag.replace("Fl Fl ", "--").replace("Fl ", "-")
            found[spelt] = (bool(value), text.partition("\n.El")[0])
    return found


def test_ksmtool_has_a_section_for_each_command_and_no_other() -> None:
    assert set(SECTIONS) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_ksmtool_has_every_option_and_choice_and_no_other(name: str) -> None:
    found = documented(SECTIONS[name])
    options = [one for one in COMMANDS[name].params if isinstance(one, click.Option)]
    assert set(found) == {spelling for option in options for spelling in option.opts}
    for option in options:
        for spelling in option.opts:
            takes_value, text = found[spelling]
            assert takes_value != option.is_flag, spelling
            if isinstance(option.type, click.Choice):
                words = set(re.findall(r"[\w.]+", text))
                assert set(option.type.choices) <= words, spelling


def test_ksmtools_own_options() -> None:
    options = {"--version", "-h", "--help"}
    listed = {word for param in cli.params for word in param.opts} | {"-h", "--help"}
    assert listed == options
    before = KSMTOOL.partition(".Sh COMMANDS")[0]
    for option in options:
        assert re.search(rf"^\.Fl {option.replace('--', 'Fl ').lstrip('-')}\b", before, re.M)


def test_the_wrapper_has_every_option_and_no_other(tree: Tree) -> None:
    shown = run([tree.wrapper, "--help"]).stdout
    listed = {
        option: value.isupper() or "|" in value
        for option, value in re.findall(r"(?:^  |, )(--[a-z-]+)(?: (\S+))?", shown, re.MULTILINE)
    }
    assert {name: takes for name, (takes, _) in documented(WRAPPER).items()} == listed


def variables(page: str) -> set[str]:
    text = page.partition(".Sh ENVIRONMENT\n")[2].partition("\n.Sh ")[0]
    return set(re.findall(r"\w+", " ".join(re.findall(r"^\.It Ev (.*)", text, re.MULTILINE))))


def test_the_wrapper_has_every_variable_and_no_other() -> None:
    sources = ("ksm_wrapper.c", "group.c", "seed.c", "target.c", "follow.h", "settings.h")
    code = "".join((SOURCE / name).read_text() for name in sources)
    used = set(re.findall(r'"([A-Z][A-Z_]+)(?:=\w+)?"', code)) - {"AUTO", "KSM_VERSION"}
    assert variables(WRAPPER) == used


def test_the_libraries_have_every_variable_and_no_other() -> None:
    code = (SOURCE / "settings.h").read_text() + (SOURCE / "ksm_preload.c").read_text()
    used = set(re.findall(r'"(KSMP?_[A-Z_]+)=', code))
    assert variables((MAN / "ksm_preload.7").read_text()) == used


def test_the_files_are_where_they_are_said_to_be() -> None:
    unit = boot.files("systemd", "/usr/bin/ksmtool")
    openrc = boot.files("openrc", "/usr/bin/ksmtool")
    assert unit is not None
    assert openrc is not None
    paths = [policy.FOLDER, policy.KILL_SWITCH, state.FILE, ldpreload.FILE, *unit.texts]
    for path in [*paths, *openrc.texts, f"{systemd.SYSTEM}/*.d/{systemd.NAME}", systemd.USER]:
        assert f"/{path}" in KSMTOOL, path


# ---- Examples ------------------------------------------------------------------------------


def examples(page: Path) -> list[str]:
    text = page.read_text().partition(".Sh EXAMPLES\n")[2].partition("\n.Sh ")[0]
    lines = re.findall(r"^\.Dl [$#] (.*)", text, re.MULTILINE)
    return [line.replace(r"\-", "-").replace(r"\(aq", "'") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_is_to_be_typed_can_be_copied(page: Path) -> None:
    """Else groff makes other characters of these than a shell knows."""
    for line in re.findall(r"^\.Dl (.*)", page.read_text(), re.MULTILINE):
        assert not re.search(r"(?<!\\)-|['`^~]", line), line


def test_the_policy_in_the_example() -> None:
    text = (MAN / "ksm-preload-policy.5").read_text()
    example = text.partition(".Bd -literal -offset indent\n")[2].partition("\n.Ed")[0]
    rules, faults = policy.parse(example.encode())
    assert not faults
    source = policy.Source("local.conf", rules)
    found = policy.Policy([source], [], "", False)
    paths = ("/usr/sbin/php-fpm8.2", "/srv/a/bin/worker", "/opt/a/bin/worker", "/usr/bin/bash")
    assert [found.verdict(path).allowed for path in paths] == [True, True, False, False]


SAID = {
    "ksm-preload-policy.5": ["\nsh: opted in"],
    "ksm-wrapper.1": ["\nopted in\n", "\nksm_preload: opted in (prctl)\n", "\na worker\n"],
    "ksm_preload.7": ["\nksm_preload: opted in (prctl)\n"],
    "ksmtool.1": ["\na worker\n", "\nForgot group web", "pages_to_scan:", "ld.so.preload would be"],
}
"""Something that the examples of a page print."""


@pytest.mark.ksm
@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_examples(name: str, system: Path, tmp_path: Path) -> None:
    """As root in a package's installation, in the order of the page."""
    before = """
        mkdir -p /run/ksm-preload
        mount -t tmpfs -o mode=755 none /run/ksm-preload
        ldconfig
    """
    lines = examples(MAN / name)
    script = before + "\n".join(f"echo {shlex.quote(line)}\n{line}" for line in lines)
    done = subprocess.run(
        as_installed(system, tmp_path, script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout
    assert lines
    for text in SAID[name]:
        assert text in done.stdout


def test_every_page_with_examples_is_run() -> None:
    assert {page.name for page in PAGES if examples(page)} == set(SAID)
