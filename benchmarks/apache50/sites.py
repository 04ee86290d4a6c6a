# SPDX-License-Identifier: MIT
"""Apache instances as a shared-hosting provider runs them: same software, other customers.

Each site is an Apache of its own (prefork, mod_php): own configuration, port on 127.0.0.1, document
root with files that no other site has, and in it DokuWiki with its own pages. As on real shared
hosting every customer has the program in the document root, all of one version; here the copies are
hard links to one trimmed copy, which spares the disk and changes nothing about private memory.

Everything follows from the number of a site, so that all arms of a run serve the same bytes.
Nothing is written outside the folder and nothing is fetched from anywhere.

`python3 benchmarks/apache50/sites.py --check N` starts N sites and looks at all of it.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import random
import shutil
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

APACHE = "/usr/sbin/apache2"
MODULES = Path("/usr/lib/apache2/modules")
DOKUWIKI = Path("/usr/share/dokuwiki")
DOKUWIKI_CONF = Path("/etc/dokuwiki")
USER = "www-data"

STATIC_PAGES = 10
IMAGES = 6
WIKI_PAGES = 8

# The date of every page and of its entry in DokuWiki's change log, which have to agree.
WRITTEN = 1767225600

# What Debian enables by default together with mod_php.
_MODULES = """
    mpm_prefork authz_core authz_host authz_user authn_core authn_file auth_basic access_compat
    alias autoindex deflate dir env filter mime negotiation reqtimeout setenvif
"""
_WIKI_FOLDERS = "attic cache index locks log media media_attic media_meta meta pages tmp"

_BEGINNINGS = "bar cel dor fen gal hem kor lin mas nev por sal"
_ENDINGS = "ade and ber den ett ica ing ley ond set tor une"
_WORDS = [begin + end for begin in _BEGINNINGS.split() for end in _ENDINGS.split()]


@dataclass(frozen=True)
class Site:
    """One Apache instance: what starts it and what it serves."""

    number: int
    port: int
    folder: Path
    argv: tuple[str, ...]
    """Stays in the foreground; wants a session of its own: Apache signals its process group."""
    ready_url: str
    """A static page: answers as soon as the site serves, without PHP having run."""
    static_urls: tuple[str, ...]
    php_urls: tuple[str, ...]

    def marker(self, page: int) -> str:
        """Return a phrase that only wiki page `page` of this site contains."""
        secret = _random(self.number, "marker", page).randrange(10**9)
        return f"site-{self.number}-page-{page}-{secret}"

    def title(self) -> str:
        """Return the name of the site, which DokuWiki puts into every page."""
        return f"The {_random(self.number, 'title').choice(_WORDS)} forum no. {self.number}"


@dataclass(frozen=True)
class Load:
    """What siege says about one run."""

    transactions: int
    availability: float
    per_second: float
    failed: int
    """No answer, or a status of 400 and above, which siege itself does not call a failure."""


def command(folder: Path) -> tuple[str, ...]:
    """Return what starts the sites below `folder`, with {i} for the number of the site."""
    return (APACHE, "-f", f"{folder}/site-{{i}}/apache2.conf", "-DFOREGROUND")


def make_sites(folder: Path, count: int, first_port: int = 18000) -> list[Site]:
    """Write sites 1 to `count` below `folder`, which must be empty or new, and return them.

    Site 1 listens on the first port. Raises FileNotFoundError for what has to be installed.
    """
    siege = Path(shutil.which("siege") or "/usr/bin/siege")
    for needed in (Path(APACHE), _php_module(), DOKUWIKI / "doku.php", DOKUWIKI_CONF, siege):
        if not needed.exists():
            packages = "apache2 libapache2-mod-php dokuwiki siege"
            raise FileNotFoundError(f"{needed} is missing: apt-get install {packages}")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # a temporary folder is 0700, and Apache's workers are not root
    software = folder / "dokuwiki"
    _copy_software(software)
    sites = [_site(folder, number, first_port - 1 + number) for number in range(1, count + 1)]
    for site in sites:
        _write_site(site, software)
    return sites


def siege_command(sites: Sequence[Site], kind: str, seconds: float, concurrency: int) -> list[str]:
    """Return a command that requests `kind` ("static" or "php") URLs of all sites for that long.

    All pages of all sites in random order, so that the load is even; then it ends by itself.
    """
    home = sites[0].folder.parent / "siege"
    home.mkdir(exist_ok=True)
    file = home / f"{kind}.urls"
    file.write_text("".join(f"{url}\n" for site in sites for url in urls(site, kind)))
    settings = home / "siegerc"
    settings.write_text(_SIEGERC)
    limit = seconds + 30
    return [
        *("env", f"HOME={home}", "timeout", "--kill-after=5", f"{limit:g}"),
        *("siege", f"--rc={settings}", f"--file={file}"),
        *(f"--time={max(1, round(seconds))}S", f"--concurrent={concurrency}"),
    ]


def parse_siege(text: str) -> Load:
    """Return what siege printed on its standard output.

    Raises ValueError if it did not come to an end.
    """
    begin, end = text.find("{"), text.rfind("}")
    if begin < 0 or end < begin:
        raise ValueError(f"siege printed no result: {text[-200:]!r}")
    found = json.loads(text[begin : end + 1])
    bad = found["transactions"] - found["successful_transactions"]
    return Load(
        transactions=found["transactions"],
        availability=found["availability"],
        per_second=found["transaction_rate"],
        failed=found["failed_transactions"] + max(0, bad),
    )


def urls(site: Site, kind: str) -> tuple[str, ...]:
    """Return the URLs of that kind."""
    return {"static": site.static_urls, "php": site.php_urls}[kind]


def _random(*key: object) -> random.Random:
    # A string seeds by its SHA-512, in every Python alike; a tuple would by the randomized hash().
    return random.Random("/".join(map(str, key)))


def _php_module() -> Path:
    return next(iter(sorted(MODULES.glob("libphp*.so"), reverse=True)), MODULES / "libphp.so")


def _site(folder: Path, number: int, port: int) -> Site:
    root = f"http://127.0.0.1:{port}"
    wiki = f"{root}/wiki"
    pages = [f"{wiki}/doku.php?id={_page_name(page)}" for page in range(WIKI_PAGES)]
    return Site(
        number=number,
        port=port,
        folder=folder / f"site-{number}",
        argv=tuple(word.replace("{i}", str(number)) for word in command(folder)),
        ready_url=f"{root}/index.html",
        static_urls=(
            f"{root}/index.html",
            f"{root}/style.css",
            *(f"{root}/page-{page}.html" for page in range(STATIC_PAGES)),
            *(f"{root}/image-{image}.png" for image in range(IMAGES)),
        ),
        php_urls=(
            *pages,
            f"{pages[1]}&do=revisions",
            f"{pages[2]}&do=edit",
            f"{pages[3]}&do=backlink",
            f"{wiki}/doku.php?do=index",
            f"{wiki}/doku.php?do=recent",
            f"{wiki}/doku.php?do=search&q={_WORDS[number % len(_WORDS)]}",
            f"{wiki}/lib/exe/taskrunner.php?id={_page_name(4)}",
            f"{wiki}/lib/exe/css.php",
        ),
    )


def _page_name(page: int) -> str:
    return "start" if page == 0 else f"topic{page}"


def _copy_software(target: Path) -> None:
    """Copy DokuWiki as its own archive lays it out, in English only, without installer and tools.

    Debian keeps conf/ in /etc and finds it by inc/preload.php; a copy in a document root has both.
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        if Path(folder).name == "lang":
            return set(names) - {"en"}
        if Path(folder) == DOKUWIKI:
            return {"bin", "install.php"} | {name for name in names if name.startswith(".ht")}
        return {"preload.php"} if Path(folder) == DOKUWIKI / "inc" else set()

    shutil.copytree(
        DOKUWIKI, target, ignore=left_out
    )  # follows lib/plugins and lib/tpl to /var/lib
    (target / "conf").mkdir()
    for file in DOKUWIKI_CONF.iterdir():
        ours = ("local.php", "plugins.local.php")
        if file.is_file() and not file.is_symlink() and file.name not in ours:
            shutil.copyfile(file, target / "conf" / file.name)
    # What may be 0640 in /etc is read by Apache's workers here.
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _write_site(site: Site, software: Path) -> None:
    for name in ("htdocs", "log", "run", "tmp"):
        (site.folder / name).mkdir(parents=True)
    _write_static(site)
    wiki = site.folder / "htdocs/wiki"
    shutil.copytree(software, wiki, copy_function=os.link)
    _write_wiki(site, wiki)
    if os.geteuid() == 0:
        user, group = pwd.getpwnam(USER).pw_uid, grp.getgrnam(USER).gr_gid
        for top in (site.folder / "tmp", site.folder / "log", wiki / "data"):
            for path in (top, *top.rglob("*")):
                os.chown(path, user, group)
    (site.folder / "apache2.conf").write_text(_configuration(site))


def _write_static(site: Site) -> None:
    root = site.folder / "htdocs"
    links = "".join(
        f'<li><a href="page-{page}.html">page {page}</a></li>\n' for page in range(STATIC_PAGES)
    )
    (root / "index.html").write_text(_html(site, "index", f"<ul>\n{links}</ul>"))
    colors = _random(site.number, "css")
    (root / "style.css").write_text(
        "".join(f".{word} {{ color: #{colors.randrange(1 << 24):06x}; }}\n" for word in _WORDS)
    )
    for page in range(STATIC_PAGES):
        words = _random(site.number, "static", page)
        body = "\n".join(f"<p>{_sentences(words, 60)}</p>" for _ in range(words.randrange(4, 20)))
        image = f'<img src="image-{page % IMAGES}.png" alt="">'
        (root / f"page-{page}.html").write_text(_html(site, f"page {page}", f"{image}\n{body}"))
    for image_number in range(IMAGES):
        bits = _random(site.number, "image", image_number)
        (root / f"image-{image_number}.png").write_bytes(_png(bits, 128, bits.randrange(60, 160)))


def _html(site: Site, name: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{site.title()}: {name}</title>\n"
        f'<link rel="stylesheet" href="style.css"></head>\n'
        f"<body><h1>{name}</h1>\n{body}\n</body></html>\n"
    )


def _png(bits: random.Random, width: int, height: int) -> bytes:
    """Return a PNG image of noise, which no compression makes small."""
    rows = b"".join(b"\0" + bits.randbytes(3 * width) for _ in range(height))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def _write_wiki(site: Site, wiki: Path) -> None:
    (wiki / "conf/local.php").write_text(_LOCAL_PHP.format(title=site.title(), data=wiki / "data"))
    (wiki / "conf/plugins.local.php").write_text(_PLUGINS_PHP)
    data = wiki / "data"
    for name in _WIKI_FOLDERS.split():
        (data / name).mkdir(parents=True)
    changes = []
    for page in range(WIKI_PAGES):
        name = _page_name(page)
        file = data / "pages" / f"{name}.txt"
        file.write_text(_wiki_text(site, page))
        os.utime(file, (WRITTEN, WRITTEN))
        line = f"{WRITTEN}\t127.0.0.1\tC\t{name}\t\tcreated\t\t{file.stat().st_size}\n"
        (data / "meta" / f"{name}.changes").write_text(line)
        changes.append(line)
    (data / "meta/_dokuwiki.changes").write_text("".join(changes))
    # The page index, which a browser would have DokuWiki build by its hidden image.
    (data / "index/page.idx").write_text(
        "".join(f"{_page_name(page)}\n" for page in range(WIKI_PAGES))
    )


def _wiki_text(site: Site, page: int) -> str:
    """Return a page like a thread of a forum: posts with lists, tables, code and links."""
    words = _random(site.number, "wiki", page)
    posts = [f"====== {site.title()}: {_page_name(page)} ======\n\n{site.marker(page)}\n"]
    for post in range(words.randrange(6, 16)):
        items = "".join(f"  * {_sentences(words, 8)}\n" for _ in range(5))
        rows = "".join(f"| {words.choice(_WORDS)} | {words.randrange(10**6)} |\n" for _ in range(6))
        code = "".join(f"${words.choice(_WORDS)} = {words.randrange(10**6)};\n" for _ in range(6))
        posts.append(
            f"===== Post {post} by {words.choice(_WORDS)} =====\n\n{_sentences(words, 80)}\n\n"
            f"See [[{_page_name(words.randrange(WIKI_PAGES))}]], **{words.choice(_WORDS)}**.\n\n"
            f"{items}\n^ Word ^ Number ^\n{rows}\n<code php>\n{code}</code>\n"
        )
    return "\n".join(posts)


def _sentences(words: random.Random, count: int) -> str:
    text = " ".join(words.choices(_WORDS, k=count))
    return text.capitalize() + "."


def _configuration(site: Site) -> str:
    folder = site.folder
    wiki = folder / "htdocs/wiki"
    modules = "".join(
        f"LoadModule {name}_module {MODULES}/mod_{name}.so\n" for name in _MODULES.split()
    )
    closed = "".join(
        f'<Directory "{wiki / name}">\n    Require all denied\n</Directory>\n'
        for name in ("data", "conf", "inc", "vendor")
    )
    return _APACHE.format(
        folder=folder,
        port=site.port,
        user=USER,
        modules=modules,
        php=_php_module(),
        closed=closed,
        number=site.number,
    )


# A fixed number of workers: all arms and situations have equally many processes.
_APACHE = """\
# Site {number}
ServerRoot "{folder}"
ServerName site-{number}.localhost
Listen 127.0.0.1:{port}
DefaultRuntimeDir "{folder}/run"
PidFile "{folder}/run/apache2.pid"
Mutex file:{folder}/run default
User {user}
Group {user}

{modules}LoadModule php_module {php}

StartServers 4
MinSpareServers 1
MaxSpareServers 4
MaxRequestWorkers 4
MaxConnectionsPerChild 0
Timeout 60
KeepAlive On
KeepAliveTimeout 5
HostnameLookups Off

LogFormat "%h %l %u %t \\"%r\\" %>s %O" common
ErrorLog "{folder}/log/error.log"
LogLevel warn
CustomLog "{folder}/log/access.log" common

TypesConfig /etc/mime.types
DirectoryIndex index.html index.php
AddOutputFilterByType DEFLATE text/html text/plain text/xml text/css text/javascript

DocumentRoot "{folder}/htdocs"
<Directory />
    AllowOverride None
    Require all denied
</Directory>
<Directory "{folder}/htdocs">
    Options FollowSymLinks
    Require all granted
</Directory>
{closed}
<FilesMatch ".+\\.php$">
    SetHandler application/x-httpd-php
</FilesMatch>
php_admin_value session.save_path "{folder}/tmp"
php_admin_value upload_tmp_dir "{folder}/tmp"
php_admin_value sys_temp_dir "{folder}/tmp"
php_admin_value error_log "{folder}/log/php.log"
php_admin_value sendmail_path "/bin/false"
php_admin_flag allow_url_fopen off
"""

_LOCAL_PHP = """\
<?php
$conf['title'] = '{title}';
$conf['savedir'] = '{data}';
$conf['license'] = '';
$conf['useacl'] = 0;
$conf['updatecheck'] = 0;
$conf['dnslookups'] = 0;
$conf['fetchsize'] = 0;
$conf['jquerycdn'] = 0;
$conf['subscribers'] = 0;
$conf['sitemap'] = 0;
$conf['disableactions'] = 'register,resendpwd,subscribe';
"""

# The one plugin that would call home.
_PLUGINS_PHP = """\
<?php
$plugins['popularity'] = 0;
"""

_SIEGERC = """\
verbose = false
color = off
json_output = true
show-logfile = false
logging = false
parser = false
protocol = HTTP/1.1
connection = close
cookies = false
accept-encoding = gzip
benchmark = true
internet = true
timeout = 30
failures = 1000000
limit = 255
"""

if __name__ == "__main__":
    CHECKOUT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "python")]
    from benchmarks.apache50.check import main

    sys.exit(main())
