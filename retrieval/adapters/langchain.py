"""A LangChain retriever as a source. The extra `langchain` installs what it needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from retrieval.adapters.once import passage_id, ranked_once
from retrieval.source import Mode, Passage, Query, Ranked

if TYPE_CHECKING:
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever


class LangChainSource:
    """Asks a LangChain retriever once; its documents are the one ranking.

    Their ids are taken from the documents, else from `source` in their metadata, else made from the
    text; titles from `title` in the metadata.
    """

    mode: Mode = "update"

    def __init__(self, retriever: BaseRetriever, name: str = "langchain") -> None:
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
        return [_passage(document) for document in await self._retriever.ainvoke(text)]


def _passage(document: Document) -> Passage:
    named = document.id or document.metadata.get("source")
    return Passage(
        passage_id(named, document.page_content),
        document.page_content,
        str(document.metadata.get("title", "")),
    )
