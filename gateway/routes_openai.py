"""The plain OpenAI API, passed through to an engine, streaming included."""

from __future__ import annotations

import aiohttp
from aiohttp import web

from gateway.bodies import read_body
from gateway.errors import BadRequest, EngineFailed
from gateway.keys import ENGINES, SESSION, SETTINGS
from gateway.relay import end_to_end, relay


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
            headers=end_to_end(request.headers),
            timeout=timeout,
            allow_redirects=False,
        ) as answer:
            return await relay(request, answer)
    except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError) as e:
        raise EngineFailed(f"the engine can't be reached: {e}") from e


routes = [
    web.post("/v1/chat/completions", passed_through),
    web.post("/v1/completions", passed_through),
    web.get("/v1/models", passed_through),
]
