"""What sites ask of crawlers in their robots.txt (RFC 9309)."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

import httpx
from protego import Protego

from retrieval.addresses import FetchFailed, host_of, port_of
from retrieval.fetch import Fetcher

AGENT = "stream2llm"
_TRIES = 2
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Rules:
    """One site's wishes."""

    known: Protego | None
    """None: the site could not say, so nothing of it is fetched."""

    def allow(self, url: httpx.URL) -> bool:
        return self.known is not None and self.known.can_fetch(str(url), AGENT)

    @property
    def delay_s(self) -> float:
        """Between two requests; 0 if the site does not say."""
        return (self.known.crawl_delay(AGENT) or 0.0) if self.known is not None else 0.0


class Robots:
    """The rules of each site, fetched once."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._rules: dict[str, Rules] = {}
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def of(self, url: httpx.URL) -> Rules:
        """The rules of the site that a page is on. No file (4xx): all is allowed; no answer, an
        error of the server (5xx) or too many requests (429): nothing is."""
        site = origin(url)
        async with self._asking[site]:
            if site not in self._rules:
                self._rules[site] = Rules(await self._ask(f"{site}/robots.txt"))
            return self._rules[site]

    async def _ask(self, url: str) -> Protego | None:
        for left in reversed(range(_TRIES)):
            try:
                answer = await self._fetcher.fetch(url)
            except FetchFailed:
                pass
            else:
                if answer.status < 500 and answer.status != 429:
                    return Protego.parse(answer.body.decode("utf-8", "replace"))
            if left:
                await asyncio.sleep(_PAUSE_S)
        return None


def origin(url: httpx.URL) -> str:
    """Scheme, host and port."""
    host = host_of(url)
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}:{port_of(url)}"
