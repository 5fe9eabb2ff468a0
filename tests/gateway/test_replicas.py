"""Several gateways, one Redis: any of them takes any request, and one that dies is replaced.

The gateways and Redis are processes; the engine has no model, so that what it is asked can be
compared token by token.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import httpx
import pytest
import pytest_asyncio

from deploy.local import Server, redis_server
from engine_adapter.client import EngineClient
from gateway.prompt import PromptBuilder
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine
from tests.gateway.replicas import MESSAGES, Caller, answered, expected, fake_engine, replicas

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def builder(model_dir: Path) -> PromptBuilder:
    return PromptBuilder(str(model_dir), ThreadPoolExecutor(1), 10_000)


class Cluster:
    """Two gateways, Redis, an engine, and a client of both."""

    def __init__(
        self,
        engine: FakeEngine,
        engine_url: str,
        servers: list[Server],
        redis: Server,
        http: httpx.AsyncClient,
    ) -> None:
        self.engine = engine
        self.engine_url = engine_url
        self.servers = servers
        self.redis = redis
        self.http = http
        self.caller = Caller(http, [server.url for server in servers])

    async def metric(self, server: Server, name: str) -> float:
        text = (await self.http.get(server.url + "/metrics")).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    async def restart(self, server: Server) -> None:
        """Start a server again, after however it ended."""

        def again() -> None:
            server.kill()
            server.start().wait_ready(60)

        await asyncio.get_running_loop().run_in_executor(None, again)


@pytest_asyncio.fixture(scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    with redis_server() as redis:
        redis.start().wait_ready(20)
        async with fake_engine() as (engine, url):
            loop = asyncio.get_running_loop()
            context = replicas(2, [url], redis.url)
            servers = await loop.run_in_executor(None, context.__enter__)
            try:
                async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
                    yield Cluster(engine, url, servers, redis, http)
            finally:
                await loop.run_in_executor(None, context.__exit__, None, None, None)


async def test_chunks_that_alternate_between_two_gateways_keep_their_order(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    rng = random.Random(4)
    cluster.engine.core.delay_s = lambda: rng.uniform(0, 0.02)
    caller = cluster.caller
    texts = [f"chunk {i} " * rng.randint(1, 4) for i in range(1000)]
    stream = await caller.open(0)

    async def send(i: int) -> None:
        await asyncio.sleep(rng.uniform(0, 0.003))
        await caller.send(stream, i, i, texts[i])

    for i in range(1000):
        await send(i)
        if rng.random() < 0.1:  # again, at the other one: taken once
            await caller.send(stream, i + 1, i, texts[i])
    assert await caller.finish(stream, 1) == "answer"
    assert answered(cluster.engine, stream) == [await expected(builder, texts)]
    assert await cluster.metric(cluster.servers[1], "stream2llm_forwarded_requests_total") >= 500
    assert caller.refusals == caller.broken == 0


async def test_all_streams_of_a_gateway_that_is_killed_finish_at_the_other(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    rng = random.Random(5)
    cluster.engine.core.delay_s = lambda: rng.uniform(0, 0.05)
    caller, begun = cluster.caller, asyncio.Event()
    half = 0

    async def one(n: int) -> tuple[str, list[str], str]:
        nonlocal half
        texts: list[str] = []
        stream = await caller.open(n % 2)
        for i in range(12):
            text = f"stream {n} chunk {i}: " + "word " * rng.randint(1, 80)
            if n % 5 == 0 and i % 3 == 2:  # some replace all they have, in another order
                texts = [text, *reversed(texts)]
                await caller.replace(stream, rng.randint(0, 1), i, texts)
            else:
                texts.append(text)
                await caller.send(stream, rng.randint(0, 1), i, text)
            await asyncio.sleep(rng.uniform(0, 0.1))
            if i == 5:
                half += 1
                if half == 50:
                    begun.set()
                await begun.wait()  # none is through before it happens
        return stream, texts, await caller.finish(stream, rng.randint(0, 1))

    streams = [asyncio.create_task(one(n)) for n in range(50)]
    await begun.wait()
    await asyncio.sleep(0.05)
    os.kill(cluster.servers[0].pid, signal.SIGKILL)
    for stream, texts, answer in await asyncio.gather(*streams):
        assert answer == "answer"
        assert answered(cluster.engine, stream)[-1] == await expected(builder, texts)
    assert await cluster.metric(cluster.servers[1], "stream2llm_streams_taken_over_total") >= 20
    await cluster.restart(cluster.servers[0])


async def test_streams_of_a_gateway_that_is_told_to_stop_go_on_at_the_other(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    caller = cluster.caller
    streams = [await caller.open(0) for _ in range(5)]
    for n, stream in enumerate(streams):
        await caller.send(stream, 0, 0, f"before {n}")
    await asyncio.get_running_loop().run_in_executor(None, cluster.servers[0].stop)
    try:
        for n, stream in enumerate(streams):
            await caller.send(stream, 1, 1, f"after {n}")
            assert await caller.finish(stream, 1) == "answer"
            texts = [f"before {n}", f"after {n}"]
            assert answered(cluster.engine, stream) == [await expected(builder, texts)]
    finally:
        await cluster.restart(cluster.servers[0])


async def test_an_answer_survives_the_gateway_that_passed_it_on(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    caller, relay = cluster.caller, cluster.servers[0]
    stream = await caller.open(1)
    await caller.send(stream, 1, 0, "text")
    cluster.engine.core.prefill_s = lambda tokens: 1.0
    try:
        asked = asyncio.create_task(caller.finish(stream, 0))
        await until(lambda: being_answered(cluster, stream), within_s=10)
        os.kill(relay.pid, signal.SIGKILL)
        assert await asked == "answer"  # the client asks the holder itself
    finally:
        cluster.engine.core.prefill_s = lambda tokens: 0.0
        await cluster.restart(relay)
    assert answered(cluster.engine, stream)[-1] == await expected(builder, ["text"])


async def test_a_client_that_hangs_up_on_a_passed_on_answer_ends_the_stream(
    cluster: Cluster,
) -> None:
    caller, http = cluster.caller, cluster.http
    stream = await caller.open(1)
    there = f"{cluster.servers[0].url}/v1/streams/{stream}"
    cluster.engine.core.prefill_s = lambda tokens: 5.0
    try:
        asked = asyncio.create_task(http.post(there + "/finish", json={"stream": False}))
        await until(lambda: being_answered(cluster, stream), within_s=10)
        asked.cancel()

        async def cancelled() -> bool:
            return bool((await http.get(there)).json()["state"] == "cancelled")

        assert await until(cancelled, within_s=20) < 4  # the prefill takes 5 s
    finally:
        cluster.engine.core.prefill_s = lambda tokens: 0.0


async def test_requests_that_take_a_stream_over_together_get_one_answer(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    caller, http = cluster.caller, cluster.http
    cluster.engine.core.delay_s = lambda: 0.05
    streams = [await caller.open(0) for _ in range(8)]
    for stream in streams:
        await caller.send(stream, 0, 0, "text")
    os.kill(cluster.servers[0].pid, signal.SIGKILL)
    try:
        for stream in streams:
            there = f"{cluster.servers[1].url}/v1/streams/{stream}"
            asked = [http.get(there), http.post(there + "/finish", json={"stream": False})]
            _, answer, *_ = await asyncio.gather(*asked, http.get(there))
            assert answer.json()["choices"][0]["message"]["content"] == "answer"
            assert answered(cluster.engine, stream) == [await expected(builder, ["text"])]
        assert await cluster.metric(cluster.servers[1], "stream2llm_open_streams") >= 0
    finally:
        cluster.engine.core.delay_s = lambda: 0.0
        await cluster.restart(cluster.servers[0])


async def test_a_stream_whose_gateway_and_engine_both_forget_it_is_lost_and_told_so_at_once(
    cluster: Cluster,
) -> None:
    caller, http, core = cluster.caller, cluster.http, cluster.engine.core
    key = {"Idempotency-Key": "a key of a stream that is lost"}
    body = {"model": MODEL, "messages": MESSAGES}

    async def opened(server: Server) -> httpx.Response:
        return await http.post(server.url + "/v1/streams", json=body, headers=key)

    stream = (await opened(cluster.servers[0])).json()["id"]
    await caller.send(stream, 0, 0, "the engine has this")

    async def is_there() -> bool:
        return any(name.startswith(stream) for name in core.tokens)

    await until(is_there, within_s=5)
    await caller.send(stream, 0, 1, "so the record does not")
    os.kill(cluster.servers[0].pid, signal.SIGKILL)
    try:
        async with aiohttp.ClientSession() as session:
            client = EngineClient(session, cluster.engine_url)
            for name in [name for name in core.tokens if name.startswith(stream)]:
                await client.abort(name)
        path = f"{cluster.servers[1].url}/v1/streams/{stream}"
        lost, *later = [
            await http.post(path + "/chunks", json={"text": "more", "seq": 2}),
            await http.post(path + "/finish", json={}),
            await http.delete(path),
        ]
        assert (lost.status_code, lost.json()["error"]["code"]) == (410, "stream_lost")
        assert [answer.status_code for answer in later] == [404, 404]
        again = await opened(cluster.servers[1])  # its key is free
        assert (again.status_code, again.json()["chunks"]) == (201, 0)
        await http.delete(path)
    finally:
        await cluster.restart(cluster.servers[0])


async def being_answered(cluster: Cluster, stream: str) -> bool:
    return bool(answered(cluster.engine, stream))


async def test_a_gateway_that_was_thought_dead_lets_go_of_its_streams(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    first, caller = cluster.servers[0], cluster.caller
    stream = await caller.open(0)
    await caller.send(stream, 0, 0, "from the first")
    os.kill(first.pid, signal.SIGSTOP)
    try:
        await caller.send(stream, 1, 1, "from the second")
    finally:
        os.kill(first.pid, signal.SIGCONT)

    await caller.send(stream, 0, 2, "again at the first")

    async def let_go() -> bool:
        return await cluster.metric(first, "stream2llm_open_streams") == 0

    await until(let_go, within_s=10)
    assert await caller.finish(stream, 0) == "answer"
    texts = ["from the first", "from the second", "again at the first"]
    assert answered(cluster.engine, stream) == [await expected(builder, texts)]


async def test_every_request_works_at_the_gateway_that_does_not_hold_the_stream(
    cluster: Cluster,
) -> None:
    caller, http = cluster.caller, cluster.http
    stream = await caller.open(0)
    there = f"{cluster.servers[1].url}/v1/streams/{stream}"
    taken = await http.put(
        there + "/documents", json={"documents": [{"id": "a", "text": "A"}, {"text": "B"}]}
    )
    assert (taken.status_code, taken.json()["seq"]) == (200, 0)
    assert (await http.get(there)).json()["chunks"] == 2
    refused = await http.post(there + "/chunks", json={"text": "x", "seq": 7})
    assert (refused.status_code, refused.json()["error"]["expected_seq"]) == (409, 1)
    lines = []
    async with http.stream("POST", there + "/finish", json={"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert (await http.get(there)).json()["state"] == "done"
    cancelled = await caller.open(0)
    gone = await http.delete(f"{cluster.servers[1].url}/v1/streams/{cancelled}")
    assert gone.json()["state"] == "cancelled"
    assert (await http.get(cluster.servers[1].url + "/v1/streams/st-none")).status_code == 404


# Redis goes away.


class SlowPipe:
    """Between gateways and Redis: passes everything on, after a delay, or not at all."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self._port = port

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _connected(self, r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
        try:
            far_r, far_w = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            w.close()
            return
        await asyncio.gather(self._pass_on(r, far_w, 0), self._pass_on(far_r, w, 1))

    async def _pass_on(self, r: asyncio.StreamReader, w: asyncio.StreamWriter, back: int) -> None:
        try:
            while part := await r.read(1 << 16):
                await asyncio.sleep(self.delay_s * back)
                w.write(part)
                await w.drain()
        except ConnectionError:
            pass
        finally:
            w.close()


async def chunks_per_stream(
    cluster: Cluster, builder: PromptBuilder, *, streams: int, chunks: int, pause_s: float
) -> float:
    """Streams that all keep to the first gateway, each answer checked; the slowest chunk, in s."""
    caller, slowest_s = cluster.caller, 0.0

    async def one(n: int) -> None:
        nonlocal slowest_s
        texts = [f"stream {n} chunk {i}" for i in range(chunks)]
        stream = await caller.open(0)
        for i, text in enumerate(texts):
            begun_s = time.monotonic()
            await caller.send(stream, 0, i, text)
            slowest_s = max(slowest_s, time.monotonic() - begun_s)
            await asyncio.sleep(pause_s)
        assert await caller.finish(stream, 0) == "answer"
        assert answered(cluster.engine, stream) == [await expected(builder, texts)]

    await asyncio.gather(*(one(n) for n in range(streams)))
    return slowest_s


async def index_up(cluster: Cluster) -> bool:
    up = [await cluster.metric(server, "stream2llm_index_up") for server in cluster.servers]
    return all(up)


async def finishes_elsewhere(cluster: Cluster) -> None:
    """A stream that was begun at the first gateway ends right at the other one."""
    stream = await cluster.caller.open(0)
    await cluster.caller.send(stream, 0, 0, "one")
    assert await cluster.caller.finish(stream, 1) == "answer"


async def test_no_request_fails_while_redis_is_paused(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    load = asyncio.create_task(
        chunks_per_stream(cluster, builder, streams=10, chunks=20, pause_s=0.4)
    )
    await asyncio.sleep(1)
    os.kill(cluster.redis.pid, signal.SIGSTOP)
    await asyncio.sleep(5)
    os.kill(cluster.redis.pid, signal.SIGCONT)
    slowest_s = await load
    assert slowest_s < 4.5  # Redis stands still for 5 s
    await until(lambda: index_up(cluster), within_s=10)
    await finishes_elsewhere(cluster)


async def test_no_request_fails_when_redis_is_killed_and_comes_back_empty(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    stream = await cluster.caller.open(0)
    await cluster.caller.send(stream, 0, 0, "before")
    load = asyncio.create_task(
        chunks_per_stream(cluster, builder, streams=10, chunks=20, pause_s=0.3)
    )
    await asyncio.sleep(1)
    await asyncio.get_running_loop().run_in_executor(None, cluster.redis.kill)
    await asyncio.sleep(1)
    await cluster.restart(cluster.redis)
    assert await load < 10
    await until(lambda: index_up(cluster), within_s=10)
    # The quiet stream is known again too: the other gateway finds its holder.
    await cluster.caller.send(stream, 1, 1, "after")
    assert await cluster.caller.finish(stream, 1) == "answer"
    assert answered(cluster.engine, stream) == [await expected(builder, ["before", "after"])]


async def test_a_slow_redis_makes_chunks_slower_and_no_more(
    cluster: Cluster, builder: PromptBuilder
) -> None:
    pipe = SlowPipe(cluster.redis.port)
    server = await pipe.serve()
    slow = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    loop = asyncio.get_running_loop()
    context = replicas(2, [cluster.engine_url], slow)
    servers = await loop.run_in_executor(None, context.__enter__)
    try:
        behind = Cluster(cluster.engine, cluster.engine_url, servers, cluster.redis, cluster.http)
        pipe.delay_s = 0.2
        slowest_s = await chunks_per_stream(behind, builder, streams=10, chunks=8, pause_s=0.05)
        assert slowest_s < 10
        await finishes_elsewhere(behind)
    finally:
        await loop.run_in_executor(None, context.__exit__, None, None, None)
        server.close()
