"""A Qdrant collection as a source. The extra `qdrant` installs what it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from retrieval.deadlines import DeadlinePassed, in_time
from retrieval.embedding import Embedder
from retrieval.refine import DOUBLING, Rounds, refine
from retrieval.source import Mode, Passage, Query, Ranked, SourceFailed

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import ScoredPoint


class QdrantSource:
    """The points nearest to the query, refined by growing `hnsw_ef`.

    The collection's vectors must be of the same model as the embedder's. Text and title are the
    fields `text_key` and `title_key` of the points' payload; points without text are passed over.
    The client stays the caller's, who closes it.
    """

    mode: Mode = "update"

    def __init__(
        self,
        client: AsyncQdrantClient,
        collection: str,
        embedder: Embedder,
        *,
        text_key: str = "text",
        title_key: str = "title",
        places: int = 10,
        rounds: Rounds = DOUBLING,
    ) -> None:
        self.name = f"qdrant:{collection}"
        self._client = client
        self._collection = collection
        self._embedder = embedder
        self._text_key = text_key
        self._title_key = title_key
        self._places = places
        self._rounds = rounds

    async def search(self, query: Query) -> AsyncGenerator[Ranked, None]:
        """As of `Source`.

        Raises:
            SourceFailed: whatever the client or the embedder raised.
        """
        try:
            embedding = asyncio.to_thread(self._embedder.embed, [query.text])
            vector = (await in_time(query, embedding))[0].tolist()
            find = partial(self._found, vector)
            async with aclosing(refine(query, find, self._rounds)) as rankings:
                async for ranked in rankings:
                    yield ranked
        except DeadlinePassed:
            return
        except Exception as exc:  # the client's transports each have their own errors
            raise SourceFailed(f"{type(exc).__name__}: {exc}") from exc

    async def _found(self, vector: list[float], effort: int) -> tuple[Passage, ...]:
        from qdrant_client.models import SearchParams

        answer = await self._client.query_points(
            self._collection,
            query=vector,
            limit=self._places,
            search_params=SearchParams(hnsw_ef=effort),
            with_payload=[self._text_key, self._title_key],
        )
        passages = map(self._passage, answer.points)
        return tuple(passage for passage in passages if passage.text)

    def _passage(self, point: ScoredPoint) -> Passage:
        payload = point.payload or {}
        return Passage(
            str(point.id),
            str(payload.get(self._text_key, "")),
            str(payload.get(self._title_key, "")),
            point.score,
        )
