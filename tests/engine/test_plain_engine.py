"""Stock vLLM without the plug-in, warmed: the answers are those of the whole prompts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest
import pytest_asyncio

from deploy.local import EngineOptions, Server, engine, gateway
from engine_adapter.errors import EngineUnavailable
from engine_adapter.messages import Extend, Finish, Open, Sampling, TokenEvent
from engine_adapter.plain_client import PlainClient
from gateway.client import Client
from tests.conftest import until
from tests.engine.conftest import MODEL, SOON_S, finished, sent_whole

STREAMS = 20
KV_BLOCKS = 97
"""96 blocks of 32 tokens, and vLLM's null block: 3,072 tokens."""


@pytest.fixture(scope="module")
def stock(model_dir: Path) -> Iterator[Server]:
    """vLLM without a plug-in of any kind, in float32."""
    options = EngineOptions(
        model=model_dir,
        dtype="float32",
        max_model_len=2048,
        kv_blocks=KV_BLOCKS,
        plugin=False,
        extra_args=("--enable-prompt-tokens-details",),
    )
    with engine(options) as server:
        server.start().wait_ready(300)
        yield server


@pytest_asyncio.fixture(scope="module")
async def plain(stock: Server) -> AsyncIterator[PlainClient]:
    async with aiohttp.ClientSession() as session:
        client = PlainClient(session, stock.url)
        yield client
        await client.close()


async def idle(client: PlainClient) -> bool:
    """Whether the server has no request and holds no KV for one."""
    info = await client.info()
    return info.running + info.waiting == 0 and info.kv_blocks_free == info.kv_blocks_total


async def grown(client: PlainClient, number: int) -> tuple[list[int], int]:
    """Open a prompt and change it a few times; its tokens and its version."""
    rng = random.Random(number)
    tokens = rng.choices(range(100, 40_000), k=rng.randint(1, 160))
    await client.open(f"history-{number}", Open(tokens=tokens, cache_salt=f"history-{number}"))
    version = 0
    for version in range(1, rng.randint(2, 5)):
        await asyncio.sleep(rng.choice([0, 0.05, 0.3]))
        keep = len(tokens) if rng.random() < 0.5 else rng.randint(1, len(tokens))
        new = rng.choices(range(100, 40_000), k=rng.randint(0, 60))
        op = Extend(version=version, keep=keep, tokens=new)
        await client.extend(f"history-{number}", op)
        tokens = tokens[:keep] + new
    return tokens, version


async def test_appends_and_updates_are_answered_as_the_whole_prompt(
    plain: PlainClient, http: httpx.AsyncClient, stock: Server
) -> None:
    few = asyncio.Semaphore(5)

    async def streamed(number: int) -> tuple[list[int], list[int]]:
        async with few:
            tokens, version = await grown(plain, number)
            prompt_id, tail = f"history-{number}", [500 + number]
            answer, _ = await finished(plain, prompt_id, version + 1, len(tokens), tail, 4)
            return tokens + tail, answer

    answers = await asyncio.gather(*(streamed(number) for number in range(STREAMS)))
    for prompt, answer in answers:
        assert answer == (await sent_whole(http, stock, prompt, 4))[0]


async def test_most_of_a_warmed_prompt_is_found_in_the_cache(plain: PlainClient) -> None:
    tokens = random.Random(1).choices(range(100, 40_000), k=1000)
    await plain.open("warm", Open(tokens=tokens[:400], cache_salt="warm"))
    for version in range(1, 7):
        await asyncio.sleep(0.1)
        part = tokens[300 + 100 * version : 400 + 100 * version]
        await plain.extend("warm", Extend(version=version, keep=300 + 100 * version, tokens=part))

    async def warmed() -> bool:
        return (await plain.status("warm")).state == "idle"

    await until(warmed, within_s=30)
    _, done = await finished(plain, "warm", 7, 1000, [5, 6, 7], 2)
    assert done.prompt_tokens == 1003
    assert done.cached_tokens > 0.9 * done.prompt_tokens


async def test_nothing_is_left_of_a_cancelled_prompt(plain: PlainClient) -> None:
    tokens = random.Random(2).choices(range(100, 40_000), k=1800)
    await plain.open("cancelled", Open(tokens=tokens))

    async def busy() -> bool:
        return (await plain.info()).running > 0

    await until(busy, within_s=10)
    await plain.abort("cancelled")
    assert await until(lambda: idle(plain), within_s=20) < SOON_S


async def test_nothing_is_left_of_an_answer_that_nobody_reads(plain: PlainClient) -> None:
    await plain.open("unread", Open(tokens=[504, 3575, 282]))
    sampling = Sampling(max_tokens=1500, ignore_eos=True)
    op = Finish(version=1, keep=3, tokens=[4649], sampling=sampling)
    async with plain.finish("unread", op) as events:
        event = await anext(events)
        assert isinstance(event, TokenEvent)
        assert not await idle(plain)
    assert await until(lambda: idle(plain), within_s=20) < SOON_S


async def test_the_gateway_goes_on_after_a_restart(
    plain: PlainClient, stock: Server, http: httpx.AsyncClient
) -> None:
    before = await plain.info()
    with gateway([], ["--plain-engine", stock.url]) as server:
        server.start().wait_ready(60)
        async with Client(server.url, timeout_s=60) as client:
            first = await asked(client)
            await asyncio.to_thread(stock.kill)
            with pytest.raises(EngineUnavailable):
                await plain.info()

            async def ready() -> bool:
                return (await http.get(server.url + "/ready")).status_code == 200

            async def away() -> bool:
                return not await ready()

            await until(away, within_s=5)
            stock.start()
            await asyncio.to_thread(stock.wait_ready, 300)
            await until(ready, within_s=10)
            assert await asked(client) == first
    assert (await plain.info()).instance_id != before.instance_id


async def asked(client: Client) -> str:
    """The answer to a prompt in three pieces."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    async with client.stream(MODEL, question, max_tokens=6, temperature=0) as stream:
        for text in ("France is in Europe. " * 20, "Paris is its capital. " * 20, "It rains."):
            await stream.send(text)
            await asyncio.sleep(0.2)
        return "".join([piece async for piece in stream.answer()])
