"""Several sources as one list of documents: searched side by side, merged as they answer.

In front stand the documents of append-mode sources, in the order in which they came; behind them
those of update-mode sources, as long as they may change: a change at the end costs an engine least.
When such a source has ended, what comes later stands behind its documents.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, zip_longest
from typing import Final, Literal

from retrieval.deadlines import left_s
from retrieval.ordering import ORDERINGS, Documents, OrderingName
from retrieval.source import Found, Passage, Query, Ranked, Source, SourceFailed

Drop = Literal["ranked", "latest"]
Ended = Literal["complete", "deadline", "failed"]

SIZES_KNOWN: Final = 4096
"""Texts whose size is not asked for again."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """A source and how its documents take part."""

    source: Source
    ordering: OrderingName = "stable"
    """Of an update-mode source's documents among themselves."""
    deadline_s: float | None = None
    """A `time.monotonic` value by which this source ends; None: when the query's passes."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much context there may be, and what gives way when it is full."""

    size: Callable[[str], int]
    """Of a document's text, in whatever unit `limit` has."""
    limit: int
    drop: Drop = "ranked"
    """`ranked`: what came in append-mode stays; of the rankings the last places give way to it.
    `latest`: the rankings stay; of what came in append-mode the newest gives way to them."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """How one source ended, or that it has not."""

    name: str
    ended: Ended | None
    """None: it is still searched."""
    reason: str
    """Why it failed; else empty."""
    passages: int
    """What it gave: all of append-mode, the last ranking of update-mode."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a merged search goes, or went."""

    sources: tuple[SourceReport, ...]
    duplicates: int
    """Passages left out of the last list because it has them from elsewhere."""
    dropped: int
    """Passages left out of the last list for the budget."""

    @property
    def complete(self) -> bool:
        """Whether all sources have said all they had to say."""
        return all(source.ended == "complete" for source in self.sources)


class MergedSearch:
    """One search of several sources. Use it once.

    Ids of the merged documents are addresses as they are, and others behind their source's name,
    because only addresses mean the same everywhere. Texts that differ in white space only are one.
    """

    def __init__(self, parts: Sequence[Part], budget: Budget) -> None:
        self._lanes = [_Lane(part) for part in parts]
        self._budget = replace(budget, size=lru_cache(SIZES_KNOWN)(budget.size))
        self._front = _Selection(self._budget)
        self._standing: list[Passage] = []  # what will not change any more, as it came
        self._last = _Selection(self._budget)
        self._changed = asyncio.Event()

    async def documents(self, query: Query) -> AsyncGenerator[Documents, None]:
        """The whole list to put into the prompt, again after each change.

        Ends when all sources have ended, at the query's deadline at the latest. A source that fails
        costs only itself. Closing ends all searches.
        """
        tasks = [asyncio.create_task(self._follow(lane, query)) for lane in self._lanes]
        shown: Documents | None = None
        running = bool(tasks)
        try:
            while running:
                await self._changed.wait()
                self._changed.clear()
                running = any(lane.ended is None for lane in self._lanes)
                if (now := self._merged()) != shown:
                    shown = now
                    yield now
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def report(self) -> Report:
        """How it goes or went, of each source in the order in which they were given."""
        sources = tuple(
            SourceReport(lane.part.source.name, lane.ended, lane.reason, lane.passages)
            for lane in self._lanes
        )
        return Report(
            sources,
            duplicates=self._front.duplicates + self._last.duplicates,
            dropped=self._front.dropped + self._last.dropped,
        )

    async def _follow(self, lane: _Lane, query: Query) -> None:
        """Take what one source says until it ends."""
        query = replace(query, deadline_s=_earliest(query.deadline_s, lane.part.deadline_s))
        limit = asyncio.timeout(left_s(query))
        try:
            async with limit, aclosing(lane.part.source.search(query)) as events:
                async for event in events:
                    self._take(lane, event)
                    await asyncio.sleep(0)  # a source that never waits must not stop the others
        except SourceFailed as exc:
            lane.end("failed", str(exc))
        except Exception as exc:  # whatever a source that others wrote may raise
            if limit.expired():
                lane.end("deadline")
            else:
                log.exception("source %s failed", lane.part.source.name)
                lane.end("failed", f"{type(exc).__name__}: {exc}")
        else:
            # a source that minds its deadline ends by itself
            left = left_s(query)
            lane.end("complete" if left is None or left > 0 else "deadline")
        finally:
            self._standing += lane.documents
            self._changed.set()

    def _take(self, lane: _Lane, event: Found | Ranked) -> None:
        if isinstance(event, Ranked):
            lane.rank(event.passages)
        else:
            lane.passages += 1
            # what does not fit beside its equals alone never will: memory stays bounded
            self._standing += self._front.offer([lane.named(event.passage)])
        self._changed.set()

    def _merged(self) -> Documents:
        front = self._front.documents
        by_rank = [lane.by_rank() for lane in self._lanes]
        ranked = [p for p in chain.from_iterable(zip_longest(*by_rank)) if p is not None]
        self._last = _Selection(self._budget)
        for passages in (front, ranked) if self._budget.drop == "ranked" else (ranked, front):
            self._last.offer(passages)
        changing = (lane for lane in self._lanes if lane.ended is None)
        return self._last.in_order_of(chain(self._standing, *(lane.documents for lane in changing)))


class _Lane:
    """One source: what it has ranked, and how it ended."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.documents: Documents = ()
        self.passages = 0
        self.ended: Ended | None = None
        self.reason = ""
        self._ranked: Documents = ()
        self._ordering = ORDERINGS[part.ordering]()

    def rank(self, passages: Sequence[Passage]) -> None:
        self._ranked = tuple(map(self.named, passages))
        self.documents = self._ordering.update(self._ranked)
        self.passages = len(self._ranked)

    def end(self, ended: Ended, reason: str = "") -> None:
        self.ended, self.reason = ended, reason
        self.documents = self._ordering.final()

    def by_rank(self) -> Documents:
        """Its documents, best first."""
        return tuple(passage for passage in self._ranked if passage in self.documents)

    def named(self, passage: Passage) -> Passage:
        """The passage by an id that is its own among all sources."""
        address = "://" in passage.id
        name = passage.id if address else f"{self.part.source.name}/{passage.id}"
        return replace(passage, id=name, score=None)


class _Selection:
    """Documents chosen one by one: each once, while they fit."""

    def __init__(self, budget: Budget) -> None:
        self.duplicates = 0
        self.dropped = 0
        self._budget = budget
        self._left = budget.limit
        self._chosen: dict[str, Passage] = {}
        self._texts = set[bytes]()

    @property
    def documents(self) -> Documents:
        return tuple(self._chosen.values())

    def offer(self, passages: Iterable[Passage]) -> list[Passage]:
        """Choose among these; returns those that it has chosen."""
        chosen = []
        for passage in passages:
            text = hashlib.blake2b(" ".join(passage.text.split()).encode()).digest()
            if passage.id in self._chosen or text in self._texts:
                self.duplicates += 1
            elif (size := self._budget.size(passage.text)) > self._left:
                self.dropped += 1
            else:
                self._left -= size
                self._texts.add(text)
                self._chosen[passage.id] = passage
                chosen.append(passage)
        return chosen

    def in_order_of(self, placed: Iterable[Passage]) -> Documents:
        """The chosen documents, each where it stands first among those given."""
        return tuple(p for p in dict.fromkeys(placed) if self._chosen.get(p.id) == p)


def _earliest(*deadlines_s: float | None) -> float | None:
    return min((deadline for deadline in deadlines_s if deadline is not None), default=None)
