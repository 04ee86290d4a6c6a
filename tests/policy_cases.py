# SPDX-License-Identifier: MIT
"""What a policy says, as a table: both readers are held to it."""

from __future__ import annotations

from dataclasses import dataclass

ALLOW, DENY = "allow", "deny"


@dataclass(frozen=True)
class Case:
    """A policy, the path of an executable, and what becomes of that."""

    name: str
    text: bytes
    path: bytes
    expected: str


def _pattern(name: str, pattern: bytes, matching: str, other: str = "") -> list[Case]:
    """Return cases of what a pattern matches and what not, paths separated by blanks."""
    text = b"deny " + pattern + b"\n"
    return [
        *(Case(f"{name}: {p}", text, p.encode("latin-1"), DENY) for p in matching.split()),
        *(Case(f"{name}, not: {p}", text, p.encode("latin-1"), ALLOW) for p in other.split()),
    ]


CASES = [
    # --- what counts where several rules do ---
    Case("nothing at all", b"", b"/bin/a", ALLOW),
    Case("no rule matches", b"deny b\n", b"/bin/a", ALLOW),
    Case("the first rule that matches: deny", b"deny a\nallow a\n", b"/bin/a", DENY),
    Case("the first rule that matches: allow", b"allow a\ndeny a\n", b"/bin/a", ALLOW),
    Case("a rule before a wider one", b"allow ab\ndeny a*\n", b"/bin/ab", ALLOW),
    Case("a rule behind a wider one", b"deny a*\nallow ab\n", b"/bin/ab", DENY),
    Case("default deny", b"default deny\n", b"/bin/a", DENY),
    Case("default allow", b"default allow\n", b"/bin/a", ALLOW),
    Case("a rule behind the default", b"default deny\nallow a\n", b"/bin/a", ALLOW),
    Case("the first default: deny", b"default deny\ndefault allow\n", b"/bin/a", DENY),
    Case("the first default: allow", b"default allow\ndefault deny\n", b"/bin/a", ALLOW),
    Case("a default that is none, and one", b"default no\ndefault deny\n", b"/bin/a", DENY),
    # --- lines ---
    Case("the last line lacks its newline", b"deny a", b"/bin/a", DENY),
    Case("a default without its newline", b"default deny", b"/bin/a", DENY),
    Case("empty lines", b"\n\n \t \n\r\ndeny a\n\n", b"/bin/a", DENY),
    Case("lines of Windows", b"deny a\r\ndefault deny\r\n", b"/bin/a", DENY),
    Case("... and what they do not match", b"deny a\r\n", b"/bin/b", ALLOW),
    Case("only a CR is no line's end", b"deny a\rdeny b\n", b"/bin/b", ALLOW),
    Case("tabs", b"\tdeny\t\ta\t\n", b"/bin/a", DENY),
    Case("blanks before the word", b"   deny a\n", b"/bin/a", DENY),
    Case("CR between word and pattern", b"deny\ra\n", b"/bin/a", DENY),
    Case("a comment", b"# deny a\n", b"/bin/a", ALLOW),
    Case("a comment behind blanks", b" \t# deny a\n", b"/bin/a", ALLOW),
    Case("no comment behind a rule", b"deny a # not me\n", b"/bin/a", ALLOW),
    Case("... it is part of the pattern", b"deny a # not me\n", b"/bin/a # not me", DENY),
    Case("a # begins no pattern", b"deny #a\n", b"/bin/#a", DENY),
    Case("a form feed is not blank", b"deny a\f\n", b"/bin/a", ALLOW),
    Case("... nor a vertical tab", b"deny\va\n", b"/bin/a", ALLOW),
    # --- what is malformed is skipped ---
    Case("an unknown word", b"refuse a\ndeny a\n", b"/bin/a", DENY),
    Case("an unknown word alone", b"refuse a\n", b"/bin/a", ALLOW),
    Case("a word that begins like one", b"denya a\ndeny\n", b"/bin/a", ALLOW),
    Case("the word in capitals", b"DENY a\n", b"/bin/a", ALLOW),
    Case("deny without a pattern", b"deny\nallow a\n", b"/bin/a", ALLOW),
    Case("deny with blanks for a pattern", b"deny  \t \n", b"/bin/a", ALLOW),
    Case("default without its word", b"default\n", b"/bin/a", ALLOW),
    Case("default with another word", b"default denied\n", b"/bin/a", ALLOW),
    Case("default with one word more", b"default deny all\n", b"/bin/a", ALLOW),
    Case("default of a prefix", b"default den\n", b"/bin/a", ALLOW),
    Case("a set that is never closed", b"deny [a\nallow *\n", b"/bin/a", ALLOW),
    Case("... behind a star", b"deny *[\n", b"/bin/a", ALLOW),
    Case("... that only has its ]", b"deny []\n", b"/bin/]", ALLOW),
    Case("... that only has its ! and ]", b"deny [!]\n", b"/bin/a", ALLOW),
    Case("... within a range", b"deny [a-\n", b"/bin/a", ALLOW),
    Case("a NUL in the pattern", b"deny [!\0]\n", b"/bin/a", ALLOW),
    Case("a NUL behind it", b"deny a\0\n", b"/bin/a", ALLOW),
    Case("a NUL before it", b"\0deny a\n", b"/bin/a", ALLOW),
    Case("NULs behind a default", b"default deny\0\0\0\0\n", b"/bin/a", ALLOW),
    Case("a NUL in another line", b"\0\ndeny a\n", b"/bin/a", DENY),
    Case("a line of 511 bytes", b"deny a" + b" " * 505 + b"\n", b"/bin/a", DENY),
    Case("a line of 512 bytes", b"deny a" + b" " * 506 + b"\n", b"/bin/a", ALLOW),
    Case("511 bytes, no newline", b"deny a" + b" " * 505, b"/bin/a", DENY),
    Case("512 bytes, no newline", b"deny a" + b" " * 506, b"/bin/a", ALLOW),
    Case("behind a line too long", b"x" * 5000 + b"\ndeny a\n", b"/bin/a", DENY),
    Case("a pattern of 506", b"deny " + b"a" * 506 + b"\n", b"/bin/" + b"a" * 506, DENY),
    Case("a byte order mark", b"\xef\xbb\xbfdeny a\n", b"/bin/a", ALLOW),
    # --- base name or whole path ---
    *_pattern("a base name", b"sh", "/bin/sh /usr/local/bin/sh sh", "/bin/ssh /bin/sh/x /bin/shx"),
    *_pattern("a path", b"/bin/sh", "/bin/sh", "/usr/bin/sh /bin/sh2 bin/sh"),
    *_pattern("a folder's programs", b"/opt/*", "/opt/a /opt/a/b/c", "/usr/opt/a /opt /optx/a"),
    *_pattern("a path's end", b"*/lib/a", "/usr/lib/a /lib/a", "/usr/lib/a/b /usr/lib/ba lib/a"),
    *_pattern("a / in a set", b"a[/]b", "a/b", "b ab /a/b"),
    *_pattern("one path", b"x/a*c", "x/abc x/a/c", "/x/abc c x/ab"),
    Case("a pattern with blanks", b"deny Proton Pass \n", b"/opt/Proton Pass", DENY),
    Case("... that has others", b"deny Proton Pass\n", b"/opt/Proton  Pass", ALLOW),
    Case("nothing behind the last /", b"deny *\n", b"/bin/", DENY),
    Case("... and a ? wants a byte", b"deny ?\n", b"/bin/", ALLOW),
    # --- replaced since it was started ---
    Case("deleted", b"deny a\n", b"/bin/a (deleted)", DENY),
    Case("deleted, by its path", b"deny /bin/a\n", b"/bin/a (deleted)", DENY),
    Case("its name ends so, and deleted", b"deny a (deleted)\n", b"/a (deleted) (deleted)", DENY),
    Case("once only", b"deny a\n", b"/bin/a (deleted) (deleted)", ALLOW),
    Case("not the same words", b"deny a\n", b"/bin/a(deleted)", ALLOW),
    # --- stars ---
    *_pattern("a star", b"*", "/bin/a a /"),
    *_pattern("a star behind", b"a*", "/bin/a /bin/abc", "/bin/ba"),
    *_pattern("a star before", b"*a", "/bin/a /bin/bca /bin/aa", "/bin/ab"),
    *_pattern("a star within", b"a*c", "/ac /abc /abcbc /acc", "/acb /a /c"),
    *_pattern("stars", b"a*b*c", "/abc /axbxc /abbcc /abcbc", "/acb /ab /ac"),
    *_pattern("stars beside each other", b"a**c***", "/ac /abcd", "/ab"),
    *_pattern("a star that has to go back", b"*ab", "/aab /abab /ab", "/aba"),
    *_pattern("stars that have to go back", b"*a*ab*b", "/aabb /xaxabxb /aabab", "/aab /abb"),
    # --- one byte ---
    *_pattern("a ?", b"a?c", "/abc /a?c", "/ac /abbc"),
    *_pattern("a ? is a byte, not a letter", b"a??c", "/a\xc3\xa4c"),
    *_pattern("a ? within a path", b"/a?b", "/a/b /axb", "/ab"),
    # --- sets ---
    *_pattern("a set", b"x[abc]", "/xa /xb /xc", "/xd /x /xab"),
    *_pattern("a range", b"x[b-d]", "/xb /xc /xd", "/xa /xe /x-"),
    *_pattern("ranges", b"[a-cx-z0]", "/a /c /y /0", "/d /1 /-"),
    *_pattern("all but a set", b"x[!ab]", "/xc /x! /x/xc", "/xa /xb /x"),
    *_pattern("all but a range", b"x[!b-d]", "/xa /xe", "/xb /xd"),
    *_pattern("a ] that comes first", b"[]a]", "/] /a", "/b"),
    *_pattern("a ] that comes first, negated", b"[!]a]", "/b", "/] /a"),
    *_pattern("a range from ]", b"[]-a]", "/] /^ /_ /a", "/b /- /["),
    *_pattern("a - that comes first", b"[-a]", "/- /a", "/b"),
    *_pattern("a - that comes last", b"[a-]", "/- /a", "/b"),
    *_pattern("a - behind a range", b"[a-c-e]", "/b /- /e", "/d"),
    *_pattern("a range from -", b"x[--/]x", "x-x x.x x/x", "x,x xax"),
    *_pattern("a range to nowhere", b"[z-a]", "", "/a /m /z"),
    *_pattern("a set of one quotes", b"[*]", "/*", "/a"),
    *_pattern("... a ?", b"[?]", "/?", "/a"),
    *_pattern("... a [", b"[[]", "/[", "/a"),
    *_pattern("... a !", b"[!!]", "/a", "/!"),
    *_pattern("a ! that is not first", b"[a!]", "/a /!", "/b"),
    *_pattern("a ^ is no !", b"[^a]", "/^ /a", "/b"),
    *_pattern("a backslash quotes nothing", b"\\*", "/\\ /\\a", "/*"),
    *_pattern("a ] that closes nothing", b"a]", "/a]", "/a"),
    *_pattern("a set behind a star", b"*[0-9]", "/a1 /1 /12", "/a /1a"),
    *_pattern("bytes above 127", b"[\x80-\xff]*", "/\xe4 /\xffa", "/a"),
    *_pattern("a ] behind the -", b"[+--]x", "/+x /,x /-x", "/ax"),
]
