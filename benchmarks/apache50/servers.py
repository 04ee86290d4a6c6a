# SPDX-License-Identifier: MIT
"""Runs sites and puts them under siege; whatever happens, nothing of it is left running."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

from benchmarks.apache50 import sites
from benchmarks.apache50.sites import Load, Site

from ksmtool.errors import KsmtoolError
from ksmtool.trial import Arm, Fleet

# Never by way of a proxy: everything here is on the loopback.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url: str, timeout: float = 30) -> bytes:
    """Return the body; raises OSError for no answer and KsmtoolError for any status but 200."""
    try:
        with _OPENER.open(url, timeout=timeout) as answer:
            body: bytes = answer.read()
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    if status != 200:
        raise KsmtoolError(f"{url} answers with status {status}.")
    return body


def fetch_all(servers: Sequence[Site], kind: str, at_once: int = 8) -> None:
    """Fetch every URL of that kind once, so that all arms go into a siege with full caches.

    DokuWiki renders a page when it is first asked for it, which takes 20 times as long as later:
    without this the arm whose requests take longer would have seen fewer pages, and look smaller.
    """
    # Site by site in turn, so that each has few requests at once.
    urls = [url for row in zip(*(sites.urls(site, kind) for site in servers)) for url in row]
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(fetch, urls):
            pass


@contextmanager
def running(servers: Sequence[Site], arm: Arm, patience: float = 120) -> Iterator[Fleet]:
    """Run all sites in the way of `arm`; yields when each of them serves, and ends them all."""
    for site in servers:
        _refuse_used_port(site.port)
    command = sites.command(servers[0].folder.parent)
    with Fleet(command, arm, len(servers)) as fleet:
        try:
            _wait_ready(fleet, servers, patience)
            yield fleet
        finally:
            with signals_blocked():
                fleet.stop()


class Siege:
    """A running siege that `fleet` does not count as its own."""

    def __init__(
        self, fleet: Fleet, servers: Sequence[Site], kind: str, seconds: float, concurrency: int
    ) -> None:
        """Keep what to start; `with` starts and ends it."""
        self._fleet = fleet
        self._argv = sites.siege_command(servers, kind, seconds, concurrency)

    def __enter__(self) -> Siege:
        """Start it in a session of its own, to be able to end it whole."""
        self._start()
        return self

    def _start(self) -> None:
        self._child = subprocess.Popen(
            self._argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._fleet.leave_out(self._child.pid)

    def __exit__(self, *_: object) -> None:
        """End it, if it has not ended by itself."""
        with signals_blocked(), self._child:
            if self._child.poll() is None:
                # `timeout` passes it on to siege, and comes down with SIGKILL 5 seconds later.
                self._child.terminate()

    def going_on(self) -> bool:
        """Whether it has not ended yet."""
        return self._child.poll() is None

    def result(self) -> Load:
        """Wait for the end and return what it says; raises KsmtoolError if that is nothing.

        siege 4 crashes now and then where two of its threads meet (its issue 191): if it has no
        result it runs once more, from the beginning.
        """
        said, complaint = self._child.communicate()
        if "{" not in said:
            self._start()
            said, complaint = self._child.communicate()
        try:
            return sites.parse_siege(said)
        except ValueError as error:
            status = self._child.returncode
            raise KsmtoolError(f"{error} (status {status}).", complaint[-500:] or None) from error


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM: a second one must not cut the clearing up short."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def end_on_sigterm() -> None:
    """Let SIGTERM end this program as Ctrl-C does, by way of every `finally`."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handler)


def _refuse_used_port(port: int) -> None:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return
    raise KsmtoolError(f"Port {port} is in use.", "Choose others with --first-port.")


def _wait_ready(fleet: Fleet, servers: Sequence[Site], patience: float) -> None:
    deadline = time.monotonic() + patience
    for site in servers:
        while True:
            fleet.check()
            try:
                fetch(site.ready_url)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise KsmtoolError(f"Site {site.number} does not serve: {error}.") from error
                time.sleep(0.05)
