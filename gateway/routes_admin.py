"""Routes for operators, on a port of their own: engines, drains, settings. No prompt text.

    GET     /admin/engines              what each engine is, has and lacks
    POST    /admin/engines              {"url", "role"}: it joins
    DELETE  /admin/engines/{id}         drained, then removed
    POST    /admin/engines/{id}/drain   no new streams there
    DELETE  /admin/engines/{id}/drain   streams there again
    GET     /admin/streams              counts
    POST    /admin/drain                no new streams at this gateway; it ends when it is told to
    POST    /admin/reload               read the settings again
    GET     /admin/config               the settings in force, without secrets
    GET     /metrics
    GET     /openapi.json               these routes, described

An engine's id is its URL without the scheme.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.bodies import read_body
from gateway.engines import AnyEngine, Engine
from gateway.errors import BadRequest, GatewayError, NotAdmin
from gateway.keys import ENGINES, KEEPER, LIFECYCLE, METRICS, RELOADER, SETTINGS, STREAMS
from gateway.openapi import route
from gateway.openapi_admin import administration
from gateway.pool import Pool
from gateway.reloading import shown
from gateway.requests import NewEngine, read
from gateway.settings import SettingsError

GATEWAY = web.AppKey("gateway", web.Application)
MAX_BODY_BYTES = 1 << 16
HASHED = "sha256:"


def admin(gateway: web.Application, key_file: str | None) -> web.Application:
    """The application of these routes, for a gateway.

    Args:
        key_file: has the key that is asked for; None: there is none, and only this machine may be
            let in.

    Raises:
        SettingsError: the file can't be used.
    """
    middleware = _guarded(None if key_file is None else _read_key(Path(key_file)))
    app = web.Application(middlewares=[middleware], client_max_size=MAX_BODY_BYTES)
    app[GATEWAY], app[SETTINGS] = gateway, gateway[SETTINGS]
    app.add_routes([*_ROUTES, route(administration())])
    return app


def _read_key(path: Path) -> bytes:
    """The hash of the key that a file has, or has the hash of."""
    try:
        said = path.read_text().strip()
        if not said.startswith(HASHED):
            return hashlib.sha256(said.encode()).digest() if said else _no_key(path, "is empty")
        return bytes.fromhex(said.removeprefix(HASHED))
    except (OSError, ValueError) as e:
        return _no_key(path, str(e))


def _no_key(path: Path, reason: str) -> bytes:
    raise SettingsError("admin_key_file", f"{path}: {reason}")


def _guarded(wanted: bytes | None) -> Middleware:
    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors in the usual shape; nothing without the key."""
        try:
            _let_in(request, wanted)
            return await handler(request)
        except GatewayError as e:
            return _json(e.to_json(), e.status, e.headers)
        except web.HTTPException as e:
            error = BadRequest(f"{request.method} {request.path}: {e.reason}")
            return _json(error.to_json(), e.status)

    return guarded


def _let_in(request: web.Request, wanted: bytes | None) -> None:
    """
    Raises:
        NotAdmin
    """
    if "Origin" in request.headers:  # a browser of this machine, on behalf of some web page
        raise NotAdmin("admin routes are not for browsers")
    if wanted is None:
        return
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    if scheme.lower() != "bearer" or not hmac.compare_digest(given, wanted):
        raise NotAdmin("send the admin key as `Authorization: Bearer KEY`")


async def _engines(request: web.Request) -> web.Response:
    pool = _pool(request)
    return _json({"engines": [_described(engine, pool) for engine in pool.members]})


async def _add(request: web.Request) -> web.Response:
    body = read(NewEngine, await read_body(request, MAX_BODY_BYTES))
    pool = _pool(request)
    return _json(_described(pool.add(body.url, body.role), pool), 201)


async def _remove(request: web.Request) -> web.Response:
    pool, engine = _pool(request), _engine(request)
    pool.drain(engine, remove=True)
    return _json(_described(engine, pool), 202)


async def _drain(request: web.Request) -> web.Response:
    pool, engine = _pool(request), _engine(request)
    pool.drain(engine)
    return _json(_described(engine, pool), 202)


async def _undrain(request: web.Request) -> web.Response:
    pool, engine = _pool(request), _engine(request)
    pool.undrain(engine)
    return _json(_described(engine, pool))


async def _streams(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    requests = gateway[LIFECYCLE].requests
    return _json(gateway[STREAMS].counts() | {"requests": requests})


async def _drain_gateway(request: web.Request) -> web.Response:
    gateway = request.app[GATEWAY]
    gateway[LIFECYCLE].begin_drain(gateway[SETTINGS], gateway[STREAMS], gateway[KEEPER])
    return _json({"draining": True} | gateway[STREAMS].counts(), 202)


async def _reload(request: web.Request) -> web.Response:
    try:
        return _json(request.app[GATEWAY][RELOADER].reload().to_json())
    except SettingsError as e:
        raise BadRequest(f"nothing was changed: {e}") from e


async def _config(request: web.Request) -> web.Response:
    return _json(shown(request.app[GATEWAY][SETTINGS].now))


async def _metrics(request: web.Request) -> web.Response:
    return metrics_of(request.app[GATEWAY])


def metrics_of(gateway: web.Application) -> web.Response:
    """A gateway's metrics, for Prometheus."""
    return web.Response(
        body=gateway[METRICS].render(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


_ROUTES = [
    web.get("/admin/engines", _engines),
    web.post("/admin/engines", _add),
    web.delete("/admin/engines/{id}", _remove),
    web.post("/admin/engines/{id}/drain", _drain),
    web.delete("/admin/engines/{id}/drain", _undrain),
    web.get("/admin/streams", _streams),
    web.post("/admin/drain", _drain_gateway),
    web.post("/admin/reload", _reload),
    web.get("/admin/config", _config),
    web.get("/metrics", _metrics),
]


def _pool(request: web.Request) -> Pool:
    return request.app[GATEWAY][ENGINES].pool


def _engine(request: web.Request) -> AnyEngine:
    return _pool(request).by_id(request.match_info["id"])


def _described(engine: AnyEngine, pool: Pool) -> dict[str, Any]:
    info = engine.info
    return {
        "id": engine.id,
        "url": engine.url,
        "role": engine.role,
        "standing": engine.standing,
        "streams": engine.streams,
        "passing": engine.passing,
        "max_streams": pool.most_streams,
        "failures": engine.health.failures,
        "ejections": engine.health.ejections,
        "trouble": engine.trouble or None,
    } | ({} if info is None else _told(engine))


def _told(engine: AnyEngine) -> dict[str, Any]:
    """What an engine says of itself."""
    info = engine.info
    assert info is not None
    return {
        "model": info.model,
        "engine": info.engine,
        "running": info.running,
        "waiting": info.waiting,
        "open_prompts": info.open_prompts if isinstance(engine, Engine) else 0,
        "kv_blocks_total": info.kv_blocks_total,
        "kv_blocks_free": info.kv_blocks_free,
        "lacks": info.lacks,
    }


def _json(
    body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )
