"""The input of a stream is closed, and its answer sent over HTTP."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import orjson
from aiohttp import web

from engine_adapter.messages import DoneEvent, ErrorEvent, TokenEvent
from gateway.answers import HEARTBEAT, Chunks, Whole, next_event, why_broken
from gateway.identity import is_forwarded
from gateway.keeper import Moved
from gateway.keys import LIFECYCLE, SETTINGS
from gateway.requests import Options
from gateway.stream import Stream


async def complete(
    request: web.Request, stream: Stream, options: Options, seq: int | None = None
) -> web.StreamResponse:
    """Close the input, once what the gateway retrieves itself is in it, and answer.

    Args:
        seq: number of the last post that is to be in it, if the client says.
    """
    lifecycle = request.app[LIFECYCLE]
    try:
        if stream.retrieval is not None:
            async with lifecycle.until_the_end():
                await stream.retrieval.ended()
        await stream.finish(options, seq)
    except asyncio.CancelledError:
        client_gone = not (lifecycle.ending or is_forwarded(request))
        if client_gone and stream.state == "open":
            with suppress(Moved):
                await stream.cancel()
        raise
    return await _answer(request, stream, options)


async def _answer(request: web.Request, stream: Stream, options: Options) -> web.StreamResponse:
    """Send the answer. A client that goes away cancels the stream; a replica that passes the answer
    on and goes away gives the client the chance to ask another."""
    try:
        await stream.keep()
        if options.stream is False:
            return await _whole(request, stream)
        return await _sse(request, stream, options)
    except (asyncio.CancelledError, ConnectionError):
        if is_forwarded(request):
            await stream.take_back_finish()
        raise
    finally:
        if stream.state != "open":
            with suppress(Moved):
                await stream.cancel()


async def _whole(request: web.Request, stream: Stream) -> web.Response:
    whole = Whole(stream)
    while True:
        match await next_event(stream, request.app[SETTINGS].now.heartbeat_s):
            case TokenEvent() as event:
                whole.add(event)
            case DoneEvent() as done:
                return json_response(whole.body(done))
            case ErrorEvent():
                raise why_broken(stream)


async def _sse(request: web.Request, stream: Stream, options: Options) -> web.StreamResponse:
    usage = options.stream_options is not None and options.stream_options.include_usage
    chunks = Chunks(stream, usage)
    response = sse_response()
    await response.prepare(request)
    await response.write(chunks.first())
    while True:
        event = await next_event(stream, request.app[SETTINGS].now.heartbeat_s)
        if event is None:
            await response.write(HEARTBEAT)
            continue
        for line in chunks.of(event):
            await response.write(line)
        if isinstance(event, DoneEvent | ErrorEvent):
            await response.write_eof()
            return response


def sse_response() -> web.StreamResponse:
    """A response that events are written to."""
    return web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
    )


def json_response(body: dict[str, Any], status: int = 200) -> web.Response:
    """A response that is one JSON object."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
