"""What the flood of `make bench-throughput` says of what it has seen."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest.flood import GRACE_S, Flood, Load, Seen
from tests.loadtest.conftest import url_of


def test_chunks_that_were_not_taken_in_time_count_as_slow() -> None:
    seen = Seen(due=1000, ack_s=[0.01] * 982 + [0.2] * 9)
    p50, _, p99, most = seen.figures(1.0)["ack_ms"]
    assert p50 == 10
    assert p99 >= 200
    assert most == 1000 * GRACE_S


@pytest.mark.slow
async def test_a_slow_opening_puts_no_chunk_off() -> None:
    """Chunks are due in the first 0.15 s of their streams' lives; opening one takes a second."""

    async def opened(request: web.Request) -> web.Response:
        await asyncio.sleep(1.0)
        return web.json_response({"id": "s"}, status=201)

    async def taken(request: web.Request) -> web.Response:
        return web.json_response({}, status=202)

    async def answered(request: web.Request) -> web.Response:
        return web.Response(text="data: [DONE]\n\n")

    app = web.Application()
    app.router.add_post("/v1/streams", opened)
    app.router.add_post("/v1/streams/s/chunks", taken)
    app.router.add_post("/v1/streams/s/finish", answered)
    load = Load(rate=40.0, streams=2, chunks=2, words=5, answer_tokens=1, model="m", seed=1)
    server = TestServer(app)
    async with server:
        flood = Flood([url_of(server)], load)
        await flood.ramp(0.0)
        left = await flood.end(30.0)
    assert (left, flood.seen.due, len(flood.seen.ack_s), flood.seen.errors) == (0, 3, 3, {})
    assert min(flood.seen.ack_s) > 1.0 - 0.15
    assert max(flood.seen.late_s) < 0.5, "the gateway was late, not the load"
