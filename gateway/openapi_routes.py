"""What clients can ask: the public routes as operations, for their description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from gateway import openapi_shapes as shapes
from gateway.errors import (
    AnswerGone,
    BadRequest,
    BodyTooLarge,
    CollectionNotFound,
    CollectionThere,
    Conflict,
    ContextTooLong,
    Draining,
    EngineFailed,
    EngineTimeout,
    Forbidden,
    GatewayError,
    IndexAway,
    InputClosed,
    KeyInUse,
    KeyReused,
    ModelNotFound,
    Overloaded,
    RateLimited,
    RequestTimeout,
    RetrievalFailed,
    RetrievalRefused,
    RetrievalUnderWay,
    SequenceGap,
    StorageFull,
    StreamLost,
    StreamNotFound,
    Unauthorized,
    UnknownDocument,
    Unsupported,
)
from gateway.openapi import (
    DESCRIBING,
    JSON,
    NDJSON,
    PROMETHEUS,
    SSE,
    Answer,
    Operation,
    Parameter,
    described,
)
from gateway.readiness import Readiness
from gateway.requests import ChunkPost, Create, FinishPost, RankedList
from gateway.routes_collections import NewCollection, Search
from gateway.settings import Settings

TITLE = "stream2llm"

_DEFAULT = {setting.name: setting.default for setting in fields(Settings)}

ABOUT = f"""A gateway that lets a model read its context while retrieval still runs: open a stream,
post context as it is found, finish, and read the answer.

A chunk post or a line of NDJSON has at most `--max-chunk-bytes` ({_DEFAULT["max_chunk_bytes"]:,} by
default), any other body `--max-body-bytes` ({_DEFAULT["max_body_bytes"]:,}). An open stream ends
after `--idle-timeout-s` ({_DEFAULT["idle_timeout_s"]:g} s) without input, any at the age of
`--max-stream-s` ({_DEFAULT["max_stream_s"]:g} s). A tenant may have narrower limits.

Every answer to a tenant with quotas has `x-ratelimit-limit-requests`,
`x-ratelimit-remaining-requests` and `x-ratelimit-reset-requests`, and the same of `tokens`. 429 and
503 come with `Retry-After`, in seconds. A path that is not described is a 404 and a method that is
not a 405, both in the error shape."""

KEY = "The key of a tenant; `X-Api-Key` does too. None is asked for without `--tenants`."

_SSE = {
    "type": "string",
    "description": "Server-sent events whose data is a `ChatCompletionChunk`, at the end `[DONE]`. "
    "An answer that breaks off ends with an `Error` instead. Lines that begin with a colon are "
    "heartbeats. Events of an answer with an Idempotency-Key are numbered by `id:`.",
}
_ANSWER = {SSE: _SSE, JSON: shapes.ChatCompletion}
_PASSED = {SSE: {"type": "string"}, JSON: {"type": "object"}}
_MESSAGES = {"messages": {"type": "array", "items": {"type": "object"}}}
_PROMPT = {"prompt": {"anyOf": [{"type": "string"}, {"type": "array"}]}}
_OF_ENGINE = Answer(
    "Or what the engine says.",
    {JSON: {"type": "object", "properties": {"error": {}}, "required": ["error"]}},
)
_LINES = {
    "type": "string",
    "description": "Lines of JSON: first one of `Create`, then chunks (`Chunk`), at last options "
    'with `"finish": true`.',
}
_PASSAGES = {
    "type": "string",
    "description": 'Lines of {"id", "text", "title"?}; all of them are taken or none.',
}

_ID = Parameter("id", "path", "Of a stream.")
_NAME = Parameter("name", "path", "Of a collection.")
_IDEMPOTENCY = Parameter(
    "Idempotency-Key", "header",
    "The same request under the same key gets the same answer. 1 to 255 ASCII characters.",
    {"type": "string", "minLength": 1, "maxLength": 255},
)  # fmt: skip
_LAST_EVENT = Parameter(
    "Last-Event-ID", "header", "The number of the last event that the client has.",
    {"type": "string", "pattern": "^[0-9]{1,17}$"},
)  # fmt: skip
_REPLAYED = {"Idempotent-Replayed": "`true` if it was made by an earlier request with this key."}

_TO_STREAM = {
    name: {"id": "$response.body#/id"}
    for name in ("postChunks", "rankDocuments", "finishStream", "getStream", "cancelStream")
}

_BODY: tuple[type[GatewayError], ...] = (
    Unauthorized, BadRequest, BodyTooLarge, RequestTimeout,
)  # fmt: skip
_ADMITTED = (*_BODY, RateLimited, Overloaded, Draining, EngineFailed)
_NEW = (*_ADMITTED, Unsupported, ContextTooLong, ModelNotFound, RetrievalRefused)
_OF_STREAM = (*_BODY, StreamNotFound, StreamLost, IndexAway, EngineFailed)
_POST = (*_OF_STREAM, ContextTooLong, InputClosed, SequenceGap, RateLimited, Overloaded)

STREAMS = (
    Operation(
        "post", "/v1/streams", "createStream", "Open a stream", "streams",
        {
            201: Answer("The stream.", {JSON: shapes.Stream}, _REPLAYED, _TO_STREAM),
            200: Answer("To NDJSON: the answer.", _ANSWER),
        },
        "With a body of NDJSON: open a stream, feed it line by line, and answer, in one request. "
        "With JSON the stream stays open for further requests.",
        body={JSON: Create, NDJSON: _LINES},
        parameters=(_IDEMPOTENCY,),
        errors=(*_NEW, InputClosed, KeyInUse, KeyReused, RetrievalFailed, IndexAway),
    ),
    Operation(
        "post", "/v1/streams/{id}/chunks", "postChunks", "Add context", "streams",
        {
            202: Answer(
                "Taken in, or was before under this `seq`.",
                {JSON: (shapes.ChunksTaken, shapes.ListTaken)},
                {"Server-Timing": "What the gateway took for it."},
            )
        },
        "Either `text` with its `id`, or `chunks`. With `seq` a post can be repeated.",
        body={JSON: ChunkPost},
        parameters=(_ID,),
        errors=_POST,
    ),
    Operation(
        "put", "/v1/streams/{id}/documents", "rankDocuments", "Replace the context", "streams",
        {
            200: Answer(
                "In force, or was before under this `seq`.",
                {JSON: (shapes.ListTaken, shapes.ChunksTaken)},
            )
        },
        "A ranked list takes the place of all documents. An `id` without `text` stands for the "
        "last text that was sent under it.",
        body={JSON: RankedList},
        parameters=(_ID,),
        errors=(*_POST, UnknownDocument, RetrievalUnderWay),
    ),
    Operation(
        "post", "/v1/streams/{id}/finish", "finishStream", "Close the input and answer", "streams",
        {200: Answer("The answer; one body with `\"stream\": false`.", _ANSWER)},
        "Options override those that the stream was opened with. With `seq` the answer is refused "
        "unless the post of that number, and so all before it, are in the prompt.",
        body={JSON: FinishPost},
        body_required=False,
        parameters=(_ID, _IDEMPOTENCY, _LAST_EVENT),
        errors=(
            *_OF_STREAM, Unsupported, ContextTooLong, InputClosed, SequenceGap, Overloaded,
            KeyReused, AnswerGone, RetrievalFailed,
        ),
    ),
    Operation(
        "get", "/v1/streams/{id}/answer", "resumeAnswer", "Go on with an answer", "streams",
        {200: Answer("The answer behind that event.", _ANSWER)},
        "Only of a stream that was finished with an Idempotency-Key.",
        parameters=(_ID, _LAST_EVENT),
        errors=(
            *_OF_STREAM, Conflict, AnswerGone, InputClosed, SequenceGap, ContextTooLong,
            Overloaded, RetrievalFailed,
        ),
    ),
    Operation(
        "get", "/v1/streams/{id}", "getStream", "Where a stream stands", "streams",
        {200: Answer("The stream.", {JSON: shapes.Stream})},
        parameters=(_ID,),
        errors=_OF_STREAM,
    ),
    Operation(
        "delete", "/v1/streams/{id}", "cancelStream", "Stop a stream, free its memory", "streams",
        {200: Answer("The stream, which has ended.", {JSON: shapes.Stream})},
        parameters=(_ID,),
        errors=_OF_STREAM,
    ),
)  # fmt: skip


def _passed(path: str, name: str, summary: str, asked: dict[str, Any], **more: Any) -> Operation:
    """An operation of the OpenAI API that an engine answers.

    Args:
        asked: the schema of the field that it can't do without.
    """
    properties = {"model": {"type": ["string", "null"]}, "stream": {"type": "boolean"}} | asked
    errors: Sequence[type[GatewayError]] = more.pop("errors", ())
    return Operation(
        "post", path, name, summary, "OpenAI API",
        {200: Answer("The answer of the engine.", _PASSED)},
        body={JSON: {"type": "object", "properties": properties, "required": list(asked)}},
        errors=(*_ADMITTED, EngineTimeout, *errors),
        unrendered={400: _OF_ENGINE, 404: _OF_ENGINE, 422: _OF_ENGINE},
        **more,
    )  # fmt: skip


OPENAI = (
    _passed(
        "/v1/chat/completions", "createChatCompletion", "A chat completion", _MESSAGES,
        description="Passed through to an engine. With `retrieval` the body is one of `Create`, "
        "and the gateway retrieves the context and answers itself.",
        errors=(
            Unsupported, ContextTooLong, ModelNotFound, RetrievalRefused, RetrievalFailed,
            InputClosed, IndexAway,
        ),
    ),
    _passed("/v1/completions", "createCompletion", "A completion", _PROMPT),
    Operation(
        "get", "/v1/models", "listModels", "The models of an engine", "OpenAI API",
        {200: Answer("The answer of the engine.", {JSON: {"type": "object"}})},
        errors=(Unauthorized, Overloaded, EngineFailed, EngineTimeout),
    ),
)  # fmt: skip

WATCHING = (
    Operation(
        "get", "/health", "health", "Whether the gateway is alive", "watching",
        {200: Answer("It is.", {JSON: shapes.Alive})},
        open=True,
    ),
    Operation(
        "get", "/ready", "ready", "Whether streams can be opened", "watching",
        {200: Answer("They can.", {JSON: Readiness})},
        unrendered={503: Answer("Not now.", {JSON: Readiness})},
        open=True,
    ),
    Operation(
        "get", "/metrics", "metrics", "For Prometheus", "watching",
        {200: Answer("The text exposition format.", {PROMETHEUS: {"type": "string"}})},
        open=True,
    ),
    DESCRIBING,
)  # fmt: skip

_SEARCHED = (Unauthorized, BadRequest, CollectionNotFound)

COLLECTIONS = (
    Operation(
        "post", "/v1/collections", "createCollection", "Make an empty collection", "collections",
        {201: Answer("It is there.", {JSON: shapes.Collection})},
        body={JSON: NewCollection},
        errors=(*_BODY, Forbidden, CollectionThere, StorageFull),
    ),
    Operation(
        "get", "/v1/collections", "listCollections", "All collections", "collections",
        {200: Answer("All of them.", {JSON: shapes.CollectionList})},
        errors=(Unauthorized,),
    ),
    Operation(
        "delete", "/v1/collections/{name}", "deleteCollection", "Remove a collection",
        "collections",
        {200: Answer("It is gone.", {JSON: shapes.CollectionDeleted})},
        parameters=(_NAME,),
        errors=(*_SEARCHED, Forbidden, StorageFull),
    ),
    Operation(
        "post", "/v1/collections/{name}/passages", "addPassages", "Add passages", "collections",
        {200: Answer("They are in it.", {JSON: shapes.PassagesAdded})},
        "A passage whose id is there takes the place of the older one.",
        body={NDJSON: _PASSAGES},
        parameters=(_NAME,),
        errors=(*_SEARCHED, BodyTooLarge, RequestTimeout, Forbidden, StorageFull),
    ),
    Operation(
        "post", "/v1/collections/{name}/search", "searchCollection", "The nearest passages",
        "collections",
        {200: Answer("Best first.", {JSON: shapes.PassageList})},
        body={JSON: Search},
        parameters=(_NAME,),
        errors=(*_SEARCHED, BodyTooLarge, RequestTimeout),
    ),
)  # fmt: skip


def public(*, collections: bool) -> bytes:
    """The description of a gateway's public routes.

    Args:
        collections: it has those of collections.
    """
    operations = [*STREAMS, *OPENAI, *WATCHING, *(COLLECTIONS if collections else ())]
    return described(TITLE, ABOUT, operations, key=KEY, also=[shapes.ChatCompletionChunk])
