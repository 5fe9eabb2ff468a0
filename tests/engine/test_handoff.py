"""Prefill at one engine, decode at another, stock one; the KV goes over vLLM's NIXL connector."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import pytest_asyncio

from deploy.local import EngineOptions, Server, engine
from engine_adapter.client import EngineClient
from engine_adapter.decode_client import DecodeClient
from engine_adapter.errors import KvLost
from engine_adapter.messages import (
    DoneEvent,
    EngineInfo,
    Extend,
    Finish,
    Open,
    Sampling,
    TokenEvent,
)
from tests.conftest import until
from tests.engine.conftest import SOON_S

BLOCK = 32
KV_BLOCKS = 97
LEASE_S = 12
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
SEEDED = Sampling(max_tokens=12, temperature=0.9, seed=7, ignore_eos=True)
_numbers = itertools.count()


@dataclass
class Pair:
    """An engine that prefills, one that decodes, and a client of each."""

    server: Server
    prefill: EngineClient
    decode: DecodeClient

    async def idle(self) -> bool:
        return all(map(_idle, await asyncio.gather(self.prefill.info(), self.decode.info())))


def _idle(info: EngineInfo) -> bool:
    return info.running + info.waiting == 0 and info.kv_blocks_free == info.kv_blocks_total


@pytest.fixture(scope="module")
def servers(model_dir: Path) -> Iterator[tuple[Server, Server]]:
    """A producer with the plug-in and a consumer without, each on a core of its own."""
    last = (os.cpu_count() or 1) - 1
    common: dict[str, Any] = {
        "model": model_dir, "dtype": "float32", "max_model_len": 2048, "kv_blocks": KV_BLOCKS,
    }  # fmt: skip
    producer = EngineOptions(
        **common, kv_role="kv_producer", kv_lease_s=LEASE_S, cores="0", debug_checks=True
    )
    consumer = EngineOptions(**common, kv_role="kv_consumer", plugin=False, cores=str(last))
    with ExitStack() as stack:
        started = [stack.enter_context(engine(o)).start() for o in (producer, consumer)]
        for server in started:
            server.wait_ready(300)
        yield started[0], started[1]


@pytest_asyncio.fixture(scope="module")
async def engines(servers: tuple[Server, Server]) -> AsyncIterator[Pair]:
    prefill, decode = servers
    async with aiohttp.ClientSession() as session:
        yield Pair(prefill, EngineClient(session, prefill.url), DecodeClient(session, decode.url))


@pytest_asyncio.fixture
async def pair(engines: Pair) -> AsyncIterator[Pair]:
    """Both engines; when a test has ended they hold no KV."""
    yield engines
    await until(engines.idle, within_s=LEASE_S + 5)


def prompt_id() -> str:
    return f"handed-{next(_numbers)}"


def prompt(length: int) -> list[int]:
    return random.Random(next(_numbers)).choices(range(100, 40_000), k=length)


async def grown(client: EngineClient, name: str, tokens: list[int], seed: int) -> Finish:
    """Bring an open prompt near its tokens by appends and updates; what is left to send."""
    rng = random.Random(seed)
    now = tokens[: rng.randint(1, len(tokens))] + prompt(rng.randint(0, 40))
    await client.open(name, Open(tokens=now))
    version = 0
    for version in range(1, 4):
        keep = rng.randint(1, len(now))
        same = next((i for i in range(keep) if now[i : i + 1] != tokens[i : i + 1]), keep)
        new = tokens[same : rng.randint(same, len(tokens))]
        await client.extend(name, Extend(version=version, keep=same, tokens=new))
        now = now[:same] + new
        if not now:
            now = tokens[:1]
    same = next((i for i, t in enumerate(now) if tokens[i : i + 1] != [t]), len(now))
    return Finish(version=version + 1, keep=same, tokens=tokens[same:], sampling=GREEDY)


async def read(events: AsyncIterator[Any]) -> tuple[list[int], DoneEvent]:
    ids: list[int] = []
    async for event in events:
        if isinstance(event, TokenEvent):
            ids += event.token_ids
        else:
            assert isinstance(event, DoneEvent), event
            return ids, event
    raise AssertionError("no end")


async def prefilled(
    pair: Pair, tokens: list[int], sampling: Sampling, name: str | None = None
) -> tuple[list[int], DoneEvent]:
    """The first token of a prompt sent in two pieces, and where its KV is."""
    name = name or prompt_id()
    await pair.prefill.open(name, Open(tokens=tokens[:5]))
    op = Finish(
        version=1, keep=len(tokens[:5]), tokens=tokens[5:], sampling=sampling, hand_over=True
    )
    async with pair.prefill.finish(name, op) as events:
        return await read(events)


async def answered(
    client: DecodeClient, tokens: list[int], sampling: Sampling, kv: dict[str, Any] | None
) -> list[int]:
    """The decode engine's answer; to a prompt without KV with no cache to use."""
    salt = None if kv else prompt_id()
    async with client.answer(
        tokens, sampling, kv_transfer=kv, request_id=prompt_id(), cache_salt=salt
    ) as events:
        ids, done = await read(events)
    assert done.prompt_tokens == len(tokens)
    return ids


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """A server all of whose processes hang."""
    leader = psutil.Process(server.pid)
    family = [leader, *leader.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in family:
            process.send_signal(signal.SIGCONT)


async def test_they_say_what_they_are(pair: Pair) -> None:
    assert (await pair.prefill.info()).hands_over
    info = await pair.decode.info()
    assert not info.hands_over
    assert (info.block_size, info.max_model_len) == (BLOCK, 2048)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 96, 300])
async def test_the_answer_is_that_of_a_single_engine(
    pair: Pair, length: int, sampling: Sampling
) -> None:
    tokens, name = prompt(length), prompt_id()
    op = await grown(pair.prefill, name, tokens, seed=length)
    op = Finish(
        version=op.version, keep=op.keep, tokens=op.tokens, sampling=sampling, hand_over=True
    )
    async with pair.prefill.finish(name, op) as events:
        first, done = await read(events)
    assert (len(first), done.prompt_tokens, done.finish_reason) == (1, length, "length")
    found = await answered(pair.decode, tokens, sampling, done.kv_transfer)
    assert found == await answered(pair.decode, tokens, sampling, None)
    assert found[:1] == first
    assert (await pair.prefill.status(name)).state == "fetched"


async def test_what_is_not_handed_over_is_answered_here(pair: Pair) -> None:
    tokens, name = prompt(120), prompt_id()
    op = await grown(pair.prefill, name, tokens, seed=1)
    async with pair.prefill.finish(name, op) as events:
        found, done = await read(events)
    assert done.kv_transfer is None
    assert found == await answered(pair.decode, tokens, GREEDY, None)


async def test_abort_frees_the_kv_that_nobody_has_fetched(pair: Pair) -> None:
    name = prompt_id()
    _, done = await prefilled(pair, prompt(200), GREEDY, name)
    assert done.kv_transfer is not None
    info = await pair.prefill.info()
    assert info.kv_blocks_total - info.kv_blocks_free == 200 // BLOCK + 1
    await pair.prefill.abort(name)
    await until(pair.idle, within_s=SOON_S)


async def test_an_answer_of_one_token_leaves_no_kv_behind(pair: Pair) -> None:
    tokens = prompt(100)
    one = Sampling(max_tokens=1, temperature=0.0)
    (token,), done = await prefilled(pair, tokens, one)
    assert (done.finish_reason, done.kv_transfer) == ("length", None)
    stops = Sampling(max_tokens=9, temperature=0.0, stop_token_ids=[token])
    _, done = await prefilled(pair, tokens, stops)
    assert (done.finish_reason, done.kv_transfer) == ("stop", None)
    await until(pair.idle, within_s=SOON_S)


async def test_kv_that_nobody_fetches_goes_when_its_lease_ends(pair: Pair) -> None:
    name = prompt_id()
    await prefilled(pair, prompt(100), GREEDY, name)
    begun_s = time.monotonic()
    assert not await pair.idle()
    assert (await pair.prefill.status(name)).state == "handed_over"
    await until(pair.idle, within_s=LEASE_S + 5)
    assert time.monotonic() - begun_s > LEASE_S / 2
    assert (await pair.prefill.status(name)).state == "expired"


async def test_a_reader_that_goes_away_leaves_no_kv_behind(pair: Pair) -> None:
    name, tokens = prompt_id(), prompt(900)
    await pair.prefill.open(name, Open(tokens=tokens[:5]))
    op = Finish(version=1, keep=5, tokens=tokens[5:], sampling=GREEDY, hand_over=True)
    async with pair.prefill.finish(name, op):
        pass
    await until(pair.idle, within_s=SOON_S)


async def test_cancelling_while_it_decodes_frees_both(pair: Pair) -> None:
    tokens = prompt(200)
    long = Sampling(max_tokens=1500, temperature=0.0, ignore_eos=True)
    _, done = await prefilled(pair, tokens, long)
    async with pair.decode.answer(
        tokens, long, kv_transfer=done.kv_transfer, request_id=prompt_id()
    ) as events:
        await anext(events)
    await until(pair.idle, within_s=SOON_S)


async def test_kv_that_does_not_come_can_be_given_up(pair: Pair) -> None:
    tokens = prompt(200)
    _, done = await prefilled(pair, tokens, GREEDY)
    await answered(pair.decode, tokens, GREEDY, done.kv_transfer)  # they know each other now
    other = prompt(200)
    _, done = await prefilled(pair, other, GREEDY)
    with stopped(pair.server):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await answered(pair.decode, other, GREEDY, done.kv_transfer)
        assert await answered(pair.decode, tokens[:40], GREEDY, None)


async def test_kv_of_an_engine_that_cannot_be_reached_is_lost(pair: Pair) -> None:
    name, tokens = prompt_id(), prompt(100)
    _, done = await prefilled(pair, tokens, GREEDY, name)
    assert done.kv_transfer is not None
    nowhere = done.kv_transfer | {"remote_engine_id": "nobody", "remote_port": 1}
    with pytest.raises(KvLost):
        await answered(pair.decode, tokens, GREEDY, nowhere)
    await pair.prefill.abort(name)


async def test_kv_of_an_engine_that_died_is_lost_and_the_other_goes_on(engines: Pair) -> None:
    """The last one: nobody prefills after it."""
    tokens = prompt(150)
    _, done = await prefilled(engines, tokens, GREEDY)
    engines.server.kill()
    begun_s = time.monotonic()
    with pytest.raises(KvLost):
        await answered(engines.decode, tokens, GREEDY, done.kv_transfer)
    assert time.monotonic() - begun_s < 30
    assert await answered(engines.decode, tokens, GREEDY, None)

    async def idle() -> bool:
        return _idle(await engines.decode.info())

    await until(idle, within_s=5)
