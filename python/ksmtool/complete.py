# SPDX-License-Identifier: MIT
"""What a shell offers at the Tab key where click alone does not know it.

click answers with a type and a value; its types are plain, dir and file. Ours besides is command,
for the scripts in data/completions: the word is part of another command line, and the value is how
many words of that are before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ksmtool.errors import KsmtoolError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def command(
    context: click.Context, parameter: click.Parameter, _incomplete: str
) -> list[CompletionItem[str]]:
    """Return that the words of this argument are a command line."""
    return _another(context.params.get(str(parameter.name)) or ())


def program(
    _context: click.Context, _parameter: click.Parameter, _incomplete: str
) -> list[CompletionItem[str]]:
    """Return that each word of this argument is a program's name."""
    return _another(())


def group(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of this user's groups."""
    from ksmtool import group as groups  # noqa: PLC0415

    try:
        return [name for name in groups.files() if name.startswith(incomplete)]
    except KsmtoolError:
        return []


class Wrapping(click.Command):
    """A command whose options end at its argument `command`: `ksmtool wrap ls -h` is ls's help."""

    allow_interspersed_args = False

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Return this command's options, but for a word of the other one."""
        begun = ctx.params.get("command")
        return _another(begun) if begun else super().shell_complete(ctx, incomplete)


def _another(begun: tuple[str, ...]) -> list[CompletionItem[str]]:
    from click.shell_completion import CompletionItem  # noqa: PLC0415

    return [CompletionItem(str(len(begun)), type="command")]
