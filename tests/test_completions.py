# SPDX-License-Identifier: MIT
"""What the Tab key offers, in each shell itself: in a terminal, from an installation's folders."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import HERE, Tmux, Tree, need, need_command, run

COMPLETIONS = HERE.parent / "data" / "completions"
BASH_COMPLETION = "usr/share/bash-completion/bash_completion"
GROUP = f"tabs-{os.getpid()}"

BASH = """
PS1='ready> '
bind 'set show-all-if-ambiguous on'
bind 'set page-completions off'
bind 'set completion-query-items 0'
bind 'set enable-bracketed-paste off'
. {bash_completion}
"""
ZSH = """
PS1='ready> '
LISTMAX=1000
fpath=({share}/zsh/site-functions $fpath)
autoload -Uz compinit
compinit -u -d {folder}/zcompdump
"""
FISH = """
function fish_prompt; echo 'ready> '; end
set fish_greeting
set fish_autosuggestion_enabled 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("t")
    (found / "metrics.prom").touch()
    return found


@pytest.fixture(scope="module")
def group(tree: Tree) -> Iterator[str]:
    assert run([tree.wrapper, "--group", GROUP, "true"]).returncode == 0
    yield GROUP
    assert run([tree.ksmtool, "group", "forget", GROUP]).returncode == 0


@pytest.fixture(scope="module", params=["bash", "zsh", "fish"])
def shell(
    request: pytest.FixtureRequest, tree: Tree, system: Path, folder: Path, group: str
) -> Iterator[Tmux]:
    """Return a terminal with the shell in it, which has no settings but ours."""
    need_command("tmux")
    name = request.param
    share = system / "usr/share"
    places = [Path("/"), HERE.parent / ".cache/packages"]
    found = [place / BASH_COMPLETION for place in places if (place / BASH_COMPLETION).exists()]
    need(name != "bash" or found, "no bash-completion")
    (folder / ".bashrc").write_text(BASH.format(bash_completion="".join(map(str, found[:1]))))
    (folder / ".zshrc").write_text(ZSH.format(share=share, folder=folder))
    options = {"bash": ("--rcfile", folder / ".bashrc"), "zsh": (), "fish": ("-C", FISH)}
    environment = {
        "HOME": folder,
        "ZDOTDIR": folder,
        "PATH": f"{tree.ksmtool.parent}:/usr/bin:/bin",
        "XDG_DATA_DIRS": f"{share}:/usr/share",
        "TERM": "screen",
        "LC_ALL": "C.UTF-8",
    }
    variables = [f"{key}={value}" for key, value in environment.items()]
    command = ["env", "-i", "-C", folder, *variables, need_command(name), *options[name]]
    where = folder / name
    where.mkdir()
    terminal = Tmux(where, shlex.join(map(str, command)))
    try:
        terminal.until("ready>")
        yield terminal
    finally:
        terminal("kill-server")


# What is typed before the Tab, and what is on the screen after it.
ROWS = [
    ("ksmtool kernel-", "kernel-disable", "kernel-enable", "kernel-status"),
    ("ksmtool --version stat", "status"),
    ("ksmtool group forget tab", GROUP),
    ("ksmtool status --sort=pro", "profit", "processes"),
    ("ksmtool export --textfile met", "metrics.prom"),
    ("ksmtool wrap --method=prctl ksmtool status --js", "--json"),
    ("ksm-wrapper --group web ksmtool status --js", "--json"),
    ("ksm-wrapper --", "--method", "--no-preload", "--group-required", "--show", "--version"),
]
MORE = [
    ("ksmtool kernel-e", "kernel-enable"),
    ("ksmtool group fo", "forget"),
    ("ksmtool status --js", "--json"),
    ("ksmtool status --sort pro", "profit", "processes"),
    ("ksmtool status --sort=nam", "--sort=name"),
    ("ksmtool export --textfile=met", "--textfile=metrics.prom"),
    ("ksmtool wrap --meth", "--method"),
    ("ksmtool wrap ksm-wrap", "ksm-wrapper"),
    ("ksmtool wrap -q ksmtool kernel-s", "kernel-status"),
    ("ksmtool wrap -- ksmtool status --js", "--json"),
    ("ksmtool wrap ksmtool status --sort=pro", "profit", "processes"),
    ("ksmtool try -n 3 -- ksmtool kernel-s", "kernel-status"),
    ("ksmtool doctor -- ksmtool kernel-s", "kernel-status"),
    ("ksmtool policy check sh ksm-wrap", "ksm-wrapper"),
    ("ksm-wrapper --no-p", "--no-preload"),
    ("ksm-wrapper --method ma", "--method madvise"),
    ("ksm-wrapper --method=ma", "--method=madvise"),
    ("ksm-wrapper --group tab", GROUP),
    ("ksm-wrapper ksm-wrap", "ksm-wrapper ksm-wrapper"),
    ("ksm-wrapper ksmtool kernel-s", "kernel-status"),
    ("ksm-wrapper --follow --group=web -- ksmtool kernel-s", "kernel-status"),
]
CASES = [
    *(pytest.param(row, id=row[0]) for row in ROWS),
    *(pytest.param(row, id=row[0], marks=pytest.mark.slow) for row in MORE),
]


@pytest.mark.parametrize("row", CASES)
def test_tab(shell: Tmux, row: tuple[str, ...]) -> None:
    typed, *offered = row
    shell.key("C-c")  # what may go on
    shell.key("C-u")
    shell.command("clear")
    shell.until("ready>", absent="clear")
    shell.type(typed)
    shell.key("Tab")
    screen = shell.until(*offered)
    assert "kernel-apply" not in screen  # hidden


def test_every_option_of_the_wrapper_and_no_other(tree: Tree) -> None:
    """bash asks for --help itself."""
    helped = set(re.findall(r"(?:^  |, )(--[a-z-]+)", run([tree.wrapper, "--help"]).stdout, re.M))
    zsh = (COMPLETIONS / "_ksm-wrapper").read_text()
    assert set(re.findall(r"^    '(?:\(.*\))?(--[a-z-]+)=?\[", zsh, re.M)) == helped
    fish = (COMPLETIONS / "ksm-wrapper.fish").read_text()
    assert {f"--{name}" for name in re.findall(r"^\$option ([a-z-]+)", fish, re.M)} == helped
