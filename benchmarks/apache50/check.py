# SPDX-License-Identifier: MIT
"""Looks whether the sites are what apache50 needs; run as `sites.py --check N`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.apache50.servers import Siege, end_on_sigterm, fetch, running
from benchmarks.apache50.sites import WIKI_PAGES, Site, make_sites

from ksmtool.errors import KsmtoolError
from ksmtool.trial import Fleet, plain_arm


def main(arguments: Sequence[str] | None = None) -> int:
    """Start sites, look at every URL and at the load, end everything; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sites.py", description=__doc__)
    parser.add_argument("--check", type=int, metavar="N", required=True, help="how many sites")
    parser.add_argument("--first-port", type=int, default=18000)
    parser.add_argument("--seconds", type=float, default=3, help="of siege for each kind")
    options = parser.parse_args(arguments)
    if min(options.check, options.seconds) < 1:
        parser.error("N and --seconds have to be at least 1")
    end_on_sigterm()
    try:
        with tempfile.TemporaryDirectory(prefix="apache50.") as folder:
            _check(Path(folder), options.check, options.first_port, options.seconds)
    except (KsmtoolError, OSError) as error:
        print(f"sites.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sites.py: stopped; nothing is left behind", file=sys.stderr)
        return 130
    return 0


def _check(folder: Path, count: int, first_port: int, seconds: float) -> None:
    begin = time.monotonic()
    sites = make_sites(folder, count, first_port)
    print(f"{count} sites written in {time.monotonic() - begin:.1f} s, {_megabytes(folder)} MB")
    begin = time.monotonic()
    with running(sites, plain_arm()) as fleet:
        print(f"all serve after {time.monotonic() - begin:.1f} s")
        _print_memory("no load", fleet)
        for site in sites:
            _check_site(site)
        static, php = len(sites[0].static_urls), len(sites[0].php_urls)
        print(f"{count} x {static} static and {php} PHP URLs: all 200")
        _check_different(sites)
        print("every wiki page and every static file is its site's own")
        _print_memory("all fetched", fleet)
        for kind in ("static", "php"):
            with Siege(fleet, sites, kind, seconds, concurrency=2 * count) as siege:
                load = siege.result()
            rate = f"{load.per_second:.0f}/s, {load.failed} failed"
            print(f"{kind}: {load.transactions} requests, {rate}")
            _print_memory(f"after {kind}", fleet)
        _print_complaints(sites)


def _check_site(site: Site) -> None:
    for url in (*site.static_urls, *site.php_urls):
        if not fetch(url):
            raise KsmtoolError(f"{url}: empty")
    for page in range(WIKI_PAGES):
        text = fetch(site.php_urls[page]).decode()
        for wanted in (site.marker(page), site.title(), "</html>"):
            if wanted not in text:
                raise KsmtoolError(f"{site.php_urls[page]}: does not contain {wanted!r}")


def _check_different(sites: Sequence[Site]) -> None:
    seen: dict[bytes, str] = {}
    for site in sites:
        for url in (*site.static_urls, *site.php_urls[:WIKI_PAGES]):
            other = seen.setdefault(fetch(url), url)
            if other != url:
                raise KsmtoolError(f"{url} and {other} are equal")


def _print_memory(when: str, fleet: Fleet) -> None:
    sums = fleet.memory()
    print(
        f"{when}: {sums.processes} processes, RSS {sums.rss >> 20} MB, Pss {sums.pss >> 20} MB, "
        f"Pss_Anon {sums.pss_anon >> 20} MB, {sums.opted_in} opted in"
    )


def _print_complaints(sites: Sequence[Site]) -> None:
    """Show what the logs hold beyond what Apache always says, each kind of line once."""
    usual = ("resuming normal operations", "Command line:", "server reached MaxRequestWorkers")
    seen: Counter[str] = Counter()
    for site in sites:
        for name in ("error.log", "php.log"):
            file = site.folder / "log" / name
            lines = file.read_text().splitlines() if file.exists() else []
            seen.update(
                line.rpartition("] ")[2].replace(site.folder.name, "site-*")
                for line in lines
                if not any(words in line for words in usual)
            )
    for line, times in seen.most_common(20):
        print(f"{times} x in the logs: {line}")


def _megabytes(folder: Path) -> int:
    """Disk space, each hard link once."""
    sizes = {s.st_ino: s.st_blocks * 512 for s in (f.lstat() for f in folder.rglob("*"))}
    return sum(sizes.values()) >> 20
