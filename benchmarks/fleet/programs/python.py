# SPDX-License-Identifier: MIT
"""Imports a heavy part of the standard library, collects what it says of itself, and waits."""

from __future__ import annotations

import ast
import importlib
import inspect
import signal
import sys
from pathlib import Path

# All of them are in every Python from 3.9 on, also in Debian's without -full and -venv.
MODULES = """
    argparse array ast asyncio base64 bisect calendar cmd code collections concurrent.futures
    configparser contextlib csv ctypes dataclasses datetime decimal difflib dis doctest
    email.mime.multipart email.policy enum fractions ftplib getpass gettext glob gzip hashlib heapq
    html.parser http.client http.cookiejar http.server importlib.metadata inspect ipaddress json
    locale logging.config logging.handlers lzma mailbox mimetypes multiprocessing.pool
    optparse pathlib pdb pickle platform plistlib pprint pydoc queue random shelve shlex shutil
    smtplib socketserver sqlite3 ssl statistics string subprocess tarfile tempfile textwrap
    threading tokenize tracemalloc typing unittest.mock urllib.request uuid wsgiref.simple_server
    xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipfile
"""


def describe(name: str) -> dict[str, str]:
    """Return what the public things of a module are, by name."""
    module = importlib.import_module(name)
    return {
        key: (inspect.getdoc(value) or "").partition("\n")[0]
        for key, value in sorted(vars(module).items())
        if not key.startswith("_")
    }


def main() -> None:
    """Build, say so by a file, wait."""
    known = {name: describe(name) for name in MODULES.split()}
    trees = [ast.parse(inspect.getsource(sys.modules[name])) for name in ("argparse", "inspect")]
    Path(sys.argv[1]).touch()
    signal.pause()
    print(len(known), len(trees))


main()
