"""The engine operations as routes of an aiohttp server; see `messages.py` for the list."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from engine_adapter.errors import EngineError
from engine_adapter.messages import (
    PREFIX,
    Batch,
    Extend,
    Finish,
    Invalidate,
    Message,
    Open,
    SetPolicy,
    decode,
    encode,
)
from engine_adapter.prompts import StreamingPrompts

PROMPTS: web.AppKey[StreamingPrompts[Any]] = web.AppKey("prompts", StreamingPrompts)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """An EngineError is answered with its status and its body."""
    try:
        return await handler(request)
    except EngineError as e:
        return json_response({"error": e.to_json()}, e.status)


def json_response(body: dict[str, Any], status: int = 200) -> web.Response:
    """A response of plain values."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


async def streamed(
    request: web.Request, parts: AsyncGenerator[bytes, None], content_type: str
) -> web.StreamResponse:
    """A response that is sent as it comes; the iterator is closed also if the client leaves."""
    response = web.StreamResponse(headers={"Content-Type": content_type})
    with suppress(ConnectionError):
        async with aclosing(parts):
            await response.prepare(request)
            async for part in parts:
                await response.write(part)
        await response.write_eof()
    return response


def _message(message: Message) -> web.Response:
    return web.Response(body=encode(message), content_type="application/json")


async def _info(request: web.Request) -> web.Response:
    return _message(await request.app[PROMPTS].info())


async def _blocks(request: web.Request) -> web.Response:
    return _message(await request.app[PROMPTS].blocks())


async def _policy(request: web.Request) -> web.Response:
    op = decode(SetPolicy, await request.read())
    return _message(await request.app[PROMPTS].set_policy(op))


async def _batch(request: web.Request) -> web.Response:
    return _message(await request.app[PROMPTS].batch(decode(Batch, await request.read())))


async def _open(request: web.Request) -> web.Response:
    op = decode(Open, await request.read())
    return _message(await request.app[PROMPTS].sessions.open(request.match_info["id"], op))


async def _extend(request: web.Request) -> web.Response:
    op = decode(Extend, await request.read())
    return _message(await request.app[PROMPTS].sessions.extend(request.match_info["id"], op))


async def _invalidate(request: web.Request) -> web.Response:
    op = decode(Invalidate, await request.read())
    return _message(await request.app[PROMPTS].sessions.invalidate(request.match_info["id"], op))


async def _finish(request: web.Request) -> web.StreamResponse:
    op = decode(Finish, await request.read())
    lines = request.app[PROMPTS].finish(request.match_info["id"], op)
    return await streamed(request, lines, "application/x-ndjson")


async def _status(request: web.Request) -> web.Response:
    return _message(await request.app[PROMPTS].sessions.status(request.match_info["id"]))


async def _tokens(request: web.Request) -> web.Response:
    return _message(await request.app[PROMPTS].sessions.tokens(request.match_info["id"]))


async def _abort(request: web.Request) -> web.Response:
    return _message(await request.app[PROMPTS].abort(request.match_info["id"]))


PROMPT = PREFIX + "/prompts/{id}"

routes = [
    web.get(PREFIX + "/info", _info),
    web.get(PREFIX + "/blocks", _blocks),
    web.put(PREFIX + "/policy", _policy),
    web.post(PREFIX + "/operations", _batch),
    web.post(PROMPT, _open),
    web.post(PROMPT + "/extend", _extend),
    web.post(PROMPT + "/invalidate", _invalidate),
    web.post(PROMPT + "/finish", _finish),
    web.get(PROMPT, _status),
    web.get(PROMPT + "/tokens", _tokens),
    web.delete(PROMPT, _abort),
]
