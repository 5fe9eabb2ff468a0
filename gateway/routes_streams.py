"""The streaming API: `/v1/streams`."""

from __future__ import annotations

import time
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import Any

import msgspec
import orjson
from aiohttp import web

from cache_index.index import StreamRecord
from gateway import idempotency
from gateway import record as records
from gateway.answers import HEARTBEAT, retrieval, sse
from gateway.bodies import must_have, read_body, read_lines
from gateway.completing import complete, json_response, sse_response
from gateway.errors import (
    AnswerGone,
    BadRequest,
    Conflict,
    GatewayError,
    InputClosed,
    KeyInUse,
    RetrievalUnderWay,
)
from gateway.holding import on_stream
from gateway.identity import tenant_of
from gateway.keeper import Moved
from gateway.keys import METRICS, SETTINGS, STREAMS
from gateway.limits import account_of, admit, body_limit, check_room, chunk_limit
from gateway.opening import known_or_tokenized, open_stream, tokenized
from gateway.record import Taken
from gateway.requests import (
    Chunk,
    ChunkPost,
    Create,
    FinishLine,
    FinishPost,
    Options,
    RankedList,
    merged,
    read,
)
from gateway.resuming import KeptAnswer
from gateway.stream import Stream

NDJSON = "application/x-ndjson"
MAX_DIGITS = 18
"""Of the number of an event."""


async def create(request: web.Request) -> web.StreamResponse:
    """Open a stream; with a body of NDJSON, open, feed and finish it in one request."""
    if request.content_type == NDJSON:
        return await _one_request(request)
    if (key := idempotency.key_of(request)) is not None:
        return await _create_once(request, key)
    admit(request, stream=True)
    body = await read_body(request, body_limit(request))
    return json_response(
        await _describe(await open_stream(request, read(Create, body), kept=True)), 201
    )


async def _create_once(request: web.Request, key: str) -> web.Response:
    """The stream of an idempotency key, made by the first request with it. For the others it needs
    no room."""
    account_of(request).ask()
    body = await read_body(request, body_limit(request))
    stream_id, asked = idempotency.stream_id(request, key), idempotency.digest(body)
    with idempotency.making(request.app, stream_id):
        found = await idempotency.made_before(request, stream_id, asked)
        if found is None:
            check_room(request, stream=True)
            create = read(Create, body)
            try:
                stream = await open_stream(
                    request, create, kept=True, stream_id=stream_id, asked=asked
                )
            except Moved as e:
                raise KeyInUse("another replica makes the stream of this key") from e
    if found is None:
        return json_response(await _describe(stream), 201)
    told = await _describe(found) if isinstance(found, Stream) else _recorded(stream_id, found)
    response = json_response(told, 201)
    response.headers[idempotency.REPLAYED] = "true"
    return response


@on_stream(chunk_limit, repeatable=lambda body: read(ChunkPost, body).seq is not None)
async def chunks(request: web.Request, stream: Stream, body: bytes) -> web.Response:
    """Take in chunks of context."""
    started_s = time.monotonic()
    account_of(request).check_tokens()
    post = read(ChunkPost, body)
    seq, taken = await stream.add(tokenized(request.app, stream, post.all()), post.seq)
    response = json_response(_acknowledged(stream, seq, taken), 202)
    took_s = time.monotonic() - started_s
    request.app[METRICS].chunk_seconds.observe(took_s)
    response.headers["Server-Timing"] = f"chunk;dur={1000 * took_s:.3f}"
    return response


@on_stream(body_limit)
async def documents(request: web.Request, stream: Stream, body: bytes) -> web.Response:
    """Put a ranked list in place of the stream's documents."""
    if stream.retrieval is not None and stream.retrieval.state == "running":
        raise RetrievalUnderWay("the gateway ranks this stream's documents: post chunks")
    account_of(request).check_tokens()
    ranked = read(RankedList, body)
    new = known_or_tokenized(request.app, stream, ranked.documents)
    seq, taken = await stream.replace(new, ranked.seq)
    return json_response(_acknowledged(stream, seq, taken))


@on_stream(body_limit)
async def finish(request: web.Request, stream: Stream, body: bytes) -> web.StreamResponse:
    """Close the input and answer."""
    post = read(FinishPost, body)
    options = merged(stream.options, post)
    if (key := idempotency.key_of(request)) is not None:
        asked = idempotency.digest(body)
        return await _finish_once(request, stream, options, post.seq, key, asked)
    return await complete(request, stream, options, post.seq)


async def _finish_once(
    request: web.Request, stream: Stream, options: Options, seq: int | None, key: str, asked: bytes
) -> web.StreamResponse:
    """The answer of an idempotency key: begun by the first request with it, and read by all."""
    answers, last = request.app[STREAMS].answers, _last_event(request)
    answer = answers.get(stream.id)
    if answer is not None and answer.key == key:
        idempotency.must_be_same(answer.digest, asked)
    elif answer is not None:
        raise InputClosed("the stream was finished with another Idempotency-Key")
    elif last is not None:  # of an answer that was given elsewhere: the rest of it is not here
        raise AnswerGone("the answer is not kept here: ask for it without Last-Event-ID")
    else:
        resume_s = request.app[SETTINGS].now.resume_s
        answer = KeptAnswer(
            stream, options, seq, key=key, digest=asked, resume_s=resume_s,
            refused=lambda answer: _refused(request.app, stream, answer),
        )  # fmt: skip
        answers[stream.id] = answer
        answer.begin()
    return await _read_kept(request, answer, last)


def _refused(app: web.Application, stream: Stream, answer: KeptAnswer) -> None:
    """The key of a `finish` that failed is free again."""
    if app[STREAMS].answers.get(stream.id) is answer:
        del app[STREAMS].answers[stream.id]


@on_stream(body_limit)
async def answer(request: web.Request, stream: Stream, body: bytes) -> web.StreamResponse:
    """The answer of a stream that was finished with an Idempotency-Key, or the rest of it."""
    last, kept = _last_event(request), request.app[STREAMS].answers.get(stream.id)
    if kept is None:
        raise Conflict("there is no answer: finish the stream, with an Idempotency-Key")
    return await _read_kept(request, kept, last)


def _last_event(request: web.Request) -> int | None:
    """The number of the last event that the client has, if it has any.

    Raises:
        BadRequest
    """
    last = request.headers.get("Last-Event-ID", "")
    if last and not (last.isascii() and last.isdecimal() and len(last) < MAX_DIGITS):
        raise BadRequest("Last-Event-ID is none of an answer's", param="Last-Event-ID")
    return int(last) if last else None


async def _read_kept(
    request: web.Request, answer: KeptAnswer, last: int | None
) -> web.StreamResponse:
    """Behind the last event that the client has, if it has a part already."""
    with answer.reading():
        await answer.closed()
        if answer.whole:
            return json_response(await answer.body())
        return await _kept_events(request, answer, -1 if last is None else last)


async def _kept_events(request: web.Request, answer: KeptAnswer, after: int) -> web.StreamResponse:
    heartbeat_s, response = request.app[SETTINGS].now.heartbeat_s, sse_response()
    try:
        async with aclosing(answer.events(after, heartbeat_s)) as events:
            async for event in events:
                if not response.prepared:
                    await response.prepare(request)
                await response.write(HEARTBEAT if event is None else b"id: %d\n%b" % event)
    except GatewayError as e:  # it reads too slowly, asks for what is long past, or it broke off
        if not response.prepared:
            raise
        await response.write(sse(e.to_json()))
    if not response.prepared:
        await response.prepare(request)
    await response.write_eof()
    return response


@on_stream(body_limit)
async def status(request: web.Request, stream: Stream, body: bytes) -> web.Response:
    """Where a stream stands."""
    return json_response(await _describe(stream))


@on_stream(body_limit)
async def cancel(request: web.Request, stream: Stream, body: bytes) -> web.Response:
    """Stop a stream and free its memory."""
    await stream.cancel()
    return json_response(await _describe(stream))


routes = [
    web.post("/v1/streams", create),
    web.post("/v1/streams/{id}/chunks", chunks),
    web.put("/v1/streams/{id}/documents", documents),
    web.post("/v1/streams/{id}/finish", finish),
    web.get("/v1/streams/{id}/answer", answer),
    web.get("/v1/streams/{id}", status),
    web.delete("/v1/streams/{id}", cancel),
]


async def _one_request(request: web.Request) -> web.StreamResponse:
    """First line the request, then chunks, then `{"finish": true}`.

    Raises:
        BadRequest: also if it has an idempotency key: its body is taken in as it comes, so nobody
            could tell whether another is the same.
    """
    if idempotency.HEADER in request.headers:
        raise BadRequest("a body of NDJSON has no idempotency key", param=idempotency.HEADER)
    admit(request, stream=True)
    limit, account = chunk_limit(request), account_of(request)
    idle_s = tenant_of(request).idle_s or request.app[SETTINGS].now.idle_timeout_s
    stream: Stream | None = None
    try:
        async with aclosing(read_lines(request, limit, idle_s)) as lines:
            first = must_have(await anext(lines, None), "the body is empty")
            stream = await open_stream(request, read(Create, first), kept=False)
            async for line in lines:
                if b'"finish"' in line and (end := _finish_line(line)) is not None:
                    options = merged(stream.options, end)
                    return await complete(request, stream, options)
                account.check_tokens()
                await stream.add(tokenized(request.app, stream, [read(Chunk, line)]), None)
        raise BadRequest('the body ended without {"finish": true}')
    finally:
        if stream is not None:
            with suppress(Moved):
                await stream.cancel()


def _finish_line(line: bytes) -> FinishLine | None:
    """The finishing line, or None if the line is a chunk whose text has that word."""
    try:
        raw = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        raise BadRequest(f"a line is no valid JSON: {e}") from e
    if not (isinstance(raw, dict) and raw.get("finish") is True):
        return None
    return read(FinishLine, line)


async def completion(request: web.Request, body: Create) -> web.StreamResponse:
    """A chat completion whose context the gateway retrieves: open, retrieve, answer."""
    account_of(request).check_streams()
    stream = await open_stream(request, body, kept=False)
    options = merged(stream.options, Options(stream=bool(body.stream)))
    try:
        return await complete(request, stream, options)
    finally:
        await stream.cancel()


def _recorded(stream_id: str, record: StreamRecord) -> dict[str, Any]:
    """A stream that another replica holds, as far as its record tells."""
    about = records.read(record).about
    return {
        "id": stream_id,
        "object": "stream",
        "created": int(about.created_s),
        "model": about.model,
        "state": record.state,
        "engine": record.engine or None,
    }


async def _describe(stream: Stream) -> dict[str, Any]:
    progress = await stream.status()
    return {
        "id": stream.id,
        "object": "stream",
        "created": int(stream.created_s),
        "model": stream.model,
        "state": stream.state,
        "error": None if stream.error is None else stream.error.to_json()["error"],
        "engine": None if stream.engine is None else stream.engine.url,
        "routing": None if stream.line.decision is None else asdict(stream.line.decision),
        "handoff": _handoff(stream),
        "chunks": len(stream.prompt.documents),
        "tokens": {
            "prompt": stream.prompt.length,
            "received": stream.prompt.context_tokens,
            "waiting": stream.waiting_tokens,
            "prefilled": 0 if progress is None else progress.computed,
        },
    } | retrieval(stream)


def _handoff(stream: Stream) -> dict[str, Any] | None:
    """Where its answer is decoded; None while no engine was asked for it."""
    handoff = None if stream.course is None else stream.course.handoff
    return None if handoff is None else asdict(handoff)


def _acknowledged(stream: Stream, seq: int, taken: Taken) -> dict[str, Any]:
    return {"id": stream.id, "seq": seq, **msgspec.structs.asdict(taken)}
