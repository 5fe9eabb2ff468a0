"""Passing on an answer that somebody else gives, as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.answers import sse
from gateway.errors import Draining, EngineFailed, EngineTimeout, GatewayError
from gateway.keys import LIFECYCLE

HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
        "trailers", "transfer-encoding", "upgrade", "host", "content-length",
    }
)  # fmt: skip


async def relay(
    request: web.Request,
    answer: aiohttp.ClientResponse,
    silence_s: float | None = None,
    seen: Callable[[bytes], None] | None = None,
) -> web.StreamResponse:
    """Send an answer on. One that breaks off does not look complete to the client.

    Args:
        silence_s: an answer that is silent so long has broken off; None: never.
        seen: called with each part.
    """
    response = web.StreamResponse(status=answer.status, headers=end_to_end(answer.headers))
    await response.prepare(request)
    try:
        async with request.app[LIFECYCLE].until_the_end():
            while part := await _next(answer, silence_s):
                if seen is not None:
                    seen(part)
                await response.write(part)
        await response.write_eof()
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, TimeoutError, Draining) as e:
        if answer.content_type == "text/event-stream":
            broken = sse(_why(e).to_json())
            await response.write(b"\n\n" + broken)  # it may have broken in the middle of an event
            await response.write_eof()
        elif request.transport is not None:
            request.transport.close()
    return response


def _why(error: Exception) -> GatewayError:
    """What a client is told of an answer that broke off."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, aiohttp.SocketTimeoutError):
        return EngineTimeout("the engine was silent too long")
    return EngineFailed("the answer broke off")


async def _next(answer: aiohttp.ClientResponse, silence_s: float | None) -> bytes:
    async with asyncio.timeout(silence_s):
        return await answer.content.readany()


def end_to_end(headers: CIMultiDict[str] | CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The headers that are meant for the other end, not for one connection."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP and name.lower() not in named
    )
