"""How fast and how completely the crawler reads a site, beside `wget -r` on the same site.

Two sites on this machine, nothing between them and the crawler: the documentation server that
ships with Python (every module of the standard library that its index names), and a built site
served as files: Rust's error codes where rustup has installed them, any folder by `--site`, else
pages that pydoc writes.

A first crawl, one request after another, warms the server and gives the order in which links stand;
then crawl and wget take turns. A page counts as lost when wget has it, the crawl does not, and its
text is neither empty nor that of a page which the crawl has. wget only stores what it fetches; the
crawl also extracts each page's text.

`make bench-crawl`; the last line is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import httpx

from deploy.local import Server, free_port
from loadtest.report import machine
from retrieval.addresses import FetchPolicy
from retrieval.crawl import Crawl, CrawlLimits
from retrieval.pages import normalised, read_page
from retrieval.source import Query

ENOUGH_PAGES = 200
CONCURRENCY = 8
RUN_S = 300.0
PYTHON = (sys.executable, "-I", "-S")
"""Sees the standard library only: pydoc imports what it documents."""
_PYDOC = "import os, runpy; os.chdir({!r}); runpy.run_module('pydoc', run_name='__main__')"
"""pydoc's index names what lies in its working directory, too."""
_WRITE = """
import pydoc, sys
for name in sys.argv[1:]:
    try:
        pydoc.writedoc(name)
    except BaseException as error:  # whatever a module does when it is imported
        print(name, repr(error))
"""
_FETCHED = re.compile(r'URL: ?(\S+) \[[^]]*\] -> "([^"]+)"')


@dataclass(frozen=True, slots=True)
class Site:
    """Where a site is, and how far from its first page it is read."""

    name: str
    url: str
    depth: int


@dataclass(frozen=True, slots=True)
class Read:
    """What one crawl gave: addresses in the order of arrival, texts, seconds."""

    urls: tuple[str, ...]
    texts: frozenset[str]
    first_s: float
    took_s: float


@dataclass(frozen=True, slots=True)
class Stored:
    """What one run of wget gave: the text of each HTML page."""

    texts: dict[str, str]
    took_s: float
    reading_s: float
    """What extracting the texts took afterwards, one page after another."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One site. Times in seconds."""

    site: str
    pages: int
    pages_per_s: float
    first_page_s: float
    in_order_pages_per_s: float
    moved_places_p50: float
    moved_places_max: int
    twice: int
    wget_pages: int | None
    wget_pages_per_s: float | None
    reading_pages_per_s: float | None
    """Extracting the text of wget's pages, which the crawl does beside fetching."""
    same_text: int | None
    """Pages of wget's that the crawl left out because it had their text, or they have none."""
    lost: int | None
    only_here: int | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--site", type=Path, help="a folder of HTML files with an index.html")
    options = parser.parse_args()
    with_wget = shutil.which("wget") is not None
    with tempfile.TemporaryDirectory() as folder, pydoc_site(folder) as pydoc:
        built = options.site or built_site(Path(folder))
        with static_site(built) as static:
            figures = [measure(site, options.runs, with_wget) for site in (pydoc, static)]
    report(figures, options.runs, with_wget)
    return 1 if any(each.lost or each.twice for each in figures) else 0


@contextmanager
def pydoc_site(folder: str) -> Iterator[Site]:
    port = free_port()
    command = [*PYTHON, "-c", _PYDOC.format(folder), "-n", "127.0.0.1", "-p", str(port)]
    # one module of the standard library opens a browser when it is imported
    environment = {"BROWSER": "true"}
    with Server("pydoc", command, port=port, ready_path="/", env=environment) as server:
        server.start().wait_ready(30)
        yield Site("python -m pydoc", f"{server.url}/", depth=1)


@contextmanager
def static_site(folder: Path) -> Iterator[Site]:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    command += ["--directory", str(folder)]
    with Server("files", command, port=port, ready_path="/") as server:
        server.start().wait_ready(30)
        yield Site(f"files of {folder.name}", f"{server.url}/index.html", depth=1000)


def built_site(folder: Path) -> Path:
    """A site of enough pages that something installed has brought, else one made now."""
    if (rustc := shutil.which("rustc")) is not None:
        root = subprocess.run([rustc, "--print", "sysroot"], capture_output=True, text=True)
        pages = Path(root.stdout.strip(), "share/doc/rust/html/error_codes")
        if sum(1 for _ in pages.rglob("*.html")) >= ENOUGH_PAGES:
            return pages
    modules = sys.stdlib_module_names - {"antigravity", "this", "idlelib"}
    return written_by_pydoc(folder / "stdlib", sorted(modules))


def written_by_pydoc(folder: Path, names: list[str]) -> Path:
    """A page for each module that can be imported here, and an index of them."""
    folder.mkdir()
    subprocess.run([*PYTHON, "-c", _WRITE, *names], cwd=folder, stdout=subprocess.DEVNULL)
    pages = sorted(path.name for path in folder.glob("*.html"))
    links = "\n".join(f'<p><a href="{page}">{page}</a></p>' for page in pages)
    (folder / "index.html").write_text(f"<html><body>{links}</body></html>")
    return folder


def measure(site: Site, runs: int, with_wget: bool) -> Figures:
    """Crawl once in order, then in turns with wget."""
    say(f"{site.name}: {site.url}")
    in_order = asyncio.run(crawl(site, concurrency=1))
    reads, stores = [], []
    for run in range(runs):
        reads.append(asyncio.run(crawl(site, CONCURRENCY)))
        say(f"  run {run + 1}: crawl {len(reads[-1].urls)} pages in {reads[-1].took_s:.2f} s")
        if with_wget:
            stores.append(wget(site))
            say(f"         wget {len(stores[-1].texts)} pages in {stores[-1].took_s:.2f} s")
    return compared(site, in_order, reads, stores)


def say(text: str) -> None:
    print(text, flush=True)


async def crawl(site: Site, concurrency: int) -> Read:
    """Everything in reach, without politeness."""
    limits = CrawlLimits(
        pages=100_000,
        depth=site.depth,
        links_per_page=100_000,
        urls=100_000,
        concurrency=concurrency,
        concurrency_per_site=concurrency,
        delay_s=0.0,
        time_s=RUN_S,
    )
    ports = frozenset({httpx.URL(site.url).port or 80})
    policy = FetchPolicy(ports=ports, allowed_networks=("127.0.0.0/8",), max_body_bytes=16 << 20)
    urls, texts, first_s, begun_s = [], set(), 0.0, time.perf_counter()
    source = Crawl([site.url], limits=limits, policy=policy)
    async with aclosing(source.search(Query(""))) as found:
        async for each in found:
            first_s = first_s or time.perf_counter() - begun_s
            urls.append(each.passage.id)
            texts.add(each.passage.text)
    return Read(tuple(urls), frozenset(texts), first_s, time.perf_counter() - begun_s)


def wget(site: Site) -> Stored:
    """What `wget -r` stores, HTML pages only."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = ["wget", "-r", "-l", str(site.depth), "-nv", "-P", folder, "-o", str(log)]
        begun_s = time.perf_counter()
        # its exit status tells of broken links, which the sites have
        subprocess.run([*command, "--no-proxy", site.url], timeout=RUN_S)
        took_s = time.perf_counter() - begun_s
        fetched = _FETCHED.findall(log.read_text(errors="replace"))
        bodies = {url: Path(path).read_bytes() for url, path in fetched}
    bodies.pop(str(httpx.URL(site.url).join("/robots.txt")), None)  # not for reading
    pages = {str(normalised(httpx.URL(url))): body for url, body in bodies.items()}
    begun_s = time.perf_counter()
    texts = {url: text_of(url, body) for url, body in pages.items() if is_html(body)}
    return Stored(texts, took_s, time.perf_counter() - begun_s)


def is_html(body: bytes) -> bool:
    return body[:200].lstrip().lower().startswith((b"<!doctype", b"<html"))


def text_of(url: str, body: bytes) -> str:
    return read_page(httpx.URL(url), "text/html", body).text


def compared(site: Site, in_order: Read, reads: list[Read], stores: list[Stored]) -> Figures:
    """The medians of the times; of pages, the worst run."""
    places = {url: place for place, url in enumerate(in_order.urls)}
    moved = [
        abs(places[url] - place)
        for read in reads
        for place, url in enumerate(read.urls)
        if url in places
    ]
    missing = [missed(read, stored) for read, stored in zip(reads, stores, strict=False)]
    extra = [len(set(r.urls) - s.texts.keys()) for r, s in zip(reads, stores, strict=False)]
    return Figures(
        site=site.name,
        pages=min(len(read.urls) for read in reads),
        pages_per_s=rate([(len(read.urls), read.took_s) for read in reads]),
        first_page_s=round(statistics.median(read.first_s for read in reads), 3),
        in_order_pages_per_s=rate([(len(in_order.urls), in_order.took_s)]),
        moved_places_p50=statistics.median(moved),
        moved_places_max=max(moved),
        twice=max(len(read.urls) - len(set(read.urls)) for read in reads),
        wget_pages=min(len(stored.texts) for stored in stores) if stores else None,
        wget_pages_per_s=rate([(len(s.texts), s.took_s) for s in stores]) if stores else None,
        reading_pages_per_s=rate([(len(s.texts), s.reading_s) for s in stores]) if stores else None,
        same_text=max((same for same, _ in missing), default=None),
        lost=max((lost for _, lost in missing), default=None),
        only_here=max(extra, default=None),
    )


def missed(read: Read, stored: Stored) -> tuple[int, int]:
    """Of the pages that only wget has: how many have no text of their own, and how many have."""
    texts = [stored.texts[url] for url in stored.texts.keys() - set(read.urls)]
    lost = sum(1 for text in texts if text and text not in read.texts)
    return len(texts) - lost, lost


def rate(runs: list[tuple[int, float]]) -> float:
    return round(statistics.median(pages / seconds for pages, seconds in runs), 1)


def report(figures: list[Figures], runs: int, with_wget: bool) -> None:
    """Print the table, and the JSON object as the last line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("httpx", "trafilatura", "lxml"))
    beside = wget_version() if with_wget else "wget is not installed: no comparison"
    print(f"\n{machine()}, {versions}; {beside}; median of {runs} runs, {CONCURRENCY} at once")
    print(f"{'':28}" + "".join(f"{each.site:>22}" for each in figures))
    for name in list(asdict(figures[0]))[1:]:
        values = [getattr(each, name) for each in figures]
        print(f"{name:28}" + "".join(f"{'' if v is None else v:>22}" for v in values))
    print(json.dumps({"benchmark": "crawl", "runs": runs, "wget": with_wget,
                      "sites": [asdict(each) for each in figures]}))  # fmt: skip


def wget_version() -> str:
    said = subprocess.run(["wget", "--version"], capture_output=True, text=True).stdout
    return " ".join(said.split()[:3])


if __name__ == "__main__":
    sys.exit(main())
