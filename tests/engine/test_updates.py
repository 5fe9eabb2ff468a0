"""Prompts that are rewritten while they are read, many at once, in memory that is too small."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest
import pytest_asyncio

from deploy.local import EngineOptions, Server, engine
from engine_adapter.client import EngineClient
from engine_adapter.errors import BadOperation, PromptFinished, VersionConflict
from engine_adapter.messages import ErrorEvent, Extend, Finish, Invalidate, Open, Sampling
from engine_adapter.scheduling.policies import POLICIES
from tests.conftest import until
from tests.engine.conftest import finished, sent_whole

POOL_TOKENS = 512
AT_ONCE = 6
ROUNDS = 10
ANSWER_TOKENS = 4
LONGEST_TOKENS = 400

policies = pytest.mark.parametrize("policy", list(POLICIES))


@pytest.fixture(scope="module")
def small_engine(model_dir: Path) -> Iterator[Server]:
    """A real vLLM that holds 512 tokens, its block accounts checked at every step."""
    options = EngineOptions(
        model=model_dir,
        dtype="float32",
        max_model_len=POOL_TOKENS,
        kv_blocks=1 + POOL_TOKENS // 32,
        policy="lcas",
        debug_checks=True,
    )
    with engine(options) as server:
        server.start().wait_ready(300)
        yield server


@pytest_asyncio.fixture(scope="module")
async def prompts(small_engine: Server) -> AsyncIterator[EngineClient]:
    async with aiohttp.ClientSession() as session:
        yield EngineClient(session, small_engine.url)


async def all_free(client: EngineClient) -> bool:
    info = await client.info()
    return info.open_prompts == 0 and info.kv_blocks_free == info.kv_blocks_total


def text(rng: random.Random, most: int) -> list[int]:
    return [rng.randrange(100, 40_000) for _ in range(rng.randint(0, most))]


async def history(
    client: EngineClient, prompt_id: str, rng: random.Random, late: Counter[str]
) -> tuple[list[int], list[int]] | None:
    """Play one prompt's life; its final tokens and its answer, or None if it was aborted."""
    tokens = [7, *text(rng, 150)]
    await client.open(prompt_id, Open(tokens=tokens, cache_salt=prompt_id))
    version = 0
    for _ in range(rng.randint(1, 5)):
        await asyncio.sleep(rng.choice([0.0, 0.0, 0.02, 0.1, 0.4]))
        version += 1
        keep = rng.randint(1, len(tokens))
        match rng.choices(["append", "update", "invalidate", "abort"], [5, 5, 2, 0.4])[0]:
            case "append":
                keep, new = len(tokens), text(rng, LONGEST_TOKENS - len(tokens))
            case "update":
                new = text(rng, LONGEST_TOKENS - keep)
            case "invalidate":
                answer = await client.invalidate(prompt_id, Invalidate(version=version, keep=keep))
                assert (answer.length, answer.kept) == (keep, keep)
                tokens = tokens[:keep]
                continue
            case "abort":
                await client.abort(prompt_id)
                return None
        answer = await client.extend(prompt_id, Extend(version=version, keep=keep, tokens=new))
        tokens = tokens[:keep] + new
        assert (answer.length, answer.kept) == (len(tokens), keep)
        assert answer.computed <= keep
    tail = [rng.randrange(100, 40_000)]
    finishing = asyncio.create_task(
        finished(client, prompt_id, version + 1, len(tokens), tail, ANSWER_TOKENS)
    )
    tokens = await updated_late(client, prompt_id, version + 1, tokens + tail, rng, late)
    output, done = await finishing
    assert done.prompt_tokens == len(tokens)
    return tokens, output


async def updated_late(
    client: EngineClient,
    prompt_id: str,
    version: int,
    tokens: list[int],
    rng: random.Random,
    late: Counter[str],
) -> list[int]:
    """Update a prompt, as often as not, whose `finish` is on its way; its tokens then."""
    for _ in range(rng.choice([0, 0, 1, 2])):
        await asyncio.sleep(rng.choice([0.0, 0.02, 0.1]))
        keep = rng.randint(1, len(tokens))
        new = text(rng, LONGEST_TOKENS - keep)
        op = Extend(version=version + 1, keep=keep, tokens=new)
        try:
            answer = await client.extend(prompt_id, op)
        except VersionConflict:  # it has overtaken `finish`
            continue
        except PromptFinished:
            late["too late"] += 1
            break
        late["in time"] += 1
        version, tokens = op.version, tokens[:keep] + new
        assert (answer.length, answer.kept, answer.state) == (len(tokens), keep, "finishing")
    return tokens


async def test_the_policy_is_chosen_by_a_flag_and_switched_at_run_time(
    prompts: EngineClient,
) -> None:
    assert (await prompts.info()).policy == "lcas", "as the fixture started it"
    for policy in POLICIES:
        assert (await prompts.set_policy(policy)).policy == policy
        assert (await prompts.info()).policy == policy
    with pytest.raises(BadOperation, match="no policy 'fastest'"):
        await prompts.set_policy("fastest")


@pytest.mark.timeout(1500)
async def test_concurrent_histories_are_answered_as_if_sent_whole(
    prompts: EngineClient, http: httpx.AsyncClient, small_engine: Server
) -> None:
    rounds_with_preemptions, late = 0, Counter[str]()
    for number, policy in itertools.product(range(ROUNDS), POLICIES):
        await prompts.set_policy(policy)
        before = (await prompts.info()).preemptions
        ids = [f"{policy}-{number}-{i}" for i in range(AT_ONCE)]
        async with asyncio.timeout(120):
            lives = await asyncio.gather(
                *(history(prompts, i, random.Random(i), late) for i in ids)
            )
        rounds_with_preemptions += (await prompts.info()).preemptions > before
        await until(lambda: all_free(prompts), within_s=5)
        for tokens, output in filter(None, lives):
            whole = await sent_whole(http, small_engine, tokens, ANSWER_TOKENS)
            assert output == whole[0], f"{policy}, round {number}"
    assert rounds_with_preemptions >= ROUNDS * len(POLICIES) / 3
    assert late["in time"] >= ROUNDS * len(POLICIES), late


@pytest.mark.parametrize("how", ["leaves", "deletes"])
async def test_an_answer_that_an_update_has_turned_is_freed_when_its_client(
    prompts: EngineClient, how: str
) -> None:
    rng = random.Random(how)
    first, second = ([7, *(rng.randrange(100, 40_000) for _ in range(399))] for _ in range(2))
    await prompts.open(how, Open(tokens=first[:10]))
    op = Finish(version=1, keep=10, tokens=first[10:], sampling=Sampling(max_tokens=100))
    async with prompts.finish(how, op) as events:
        answer = await prompts.extend(how, Extend(version=2, keep=1, tokens=second[1:]))
        assert (answer.length, answer.kept) == (400, 1)
        if how == "deletes":
            await prompts.abort(how)
            assert [type(event) async for event in events][-1] is ErrorEvent
    await until(lambda: all_free(prompts), within_s=5)


@pytest.mark.timeout(300)
@policies
async def test_24_streams_in_a_quarter_of_their_memory_all_finish(
    prompts: EngineClient, policy: str
) -> None:
    await prompts.set_policy(policy)

    async def streamed(i: int) -> int:
        rng = random.Random(i)
        parts = [[rng.randrange(100, 40_000) for _ in range(21)] for _ in range(4)]
        prompt_id = f"quarter-{policy}-{i}"
        await prompts.open(prompt_id, Open(tokens=parts[0]))
        for version in (1, 2):
            await asyncio.sleep(0.1)
            op = Extend(version=version, keep=21 * version, tokens=parts[version])
            await prompts.extend(prompt_id, op)
        _, done = await finished(prompts, prompt_id, 3, 63, parts[3], 2)
        return done.prompt_tokens

    async with asyncio.timeout(200):
        assert await asyncio.gather(*(streamed(i) for i in range(24))) == [84] * 24
    await until(lambda: all_free(prompts), within_s=5)
