"""The plain OpenAI API, passed through to an engine, streaming included; chat completions with
`retrieval` are answered here."""

from __future__ import annotations

import aiohttp
import orjson
from aiohttp import web

from gateway.bodies import read_body
from gateway.errors import BadRequest, EngineFailed
from gateway.keys import ENGINES, SESSION, SETTINGS
from gateway.relay import end_to_end, relay
from gateway.requests import Create, read
from gateway.routes_streams import completion


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answered here if the gateway is to retrieve the context, else passed through."""
    body = await read_body(request, request.app[SETTINGS].now.max_body_bytes)
    if b'"retrieval"' in body and _has_retrieval(body):
        return await completion(request, read(Create, body))
    return await _pass(request, body)


def _has_retrieval(body: bytes) -> bool:
    try:
        return orjson.loads(body).get("retrieval") is not None
    except (orjson.JSONDecodeError, AttributeError):
        return False  # the engine says what is wrong with it


async def passed_through(request: web.Request) -> web.StreamResponse:
    """Send the request on as it is, and its answer back as it comes."""
    return await _pass(request, await read_body(request, request.app[SETTINGS].now.max_body_bytes))


async def _pass(request: web.Request, body: bytes) -> web.StreamResponse:
    if b'"kv_transfer_params"' in body:  # engines trust each other's, not a client's
        raise BadRequest("kv_transfer_params is not for clients", param="kv_transfer_params")
    engines = request.app[ENGINES]
    engine = engines.any()
    timeout = aiohttp.ClientTimeout(total=None, connect=5.0)
    try:
        with engines.pool.passing(engine):
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
    web.post("/v1/chat/completions", chat_completions),
    web.post("/v1/completions", passed_through),
    web.get("/v1/models", passed_through),
]
