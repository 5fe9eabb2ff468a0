"""A gateway that ends in the middle of answers: nothing is lost where another replica is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from aiohttp.test_utils import TestServer, unused_port

from gateway.app import build
from gateway.client import Client
from gateway.settings import Settings
from tests.conftest import until
from tests.fake_engine import MODEL, FakeCore, FakeEngine
from tests.gateway.pools import QUESTION, closing, served

pytestmark = pytest.mark.slow

BODY = {"model": MODEL, "messages": QUESTION}
LONG_S = 60.0


@dataclass
class Two:
    """Two replicas with one engine, which takes long to answer until a test says otherwise."""

    core: FakeCore
    servers: list[TestServer]
    closing: list[str]
    """Paths of requests whose connection to the second replica closes when it is used."""
    http: httpx.AsyncClient

    def url(self, number: int) -> str:
        return str(self.servers[number].make_url("")).rstrip("/")

    async def opened(self, number: int) -> str:
        """The path of a stream that this replica holds."""
        created = await self.http.post(self.url(number) + "/v1/streams", json=BODY)
        path = f"/v1/streams/{created.json()['id']}"
        posted = {"text": "some context", "seq": 0}
        assert (await self.http.post(self.url(number) + path + "/chunks", json=posted)).is_success
        return path

    async def finish(self, number: int, path: str, *, stream: bool = False) -> httpx.Response:
        return await self.http.post(self.url(number) + path + "/finish", json={"stream": stream})

    async def asked(self, count: int) -> None:
        """Wait until the engine has to give so many answers."""

        async def so() -> bool:
            return self.core.answering == count

        await until(so, within_s=5)


@asynccontextmanager
async def replica(
    model_dir: Path, engine_url: str, index: str | None
) -> AsyncIterator[tuple[TestServer, list[str]]]:
    port = unused_port()
    settings = Settings(
        engine=(engine_url,), tokenizer=str(model_dir), port=port, index=index, index_timeout_s=5.0
    )
    app = build(settings)
    closes = closing(app)
    async with TestServer(app, port=port) as server:
        yield server, closes


@asynccontextmanager
async def replicas(model_dir: Path, index: str | None) -> AsyncIterator[Two]:
    engine = FakeEngine()
    engine.core.prefill_s = lambda tokens: LONG_S
    async with AsyncExitStack() as running:
        url = await running.enter_async_context(served(engine.app()))
        one, _ = await running.enter_async_context(replica(model_dir, url, index))
        two, closes = await running.enter_async_context(replica(model_dir, url, index))
        http = await running.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=30))
        yield Two(engine.core, [one, two], closes, http)


@pytest.mark.parametrize("asked", ["the one that ends", "another, which sends it on"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_off_can_be_had_from_the_other_replica(
    model_dir: Path, redis_url: str, asked: str, stream: bool
) -> None:
    async with replicas(model_dir, redis_url) as two:
        holder = 1 if asked == "another, which sends it on" else 0
        path = await two.opened(holder)
        cut = asyncio.create_task(two.finish(0, path, stream=stream))
        await two.asked(1)
        await two.servers[0].close()
        told = await cut
        if stream:
            assert told.status_code == 200
            assert '"code":"draining"' in told.text
        else:
            assert (told.status_code, told.json()["error"]["code"]) == (503, "draining")
            assert told.headers["Retry-After"] == "1"
        await two.asked(0)
        two.core.prefill_s = lambda tokens: 0.0
        answer = await two.finish(1, path)
        assert answer.json()["choices"][0]["message"]["content"] == "answer"
        assert not two.core.tokens


async def test_whoever_hangs_up_later_does_not_end_what_the_other_replica_does(
    model_dir: Path, redis_url: str
) -> None:
    async with replicas(model_dir, redis_url) as two:
        path = await two.opened(0)
        cut = asyncio.create_task(two.finish(0, path))
        await two.asked(1)
        ending = asyncio.create_task(two.servers[0].close())
        await cut
        again = asyncio.create_task(two.finish(1, path))
        await two.asked(1)
        await ending
        await two.asked(1)
        again.cancel()
        await two.asked(0)


async def test_without_others_an_answer_that_is_cut_off_leaves_nothing_at_the_engine(
    model_dir: Path,
) -> None:
    async with replicas(model_dir, None) as two:
        path = await two.opened(0)
        cut = asyncio.create_task(two.finish(0, path))
        await two.asked(1)
        await two.servers[0].close()
        told = await cut
        assert (told.status_code, told.json()["error"]["code"]) == (503, "draining")
        await two.asked(0)
        assert not two.core.tokens


async def test_chunks_that_come_at_the_end_are_for_another_replica(
    model_dir: Path, redis_url: str
) -> None:
    """One that was sent before the end, on a connection that was there."""
    async with replicas(model_dir, redis_url) as two:
        long, path = await two.opened(0), await two.opened(0)
        cut = asyncio.create_task(two.finish(0, long))
        await two.asked(1)
        ending = asyncio.create_task(two.servers[0].close())
        answered = []
        for seq in range(1, 20):
            posted = {"text": "more", "seq": seq}
            try:
                got = await two.http.post(two.url(0) + path + "/chunks", json=posted)
            except httpx.TransportError:
                break
            answered.append(got)
            if not got.is_success:
                break
        await ending
        await cut
        assert {a.status_code for a in answered} <= {202, 503}
        kept = sum(a.is_success for a in answered)
        posted = {"text": "more", "seq": kept + 1}
        assert (await two.http.post(two.url(1) + path + "/chunks", json=posted)).is_success
        two.core.prefill_s = lambda tokens: 0.0
        answer = await two.finish(1, path)
        assert answer.json()["choices"][0]["message"]["content"] == "answer"


async def test_a_client_of_both_replicas_goes_on_at_the_other(
    model_dir: Path, redis_url: str
) -> None:
    async with replicas(model_dir, redis_url) as two, Client(two.url(0), two.url(1)) as client:
        two.core.prefill_s = lambda tokens: 0.0
        async with client.stream(MODEL, QUESTION) as stream:
            await stream.send("some context", id="a")
            await two.servers[0].close()
            await stream.send("more context")
            await stream.replace([{"id": "a"}])
            assert (await stream.status())["tokens"]["received"] > 0
            assert "".join([piece async for piece in stream.answer()]) == "answer"
        async with client.stream(MODEL, QUESTION) as stream:
            whole = await stream.finish()
            assert whole["choices"][0]["message"]["content"] == "answer"


async def test_what_is_sent_on_over_a_connection_that_closes_is_sent_again(
    model_dir: Path, redis_url: str
) -> None:
    async with replicas(model_dir, redis_url) as two:
        two.core.prefill_s = lambda tokens: 0.0
        path = await two.opened(1)
        two.closing += ["/chunks$", "/finish$"]
        posted = {"text": "more", "seq": 1}
        taken = await two.http.post(two.url(0) + path + "/chunks", json=posted)
        assert (taken.status_code, taken.json()["seq"]) == (202, 1)
        answer = await two.finish(0, path)
        assert answer.json()["choices"][0]["message"]["content"] == "answer"
        assert not two.closing
