"""Collections for streams to search: `/v1/collections`, only where a folder for them is set.

    POST    /v1/collections                  {"name"}; an empty one
    GET     /v1/collections                  all of them
    DELETE  /v1/collections/NAME
    POST    /v1/collections/NAME/passages    NDJSON, lines of {"id", "text", "title"?}
    POST    /v1/collections/NAME/search      {"query", "k"?}

With tenants, all of them may search all collections, and those whose part of the file has
`collections_write` may change them.

What blocks runs in threads; of changes one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, ParamSpec, TypeVar

import msgspec
import orjson
from aiohttp import web

from gateway.bodies import read_body, read_lines
from gateway.errors import (
    BadRequest,
    BodyTooLarge,
    CollectionNotFound,
    CollectionThere,
    Forbidden,
    GatewayError,
    StorageFull,
)
from gateway.identity import tenant_of
from gateway.keys import COLLECTIONS, SETTINGS, TENANTS
from gateway.requests import read
from retrieval.collections.store import (
    BadName,
    CollectionError,
    CollectionExists,
    CollectionMissing,
    CollectionUnwritable,
)
from retrieval.embedding import EmbedderMissing
from retrieval.refine import DOUBLING
from retrieval.source import Passage

CHANGING = web.AppKey("changing_collections", asyncio.Lock)
"""Each change rewrites a collection, and a waiting one would hold a thread."""

P = ParamSpec("P")
T = TypeVar("T")


class NewCollection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/collections`."""

    name: str


class NewPassage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of `POST /v1/collections/NAME/passages`."""

    id: Annotated[str, msgspec.Meta(min_length=1)]
    text: Annotated[str, msgspec.Meta(min_length=1)]
    title: str = ""


class Search(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/collections/NAME/search`."""

    query: Annotated[str, msgspec.Meta(min_length=1)]
    k: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10


async def create(request: web.Request) -> web.Response:
    """Make an empty collection."""
    _must_write(request)
    name = read(NewCollection, await _body(request)).name
    async with request.app[CHANGING]:
        await _in_thread(request.app[COLLECTIONS].create, name)
    return _json({"name": name, "object": "collection", "passages": 0}, 201)


async def show(request: web.Request) -> web.Response:
    """All collections."""
    found = await _in_thread(request.app[COLLECTIONS].list)
    data = [{"object": "collection", **asdict(info)} for info in found]
    return _json({"object": "list", "data": data})


async def delete(request: web.Request) -> web.Response:
    """Remove a collection."""
    _must_write(request)
    name = request.match_info["name"]
    async with request.app[CHANGING]:
        await _in_thread(request.app[COLLECTIONS].delete, name)
    return _json({"name": name, "object": "collection", "deleted": True})


async def add(request: web.Request) -> web.Response:
    """Add passages, all or none; one whose id is there replaces the older one."""
    _must_write(request)
    name = request.match_info["name"]
    passages = await _passages(request)
    async with request.app[CHANGING]:
        count = await _in_thread(request.app[COLLECTIONS].add, name, passages)
    return _json({"name": name, "object": "collection", "added": len(passages), "passages": count})


async def search(request: web.Request) -> web.Response:
    """The nearest passages, best first."""
    asked = read(Search, await _body(request))
    collections, name = request.app[COLLECTIONS], request.match_info["name"]

    def nearest() -> tuple[Passage, ...]:
        collection = collections.open(name)
        vectors = collections.embedder.embed([asked.query])
        return collection.search(vectors[0], asked.k, DOUBLING.efforts[-1])

    data = [asdict(passage) for passage in await _in_thread(nearest)]
    return _json({"object": "list", "data": data})


routes = [
    web.post("/v1/collections", create),
    web.get("/v1/collections", show),
    web.delete("/v1/collections/{name}", delete),
    web.post("/v1/collections/{name}/passages", add),
    web.post("/v1/collections/{name}/search", search),
]


def _must_write(request: web.Request) -> None:
    if not (request.app[TENANTS].open or tenant_of(request).collections_write):
        raise Forbidden("this key does not change collections")


async def _body(request: web.Request) -> bytes:
    return await read_body(request, request.app[SETTINGS].now.max_chunk_bytes)


async def _passages(request: web.Request) -> list[Passage]:
    """Those of the body.

    Raises:
        BadRequest: a line is none; it is named by its number.
        BodyTooLarge
    """
    settings = request.app[SETTINGS].now
    left, passages = settings.max_body_bytes, list[Passage]()
    async for line in read_lines(request, settings.max_chunk_bytes, settings.idle_timeout_s):
        left -= len(line)
        if left < 0:
            raise BodyTooLarge(f"the body has more than {settings.max_body_bytes} bytes")
        try:
            row = read(NewPassage, line)
        except BadRequest as e:
            raise BadRequest(f"passage {len(passages) + 1}: {e.message}") from e
        passages.append(Passage(row.id, row.text, row.title))
    if not passages:
        raise BadRequest("there are no passages in the body")
    return passages


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a blocking call on collections gives; its errors as clients are told them."""
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except CollectionMissing as e:
        raise CollectionNotFound(str(e)) from e
    except CollectionExists as e:
        raise CollectionThere(str(e)) from e
    except BadName as e:
        raise BadRequest(str(e), param="name") from e
    except CollectionUnwritable as e:
        raise StorageFull(str(e)) from e
    except (CollectionError, EmbedderMissing) as e:
        raise GatewayError(str(e)) from e


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
