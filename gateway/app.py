"""The application: builds everything, owns everything that runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import aiohttp
import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from cache_index.opening import open_index
from engine_adapter.decode_client import DecodeClient
from gateway import limits, routes_collections, routes_openai, routes_streams
from gateway.accounts import Accounts
from gateway.builders import builder_for
from gateway.engines import AnyEngine
from gateway.errors import BadRequest, BodyTooLarge, Draining, GatewayError, RequestTimeout
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
    LIFECYCLE,
    LOAD,
    MAKING,
    METRICS,
    RELOADER,
    RETRIEVALS,
    SESSION,
    SETTINGS,
    STREAMS,
    TAKING_OVER,
    TELLING,
    TENANTS,
    TOKENIZERS,
)
from gateway.lifecycle import ENDS, Lifecycle, counting
from gateway.openapi import route
from gateway.openapi_routes import public
from gateway.placement import Engines
from gateway.pool import Callbacks, Pool
from gateway.prefixes import Prefixes
from gateway.readiness import Tokenizers, readiness
from gateway.reloading import Reloader
from gateway.retrieving import Retrievals
from gateway.routes_admin import metrics_of
from gateway.settings import Current, Settings
from gateway.streams import Streams
from gateway.tasks import begin
from gateway.telemetry import Metrics
from gateway.tenants import Tenants
from gateway.tracing import passing_on, traced
from retrieval.collections.store import Collections
from retrieval.embedding import Embedder, EmbedderMissing, MiniLm

logger = logging.getLogger(__name__)

TOKENIZER_THREADS = 2
IDLE_S = 4.0
"""Connections that were idle for longer are not used again: engines close them (vLLM after 5 s),
and one that is used in that moment takes the request with it."""


def build(
    settings: Settings,
    embedder: Embedder | None = None,
    read_again: Callable[[], Settings] | None = None,
) -> web.Application:
    """A gateway with these settings, not started yet.

    Args:
        embedder: of its collections; None for the small model that comes as a package.
        read_again: reads the settings when they may have changed; None: they never do.
    """
    lifecycle = Lifecycle()
    app = web.Application(
        middlewares=[traced, _errors, identified, counting(lifecycle)],
        client_max_size=settings.max_body_bytes + 1,
        logger=logger,
    )
    app[SETTINGS] = Current(settings)
    app[METRICS], app[LIFECYCLE] = Metrics(), lifecycle
    app[TENANTS] = Tenants(Path(settings.tenants) if settings.tenants else None)
    app[ACCOUNTS], app[LOAD] = Accounts(), limits.Load(settings)
    app[BUILDERS], app[TAKING_OVER], app[TELLING], app[MAKING] = {}, {}, set(), set()
    app.add_routes([*routes_streams.routes, *routes_openai.routes])
    app.add_routes(
        [web.get("/health", _health), web.get("/ready", _ready), web.get("/metrics", _metrics)]
    )
    if settings.collections is not None:
        app[COLLECTIONS] = Collections(Path(settings.collections), embedder or MiniLm())
        app[routes_collections.CHANGING] = asyncio.Lock()
        app.add_routes(routes_collections.routes)
    app.add_routes([route(public(collections=settings.collections is not None))])
    app.on_response_prepare.extend((limits.tell_limits, _last_on_its_connection))
    app.on_shutdown.append(_cut_off)
    app.cleanup_ctx.append(partial(_running, read_again=read_again or (lambda: settings)))
    return app


async def _running(app: web.Application, read_again: Callable[[], Settings]) -> AsyncIterator[None]:
    """Everything that lives as long as the gateway, begun in order, and ended in the opposite one:
    each, also where another fails."""
    settings, metrics = app[SETTINGS].now, app[METRICS]
    index = open_index(settings.index, timeout_s=settings.index_timeout_s)
    guard = Guard(timeout_s=settings.index_timeout_s, metrics=metrics)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S)
    async with AsyncExitStack() as closing:
        session = await closing.enter_async_context(
            aiohttp.ClientSession(
                connector=connector, auto_decompress=False, trace_configs=[passing_on()]
            )
        )
        closing.push_async_callback(index.close)
        keeper = Keeper(
            index,
            settings.replica,
            guard=guard,
            lease_s=max(settings.lease_s, settings.keep_finished_s),
            shared=settings.index is not None,
            metrics=metrics,
        )
        prefixes = Prefixes(index, guard)
        pool = Pool(session, settings, metrics, decoding=DecodeClient)
        engines = Engines(pool, prefixes, settings.routing)
        streams = Streams(settings, keeper, metrics, app[ACCOUNTS])
        retrievals = Retrievals(settings, app.get(COLLECTIONS), metrics)
        tokenizers = Tokenizers(partial(builder_for, app))

        def seen(engine: AnyEngine) -> None:
            prefixes.follow(engine)
            tokenizers.seen(engine)

        def use(settings: Settings) -> None:
            for user in (pool, streams, engines, app[LOAD]):
                user.use(settings)
            app[ACCOUNTS].use(app[TENANTS])
            logging.getLogger().setLevel(settings.log_level.upper())

        executor = closing.enter_context(ThreadPoolExecutor(TOKENIZER_THREADS, "tokenizer"))
        app[SESSION], app[STREAMS], app[ENGINES] = session, streams, engines
        app[EXECUTOR], app[KEEPER], app[RETRIEVALS] = executor, keeper, retrievals
        app[TOKENIZERS] = tokenizers
        app[RELOADER] = Reloader(app[SETTINGS], pool, app[TENANTS], read_again, use)
        callbacks = Callbacks(
            lost=streams.engine_lost, left=streams.leave, seen=seen, removed=prefixes.unfollow
        )
        for stop in (prefixes.stop, tokenizers.stop, pool.stop, keeper.stop, streams.stop):
            closing.push_async_callback(stop)
        closing.push_async_callback(app[LOAD].tokenizing.stop)
        closing.push_async_callback(retrievals.stop)
        closing.push_async_callback(app[LIFECYCLE].stop)
        await pool.start(callbacks)
        await keeper.start(streams.keep_again)
        await streams.start()
        loading = begin(_load_embedder(app.get(COLLECTIONS)), "loading the embedder")
        closing.callback(loading.cancel)
        yield


async def _cut_off(app: web.Application) -> None:
    """Before the connections of requests that are still under way break."""
    app[LIFECYCLE].end()
    await app[STREAMS].cut_off(Draining(ENDS))


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
    broken = request.content.exception() is not None
    if broken or isinstance(error, BodyTooLarge | RequestTimeout):
        response.force_close()  # the rest of the body is not read
    return response


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "alive"})


async def _ready(request: web.Request) -> web.Response:
    app = request.app
    index = "own"
    if app[SETTINGS].now.index is not None:
        index = "up" if app[KEEPER].reaches_index else "away"
    draining = app[LIFECYCLE].draining
    found = readiness(app[ENGINES].pool, app[TOKENIZERS], draining=draining, index=index)
    return web.json_response(found.to_json(), status=200 if found.ready else 503)


async def _metrics(request: web.Request) -> web.Response:
    return metrics_of(request.app)


async def _last_on_its_connection(request: web.Request, response: web.StreamResponse) -> None:
    """While the gateway is drained clients should not come back on the connections they have."""
    if request.app[LIFECYCLE].draining:
        response.force_close()
        response.headers["Connection"] = "close"
