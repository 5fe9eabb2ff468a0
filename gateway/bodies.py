"""Reading request bodies: bounded in size and in time, and line by line where they stream in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from aiohttp import web

from gateway.errors import BadRequest, BodyTooLarge, RequestTimeout
from gateway.keys import SETTINGS

MIN_BYTES_PER_S = 16 << 10
"""Beyond `client_timeout_s`, what has arrived earns time at this rate, as in Apache's
mod_reqtimeout: a large body may come over a slow line, but none byte by byte."""


async def read_body(request: web.Request, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it has more bytes than the limit; no more than that is read.
        RequestTimeout
    """
    if (request.content_length or 0) > limit_bytes:
        raise BodyTooLarge(f"the body has {request.content_length} bytes, limit {limit_bytes}")
    if request.content.is_eof() and request.content.exception() is None:
        whole = request.content.read_nowait()  # it came with its headers, as most bodies do
        if len(whole) > limit_bytes:
            raise BodyTooLarge(f"the body has more than {limit_bytes} bytes")
        return whole
    body, begun_s = bytearray(), time.monotonic()
    while part := await _part(request, begun_s + _allowed_s(request, len(body))):
        body += part
        if len(body) > limit_bytes:
            raise BodyTooLarge(f"the body has more than {limit_bytes} bytes")
    return bytes(body)


async def read_lines(
    request: web.Request, limit_bytes: int, idle_s: float
) -> AsyncGenerator[bytes, None]:
    """The lines of a body as they arrive, without their ends; empty ones are skipped.

    Args:
        idle_s: how long a next line may be waited for. The first one, and each that has begun, have
            as long as a body.

    Raises:
        BodyTooLarge: a line has more bytes than the limit.
        RequestTimeout
    """
    rest, begun_s = bytearray(), time.monotonic()
    due_s = begun_s + _allowed_s(request, 0)
    while part := await _part(request, due_s):
        rest += part
        *lines, tail = rest.split(b"\n")
        rest = bytearray(tail)
        for line in lines:
            if len(line) > limit_bytes:
                raise BodyTooLarge(f"a line has {len(line)} bytes, limit {limit_bytes}")
            if line.strip():
                yield bytes(line)
        if len(rest) > limit_bytes:
            raise BodyTooLarge(f"a line has more than {limit_bytes} bytes")
        if lines or len(rest) == len(part):  # a line has begun, or none has
            begun_s = time.monotonic()
        due_s = begun_s + (_allowed_s(request, len(rest)) if rest else idle_s)
    if rest.strip():
        yield bytes(rest)


async def _part(request: web.Request, due_s: float) -> bytes:
    """The next part of a body, nothing at its end.

    Raises:
        RequestTimeout: it has not come at that time.
        BadRequest: it is not encoded as its headers say.
    """
    try:
        async with asyncio.timeout(due_s - time.monotonic()):
            return await request.content.readany()
    except TimeoutError as e:
        raise RequestTimeout("the body did not arrive in time") from e
    except web.RequestPayloadError as e:
        request.content.feed_eof()  # else the server looks for the rest of it
        raise BadRequest("the body is not encoded as its headers say") from e


def _allowed_s(request: web.Request, arrived_bytes: int) -> float:
    timeout_s = request.app[SETTINGS].now.client_timeout_s
    return timeout_s + arrived_bytes / MIN_BYTES_PER_S


def must_have(value: bytes | None, message: str) -> bytes:
    """The value, or a BadRequest if there is none."""
    if value is None:
        raise BadRequest(message)
    return value
