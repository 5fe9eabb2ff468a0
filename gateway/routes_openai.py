"""The plain OpenAI API, passed through to an engine, streaming included; chat completions with
`retrieval` are answered here."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from multidict import CIMultiDict

from engine_adapter.errors import EngineUnavailable
from gateway.bodies import read_body
from gateway.errors import BadRequest, EngineFailed, EngineTimeout
from gateway.identity import tenant_of
from gateway.keys import ENGINES, LIFECYCLE, SESSION, SETTINGS, STREAMS, TENANTS
from gateway.limits import account_of, admit, body_limit
from gateway.metering import PassedTokens
from gateway.models import Cards, engines_of, listed
from gateway.relay import relay
from gateway.requests import Create, read
from gateway.routes_streams import completion
from gateway.tenants import Tenant

BETWEEN_ENGINES = ("cache_salt", "kv_transfer_params", "ec_transfer_params")
"""Fields that engines believe: a client that could set them would reach what others have cached."""
HEADERS = (
    "Accept", "Accept-Encoding", "Content-Type", "User-Agent", "X-Request-Id", "traceparent",
    "tracestate",
)  # fmt: skip
"""What an engine hears of a request; others would let a client choose its rank or its worker."""


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answered here if the gateway is to retrieve the context, else passed through."""
    admit(request, stream=False)
    body = await read_body(request, body_limit(request))
    if b'"retrieval"' in body and _has_retrieval(body):
        return await completion(request, read(Create, body))
    return await _pass(request, *_for_engines(body, tenant_of(request)))


def _has_retrieval(body: bytes) -> bool:
    try:
        return orjson.loads(body).get("retrieval") is not None
    except (orjson.JSONDecodeError, AttributeError):
        return False  # the engine says what is wrong with it


async def completions(request: web.Request) -> web.StreamResponse:
    """Passed through."""
    admit(request, stream=False)
    body = await read_body(request, body_limit(request))
    return await _pass(request, *_for_engines(body, tenant_of(request)))


async def models(request: web.Request) -> web.StreamResponse:
    """All models of all engines, once each."""
    lists = await listed(request.app, _headers(request))
    if not lists:
        raise EngineFailed("no engine can be reached")
    cards: Cards = {}
    for more in lists.values():
        cards = more | cards
    return web.json_response({"object": "list", "data": list(cards.values())})


def _for_engines(body: bytes, tenant: Tenant) -> tuple[bytes, object]:
    """A body as engines get it, with the tenant's salt if it has one, and the model that it names.

    Raises:
        BadRequest: it is no JSON object, or has what is not for clients.
    """
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        raise BadRequest("the body is no valid JSON") from e
    if not isinstance(raw, dict):
        raise BadRequest("the body must be a JSON object")
    for name in (*BETWEEN_ENGINES, *(["priority"] if tenant.cache_salt else [])):
        if raw.get(name) is not None:
            raise BadRequest(f"{name} is not for clients", param=name)
    _check_extensions(raw.get("vllm_xargs"))
    model = raw.get("model")
    if tenant.cache_salt is None:
        return body, model
    try:
        return orjson.dumps(raw | {"cache_salt": tenant.cache_salt}), model
    except orjson.JSONEncodeError as e:  # it writes fewer levels than it reads
        raise BadRequest(f"the body can't be passed on: {e}") from e


def _check_extensions(extensions: Any) -> None:
    """vLLM puts these beside what the plug-in and its connectors say of a request."""
    for name in extensions if isinstance(extensions, dict) else ():
        if name.startswith("stream2llm") or name.endswith("_transfer_params"):
            raise BadRequest(f"{name} is not for clients", param="vllm_xargs")


async def _pass(request: web.Request, body: bytes, model: object) -> web.StreamResponse:
    app, engines = request.app, request.app[ENGINES]
    engine = engines.any(await engines_of(app, model, _headers(request)), app[STREAMS].alive)
    silence_s, tokens = app[SETTINGS].now.engine_timeout_s, PassedTokens(body)
    try:
        with engines.pool.passing(engine):
            try:
                async with app[LIFECYCLE].until_the_end():
                    answer = await app[SESSION].request(
                        request.method,
                        engine.url + request.path_qs,
                        data=body or None,
                        headers=_headers(request),
                        timeout=aiohttp.ClientTimeout(total=None, connect=5.0, sock_read=silence_s),
                        allow_redirects=False,
                    )
            except aiohttp.SocketTimeoutError as e:
                # Says nothing of the engine: what takes long is for clients to choose.
                raise EngineTimeout(f"the engine was silent for {silence_s:g} s") from e
            except (aiohttp.ClientError, TimeoutError) as e:
                engines.pool.told(engine, EngineUnavailable(str(e)))
                raise EngineFailed(f"the engine can't be reached: {e}") from e
            engines.pool.told(engine, None)
            async with answer:
                return await relay(request, answer, seen=tokens.see if answer.ok else None)
    except asyncio.CancelledError:
        tokens.hung_up(0 if engine.info is None else engine.info.max_model_len)
        raise
    finally:
        account_of(request).spend(tokens.total)


def _headers(request: web.Request) -> CIMultiDict[str]:
    """Where the gateway asks for keys of its own, they are none of the engine's."""
    names = (*HEADERS, "Authorization") if request.app[TENANTS].open else HEADERS
    return CIMultiDict((name, request.headers[name]) for name in names if name in request.headers)


routes = [
    web.post("/v1/chat/completions", chat_completions),
    web.post("/v1/completions", completions),
    web.get("/v1/models", models),
]
