"""The bodies of answers, for their description. Handlers build them as plain objects; the tests
hold what they send against these."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.engines import Role, Standing
from gateway.handoff import Handoff
from gateway.routing import Decision
from gateway.stream import State
from retrieval.source import Passage


class ErrorBody(msgspec.Struct):
    """What went wrong, as in the OpenAI API. Some codes bring further fields."""

    message: str
    type: str
    param: str | None
    code: str | None
    expected_seq: int | UnsetType = UNSET
    """With `sequence_gap`."""
    limit: str | UnsetType = UNSET
    """With `rate_limit_exceeded`: which one."""
    retrieval: RetrievalReport | UnsetType = UNSET
    """With `retrieval_failed`."""


class Error(msgspec.Struct):
    """The body of every error."""

    error: ErrorBody


class SourceReport(msgspec.Struct):
    """How the search of one source went."""

    name: str
    state: str
    reason: str | None
    passages: int


class RetrievalReport(msgspec.Struct):
    """How the retrieval of a stream goes or went."""

    state: Literal["running", "ended", "cancelled"]
    complete: bool
    reason: str | None
    sources: list[SourceReport]
    documents: list[str]
    duplicates: int
    dropped: int
    invalidated_tokens: int


class StreamTokens(msgspec.Struct):
    """Tokens of a stream."""

    prompt: int
    """Its tail included."""
    received: int
    """Of its documents."""
    waiting: int
    """On no way to an engine yet."""
    prefilled: int
    """Whose KV the engine holds."""


class Stream(msgspec.Struct):
    """Where a stream stands. One that another replica holds is told in part."""

    id: str
    object: Literal["stream"]
    created: int
    model: str
    state: State
    engine: str | None
    error: ErrorBody | UnsetType | None = UNSET
    routing: Decision | UnsetType | None = UNSET
    handoff: Handoff | UnsetType | None = UNSET
    chunks: int | UnsetType = UNSET
    tokens: StreamTokens | UnsetType = UNSET
    retrieval: RetrievalReport | UnsetType = UNSET


class ChunksTaken(msgspec.Struct):
    """Acknowledges a post of chunks."""

    id: str
    seq: int
    tokens: int
    tokens_received: int
    """Of all documents of the stream."""


class ListTaken(msgspec.Struct):
    """Acknowledges a ranked list; a number that was a post of chunks keeps that one's answer."""

    id: str
    seq: int
    tokens_received: int
    kept: int
    invalidated: int
    added: int


class PromptTokensDetails(msgspec.Struct):
    """`cached_tokens` were computed before the input was closed."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """As in the OpenAI API."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(msgspec.Struct):
    """The answer."""

    role: Literal["assistant"]
    content: str


class Choice(msgspec.Struct):
    """There is one."""

    index: Literal[0]
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatCompletion(msgspec.Struct):
    """An answer in one body."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    retrieval: RetrievalReport | UnsetType = UNSET


class Delta(msgspec.Struct):
    """A piece of the answer; the role comes first."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    """There is one, but beside `usage`, where there is none."""

    index: Literal[0]
    delta: Delta
    logprobs: dict[str, Any] | None
    finish_reason: str | None


class ChatCompletionChunk(msgspec.Struct):
    """The data of one event of an answer. Behind the last one comes `[DONE]`, or instead of it the
    data of an event is an `Error`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    retrieval: RetrievalReport | UnsetType = UNSET


class Alive(msgspec.Struct):
    """The gateway answers."""

    status: Literal["alive"]


class Collection(msgspec.Struct):
    """A collection."""

    name: str
    object: Literal["collection"]
    passages: int
    embedder: str | UnsetType = UNSET


class CollectionList(msgspec.Struct):
    """All collections."""

    object: Literal["list"]
    data: list[Collection]


class CollectionDeleted(msgspec.Struct):
    """A collection is no more."""

    name: str
    object: Literal["collection"]
    deleted: Literal[True]


class PassagesAdded(msgspec.Struct):
    """Passages are in a collection."""

    name: str
    object: Literal["collection"]
    added: int
    passages: int
    """That it has now."""


class PassageList(msgspec.Struct):
    """What a search has found, best first."""

    object: Literal["list"]
    data: list[Passage]


class EngineStatus(msgspec.Struct):
    """An engine of the pool. What it says itself is there once it has answered."""

    id: str
    url: str
    role: Role
    standing: Standing
    streams: int
    passing: int
    """Requests that are passed through."""
    max_streams: int | None
    failures: int
    ejections: int
    trouble: str | None
    model: str | UnsetType = UNSET
    engine: str | UnsetType = UNSET
    running: int | UnsetType = UNSET
    waiting: int | UnsetType = UNSET
    open_prompts: int | UnsetType = UNSET
    kv_blocks_total: int | UnsetType = UNSET
    kv_blocks_free: int | UnsetType = UNSET
    lacks: list[str] | UnsetType = UNSET


class EngineList(msgspec.Struct):
    """All engines of the pool."""

    engines: list[EngineStatus]


class StreamCounts(msgspec.Struct):
    """Streams that have not ended."""

    streams: int
    by_state: dict[str, int]
    by_model: dict[str, int]
    by_engine: dict[str, int]
    requests: int | UnsetType = UNSET
    """Under way."""
    draining: Literal[True] | UnsetType = UNSET
