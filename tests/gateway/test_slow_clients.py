"""Clients that are slow, half gone, or too many, and engines that fall silent: each wait ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import uvloop
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_adapter.messages import DoneEvent, Event, TokenEvent
from gateway.app import build
from gateway.keys import BUILDERS, ENGINES, METRICS, SETTINGS, STREAMS
from gateway.ports import listen
from gateway.settings import Settings
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine
from tests.gateway.pools import QUESTION, served, shared_builder

pytestmark = pytest.mark.slow

TIMEOUT_S = 0.4
LATE_S = 5.0
"""What a deadline may be missed by on a busy machine."""
BODY = {"model": MODEL, "messages": QUESTION}
HEAD = "POST /v1/streams HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
NDJSON = (
    "POST /v1/streams HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"
    "Transfer-Encoding: chunked\r\n\r\n"
)


def request_of(body: Any) -> bytes:
    sent = orjson.dumps(body)
    return f"{HEAD}Content-Length: {len(sent)}\r\n\r\n".encode() + sent


def part(text: str) -> bytes:
    """One chunk of a body whose length is not told."""
    return f"{len(text.encode()):x}\r\n{text}\r\n".encode()


@dataclass
class Door:
    """A gateway as its clients reach it, and the engine behind it."""

    app: web.Application
    port: int
    engine: FakeEngine
    http: httpx.AsyncClient

    def metric(self, name: str, **labels: str) -> float:
        return self.app[METRICS].registry.get_sample_value(name, labels) or 0.0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def no_streams(self) -> bool:
        return self.app[STREAMS].alive(MODEL) == 0 and not self.engine.core.tokens

    async def serves(self) -> bool:
        return (await self.http.post("/v1/streams", json=BODY)).status_code == 201


@asynccontextmanager
async def door(
    model_dir: Path, engine: FakeEngine | None = None, routes: Any = (), **given: Any
) -> AsyncIterator[Door]:
    engine = engine or FakeEngine()
    behind = engine.app()
    behind.add_routes(routes)
    async with served(behind) as url:
        values = {"client_timeout_s": TIMEOUT_S, "poll_s": 0.1} | given
        app = build(Settings(engine=(url,), tokenizer=str(model_dir), **values))
        builder = asyncio.get_running_loop().create_future()
        builder.set_result(shared_builder(str(model_dir)))
        app[BUILDERS][MODEL] = builder
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        server = await listen(runner, "127.0.0.1", 0, app[SETTINGS], app[METRICS])
        port = server.sockets[0].getsockname()[1]
        base = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=20) as http:
            yield Door(app, port, engine, http)
        server.close()
        await runner.cleanup()


async def drip(writer: asyncio.StreamWriter, data: bytes, every_s: float = 0.02) -> None:
    """Byte by byte, until nobody listens any more."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(every_s)


async def told(reader: asyncio.StreamReader, status: int, code: str) -> str:
    """The last response of a connection, which has to be this error; returns its head.

    A byte that drips in when the server has closed makes that a reset, behind the response."""
    parts = list[bytes]()
    async with asyncio.timeout(TIMEOUT_S + LATE_S):
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith(f"HTTP/1.1 {status} ")
    assert "connection: close" in (line.lower() for line in lines)
    assert orjson.loads(body)["error"]["code"] == code
    return head.decode()


async def test_a_head_byte_by_byte_is_a_408(model_dir: Path) -> None:
    async with door(model_dir) as at:
        reader, writer = await at.connect()
        begun_s = time.monotonic()
        dripping = asyncio.create_task(drip(writer, HEAD.encode()))
        await told(reader, 408, "request_timeout")
        assert TIMEOUT_S * 0.9 < time.monotonic() - begun_s < TIMEOUT_S + LATE_S
        dripping.cancel()
        writer.close()
        assert at.metric("stream2llm_errors_total", code="request_timeout") == 1
        assert await at.serves()


async def test_deadlines_hold_on_the_loop_that_gateways_run_on(model_dir: Path) -> None:
    async def told_off() -> None:
        async with door(model_dir, max_connections=1) as at:
            reader, writer = await at.connect()

            async def full() -> bool:
                return at.metric("stream2llm_connections") == 1

            await until(full, within_s=LATE_S)
            refused, other = await at.connect()
            other.write(HEAD.encode())
            await told(refused, 503, "overloaded")
            writer.write(HEAD.encode())  # its deadline begins
            await told(reader, 408, "request_timeout")
            writer.close()
            other.close()

    await asyncio.to_thread(uvloop.run, told_off())


async def test_a_slow_head_behind_a_quick_request_is_a_408_too(model_dir: Path) -> None:
    async with door(model_dir) as at:
        reader, writer = await at.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in await reader.readline()
        await reader.readuntil(b'{"status": "alive"}')
        writer.write(b"\r\nGET /health HTT")
        await told(reader, 408, "request_timeout")
        writer.close()


async def test_connections_without_a_request_are_closed(model_dir: Path) -> None:
    async with door(model_dir, keepalive_s=0.3) as at:
        silent, writer = await at.connect()
        used, other = await at.connect()
        other.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(LATE_S):
            assert await silent.read() == b""
            assert (await used.read()).endswith(b'{"status": "alive"}')
        writer.close()
        other.close()


async def test_a_connection_outlives_the_deadlines_of_its_requests(model_dir: Path) -> None:
    async with door(model_dir) as at:
        reader, writer = await at.connect()
        for _ in range(3):
            await asyncio.sleep(TIMEOUT_S * 1.2)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b'{"status": "alive"}')
        writer.close()


@pytest.mark.parametrize("sent", [0, 5])
async def test_a_body_that_does_not_arrive_is_a_408(model_dir: Path, sent: int) -> None:
    async with door(model_dir) as at:
        reader, writer = await at.connect()
        head, _, body = request_of(BODY).partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n" + body[:sent])
        dripping = asyncio.create_task(drip(writer, body[sent:] if sent else b"", 0.1))
        await told(reader, 408, "request_timeout")
        dripping.cancel()
        writer.close()
        assert await at.no_streams()


async def test_a_large_body_may_come_over_a_slow_line(model_dir: Path) -> None:
    timeout_s = 5.0
    async with door(model_dir, client_timeout_s=timeout_s) as at:
        reader, writer = await at.connect()
        messages = [{"role": "user", "content": "word " * 60_000}]
        request, begun_s = request_of({"model": MODEL, "messages": messages}), time.monotonic()
        for i in range(0, len(request), 10_000):
            writer.write(request[i : i + 10_000])
            await asyncio.sleep(0.2)  # three times the least rate
        assert time.monotonic() - begun_s > timeout_s * 1.1
        assert b"201" in await reader.readline()
        writer.close()


async def test_lines_may_come_late_but_each_has_to_come_whole(model_dir: Path) -> None:
    async with door(model_dir) as at:
        reader, writer = await at.connect()
        writer.write(NDJSON.encode() + part(orjson.dumps(BODY).decode() + "\n"))
        for _ in range(3):
            await asyncio.sleep(TIMEOUT_S * 1.2)
            writer.write(part('{"text": "word"}\n'))
        await asyncio.sleep(0.1)
        assert not await at.no_streams()
        dripping = asyncio.create_task(drip(writer, part('{"text": ') * 50, 0.05))
        await told(reader, 408, "request_timeout")
        dripping.cancel()
        writer.close()
        await until(at.no_streams, within_s=LATE_S)


async def test_a_request_of_lines_ends_with_its_stream_when_no_line_comes(model_dir: Path) -> None:
    async with door(model_dir, idle_timeout_s=0.6) as at:
        reader, writer = await at.connect()
        writer.write(NDJSON.encode() + part(orjson.dumps(BODY).decode() + "\n"))
        await told(reader, 408, "request_timeout")
        writer.close()
        await until(at.no_streams, within_s=LATE_S)


class Endless(FakeEngine):
    """Answers for ever, in large pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.answering = 0
        self.told = 0
        self.core.answer = self._answer  # type: ignore[method-assign]

    async def _answer(
        self, prompt_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Event, None]:
        self.answering += 1
        try:
            while self.told < 5000:
                self.told += 1
                yield TokenEvent(token_ids=[1], text="x" * 50_000)
                await asyncio.sleep(0.005)
            yield DoneEvent("stop", 1, 0, 1)
        finally:
            self.answering -= 1
            await self.core.close(prompt_id)


async def test_a_reader_that_does_not_read_is_cut_off_and_its_answer_ends(model_dir: Path) -> None:
    engine = Endless()
    async with door(model_dir, engine) as at:
        created = (await at.http.post("/v1/streams", json=BODY)).json()
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", at.port))
        path = f"/v1/streams/{created['id']}/finish"
        stalled.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{{}}".encode()
        )

        async def answers() -> bool:
            return engine.answering == 1

        async def ended() -> bool:
            return engine.answering == 0

        await until(answers, within_s=LATE_S)
        await until(ended, within_s=TIMEOUT_S + LATE_S)
        assert 1 < engine.told < 5000  # it was not read to its end
        await until(at.no_streams, within_s=LATE_S)
        stalled.close()


async def test_connections_beyond_the_bound_are_refused_until_others_end(model_dir: Path) -> None:
    async with door(model_dir, max_connections=3, client_timeout_s=30.0) as at:
        others = [await at.connect() for _ in range(3)]

        async def full() -> bool:
            return at.metric("stream2llm_connections") == 3

        await until(full, within_s=LATE_S)
        reader, writer = await at.connect()
        writer.write(request_of(BODY))
        assert "Retry-After" in await told(reader, 503, "overloaded")
        writer.close()
        others[0][1].close()

        async def served_again() -> bool:
            try:
                return await at.serves()
            except httpx.TransportError:
                return False

        await until(served_again, within_s=LATE_S)
        for _, other in others[1:]:
            other.close()


async def silent(request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.json_response({})


async def stalls(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"choices": []}\n\n')
    await asyncio.sleep(60)
    return response


async def test_an_engine_that_is_silent_is_a_504_and_stays_in_use(model_dir: Path) -> None:
    routes = [web.post("/v1/completions", silent), web.post("/v1/chat/completions", stalls)]
    async with door(model_dir, routes=routes, engine_timeout_s=3) as at:
        asked = {"model": MODEL, "prompt": "x"}
        *answers, broken = await asyncio.gather(
            *(at.http.post("/v1/completions", json=asked) for _ in range(4)),  # 3 eject an engine
            at.http.post("/v1/chat/completions", json=BODY),
        )
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_timeout")
        assert broken.status_code == 200
        events = [line for line in broken.text.split("\n\n") if line.startswith("data: ")]
        assert orjson.loads(events[-1][6:])["error"]["code"] == "engine_timeout"
        assert [engine.standing for engine in at.app[ENGINES].all] == ["healthy"]


async def test_a_request_is_the_same_however_it_is_cut(model_dir: Path) -> None:
    async with door(model_dir, client_timeout_s=30.0) as at:
        loop = asyncio.get_running_loop()
        request = request_of(BODY)

        async def ask(cuts: list[int]) -> None:
            reader, writer = await at.connect()
            bounds = [0, *sorted(cuts), len(request)]
            for begin, end in pairwise(bounds):
                writer.write(request[begin:end])
                await asyncio.sleep(0)
            assert b"201" in await reader.readline()
            writer.close()

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.integers(0, len(request)), max_size=8))
        def cut(cuts: list[int]) -> None:
            asyncio.run_coroutine_threadsafe(ask(cuts), loop).result(LATE_S)

        await asyncio.to_thread(cut)
