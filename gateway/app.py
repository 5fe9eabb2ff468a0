"""The application: builds everything, owns everything that runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from cache_index.opening import open_index
from gateway import limits, routes_collections, routes_openai, routes_streams
from gateway.accounts import Accounts
from gateway.errors import BadRequest, BodyTooLarge, GatewayError
from gateway.guard import Guard
from gateway.identity import identified
from gateway.keeper import Keeper
from gateway.keys import (
    ACCOUNTS,
    BUILDERS,
    COLLECTIONS,
    ENGINES,
    EXECUTOR,
    KEEPER,
    LOAD,
    MAKING,
    METRICS,
    RETRIEVALS,
    SESSION,
    SETTINGS,
    STREAMS,
    TAKING_OVER,
    TELLING,
    TENANTS,
)
from gateway.placement import Engines
from gateway.prefixes import Prefixes
from gateway.retrieving import Retrievals
from gateway.settings import Settings
from gateway.streams import Streams
from gateway.telemetry import Metrics
from gateway.tenants import Tenants
from retrieval.collections.store import Collections
from retrieval.embedding import Embedder, EmbedderMissing, MiniLm

logger = logging.getLogger(__name__)

TOKENIZER_THREADS = 2


def build(settings: Settings, embedder: Embedder | None = None) -> web.Application:
    """A gateway with these settings, not started yet.

    Args:
        embedder: of its collections; None for the small model that comes as a package.
    """
    app = web.Application(
        middlewares=[_errors, identified],
        client_max_size=settings.max_body_bytes + 1,
        logger=logger,
    )
    app[SETTINGS] = settings
    app[METRICS] = Metrics()
    app[TENANTS] = Tenants(Path(settings.tenants) if settings.tenants else None)
    app[ACCOUNTS] = Accounts()
    app[LOAD] = limits.Load(
        max_queued_tokens=settings.max_queued_tokens,
        max_tokenizing_bytes=settings.max_tokenizing_bytes,
    )
    app.on_response_prepare.append(limits.tell_limits)
    app[BUILDERS], app[TAKING_OVER], app[TELLING], app[MAKING] = {}, {}, set(), set()
    app.add_routes([*routes_streams.routes, *routes_openai.routes])
    app.add_routes(
        [web.get("/health", _health), web.get("/ready", _ready), web.get("/metrics", _metrics)]
    )
    if settings.collections is not None:
        app[COLLECTIONS] = Collections(Path(settings.collections), embedder or MiniLm())
        app[routes_collections.CHANGING] = asyncio.Lock()
        app.add_routes(routes_collections.routes)
    app.cleanup_ctx.append(_running)
    return app


async def _running(app: web.Application) -> AsyncIterator[None]:
    """Everything that lives as long as the gateway, begun and ended in order."""
    settings, metrics = app[SETTINGS], app[METRICS]
    index = open_index(settings.index, timeout_s=settings.index_timeout_s)
    guard = Guard(timeout_s=settings.index_timeout_s, metrics=metrics)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    async with (
        aiohttp.ClientSession(connector=connector, auto_decompress=False) as session,
        AsyncExitStack() as closing,
    ):
        closing.push_async_callback(index.close)
        keeper = Keeper(
            index,
            settings.replica,
            guard=guard,
            lease_s=max(settings.lease_s, settings.keep_finished_s),
            metrics=metrics,
        )
        streams = Streams(settings, keeper, metrics, app[ACCOUNTS])
        retrievals = Retrievals(settings, app.get(COLLECTIONS), metrics)
        prefixes = Prefixes(index, guard)
        engines = Engines(
            session,
            settings.engine,
            plain_urls=settings.plain_engine,
            poll_s=settings.poll_s,
            policy=settings.routing,
            prefixes=prefixes,
            metrics=metrics,
            lost=streams.engine_lost,
            seen=prefixes.follow,
        )
        with ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer") as executor:
            app[SESSION], app[STREAMS], app[ENGINES] = session, streams, engines
            app[EXECUTOR], app[KEEPER], app[RETRIEVALS] = executor, keeper, retrievals
            await engines.start()
            await keeper.start(streams.keep_again)
            await streams.start()
            loading = asyncio.create_task(_load_embedder(app.get(COLLECTIONS)))
            yield
            loading.cancel()
            await retrievals.stop()
            await streams.stop()
            await keeper.stop()
            await engines.stop()
            await prefixes.stop()


async def _load_embedder(collections: Collections | None) -> None:
    """Now rather than in the deadline of the first search."""
    if collections is not None:
        try:
            await asyncio.to_thread(collections.embedder.embed, ["loads the model"])
        except EmbedderMissing as e:
            logger.error("collections can't be searched: %s", e)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in the OpenAI shape, once."""
    try:
        return await handler(request)
    except GatewayError as e:
        return _render(request, e)
    except web.HTTPRequestEntityTooLarge as e:
        return _render(request, BodyTooLarge(e.text or "the body is too large"))
    except web.HTTPException as e:
        if e.status < 400:
            raise
        error = BadRequest(f"{request.method} {request.path}: {e.reason}")
        return _render(request, error, status=e.status, headers=dict(e.headers))
    except ConnectionError:
        raise  # the client is gone: nobody to tell
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return _render(request, GatewayError("the gateway failed"))


def _render(
    request: web.Request,
    error: GatewayError,
    *,
    status: int | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    request.app[METRICS].errors.labels(error.code or "").inc()
    kept = {k: v for k, v in (headers or {}).items() if k.lower() == "allow"}
    response = web.Response(
        body=orjson.dumps(error.to_json()),
        status=status or error.status,
        headers=error.headers | kept,
        content_type="application/json",
    )
    if isinstance(error, BodyTooLarge):
        response.force_close()  # the rest of the body is not read
    return response


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "alive"})


async def _ready(request: web.Request) -> web.Response:
    engines = request.app[ENGINES]
    reached = {engine.url: engine.info is not None for engine in engines.all}
    status = 200 if engines.ready else 503
    return web.json_response({"ready": bool(engines.ready), "engines": reached}, status=status)


async def _metrics(request: web.Request) -> web.Response:
    return web.Response(
        body=request.app[METRICS].render(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )
