# SPDX-License-Identifier: MIT
"""The policy: which programs are left out of KSM. The only reader in Python.

src/policy.h is the one in C, which decides in the libraries, and says what the grammar is. One
table of cases and a differential test hold both to the same answers (tests/test_policy.py).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

DEFAULTS = os.path.join(os.path.dirname(__file__), "default_policy")
FOLDER = "etc/ksm-preload"
KILL_SWITCH = "run/ksm-preload.disabled"

_LONGEST_LINE = 511
_BLANKS = b" \t\r"
# As in C: what says that there is nothing to be trusted. Whatever else fails leaves programs out.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV}

_STAR, _ANY = -1, -2


@dataclass(frozen=True)
class Rule:
    """One line that counts."""

    word: str
    """deny, allow or default."""
    argument: bytes
    """The pattern; for a default: allow or deny."""
    line: int

    def __str__(self) -> str:
        """Return the rule as it could be written."""
        return f"{self.word} {os.fsdecode(self.argument)}"


@dataclass(frozen=True)
class Problem:
    """Something in a file that does not do what its author wanted."""

    file: str
    line: int
    """0: the file as a whole."""
    message: str

    def __str__(self) -> str:
        """Return one line for people."""
        return f"{self.file}:{self.line or ''}{':' if self.line else ''} {self.message}"


@dataclass(frozen=True)
class Source:
    """A file that was read, and its rules."""

    path: str
    rules: Sequence[Rule]


@dataclass(frozen=True)
class Verdict:
    """What becomes of a program, and what decided that."""

    allowed: bool
    why: str
    file: str = ""
    line: int = 0
    rule: str = ""


LET_IN = Verdict(True, "no rule matches")
STATIC = "static: it loads no library, so it keeps the flag of whoever starts it"


@dataclass(frozen=True)
class Policy:
    """All that is in force."""

    sources: Sequence[Source]
    problems: Sequence[Problem]
    kill_switch: str
    """Its path."""
    off: bool
    """The kill switch is on: every program is left out."""
    unreadable: str = ""
    """The file that failed to be read: every program is left out that is not decided before it."""

    def default(self) -> Verdict:
        """Return what becomes of a program that no rule matches."""
        for source in self.sources:
            for rule in source.rules:
                if rule.word == "default":
                    return _by(source, rule, rule.argument == b"allow")
        return LET_IN

    def verdict(self, path: str) -> Verdict:
        """Return what becomes of the program whose executable is `path`, all symlinks resolved."""
        if self.off:
            return Verdict(False, f"{self.kill_switch} is there")
        whole = os.fsencode(path)
        whole = whole[: -len(b" (deleted)")] if whole.endswith(b" (deleted)") else whole
        base = whole[whole.rfind(b"/") + 1 :]
        for source in self.sources:
            for rule in source.rules:
                if rule.word == "default":
                    continue
                text = whole if b"/" in rule.argument else base
                # Spares nearly every rule of a long list the look at its pattern.
                if rule.argument[:1] not in (b"*", b"?", b"[", text[:1]):
                    continue
                if matches(rule.argument, text):
                    return _by(source, rule, rule.word == "allow")
        if self.unreadable:
            return Verdict(False, f"{self.unreadable} cannot be read")
        return self.default()


def _by(source: Source, rule: Rule, allowed: bool) -> Verdict:
    why = f'"{rule}" in {source.path}:{rule.line}'
    return Verdict(allowed, why, source.path, rule.line, str(rule))


def _elements(pattern: bytes) -> list[int | frozenset[int]] | None:
    """Return a pattern as bytes, sets of bytes, _ANY and _STAR; None if a set is never closed."""
    found: list[int | frozenset[int]] = []
    at = 0
    while at < len(pattern):
        byte = pattern[at]
        at += 1
        if byte != ord("["):
            found.append({ord("*"): _STAR, ord("?"): _ANY}.get(byte, byte))
            continue
        other = pattern[at : at + 1] == b"!"
        at += other
        members: set[int] = set()
        first = at
        while at < len(pattern) and (pattern[at] != ord("]") or at == first):
            low = high = pattern[at]
            if pattern[at + 1 : at + 2] == b"-" and pattern[at + 2 : at + 3] not in (b"", b"]"):
                high = pattern[at + 2]
                at += 2
            members.update(range(low, high + 1))
            at += 1
        if at >= len(pattern):
            return None
        at += 1
        found.append(frozenset(range(256)) - members if other else frozenset(members))
    return found


def matches(pattern: bytes, text: bytes) -> bool:
    """Return whether a pattern matches the whole text; one that is malformed matches nothing."""
    elements = _elements(pattern)
    if elements is None:
        return False
    # Where in the pattern one can be, after each byte of the text.
    places = {0}
    for byte in text:
        after = set()
        for place in _behind_stars(elements, places):
            element = elements[place] if place < len(elements) else None
            if element == _STAR:
                after.add(place)
            elif element in (_ANY, byte) or (isinstance(element, frozenset) and byte in element):
                after.add(place + 1)
        places = after
    return len(elements) in _behind_stars(elements, places)


def _behind_stars(elements: Sequence[int | frozenset[int]], places: set[int]) -> set[int]:
    """Add the places that a star, taking nothing, leads to."""
    reached = set(places)
    for place in places:
        at = place
        while at < len(elements) and elements[at] == _STAR:
            at += 1
            reached.add(at)
    return reached


def parse(text: bytes) -> tuple[list[Rule], list[tuple[int, str]]]:
    """Return the rules of a text, and line numbers with what is wrong there."""
    rules = []
    wrong = []
    for number, line in enumerate(text.split(b"\n"), 1):
        result = _parse_line(line, number)
        if isinstance(result, Rule):
            rules.append(result)
        elif result:
            wrong.append((number, result))
    return rules, wrong


def _parse_line(line: bytes, number: int) -> Rule | str | None:
    """Return the rule of a line, what is wrong with it, or None if it is empty or a comment."""
    if len(line) > _LONGEST_LINE:
        return f"The line is longer than {_LONGEST_LINE} bytes."
    if b"\0" in line:
        return "There is a NUL byte in the line."
    line = line.strip(_BLANKS)
    if not line or line.startswith(b"#"):
        return None
    word = line.replace(b"\t", b" ").replace(b"\r", b" ").split(b" ", 1)[0]
    argument = line[len(word) :].lstrip(_BLANKS)
    wrong = None
    if word not in (b"deny", b"allow", b"default"):
        wrong = f"{os.fsdecode(word)!r} is none of deny, allow, default."
    elif not argument:
        wrong = f"{word.decode()} lacks its argument."
    elif word == b"default" and argument not in (b"allow", b"deny"):
        wrong = "default takes one word, allow or deny."
    elif word != b"default" and b"[" in argument and _elements(argument) is None:
        wrong = "A set that begins with [ is never closed by ]."
    return wrong or Rule(word.decode(), argument, number)


def load(root: os.PathLike[str] | str = "/") -> Policy:
    """Return the policy of the system below `root`, as the libraries see it.

    What only root may read is read, if we are root, though other users' programs may not, and are
    left out: a problem says so.
    """
    folder = os.path.join(root, FOLDER)
    switch = os.path.join(root, KILL_SWITCH)
    sources: list[Source] = []
    problems: list[Problem] = []
    unreadable = ""
    try:
        _look_at_folder(folder, problems)
        drop_ins = os.path.join(folder, "policy.d")
        for name in _names(drop_ins, problems):
            _add(sources, problems, os.path.join(drop_ins, os.fsdecode(name)))
        if not _add(sources, problems, os.path.join(folder, "policy")):
            with open(DEFAULTS, "rb") as file:
                sources.append(Source(DEFAULTS, parse(file.read())[0]))
    except OSError as error:
        if error.filename == DEFAULTS:
            raise
        unreadable = str(error.filename)
        message = f"Cannot be read, so programs are left out: {error.strerror}."
        problems.append(Problem(unreadable, 0, message))
    return Policy(sources, problems, switch, _is_there(switch), unreadable)


def doubts(policy: Policy) -> Iterator[Problem]:
    """Yield what is well-formed, but hardly what its author meant."""
    for source in policy.sources:
        for rule in source.rules:
            message = _doubt(rule.argument) if source.path != DEFAULTS else None
            if message:
                yield Problem(source.path, rule.line, message)


def _doubt(pattern: bytes) -> str | None:
    if b" #" in pattern or b"\t#" in pattern:
        return "A comment is a line of its own: here the # is part of the pattern."
    if pattern[:1] in (b'"', b"'"):
        return "The quote is part of the pattern: a name with blanks needs none."
    if pattern.startswith(b"/") and not set(pattern) & set(b"*?["):
        real = os.path.realpath(pattern)
        if real != pattern:
            return f"It can match no program: without symlinks this path is {os.fsdecode(real)}."
    return None


@dataclass(frozen=True)
class Outcome:
    """What becomes of a program."""

    name: str
    """As it was asked for."""
    path: str
    """Of the executable that runs in the end, an interpreter for a script, symlinks resolved."""
    verdict: Verdict
    note: str = ""
    """What the verdict cannot bring about."""


def outcome(policy: Policy, name: str, search: str | None) -> Outcome | None:
    """Return what becomes of a path, or of a name looked up in `search`; None if there is none."""
    from ksmtool import program  # noqa: PLC0415 - for this alone

    found = program.find(name, search)
    if found is None:
        return None
    final = program.inspect(found, search).final
    path = os.path.realpath(final.path)
    if final.privileged:
        return Outcome(name, path, Verdict(False, f"it is {final.privileged}"))
    verdict = policy.verdict(path)
    return Outcome(name, path, verdict, "" if verdict.allowed or not final.alone else STATIC)


def _is_there(switch: str) -> bool:
    """Return whether the kill switch is on, which it is, too, where nobody can tell."""
    try:
        os.stat(switch)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _look_at_folder(folder: str, problems: list[Problem]) -> None:
    try:
        found = os.stat(folder)
    except OSError:
        return
    if found.st_uid != 0 or found.st_mode & 0o022:
        problems.append(Problem(folder, 0, "Others than root may remove files from it."))
    if not found.st_mode & 0o001:
        message = "Not every user may enter it: other users' programs are left out."
        problems.append(Problem(folder, 0, message))


def _trusted(path: str, problems: list[Problem], is_kind: Callable[[int], bool]) -> int | None:
    """Open what is root's alone and of the right kind; None, and the reason if there is something.

    Raises OSError where it cannot be known what is there.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        if os.path.lexists(path):
            problems.append(Problem(path, 0, f"Not read: {error.strerror}."))
        return None
    found = os.fstat(file)
    directory = is_kind is stat.S_ISDIR
    reason = ""
    if not is_kind(found.st_mode):
        reason = f"it is not a {'folder' if directory else 'regular file'}"
    elif found.st_uid != 0:
        reason = f"it belongs to user {found.st_uid}, not to root"
    elif found.st_mode & 0o022:
        reason = f"others than root may write it (mode {stat.S_IMODE(found.st_mode):04o})"
    if reason:
        os.close(file)
        problems.append(Problem(path, 0, f"Not read: {reason}."))
        return None
    everybody = 0o005 if directory else 0o004
    if found.st_mode & everybody != everybody:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        message = f"Other users' programs cannot read it (mode {mode}), so they are left out."
        problems.append(Problem(path, 0, message))
    return file


def _names(folder: str, problems: list[Problem]) -> Iterator[bytes]:
    """Yield the names of the drop-ins in their order."""
    file = _trusted(folder, problems, stat.S_ISDIR)
    if file is None:
        return
    try:
        names = os.listdir(file)
    except OSError as error:
        error.filename = folder
        raise
    finally:
        os.close(file)
    for name in sorted(map(os.fsencode, names)):
        if name.startswith(b"."):
            continue
        if name.endswith(b".conf"):
            yield name
        elif name != b"README" and not name.endswith(b"~"):  # which nobody takes for rules
            message = "Not read: its name does not end in .conf."
            problems.append(Problem(os.path.join(folder, os.fsdecode(name)), 0, message))


def _add(sources: list[Source], problems: list[Problem], path: str) -> bool:
    """Add a file if it is there and trusted; return whether it is."""
    file = _trusted(path, problems, stat.S_ISREG)
    if file is None:
        return False
    try:
        with open(file, "rb") as opened:
            rules, wrong = parse(opened.read())
    except OSError as error:
        error.filename = path
        raise
    sources.append(Source(path, rules))
    problems.extend(Problem(path, number, message) for number, message in wrong)
    return True
