"""KV memory: under pressure everything finishes, and whoever leaves gives back what it held."""

from __future__ import annotations

import asyncio
import random

import httpx

from deploy.local import Server
from engine_adapter.client import EngineClient
from engine_adapter.messages import Extend, Finish, Open, Sampling
from gateway.client import Client
from tests.conftest import KV_BLOCKS, until
from tests.engine.conftest import MODEL, SOON_S, finished, sent_whole

QUESTION = [{"role": "user", "content": "Why?"}]
TEXT = "Memory that nobody uses is given back to the pool of blocks. "


async def all_free(client: EngineClient) -> bool:
    info = await client.info()
    return info.kv_blocks_free == KV_BLOCKS - 1 and info.running == 0


async def test_eight_streams_of_1400_tokens_in_a_pool_of_4224_all_finish(
    engine_client: EngineClient, http: httpx.AsyncClient, engine_server: Server
) -> None:
    rng = random.Random(1400)
    prompts = [[rng.randrange(100, 40000) for _ in range(1400)] for _ in range(8)]

    async def streamed(number: int) -> list[int]:
        prompt_id, tokens = f"pressure-{number}", prompts[number]
        await engine_client.open(prompt_id, Open(tokens=tokens[:200], lease_s=300))
        for version in range(1, 6):
            await asyncio.sleep(rng.uniform(0.1, 0.5))
            part = tokens[200 * version : 200 * version + 200]
            op = Extend(version=version, keep=200 * version, tokens=part)
            await engine_client.extend(prompt_id, op)
        return (await finished(engine_client, prompt_id, 6, 1200, tokens[1200:], 4))[0]

    async with asyncio.timeout(280):
        answers = await asyncio.gather(*(streamed(i) for i in range(8)))
    for i in range(8):
        assert answers[i] == (await sent_whole(http, engine_server, prompts[i], 4))[0]
    await until(lambda: all_free(engine_client), within_s=5)


async def test_a_reader_that_goes_away_frees_the_memory_soon(
    client: Client, engine_client: EngineClient, gateway_server: Server
) -> None:
    async with client.stream(MODEL, QUESTION, max_tokens=400, ignore_eos=True) as stream:
        await stream.send(TEXT * 20)
        pieces = stream.answer()
        await anext(pieces)
        assert not await all_free(engine_client)
        await pieces.aclose()  # closes the connection
        took_s = await until(lambda: all_free(engine_client), within_s=20)
    assert took_s < SOON_S


async def test_a_sender_that_goes_away_in_the_one_request_form_frees_the_memory(
    engine_client: EngineClient, gateway_server: Server
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", gateway_server.port)
    line = b'{"model": "%s", "messages": [{"role": "user", "content": "Why?"}]}\n' % MODEL.encode()
    writer.write(
        b"POST /v1/streams HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/x-ndjson\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(line), line)
    )
    await writer.drain()

    async def held() -> bool:
        return not await all_free(engine_client)

    await until(held, within_s=10)
    writer.close()
    assert await until(lambda: all_free(engine_client), within_s=20) < SOON_S


async def test_a_cancelled_stream_frees_its_memory_soon(
    client: Client, engine_client: EngineClient
) -> None:
    async with client.stream(MODEL, QUESTION) as stream:
        await stream.send(TEXT * 40)

        async def reading() -> bool:
            return (await stream.status())["tokens"]["prefilled"] > 200

        await until(reading, within_s=20)
        await stream.cancel()
        assert (await stream.status())["state"] == "cancelled"
        assert await until(lambda: all_free(engine_client), within_s=20) < SOON_S


async def test_a_prompt_whose_owner_is_silent_for_its_lease_is_freed(
    engine_client: EngineClient,
) -> None:
    await engine_client.open("silent", Open(tokens=[5] * 200, lease_s=1.5))
    await until(lambda: all_free(engine_client), within_s=10)


async def test_the_engine_reports_what_was_computed_early(engine_client: EngineClient) -> None:
    await engine_client.open("early", Open(tokens=list(range(100, 400))))

    async def computed() -> bool:
        return (await engine_client.status("early")).computed == 299  # all but the last

    await until(computed, within_s=10)
    _, done = await finished(engine_client, "early", 1, 300, [7, 8], 2)
    assert (done.prompt_tokens, done.cached_tokens) == (302, 299)


async def test_sampling_values_reach_vllm(engine_client: EngineClient) -> None:
    tokens = [504, 3575, 282, 4649, 314]  # a short prompt
    await engine_client.open("sampling", Open(tokens=tokens))
    sampling = Sampling(max_tokens=3, min_tokens=3, temperature=0.0, logprobs=2, seed=1)
    op = Finish(version=1, keep=5, tokens=[], sampling=sampling)
    async with engine_client.finish("sampling", op) as events:
        found = [event async for event in events]
    assert sum(len(event.token_ids) for event in found[:-1]) == 3
    assert all(len(position.top) == 2 for event in found[:-1] for position in event.logprobs)
