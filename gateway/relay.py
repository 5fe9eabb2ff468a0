"""Passing on an answer that somebody else gives, as it comes."""

from __future__ import annotations

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.errors import EngineFailed

HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
        "trailers", "transfer-encoding", "upgrade", "host", "content-length",
    }
)  # fmt: skip


async def relay(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    """Send an answer on. One that breaks off does not look complete to the client."""
    response = web.StreamResponse(status=answer.status, headers=end_to_end(answer.headers))
    await response.prepare(request)
    try:
        async for part in answer.content.iter_any():
            await response.write(part)
        await response.write_eof()
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError):
        if "text/event-stream" in answer.headers.get("Content-Type", ""):
            broken = EngineFailed("the answer broke off").to_json()
            await response.write(b"data: " + web.json_response(broken).body + b"\n\n")  # type: ignore[operator]
            await response.write_eof()
        elif request.transport is not None:
            request.transport.close()
    return response


def end_to_end(headers: CIMultiDict[str] | CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The headers that are meant for the other end, not for one connection."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP and name.lower() not in named
    )
