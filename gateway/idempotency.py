"""Requests that may come twice: what was made or answered under an `Idempotency-Key`.

A stream that is made under a key has an id that follows from the tenant and the key, so every
replica finds it, and the key lives as long as the stream can be looked up. What was asked is kept
as a digest beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from cache_index.index import StreamRecord
from gateway import record as records
from gateway.errors import BadRequest, KeyInUse, KeyReused
from gateway.identity import tenant_of
from gateway.keys import KEEPER, MAKING, STREAMS
from gateway.stream import Stream

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
"""On an answer that was given before."""
MAX_KEY_CHARS = 255


def key_of(request: web.Request) -> str | None:
    """The key of a request, if it has one.

    Raises:
        BadRequest
    """
    key = request.headers.get(HEADER)
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isascii()):
        raise BadRequest(f"{HEADER} has 1 to {MAX_KEY_CHARS} ASCII characters", param=HEADER)
    return key


def digest(body: bytes) -> bytes:
    """Tells what was asked from something else."""
    return hashlib.blake2b(body, digest_size=16).digest()


@contextmanager
def making(app: web.Application, stream_id: str) -> Iterator[None]:
    """While the stream of a key is looked for, and made if there is none.

    Raises:
        KeyInUse: another request does that.
    """
    under_way = app[MAKING]
    if stream_id in under_way:
        raise KeyInUse("the first request with this key is still under way")
    under_way.add(stream_id)
    try:
        yield
    finally:
        under_way.discard(stream_id)


async def made_before(
    request: web.Request, stream_id: str, asked: bytes
) -> Stream | StreamRecord | None:
    """What was made under the key of this id, here or at another replica.

    Raises:
        KeyReused: something else was asked for.
        IndexAway
    """
    app = request.app
    found = app[STREAMS].find(stream_id)
    if found is not None:
        must_be_same(found.asked, asked)
        return found
    record = await app[KEEPER].find(stream_id)
    if record is not None:
        must_be_same(records.read(record).about.asked, asked)
    return record


def must_be_same(first: bytes, now: bytes) -> None:
    """Refuse another request under the key of an earlier one."""
    if first != now:
        raise KeyReused("another request was made with this key", param=HEADER)


def stream_id(request: web.Request, key: str) -> str:
    """Of the stream that is made under a key."""
    return tenant_of(request).stream_id(key)
