"""A LlamaIndex retriever as a source. The extra `llamaindex` installs what it needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from retrieval.adapters.once import passage_id, ranked_once
from retrieval.source import Mode, Passage, Query, Ranked

if TYPE_CHECKING:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore


class LlamaIndexSource:
    """Asks a LlamaIndex retriever once; its nodes are the one ranking.

    Titles are taken from `title` in the nodes' metadata.
    """

    mode: Mode = "update"

    def __init__(self, retriever: BaseRetriever, name: str = "llamaindex") -> None:
        self.name = name
        self._retriever = retriever

    async def search(self, query: Query) -> AsyncGenerator[Ranked, None]:
        """As of `Source`.

        Raises:
            SourceFailed: whatever the retriever raised.
        """
        async for ranked in ranked_once(query, self._found(query.text)):
            yield ranked

    async def _found(self, text: str) -> list[Passage]:
        return [_passage(node) for node in await self._retriever.aretrieve(text)]


def _passage(node: NodeWithScore) -> Passage:
    text = node.get_content()
    title = str(node.metadata.get("title", ""))
    return Passage(passage_id(node.node_id, text), text, title, node.score)
