"""Pages of web sites, each the moment it has been read."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import logging
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import httpx

from retrieval.addresses import AddressRefused, FetchFailed, FetchPolicy, host_matches, host_of
from retrieval.channel import Channel, ChannelEnded, end_at
from retrieval.fetch import Fetched, Fetcher, Unreachable
from retrieval.frontier import Frontier, Visit
from retrieval.pages import READABLE_TYPES, cut, normalised, read_page
from retrieval.robots import Robots
from retrieval.source import Found, Mode, Passage, Query, SourceFailed
from retrieval.transport import Resolve, system_resolve

log = logging.getLogger(__name__)

READERS = 2
"""Threads that extract text."""
_URL = re.compile(r"https?://[^\s<>\"'`]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CrawlLimits:
    """How far a crawl goes, and how fast."""

    pages: int = 50
    """Yielded at most."""
    depth: int = 2
    """Links from a seed; 0: the seeds only."""
    links_per_page: int = 100
    """Followed of one page, the first ones."""
    urls: int = 5000
    """Known at most; beyond that links are not followed, so that endless sites end."""
    hosts: tuple[str, ...] = ()
    """Followed to beside the seeds' own; `.name` for all beneath a name too."""
    concurrency: int = 8
    concurrency_per_site: int = 2
    delay_s: float = 0.5
    """Between the beginnings of two requests to one site."""
    max_crawl_delay_s: float = 10.0
    """Of what a robots.txt asks for."""
    attempts: int = 3
    """At a page whose server fails (5xx, 429, no answer)."""
    backoff_s: float = 0.5
    """Before the second attempt, about; doubled for each further one."""
    max_wait_s: float = 10.0
    """A page that asks for a longer one (Retry-After) is passed over."""
    site_failures: int = 10
    """In a row, after which a site is left alone."""
    page_chars: int | None = None
    """Of a page's text, cut at a line's end."""
    time_s: float = 60.0
    """For the whole crawl; a query's deadline may come earlier."""


class _PassedOver(FetchFailed):
    """A page that this crawl does not want."""


class Crawl:
    """Follows links from seeds, breadth first, and yields what has text, each text once.

    Passages come in the order in which they are read; their ids are the pages' addresses after
    redirects. Pages that can't be had are passed over.
    """

    mode: Mode = "append"

    def __init__(
        self,
        seeds: Iterable[str] = (),
        *,
        limits: CrawlLimits | None = None,
        policy: FetchPolicy | None = None,
        resolve: Resolve = system_resolve,
        tls: ssl.SSLContext | None = None,
        name: str = "crawl",
    ) -> None:
        """
        Args:
            seeds: where to begin; if none, the addresses in the query's text.
            policy: what may be fetched at all; by default only what is public.
            resolve: looks names up.
            tls: which certificates are trusted, if not those that come with httpx.
        """
        self.name = name
        self._seeds = tuple(seeds)
        self._limits = limits or CrawlLimits()
        self._policy = policy or FetchPolicy()
        self._resolve = resolve
        self._tls = tls

    async def search(self, query: Query) -> AsyncGenerator[Found, None]:
        """Crawl until everything in reach is read, or a limit or the deadline is met.

        Raises:
            SourceFailed: there are no seeds, or none of them could be had.
        """
        seeds = self._seeds or urls_in(query.text)
        if not seeds:
            raise SourceFailed(f"{self.name}: no address to begin at")
        found = Channel[Passage](capacity=self._limits.concurrency)
        fetcher = Fetcher(
            self._policy,
            resolve=self._resolve,
            connections=2 * self._limits.concurrency,
            tls=self._tls,
        )
        crawling = asyncio.create_task(_Run(self.name, fetcher, self._limits, found).run(seeds))
        timer = end_at(found, _earlier(query.deadline_s, self._limits.time_s))
        try:
            while (passage := await found.get()) is not None:
                yield Found(passage)
        finally:
            if timer is not None:
                timer.cancel()
            crawling.cancel()
            await asyncio.wait({crawling})


def urls_in(text: str) -> tuple[str, ...]:
    """The web addresses in a text, without the punctuation behind them."""
    return tuple(dict.fromkeys(url.rstrip(".,;:!?)]}") for url in _URL.findall(text)))


def _earlier(deadline_s: float | None, time_s: float) -> float:
    own_s = time.monotonic() + time_s
    return own_s if deadline_s is None else min(own_s, deadline_s)


class _Run:
    """One crawl under way."""

    def __init__(
        self, name: str, fetcher: Fetcher, limits: CrawlLimits, found: Channel[Passage]
    ) -> None:
        self._name = name
        self._fetcher = fetcher
        self._limits = limits
        self._found = found
        self._robots = Robots(fetcher)
        self._frontier = Frontier(
            per_site=limits.concurrency_per_site,
            delay_s=limits.delay_s,
            max_urls=limits.urls,
            give_up_after=limits.site_failures,
        )
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="crawl")
        self._hosts: set[str] = set()
        self._texts: set[bytes] = set()
        self._left = limits.pages
        self._failed_seeds: list[str] = []

    async def run(self, seeds: Iterable[str]) -> None:
        """Crawl, and end the channel."""
        error: SourceFailed | None = None
        try:
            async with self._fetcher:
                await self._crawl(seeds)
            if self._failed_seeds and not self._texts:
                error = SourceFailed(f"{self._name}: {'; '.join(self._failed_seeds[:3])}")
        finally:
            self._readers.shutdown(wait=False, cancel_futures=True)
            self._found.end(error)

    async def _crawl(self, seeds: Iterable[str]) -> None:
        for seed in seeds:
            self._plant(seed)
        async with asyncio.TaskGroup() as workers:
            for _ in range(self._limits.concurrency):
                workers.create_task(self._work())

    def _plant(self, seed: str) -> None:
        try:
            url = normalised(self._fetcher.policy.check_url(seed))
        except AddressRefused as error:
            self._failed_seeds.append(str(error))
        else:
            self._hosts.add(host_of(url))
            self._frontier.add(Visit(url, depth=0))

    async def _work(self) -> None:
        while (visit := await self._frontier.take()) is not None:
            try:
                await self._visit(visit)
            except ChannelEnded:
                self._frontier.close()
            except FetchFailed as error:
                self._passed_over(visit, str(error))
            except Exception as error:  # a mistake met on one page, here or in a library
                log.exception("%s could not be read", visit.url)
                self._passed_over(visit, f"{visit.url}: {error!r}")
            finally:
                self._frontier.done(visit)

    def _passed_over(self, visit: Visit, why: str) -> None:
        log.info("passed over: %s", why)
        if visit.depth == 0:
            self._failed_seeds.append(why)

    async def _visit(self, visit: Visit) -> None:
        await self._ask_leave(visit.url)
        try:
            answer = await self._fetcher.fetch(
                visit.url, types=READABLE_TYPES, before_redirect=partial(self._redirected, visit)
            )
        except Unreachable:
            if not self._again(visit, 0.0):
                raise
            return
        if answer.status == 429 or answer.status >= 500:
            self._busy(visit, answer)
        elif answer.status != 200:
            raise _PassedOver(str(answer.url), f"status {answer.status}")
        else:
            self._frontier.judge(visit.url, answered=True)
            await self._read(visit, answer)

    async def _ask_leave(self, url: httpx.URL) -> None:
        rules = await self._robots.of(url)
        self._frontier.pace(url, min(rules.delay_s, self._limits.max_crawl_delay_s))
        if (refusal := rules.refusal(url)) is not None:
            raise _PassedOver(str(url), refusal)

    async def _redirected(self, visit: Visit, url: httpx.URL) -> None:
        """A seed may lead to another host, which then belongs to the crawl; a link may not."""
        target = normalised(url)
        if visit.depth > 0 and not self._in_reach(target):
            raise _PassedOver(str(url), "leads out of the site")
        if not self._frontier.claim(target) and visit.attempt == 1:
            raise _PassedOver(str(url), "was found before")
        await self._ask_leave(target)
        await self._frontier.turn(target)
        if visit.depth == 0:
            self._hosts.add(host_of(target))

    def _busy(self, visit: Visit, answer: Fetched) -> None:
        wait_s = retry_after_s(answer.retry_after)
        self._frontier.hold(answer.url, min(wait_s, self._limits.max_wait_s))
        if not self._again(visit, wait_s):
            raise _PassedOver(str(answer.url), f"status {answer.status}")

    def _again(self, visit: Visit, wait_s: float) -> bool:
        """Plan another attempt; False if there is none left."""
        self._frontier.judge(visit.url, answered=False)
        backoff_s = self._limits.backoff_s * 2 ** (visit.attempt - 1) * random.uniform(0.5, 1.5)
        if visit.attempt >= self._limits.attempts or wait_s > self._limits.max_wait_s:
            return False
        next_one = replace(visit, attempt=visit.attempt + 1)
        self._frontier.again(next_one, max(wait_s, backoff_s))
        return True

    async def _read(self, visit: Visit, answer: Fetched) -> None:
        loop = asyncio.get_running_loop()
        page = await loop.run_in_executor(
            self._readers, read_page, answer.url, answer.content_type, answer.body
        )
        if visit.depth < self._limits.depth:
            self._follow(visit, page.links)
        await self._give(str(normalised(answer.url)), page.title, page.text)

    def _follow(self, visit: Visit, links: Iterable[httpx.URL]) -> None:
        wanted = 0
        for url in links:
            if self._in_reach(url):
                self._frontier.add(Visit(url, visit.depth + 1))
                wanted += 1
                if wanted == self._limits.links_per_page:
                    return

    def _in_reach(self, url: httpx.URL) -> bool:
        host = host_of(url)
        if host not in self._hosts and not any(host_matches(host, p) for p in self._limits.hosts):
            return False
        with suppress(AddressRefused):
            self._fetcher.policy.check_url(url)
            return True
        return False

    async def _give(self, url: str, title: str, text: str) -> None:
        """Yield a page, unless it has no text or that of an earlier one."""
        mark = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
        if not text or mark in self._texts or self._left == 0:
            return
        self._texts.add(mark)
        self._left -= 1
        max_chars = self._limits.page_chars
        shown = text if max_chars is None else cut(text, max_chars)
        await self._found.put(Passage(url, shown, title))
        if self._left == 0:
            self._frontier.close()
            self._found.end()


def retry_after_s(text: str) -> float:
    """Seconds that a Retry-After header asks for; 0 if it can't be read."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0
