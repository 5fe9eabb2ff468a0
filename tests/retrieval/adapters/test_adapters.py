"""Other people's retrievers as sources, with the real libraries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from retrieval.adapters.langchain import LangChainSource
from retrieval.adapters.llamaindex import LlamaIndexSource
from retrieval.adapters.qdrant import QdrantSource
from retrieval.refine import Rounds
from retrieval.source import Passage, Query, Ranked, Source, SourceFailed
from tests.retrieval.words import Words

# the libraries take seconds to import
pytestmark = pytest.mark.engine

TEXTS = ["apple pear", "plum cherry", "grape fig"]


class Failure(Exception):
    """Of a retriever."""


async def rankings(source: Source, query: Query) -> list[tuple[Passage, ...]]:
    async with aclosing(source.search(query)) as events:
        return [event.passages async for event in events if isinstance(event, Ranked)]


def langchain(fails: bool = False, hangs: bool = False) -> LangChainSource:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class Retriever(BaseRetriever):
        async def _aget_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            await misbehave(fails, hangs)
            return [
                Document(query, id="1", metadata={"title": "T"}),
                Document("b", metadata={"source": "https://example.org/b"}),
                Document("c"),
            ]

        def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            raise NotImplementedError

    return LangChainSource(Retriever())


def llamaindex(fails: bool = False, hangs: bool = False) -> LlamaIndexSource:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    class Retriever(BaseRetriever):
        async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            await misbehave(fails, hangs)
            text = query_bundle.query_str
            node = TextNode(id_="1", text=text, metadata={"title": "T"})
            return [NodeWithScore(node=node, score=0.5)]

        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            raise NotImplementedError

    return LlamaIndexSource(Retriever())


async def misbehave(fails: bool, hangs: bool) -> None:
    if fails:
        raise Failure("it broke")
    if hangs:
        await asyncio.Event().wait()


@pytest.fixture
async def qdrant() -> AsyncIterator[Any]:
    """An embedded Qdrant with a collection `fruit`."""
    from qdrant_client import AsyncQdrantClient, models

    client = AsyncQdrantClient(":memory:")
    size = models.VectorParams(size=Words.dimensions, distance=models.Distance.COSINE)
    await client.create_collection("fruit", vectors_config=size)
    points = [
        models.PointStruct(id=n, vector=vector.tolist(), payload={"text": text, "title": text[:1]})
        for n, (text, vector) in enumerate(zip(TEXTS, Words().embed(TEXTS), strict=True))
    ]
    no_text = models.PointStruct(id=9, vector=points[0].vector, payload={})
    await client.upsert("fruit", points=[*points, no_text])
    yield client
    await client.close()


async def test_langchain_documents_are_one_ranking() -> None:
    (found,) = await rankings(langchain(), Query("a"))
    assert [(p.text, p.title) for p in found] == [("a", "T"), ("b", ""), ("c", "")]
    assert [p.id for p in found[:2]] == ["1", "https://example.org/b"]
    assert await rankings(langchain(), Query("a")) == [found]


async def test_llamaindex_nodes_are_one_ranking() -> None:
    assert await rankings(llamaindex(), Query("a")) == [(Passage("1", "a", "T", 0.5),)]


@pytest.mark.parametrize("source", [langchain, llamaindex])
async def test_a_failure_is_the_source_s_and_the_deadline_ends_it(source: Any) -> None:
    with pytest.raises(SourceFailed, match="Failure: it broke"):
        await rankings(source(fails=True), Query("a"))
    assert await rankings(source(hangs=True), Query("a", time.monotonic() + 0.05)) == []


async def test_qdrant_is_searched_with_growing_effort_until_nothing_changes(
    qdrant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    efforts = []
    query_points = qdrant.query_points

    async def recorded(*args: Any, search_params: Any, **kwargs: Any) -> Any:
        efforts.append(search_params.hnsw_ef)
        return await query_points(*args, search_params=search_params, **kwargs)

    monkeypatch.setattr(qdrant, "query_points", recorded)
    source = QdrantSource(qdrant, "fruit", Words(), rounds=Rounds((10, 20, 40, 80), unchanged=2))
    found = await rankings(source, Query("plum cherry"))
    assert efforts == [10, 20, 40]
    for passages in found:
        assert sorted(p.text for p in passages) == sorted(TEXTS)
        assert (passages[0].id, passages[0].title) == ("1", "p")
        assert passages[0].score == pytest.approx(1, abs=1e-3)


async def test_a_qdrant_that_fails_fails_the_source(qdrant: Any) -> None:
    with pytest.raises(SourceFailed, match="none"):
        await rankings(QdrantSource(qdrant, "none", Words()), Query("plum"))
    late = Query("plum", time.monotonic())
    assert await rankings(QdrantSource(qdrant, "fruit", Words()), late) == []
