"""A collection as a source: the nearest passages, found with more and more effort."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from retrieval.collections.collection import Collection
from retrieval.collections.store import CollectionError, Collections
from retrieval.deadlines import DeadlinePassed, in_time
from retrieval.embedding import EmbedderMissing, Vectors
from retrieval.refine import DOUBLING, Rounds, refine
from retrieval.source import Mode, Passage, Query, Ranked, SourceFailed


class AnnSearch:
    """The passages of a collection nearest to the query, in better and better rankings.

    Works in threads: the event loop stays free. A step under way in a thread can't be stopped, but
    nobody waits for it after the deadline or when the search is closed.
    """

    mode: Mode = "update"

    def __init__(
        self,
        collections: Collections,
        collection: str,
        *,
        places: int = 10,
        rounds: Rounds = DOUBLING,
    ) -> None:
        self.name = f"ann:{collection}"
        self._collections = collections
        self._collection = collection
        self._places = places
        self._rounds = rounds

    async def search(self, query: Query) -> AsyncGenerator[Ranked, None]:
        """As of `Source`.

        Raises:
            SourceFailed: the collection or the model is not there.
        """
        try:
            collection, vector = await in_time(query, self._prepared(query))
        except DeadlinePassed:
            return
        except (CollectionError, EmbedderMissing) as exc:
            raise SourceFailed(str(exc)) from exc

        async def find(effort: int) -> tuple[Passage, ...]:
            return await asyncio.to_thread(collection.search, vector, self._places, effort)

        async with aclosing(refine(query, find, self._rounds)) as rankings:
            async for ranked in rankings:
                yield ranked

    async def _prepared(self, query: Query) -> tuple[Collection, Vectors]:
        collection = await asyncio.to_thread(self._collections.open, self._collection)
        vectors = await asyncio.to_thread(self._collections.embedder.embed, [query.text])
        return collection, vectors[0]
