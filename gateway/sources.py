"""What clients may have retrieved for them, and the sources that do it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gateway.errors import BadRequest, RetrievalRefused
from gateway.requests import AnnSpec, CrawlSpec
from gateway.settings import Settings
from retrieval.ann import AnnSearch
from retrieval.collections.store import Collections
from retrieval.crawl import Crawl, CrawlLimits
from retrieval.merge import Part
from retrieval.source import Source


class Sources:
    """Makes sources within what is configured."""

    def __init__(self, settings: Settings, collections: Collections | None) -> None:
        """
        Args:
            collections: None where there are none to be searched.
        """
        self._settings = settings
        self._policy = settings.fetch_policy
        self._collections = collections

    def parts(self, specs: Sequence[CrawlSpec | AnnSpec]) -> list[Part]:
        """The sources that a client asks for; their seconds begin now.

        Raises:
            RetrievalRefused: it asks for what is not configured.
            BadRequest: it asks for more than the gateway allows.
        """
        return [self._part(spec, f"retrieval.sources[{n}]") for n, spec in enumerate(specs)]

    def deadline_s(self, given_s: float | None, place: str) -> float:
        """The `time.monotonic` value by which a search ends.

        Raises:
            BadRequest: it is later than the gateway allows.
        """
        longest_s = self._settings.retrieval_max_s
        _at_most(given_s or 0, longest_s, f"{place}.deadline_s")
        return time.monotonic() + (longest_s if given_s is None else given_s)

    def _part(self, spec: CrawlSpec | AnnSpec, place: str) -> Part:
        deadline_s = self.deadline_s(spec.deadline_s, place)
        match spec:
            case CrawlSpec():
                return Part(self._crawl(spec, place), deadline_s=deadline_s)
            case AnnSpec():
                return Part(self._ann(spec, place), spec.ordering, deadline_s)

    def _crawl(self, spec: CrawlSpec, place: str) -> Source:
        settings = self._settings
        if not settings.crawl:
            raise RetrievalRefused("this gateway does not crawl (--crawl)", param=place)
        _at_most(spec.pages, settings.crawl_max_pages, f"{place}.pages")
        _at_most(spec.depth, settings.crawl_max_depth, f"{place}.depth")
        limits = CrawlLimits(
            pages=spec.pages,
            depth=spec.depth,
            page_chars=spec.page_chars,
            delay_s=settings.crawl_delay_s,
            time_s=settings.retrieval_max_s,
        )
        return Crawl(spec.seeds, limits=limits, policy=self._policy)

    def _ann(self, spec: AnnSpec, place: str) -> Source:
        if self._collections is None:
            raise RetrievalRefused("this gateway has no collections (--collections)", param=place)
        return AnnSearch(self._collections, spec.collection, places=spec.k)


def _at_most(value: float, limit: float, param: str) -> None:
    if value > limit:
        raise BadRequest(f"{param} is {value:g}; this gateway allows {limit:g}", param=param)
