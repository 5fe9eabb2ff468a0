"""What a crawl will visit next: breadth first, each address once, each site at its pace."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from dataclasses import dataclass, field

import httpx

from retrieval.robots import origin


@dataclass(frozen=True, slots=True)
class Visit:
    """An address to fetch."""

    url: httpx.URL
    depth: int
    """Links from the nearest seed."""
    attempt: int = 1


@dataclass(slots=True)
class _Site:
    delay_s: float
    waiting: deque[tuple[int, Visit]] = field(default_factory=deque)
    active: int = 0
    next_s: float = 0.0
    """When the next request may go out."""
    failures: int = 0
    """In a row."""


class Frontier:
    """Visits to make. Whoever takes one says `done` in the end."""

    def __init__(self, *, per_site: int, delay_s: float, max_urls: int, give_up_after: int) -> None:
        """
        Args:
            per_site: visits to one site at the same time.
            delay_s: between the beginnings of two requests to one site.
            max_urls: addresses known in all; later ones are dropped.
            give_up_after: failures in a row after which a site is left alone.
        """
        self._per_site = per_site
        self._delay_s = delay_s
        self._max_urls = max_urls
        self._give_up_after = give_up_after
        self._sites: dict[str, _Site] = {}
        self._seen: set[str] = set()
        self._later: list[tuple[float, int, Visit]] = []
        self._order = itertools.count()
        self._closed = False
        self._changed = asyncio.Event()

    def claim(self, url: httpx.URL) -> bool:
        """Note an address as known; False if it was already, or there is no room to know more."""
        key = str(url)
        if key in self._seen or len(self._seen) >= self._max_urls:
            return False
        self._seen.add(key)
        return True

    def add(self, visit: Visit) -> None:
        """A visit to make, if its address is new."""
        if self.claim(visit.url):
            self._put(visit)

    def again(self, visit: Visit, wait_s: float) -> None:
        """The same visit once more, after some time."""
        heapq.heappush(self._later, (time.monotonic() + wait_s, next(self._order), visit))
        self._changed.set()

    async def take(self) -> Visit | None:
        """The next visit, as soon as its site's turn comes; None when there is nothing to do and
        nobody at work who could find more."""
        while not self._closed:
            now_s = time.monotonic()
            self._bring_back(now_s)
            if (site := self._next_site(now_s)) is not None:
                site.active += 1
                site.next_s = now_s + site.delay_s
                return site.waiting.popleft()[1]
            if not self._later and not any(s.waiting or s.active for s in self._sites.values()):
                self.close()
                break
            await self._change_within(self._idle_s(now_s))
        return None

    def done(self, visit: Visit) -> None:
        """A visit that was taken has been made, or has failed."""
        self._site(visit.url).active -= 1
        self._changed.set()

    async def turn(self, url: httpx.URL) -> None:
        """Wait for a site's turn, for a request that is no visit of its own."""
        site = self._site(url)
        at_s = max(site.next_s, time.monotonic())
        site.next_s = at_s + site.delay_s
        await asyncio.sleep(at_s - time.monotonic())

    def pace(self, url: httpx.URL, delay_s: float) -> None:
        """The site of this page asks for at least this delay."""
        site = self._site(url)
        if delay_s > site.delay_s:
            site.next_s += delay_s - site.delay_s
            site.delay_s = delay_s

    def hold(self, url: httpx.URL, wait_s: float) -> None:
        """No request to the site of this page for some time."""
        site = self._site(url)
        site.next_s = max(site.next_s, time.monotonic() + wait_s)

    def judge(self, url: httpx.URL, answered: bool) -> None:
        """Whether the site of this page answered; one that fails too often is left alone."""
        site = self._site(url)
        site.failures = 0 if answered else site.failures + 1
        if self._gave_up(site):
            site.waiting.clear()

    def close(self) -> None:
        """No more visits."""
        self._closed = True
        self._changed.set()

    def _put(self, visit: Visit) -> None:
        site = self._site(visit.url)
        if not self._gave_up(site):
            site.waiting.append((next(self._order), visit))
            self._changed.set()

    def _gave_up(self, site: _Site) -> bool:
        return site.failures >= self._give_up_after

    def _site(self, url: httpx.URL) -> _Site:
        return self._sites.setdefault(origin(url), _Site(self._delay_s))

    def _bring_back(self, now_s: float) -> None:
        while self._later and self._later[0][0] <= now_s:
            self._put(heapq.heappop(self._later)[2])

    def _free(self) -> list[_Site]:
        sites = self._sites.values()
        return [site for site in sites if site.waiting and site.active < self._per_site]

    def _next_site(self, now_s: float) -> _Site | None:
        """Of the sites whose turn it is, the one whose page was found first."""
        ready = (site for site in self._free() if site.next_s <= now_s)
        return min(ready, key=lambda site: site.waiting[0][0], default=None)

    def _idle_s(self, now_s: float) -> float | None:
        """How long nothing can come up by itself; None: for ever."""
        times_s = [site.next_s for site in self._free()]
        times_s += [at_s for at_s, _, _ in self._later[:1]]
        return max(min(times_s) - now_s, 0) if times_s else None

    async def _change_within(self, seconds: float | None) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return
