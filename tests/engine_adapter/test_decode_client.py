"""Answers of a stock server to prompts whose KV is elsewhere; the server does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from engine_adapter.decode_client import DecodeClient
from engine_adapter.errors import BadOperation, EngineError, EngineUnavailable, KvLost
from engine_adapter.messages import DoneEvent, Sampling, TokenEvent
from engine_adapter.operations import Decoding
from engine_adapter.plain_server import LOAD_TIMEOUT_S
from tests.conftest import until
from tests.fake_openai import MODEL, FakeOpenAI

KV = {"do_remote_prefill": True, "remote_engine_id": "e"}
TOKENS = list(range(20))
TWO = Sampling(max_tokens=2, temperature=0.0, seed=3)


@asynccontextmanager
async def running(fake: FakeOpenAI) -> AsyncIterator[DecodeClient]:
    runner = web.AppRunner(fake.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session:
        client = DecodeClient(session, f"http://{host}:{port}")
        await client.info()
        yield client
    for gate in (fake.answer_gate, fake.more_gate):
        gate.set()
    await runner.cleanup()


async def answered(
    client: Decoding, kv: dict[str, Any] | None = KV
) -> tuple[list[int], DoneEvent | None]:
    ids: list[int] = []
    async with client.answer(TOKENS, TWO, kv_transfer=kv, request_id="r") as events:
        async for event in events:
            if isinstance(event, DoneEvent):
                return ids, event
            assert isinstance(event, TokenEvent)
            ids += event.token_ids
    return ids, None


@pytest.mark.slow
async def test_a_server_may_take_as_long_to_say_how_it_is_as_its_caller_allows() -> None:
    fake = FakeOpenAI()
    async with running(fake) as client:
        fake.silent_s = LOAD_TIMEOUT_S + 0.3
        with pytest.raises(EngineUnavailable):
            await client.info(timeout_s=0.1)
        assert (await client.info(timeout_s=20)).model == MODEL


@pytest.mark.parametrize("kv", [KV, None])
async def test_the_server_is_asked_for_the_whole_answer(kv: dict[str, Any] | None) -> None:
    fake = FakeOpenAI()
    async with running(fake) as client:
        ids, done = await answered(client, kv)
    assert ids == [sum(TOKENS), sum(TOKENS) + 1]
    assert done is not None
    assert (done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("length", 20, 2)
    (body,) = fake.answers
    assert body.get("kv_transfer_params") == kv
    assert (body["prompt"], body["max_tokens"], body["seed"]) == (TOKENS, 2, 3)
    assert (body["request_id"], body["model"]) == ("r", MODEL)


async def test_info_says_what_the_server_is_and_that_it_was_started_anew() -> None:
    fake = FakeOpenAI(waiting=3)
    async with running(fake) as client:
        info = await client.info()
        assert (info.model, info.max_model_len, info.waiting) == (MODEL, 4096, 3)
        assert (info.kv_blocks_total, info.kv_blocks_free) == (200, 150)
        assert not info.hands_over
        assert info.operations == ["answer", "info"]
        assert (await client.info()).instance_id == info.instance_id
        fake.started_s = 200.0
        assert (await client.info()).instance_id != info.instance_id


@pytest.mark.parametrize("kv", [KV, None])
async def test_an_answer_that_fails_before_its_first_token(kv: dict[str, Any] | None) -> None:
    """With KV of another engine it can be prefilled anew; the server itself is well."""
    fake = FakeOpenAI()
    async with running(fake) as client:
        fake.refuses = 500, "Internal server error"
        with pytest.raises(KvLost if kv else EngineUnavailable, match="Internal server error"):
            await answered(client, kv)


async def test_what_the_server_refuses_is_not_the_fault_of_the_kv() -> None:
    fake = FakeOpenAI()
    async with running(fake) as client:
        fake.refuses = 400, "no such value"
        with pytest.raises(BadOperation):
            await answered(client)


async def test_an_answer_that_breaks_off_later_has_not_lost_its_kv() -> None:
    fake = FakeOpenAI(finish_reason="error")
    async with running(fake) as client:
        with pytest.raises(EngineUnavailable):
            await answered(client)


async def test_a_server_that_is_gone_has_not_lost_the_kv() -> None:
    async with running(FakeOpenAI()) as client:
        pass
    async with aiohttp.ClientSession() as session:
        gone = DecodeClient(session, client.url)
        with pytest.raises(EngineUnavailable):
            await answered(gone)


async def test_leaving_the_block_aborts_the_answer() -> None:
    fake = FakeOpenAI()
    async with running(fake) as client:
        fake.more_gate.clear()
        async with client.answer(TOKENS, TWO, kv_transfer=KV, request_id="r") as events:
            await anext(events)
        await until(_aborted(fake), within_s=5)


async def test_cancelling_who_waits_for_the_first_token_aborts_the_answer() -> None:
    fake = FakeOpenAI()
    async with running(fake) as client:
        fake.answer_gate.clear()
        reader = asyncio.create_task(answered(client))
        await until(_asked(fake), within_s=5)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await until(_aborted(fake), within_s=5)


def _asked(fake: FakeOpenAI) -> Any:
    async def asked() -> bool:
        return bool(fake.answers)

    return asked


def _aborted(fake: FakeOpenAI) -> Any:
    async def aborted() -> bool:
        return len(fake.aborted) == 1

    return aborted


def test_the_error_keeps_its_kind_on_the_wire() -> None:
    assert isinstance(EngineError.from_json(KvLost("gone").to_json()), KvLost)
