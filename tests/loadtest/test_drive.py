"""The open-loop driver: against a gateway in this process, and one that is slow on purpose."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest.drive import Mix, Seen, drive
from loadtest.front import Front, brings_token
from loadtest.workload import Document, Input, Query
from tests.fake_engine import MODEL
from tests.loadtest.conftest import url_of

pytestmark = pytest.mark.slow


class Words:
    """As many words as tokens."""

    def of(self, document: Document) -> str:
        return document.text or f"word{document.doc_id} " * document.tokens


@asynccontextmanager
async def front(url: str, model: str = MODEL) -> AsyncIterator[Front]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        yield Front(http, url, model, {"max_tokens": 3})


async def driven(url: str, queries: list[Query], mix: Mix | None = None) -> Seen:
    async with asyncio.timeout(60), front(url) as gateway:
        return await drive(gateway, queries, Words(), mix or Mix())


def chunked(query_id: int, arrival_s: float, *at_s: float) -> Query:
    documents = [Document(10 * query_id + i, 5) for i in range(len(at_s))]
    inputs = tuple(Input(at, (d,)) for at, d in zip(at_s, documents, strict=True))
    return Query(query_id, arrival_s, False, inputs, 4)


async def test_streams_are_opened_fed_and_answered(gateway_url: str) -> None:
    queries = [chunked(i, 0.01 * i, 0.0, 0.02, 0.03) for i in range(10)]
    seen = await driven(gateway_url, queries)
    assert (seen.answered, seen.chunks, seen.errors) == (10, 30, {})
    assert len(seen.ttft_s) == len(seen.open_s) == 10
    assert len(seen.chunk_ack_s) == 30
    assert min(seen.ttft_s) > 0
    assert seen.answer_tokens > 0
    assert seen.tokens_invalidated == 0


async def test_a_list_that_changes_at_its_front_invalidates(gateway_url: str) -> None:
    a, b, c = (Document(i, 30) for i in (1, 2, 3))
    lists = Input(0.0, (a, b)), Input(0.05, (c, b)), Input(0.1, (c, b, a))
    seen = await driven(gateway_url, [Query(0, 0.0, True, lists, 5)])
    assert (seen.answered, seen.chunks, seen.errors) == (1, 3, {})
    assert seen.tokens_invalidated > 60


async def test_streams_that_are_given_up_are_counted(gateway_url: str) -> None:
    seen = await driven(gateway_url, [chunked(i, 0.0, 0.0, 0.02) for i in range(30)], Mix(cancel=1))
    assert (seen.cancelled, seen.answered, seen.errors) == (30, 0, {})


async def test_what_a_gateway_refuses_is_an_error_by_its_code(gateway_url: str) -> None:
    async with front(gateway_url, "nobody") as gateway:
        seen = await drive(gateway, [chunked(0, 0.0, 0.0)], Words(), Mix())
    assert seen.errors == {"model_not_found": 1}


async def test_a_gateway_that_is_not_there_is_an_error(unused_tcp_port: int) -> None:
    seen = await driven(f"http://127.0.0.1:{unused_tcp_port}", [chunked(0, 0.0, 0.0)])
    assert sum(seen.errors.values()) == 1
    assert seen.figures()["ttft_s"] is None


@dataclass
class Slow:
    """A gateway that serves one chunk after the other, each for some time."""

    service_s: float
    opened_s: list[float] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def open(self, request: web.Request) -> web.Response:
        self.opened_s.append(time.perf_counter())
        return web.json_response({"id": f"s{len(self.opened_s)}"}, status=201)

    async def chunk(self, request: web.Request) -> web.Response:
        async with self.lock:
            await asyncio.sleep(self.service_s)
        return web.json_response({"tokens": 5}, status=202)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta in ({"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}):
            event = {"choices": [{"delta": delta}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/streams", self.open)
        app.router.add_post("/v1/streams/{id}/chunks", self.chunk)
        app.router.add_post("/v1/streams/{id}/finish", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        return app


@asynccontextmanager
async def served(slow: Slow) -> AsyncIterator[str]:
    server = TestServer(slow.app())
    await server.start_server()
    yield url_of(server)
    await server.close()


async def test_a_slow_gateway_neither_slows_the_load_nor_hides_its_queue() -> None:
    """50 arrivals in half a second, of which a gateway serves one in 0.2 s: the last waits 9.5 s.

    A driver that waits for its answers (coordinated omission) would see 0.2 s each.
    """
    slow, gap_s = Slow(service_s=0.2), 0.01
    async with served(slow) as url:
        seen = await driven(url, [chunked(i, gap_s * i, 0.0) for i in range(50)])
    assert seen.errors == {}
    arrivals = [at_s - slow.opened_s[0] for at_s in slow.opened_s]
    assert arrivals[-1] < 5  # 0.49 s; ten seconds if the load had been slowed
    waits_s = sorted(seen.chunk_ack_s)
    assert waits_s[-1] > 50 * 0.2 - 1
    assert statistics.median(waits_s) > 4
    assert min(seen.ttft_s) >= min(seen.chunk_ack_s)  # from when it was due, the queue included


class Busy(Words):
    """Keeps the whole driver busy for a second before it has the text of one document."""

    def __init__(self, doc_id: int) -> None:
        self._doc_id = doc_id

    def of(self, document: Document) -> str:
        if document.doc_id == self._doc_id:
            time.sleep(1.0)
        return super().of(document)


async def test_a_driver_that_is_late_within_a_stream_says_so() -> None:
    late = chunked(1, 0.0, 0.0, 1.0)
    async with served(Slow(0.0)) as url, asyncio.timeout(60), front(url) as gateway:
        seen = await drive(gateway, [late, chunked(2, 0.5, 0.0)], Busy(20), Mix())
    assert seen.errors == {}
    assert max(seen.driver_late_s) > 0.4  # busy from 0.5 s to 1.5 s
    assert max(seen.chunk_ack_s) >= max(seen.driver_late_s)


async def test_a_step_that_waits_for_the_gateway_is_not_the_drivers_lateness() -> None:
    async with served(Slow(0.2)) as url:
        seen = await driven(url, [chunked(1, 0.0, 0.0, 0.1, 0.2)])
    assert (seen.chunks, seen.errors) == (3, {})
    assert len(seen.driver_late_s) == 1  # of its start


def test_which_events_bring_tokens() -> None:
    deltas: list[dict[str, str]] = [
        {"role": "assistant", "content": ""}, {"content": "a"}, {"content": ""},
        {"role": "assistant", "content": "b"}, {},
    ]  # fmt: skip
    found = [brings_token({"choices": [{"delta": delta}]}) for delta in deltas]
    assert found == [False, True, True, True, False]
    assert not brings_token({"choices": []})


async def test_plain_chat_is_sent_whole_when_its_retrieval_ends() -> None:
    async with served(Slow(0.0)) as url:
        seen = await driven(url, [chunked(i, 0.0, 0.0, 0.05) for i in range(4)], Mix(chat=1))
    assert (seen.answered, seen.chunks, len(seen.chat_ttft_s), seen.ttft_s) == (4, 0, 4, [])
    assert len(seen.between_tokens_s) == 4


async def test_hundreds_of_streams_are_open_at_once() -> None:
    slow = Slow(0.0)
    async with served(slow) as url:
        seen = await driven(url, [chunked(i, 0.001 * i, 0.0, 5.0) for i in range(300)])
    assert (seen.answered, seen.errors) == (300, {})
    assert seen.open_at_once == 300
