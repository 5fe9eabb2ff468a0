"""The index follows a real engine: what streams leave there, what makes way, a restart."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from cache_index.event_stream import Source, name_of
from cache_index.kv_events import Follower
from cache_index.mirror import Snapshot, unpacked
from deploy.local import EngineOptions, Server, engine
from engine_adapter.client import EngineClient
from engine_adapter.messages import Extend, KvEvents, Open
from tests.cache_index.publisher import ENGINE, FAMILY, TinyIndex
from tests.conftest import until
from tests.engine.conftest import finished

KV_BLOCKS = 41
"""40 blocks of 32 tokens, and vLLM's null block."""


@pytest.fixture
def server(model_dir: Path) -> Iterator[Server]:
    options = EngineOptions(
        model=model_dir,
        max_model_len=1024,
        kv_blocks=KV_BLOCKS,
        kv_events=True,
        debug_checks=True,
    )
    with engine(options) as server:
        yield server.start().wait_ready(180)


@asynccontextmanager
async def following(client: EngineClient, index: TinyIndex) -> AsyncIterator[KvEvents]:
    async def snapshot() -> Snapshot:
        blocks = await client.blocks()
        return Snapshot(blocks.instance_id, blocks.next_batch, blocks.names)

    told = (await client.info()).kv_events
    assert told is not None
    source = Source.at(client.url, told.endpoint, told.replay_endpoint, told.topic)
    follower = Follower(index, source, snapshot, family=FAMILY, engine=ENGINE, lease_s=60)
    follower.start()
    yield told
    await follower.stop()


def names(tokens: list[int], salt: str | None, told: KvEvents) -> set[int]:
    """By vLLM's own functions."""
    hash_fn = get_hash_fn_by_name(told.hash_algorithm)
    kv_cache_utils.init_none_hash(hash_fn)
    assert kv_cache_utils.NONE_HASH.hex() == told.hash_root
    request = Request(
        request_id="named",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=kv_cache_utils.get_request_block_hasher(told.block_size, hash_fn),
    )
    return set(map(name_of, request.block_hashes))


async def streamed(client: EngineClient, name: str, tokens: list[int], salt: str | None) -> None:
    """A prompt in three pieces, and its answer."""
    third = len(tokens) // 3
    await client.open(name, Open(tokens=tokens[:third], cache_salt=salt))
    await client.extend(name, Extend(version=1, keep=third, tokens=tokens[third : 2 * third]))
    await finished(client, name, 2, 2 * third, tokens[2 * third :], 3)


async def agreed(client: EngineClient, index: TinyIndex, within_s: float = 10) -> None:
    async def agree() -> bool:
        blocks = await client.blocks()
        same = set(unpacked(blocks.names)) == index.names
        return same and (blocks.instance_id, blocks.next_batch) == (index.instance, index.expected)

    await until(agree, within_s=within_s)


async def test_the_index_follows_an_engine_through_pressure_and_a_restart(server: Server) -> None:
    rng, index = random.Random(4), TinyIndex()
    prompts = [[rng.randrange(100, 40_000) for _ in range(400)] for _ in range(9)]
    async with aiohttp.ClientSession() as session:
        client = EngineClient(session, server.url)
        async with following(client, index) as told:
            assert told.block_size == 32
            await streamed(client, "first", prompts[0], None)
            await streamed(client, "salted", prompts[0], "tenant")
            await agreed(client, index)
            mine, theirs = names(prompts[0], None, told), names(prompts[0], "tenant", told)
            assert len(mine | theirs) == 2 * (400 // 32)
            assert mine | theirs <= index.names
            for i, prompt in enumerate(prompts[1:]):
                await streamed(client, f"pressure-{i}", prompt, None)
            await agreed(client, index)
            assert not mine & index.names, "it made way"
            assert names(prompts[-1], None, told) <= index.names
            server.kill()
            server.start().wait_ready(180)
            await agreed(client, index)
            assert index.names == set()
            await streamed(client, "again", prompts[0], None)
            await agreed(client, index)
            assert mine <= index.names
