"""The plain OpenAI API, passed through to an engine, streaming included."""

from __future__ import annotations

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from gateway.bodies import read_body
from gateway.errors import BadRequest, EngineFailed
from gateway.keys import ENGINES, SESSION, SETTINGS

HOP_BY_HOP = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
        "trailers", "transfer-encoding", "upgrade", "host", "content-length",
    }
)  # fmt: skip


async def passed_through(request: web.Request) -> web.StreamResponse:
    """Send the request on as it is, and its answer back as it comes."""
    body = await read_body(request, request.app[SETTINGS].max_body_bytes)
    if b'"kv_transfer_params"' in body:  # engines trust each other's, not a client's
        raise BadRequest("kv_transfer_params is not for clients", param="kv_transfer_params")
    engine = request.app[ENGINES].any()
    timeout = aiohttp.ClientTimeout(total=None, connect=5.0)
    try:
        async with request.app[SESSION].request(
            request.method,
            engine.url + request.path_qs,
            data=body or None,
            headers=_end_to_end(request.headers),
            timeout=timeout,
            allow_redirects=False,
        ) as answer:
            return await _copy(request, answer)
    except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError) as e:
        raise EngineFailed(f"the engine can't be reached: {e}") from e


async def _copy(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=_end_to_end(answer.headers))
    await response.prepare(request)
    try:
        async for part in answer.content.iter_any():
            await response.write(part)
        await response.write_eof()
    except aiohttp.ClientPayloadError:
        if "text/event-stream" in answer.headers.get("Content-Type", ""):
            broken = EngineFailed("the engine died while answering").to_json()
            await response.write(b"data: " + web.json_response(broken).body + b"\n\n")  # type: ignore[operator]
            await response.write_eof()
        elif request.transport is not None:
            request.transport.close()  # a short body must not look complete
    return response


def _end_to_end(headers: CIMultiDict[str] | CIMultiDictProxy[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP and name.lower() not in named
    )


routes = [
    web.post("/v1/chat/completions", passed_through),
    web.post("/v1/completions", passed_through),
    web.get("/v1/models", passed_through),
]
