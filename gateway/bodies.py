"""Reading request bodies: bounded, and line by line where they stream in."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from aiohttp import web

from gateway.errors import BadRequest, BodyTooLarge


async def read_body(request: web.Request, limit_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it has more bytes than the limit; no more than that is read.
    """
    if (request.content_length or 0) > limit_bytes:
        raise BodyTooLarge(f"the body has {request.content_length} bytes, limit {limit_bytes}")
    body = bytearray()
    async for part in request.content.iter_any():
        body += part
        if len(body) > limit_bytes:
            raise BodyTooLarge(f"the body has more than {limit_bytes} bytes")
    return bytes(body)


async def read_lines(request: web.Request, limit_bytes: int) -> AsyncGenerator[bytes, None]:
    """The lines of a body as they arrive, without their ends; empty ones are skipped.

    Raises:
        BodyTooLarge: a line has more bytes than the limit.
    """
    rest = bytearray()
    async for part in request.content.iter_any():
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
    if rest.strip():
        yield bytes(rest)


def must_have(value: bytes | None, message: str) -> bytes:
    """The value, or a BadRequest if there is none."""
    if value is None:
        raise BadRequest(message)
    return value
