"""Two gateways, one Redis, a real engine: what one of them began, the other ends, exactly."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator

import httpx
import pytest_asyncio

from deploy.local import Server, redis_server
from gateway.prompt import PromptBuilder
from tests.engine.conftest import MODEL, sent_whole
from tests.gateway.replicas import Caller, replicas

STREAMS = 12
ANSWER_TOKENS = 12
WORDS = ["river", "stone", "cloud", "engine", "paper", "green", "seven", "under", "music", "salt"]


@pytest_asyncio.fixture
async def servers(engine_server: Server) -> AsyncIterator[list[Server]]:
    loop = asyncio.get_running_loop()
    with redis_server() as redis:
        redis.start().wait_ready(20)
        context = replicas(2, [engine_server.url], redis.url)
        running = await loop.run_in_executor(None, context.__enter__)
        yield running
        await loop.run_in_executor(None, context.__exit__, None, None, None)


def messages(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{{{{documents}}}}\nWhat does text {n} say?"}]


async def test_answers_are_exact_when_a_gateway_is_killed_between_and_during_them(
    http: httpx.AsyncClient, engine_server: Server, servers: list[Server], builder: PromptBuilder
) -> None:
    rng = random.Random(11)
    caller = Caller(http, [server.url for server in servers], patience_s=120)
    half, killed = asyncio.Barrier(STREAMS + 1), asyncio.Event()

    async def one(n: int) -> tuple[list[str], str]:
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 25))) for _ in range(6)]
        created = await caller.call(
            "POST", "/v1/streams", 0, {"model": MODEL, "messages": messages(n)}
        )
        for seq, text in enumerate(texts):
            if seq == 3:
                await half.wait()
            await caller.send(created["id"], rng.randint(0, 1), seq, text)
        if n % 2:  # these are being answered when it happens, or about to be
            await killed.wait()
        path = f"/v1/streams/{created['id']}/finish"
        options = {"stream": False, "temperature": 0, "max_tokens": ANSWER_TOKENS}
        answer = await caller.call("POST", path, 0, options)
        return texts, answer["choices"][0]["message"]["content"]

    streams = [asyncio.create_task(one(n)) for n in range(STREAMS)]
    await half.wait()
    await asyncio.sleep(rng.uniform(0.2, 1.0))
    os.kill(servers[0].pid, signal.SIGKILL)
    killed.set()
    for n, (texts, answer) in enumerate(await asyncio.gather(*streams)):
        prompt = await builder.frame(messages(n))
        prompt = prompt.with_documents([await builder.document(text) for text in texts])
        whole = prompt.open.all() + list(prompt.tail)
        assert answer == (await sent_whole(http, engine_server, whole, ANSWER_TOKENS))[1]
