"""A collection as a source: the nearest passages, found with more and more effort."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Final, TypeVar

from retrieval.collections.collection import Collection
from retrieval.collections.store import CollectionError, Collections
from retrieval.embedding import EmbedderMissing, Vectors
from retrieval.source import Mode, Query, Ranked, SourceFailed

EFFORTS: Final = (20, 40, 80, 160, 320, 640)
"""Candidates kept in each round (HNSW's ef). Fewer rounds in between, fewer changes in all."""

T = TypeVar("T")


class AnnSearch:
    """The passages of a collection nearest to the query, in better and better rankings.

    Each round searches with more effort and yields its ranking, also when it is the same. The
    search ends after the last round, at the deadline, or when `unchanged_rounds` rounds in a row
    have changed nothing.
    """

    mode: Mode = "update"

    def __init__(
        self,
        collections: Collections,
        collection: str,
        *,
        places: int = 10,
        efforts: tuple[int, ...] = EFFORTS,
        unchanged_rounds: int = 2,
    ) -> None:
        self.name = f"ann:{collection}"
        self._collections = collections
        self._collection = collection
        self._places = places
        self._efforts = efforts
        self._unchanged_rounds = unchanged_rounds

    async def search(self, query: Query) -> AsyncGenerator[Ranked, None]:
        """As of `Source`.

        Raises:
            SourceFailed: the collection or the model is not there.
        """
        unchanged, before = 0, None
        try:
            collection, vector = await self._prepared(query)
            for effort in self._efforts:
                found = await _in_thread(
                    query, partial(collection.search, vector, self._places, effort)
                )
                yield Ranked(found)
                unchanged = unchanged + 1 if found == before else 0
                if unchanged >= self._unchanged_rounds:
                    return
                before = found
        except TimeoutError:
            return

    async def _prepared(self, query: Query) -> tuple[Collection, Vectors]:
        embed = self._collections.embedder.embed
        try:
            collection = await _in_thread(query, partial(self._collections.open, self._collection))
            vectors = await _in_thread(query, partial(embed, [query.text]))
        except (CollectionError, EmbedderMissing) as exc:
            raise SourceFailed(str(exc)) from exc
        return collection, vectors[0]


async def _in_thread(query: Query, work: Callable[[], T]) -> T:
    """Do it off the event loop. Raises TimeoutError at the query's deadline."""
    left_s = None if query.deadline_s is None else query.deadline_s - time.monotonic()
    async with asyncio.timeout(left_s):
        return await asyncio.to_thread(work)
