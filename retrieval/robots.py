"""What sites ask of crawlers in their robots.txt (RFC 9309)."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

import httpx
from protego import Protego

from retrieval.addresses import AddressRefused, FetchFailed, host_of, port_of
from retrieval.fetch import Fetched, Fetcher, Unreachable

AGENT = "stream2llm"
_TRIES = 2
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Rules:
    """One site's wishes."""

    parsed: Protego | None
    unknown: str = ""
    """Why there are none; then nothing of the site is fetched."""

    def refusal(self, url: httpx.URL) -> str | None:
        """Why a page is not to be fetched; None if it may be."""
        if self.parsed is None:
            return self.unknown
        return None if self.parsed.can_fetch(str(url), AGENT) else "robots.txt does not allow it"

    @property
    def delay_s(self) -> float:
        """Between two requests; 0 if the site does not say."""
        return (self.parsed.crawl_delay(AGENT) or 0.0) if self.parsed is not None else 0.0


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
                self._rules[site] = await self._ask(f"{site}/robots.txt")
            return self._rules[site]

    async def _ask(self, url: str) -> Rules:
        for left in reversed(range(_TRIES)):
            try:
                answer = await self._fetcher.fetch(url)
            except Unreachable as error:
                rules = Rules(None, f"{error.reason} (robots.txt)")
            except AddressRefused as error:
                return Rules(None, error.reason)
            except FetchFailed as error:
                return Rules(None, f"{error.reason} (robots.txt)")
            else:
                rules = _rules(answer)
            if rules.parsed is not None:
                break
            if left:
                await asyncio.sleep(_PAUSE_S)
        return rules


def _rules(answer: Fetched) -> Rules:
    if answer.status >= 500 or answer.status == 429:
        return Rules(None, f"status {answer.status} (robots.txt)")
    return Rules(Protego.parse(answer.body.decode("utf-8", "replace")))


def origin(url: httpx.URL) -> str:
    """Scheme, host and port."""
    host = host_of(url)
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}:{port_of(url)}"
