"""Retrieval that the gateway runs for a stream: what the sources find goes into its prompt.

A list of documents from the merged sources becomes the stream's documents whenever it changes; what
the client itself posts stays. The prompt keeps its beginning as far as that goes: behind the first
document that is no longer in its place stand the client's first, then the retrieved ones.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol
from weakref import proxy

from gateway.errors import BadRequest, GatewayError, Overloaded, RetrievalFailed
from gateway.keeper import Moved
from gateway.prompt import DOCUMENTS, Document, Message, Prompt
from gateway.requests import AnnSpec, RetrievalSpec
from gateway.settings import Settings
from gateway.sources import Sources
from gateway.telemetry import Metrics
from retrieval.collections.store import Collections
from retrieval.merge import Budget, MergedSearch, Part
from retrieval.ordering import Documents
from retrieval.source import Found, Mode, Passage, Query, Ranked, Source

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 512
"""Room left for an answer whose length nobody has limited, when the budget is not given either."""

State = Literal["running", "ended", "cancelled"]
Tokenize = Callable[[str], Awaitable[Document]]


class Fed(Protocol):
    """What retrieval needs of a stream."""

    prompt: Prompt

    async def rearrange(self, change: Callable[[tuple[Document, ...]], Sequence[Document]]) -> int:
        """Change the documents; returns how many tokens that has invalidated."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be searched, and how."""

    parts: list[Part]
    questions: list[str]
    """One for each part."""
    query: Query
    budget_tokens: int | None
    drop: Literal["ranked", "latest"]


class Retrievals:
    """All searches of one gateway, and their tasks."""

    def __init__(
        self, settings: Settings, collections: Collections | None, metrics: Metrics
    ) -> None:
        self._sources = Sources(settings, collections)
        self._max = settings.max_retrievals
        self._metrics = metrics
        self._tasks = set[asyncio.Task[None]]()

    def plan(self, spec: RetrievalSpec, messages: Sequence[Message]) -> Plan:
        """What a client asks for; its seconds begin now.

        Raises:
            RetrievalRefused, BadRequest: it is not to be had here.
            Overloaded: there are too many searches under way.
        """
        if len(self._tasks) >= self._max:
            raise Overloaded(f"{len(self._tasks)} retrievals are under way")
        question = spec.query or _last_question(messages)
        questions = [source.query or question for source in spec.sources]
        for source, text in zip(spec.sources, questions, strict=True):
            if isinstance(source, AnnSpec) and not text:
                raise BadRequest("there is no query", param="retrieval.query")
        parts = self._sources.parts(spec.sources)
        query = Query(question, self._sources.deadline_s(spec.deadline_s, "retrieval"))
        return Plan(parts, questions, query, spec.budget_tokens, spec.drop)

    def start(
        self, stream: Fed, plan: Plan, tokenize: Tokenize, max_tokens: int | None
    ) -> Retrieval:
        """Search, and feed the stream.

        Args:
            max_tokens: of the stream's documents, its own included; None: nobody knows.
        """
        retrieval = Retrieval(stream, plan, tokenize, max_tokens, self._metrics)
        self._tasks.add(retrieval.task)
        retrieval.task.add_done_callback(self._tasks.discard)
        return retrieval

    async def stop(self) -> None:
        """End all searches."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Retrieval:
    """The search for one stream."""

    def __init__(
        self,
        stream: Fed,
        plan: Plan,
        tokenize: Tokenize,
        max_tokens: int | None,
        metrics: Metrics,
    ) -> None:
        self.state: State = "running"
        self._stream: Fed = proxy(stream)  # which has this, and ends it when it ends itself
        self._query = plan.query
        self._tokenize = tokenize
        self._max_tokens = sys.maxsize if max_tokens is None else max_tokens
        self._metrics = metrics
        self._found: dict[str, Document] = {}  # by text
        self._placed: list[Document] = []
        self._cut = 0
        self._invalidated = 0
        self._reason = ""
        room = max(self._max_tokens - stream.prompt.context_tokens, 0)
        budget = Budget(self._size, min(plan.budget_tokens or room, room), plan.drop)
        parts = [
            replace(part, source=_Read(part.source, question, self._read))
            for part, question in zip(plan.parts, plan.questions, strict=True)
        ]
        self._search = MergedSearch(parts, budget)
        self.task = asyncio.create_task(self._run())

    async def ended(self) -> None:
        """Wait for the end: at the deadline at the latest.

        Raises:
            RetrievalFailed: all sources failed, and the stream has no documents.
        """
        await asyncio.wait({self.task})
        if not self.task.cancelled():
            self.task.result()
        sources = self._search.report().sources
        if self.state == "ended" and not self._stream.prompt.documents:
            reasons = [source.reason for source in sources if source.ended == "failed"]
            if len(reasons) == len(sources):
                raise RetrievalFailed("; ".join(reasons), retrieval=self.report())

    def cancel(self) -> None:
        """End all sources now. No error if they have ended."""
        self.task.cancel()

    def report(self) -> dict[str, Any]:
        """How it goes or went, for clients."""
        report = self._search.report()
        return {
            "state": self.state,
            "complete": self.state == "ended" and not self._reason and report.complete,
            "reason": self._reason or None,
            "sources": [
                {
                    "name": source.name,
                    "state": source.ended or self.state,
                    "reason": source.reason or None,
                    "passages": source.passages,
                }
                for source in report.sources
            ],
            "documents": [document.name for document in self._placed],
            "duplicates": report.duplicates,
            "dropped": report.dropped + self._cut,
            "invalidated_tokens": self._invalidated,
        }

    async def _run(self) -> None:
        began_s = time.monotonic()
        try:
            async with aclosing(self._search.documents(self._query)) as lists:
                async for documents in lists:
                    await self._put(documents)
            self.state = "ended"
        except (GatewayError, Moved) as e:
            self.state, self._reason = "ended", str(e)
        finally:
            if self.state == "running":
                self.state = "cancelled"
            self._found.clear()
            self._metrics.retrieval_seconds.observe(time.monotonic() - began_s)
            for source in self._search.report().sources:
                kind, end = source.name.partition(":")[0], source.ended or "cancelled"
                self._metrics.retrieval_sources.labels(kind, end).inc()

    async def _put(self, passages: Documents) -> None:
        wanted = [replace(self._found[p.text], name=p.id) for p in passages]

        def change(now: tuple[Document, ...]) -> Sequence[Document]:
            placed = {id(document) for document in self._placed}
            arranged = arrange(now, placed, wanted, self._max_tokens)
            foreign = {id(document) for document in now} - placed
            self._placed = [d for d in arranged if id(d) not in foreign]
            self._cut = len(wanted) - len(self._placed)
            return arranged

        self._invalidated += await self._stream.rearrange(change)

    async def _read(self, passages: Sequence[Passage]) -> None:
        """Have the tokens of passages at hand."""
        new = [text for text in {p.text for p in passages} if text not in self._found]
        documents = await asyncio.gather(*(self._tokenize(text) for text in new))
        self._found.update(zip(new, documents, strict=True))

    def _size(self, text: str) -> int:
        return len(self._found[text].tokens)


def arrange(
    now: Sequence[Document], retrieved: Collection[int], wanted: Sequence[Document], max_tokens: int
) -> list[Document]:
    """The documents of a prompt, so that it has what is wanted and keeps what its client gave.

    Args:
        now: what it has.
        retrieved: identities (`id`) of those that are not the client's.
        wanted: what is to be there beside the client's, in this order.
        max_tokens: of all; what is wanted last gives way.
    """
    own = [document for document in now if id(document) not in retrieved]
    left = max_tokens - sum(len(document.tokens) for document in own)
    fitting = list(_fitting(wanted, left))
    kept: list[Document] = []
    place = 0
    for document in now:
        if id(document) in retrieved:
            if place == len(fitting) or document != fitting[place]:
                break
            place += 1
        kept.append(document)
    behind = [d for d in now[len(kept) :] if id(d) not in retrieved]
    return [*kept, *behind, *fitting[place:]]


def _fitting(documents: Sequence[Document], max_tokens: int) -> Sequence[Document]:
    for count, document in enumerate(documents):
        max_tokens -= len(document.tokens)
        if max_tokens < 0:
            return documents[:count]
    return documents


def _last_question(messages: Sequence[Message]) -> str:
    for message in reversed(messages):
        content = message.get("content")
        if message.get("role") == "user" and isinstance(content, str):
            return content.replace(DOCUMENTS, "").strip()
    return ""


class _Read:
    """A source with a question of its own, whose passages are read before anybody hears of them."""

    def __init__(
        self,
        source: Source,
        question: str,
        read: Callable[[Sequence[Passage]], Awaitable[None]],
    ) -> None:
        self.name = source.name
        self.mode: Mode = source.mode
        self._source = source
        self._question = question
        self._read = read

    async def search(self, query: Query) -> AsyncGenerator[Found | Ranked, None]:
        """As of `Source`."""
        asked = replace(query, text=self._question)
        async with aclosing(self._source.search(asked)) as events:
            async for event in events:
                match event:
                    case Found(passage):
                        await self._read([passage])
                    case Ranked(passages):
                        await self._read(passages)
                yield event
