"""The simulated engine as a server: a gateway and its clients find a vLLM with the plug-in."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import pytest_asyncio

pytest.importorskip("vllm")

from deploy.local import Server, command, gateway
from engine_adapter.client import EngineClient
from engine_adapter.errors import (
    BadOperation,
    PromptExists,
    PromptFinished,
    PromptTooLong,
    UnknownPrompt,
    VersionConflict,
)
from engine_adapter.messages import (
    Blocks,
    DoneEvent,
    ErrorEvent,
    Event,
    Extend,
    Finish,
    Invalidate,
    Open,
    Sampling,
    TokenEvent,
)
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.simulated.hardware import H100X2, LLAMA_3_1_8B
from engine_adapter.simulated.realtime import RealTimeEngine
from gateway.client import Client, StreamError
from tests.conftest import until

pytestmark = pytest.mark.engine  # not for their needs, for their time

MODEL = "some-model"
KV_TOKENS = 100_000
SPEED = 0.5
MESSAGES = [{"role": "user", "content": "{{documents}}\nWhy?"}]


def estimate_s(cached: int, tokens: int, step_tokens: int = 8192) -> float:
    """Real seconds of computing tokens behind cached ones alone."""
    steps = range(cached, cached + tokens, step_tokens)
    works = [(begin, min(step_tokens, cached + tokens - begin)) for begin in steps]
    return sum(H100X2.step_s(LLAMA_3_1_8B, [work]) for work in works) / SPEED


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    line = [sys.executable, "-m", "engine_adapter.simulated", "--port", "{port}"]
    line += ["--hardware", "h100x2", "--model-name", MODEL, "--policy", "fcfs"]
    line += ["--kv-tokens", str(KV_TOKENS), "--speed", str(SPEED)]
    with command("simulated", line, ready_path="/health") as server:
        yield server.start().wait_ready(60)


@pytest_asyncio.fixture(scope="module")
async def engine(server: Server) -> AsyncIterator[EngineClient]:
    async with aiohttp.ClientSession() as session:
        yield EngineClient(session, server.url)


@pytest.fixture(scope="module")
def gateway_server(server: Server, model_dir: Path) -> Iterator[Server]:
    with gateway([server.url], ["--tokenizer", str(model_dir)]) as front:
        yield front.start().wait_ready(60)


@pytest_asyncio.fixture(scope="module")
async def client(gateway_server: Server) -> AsyncIterator[Client]:
    async with Client(gateway_server.url) as client:
        yield client


async def nothing_held(engine: EngineClient) -> bool:
    info = await engine.info()
    return info.kv_blocks_free == info.kv_blocks_total and not info.open_prompts


async def idle(engine: EngineClient, prompt_id: str) -> bool:
    return (await engine.status(prompt_id)).state == "idle"


def finish(version: int, keep: int, tokens: list[int], answer: int, **sampling: Any) -> Finish:
    sampled = Sampling(max_tokens=answer, **sampling)
    return Finish(version=version, keep=keep, tokens=tokens, sampling=sampled)


async def answer(engine: EngineClient, prompt_id: str, op: Finish) -> tuple[list[Event], float]:
    """The events of an answer, and the time to the first of them."""
    begun_s, first_s, events = time.monotonic(), 0.0, []
    async with engine.finish(prompt_id, op) as stream:
        async for event in stream:
            first_s = first_s or time.monotonic() - begun_s
            events.append(event)
    return events, first_s


async def test_operations_are_those_of_the_real_engine(engine: EngineClient) -> None:
    opened = Open(tokens=list(range(100)))
    first = await engine.open("p", opened)
    assert (first.version, first.length) == (0, 100)
    assert await engine.open("p", opened) == first, "a retry has the first answer"
    with pytest.raises(PromptExists):
        await engine.open("p", Open(tokens=[1]))
    op = Extend(version=1, keep=100, tokens=list(range(100, 200)))
    extended = await engine.extend("p", op)
    assert await engine.extend("p", op) == extended
    await until(lambda: idle(engine, "p"), within_s=5)
    cut = await engine.invalidate("p", Invalidate(version=2, keep=40))
    assert (cut.kept, cut.length, cut.computed) == (40, 40, 32), "cut at the border of a block"
    assert (cut.invalidated, cut.freed_blocks) == (199 - 32, 11)
    with pytest.raises(VersionConflict) as gap:
        await engine.extend("p", Extend(version=9, keep=0, tokens=[1]))
    assert gap.value.details == {"expected_version": 3}
    with pytest.raises(VersionConflict):
        await engine.invalidate("p", Invalidate(version=2, keep=41))
    told = await engine.tokens("p")
    assert (told.version, told.finished, told.tokens) == (2, False, list(range(40)))
    with pytest.raises(UnknownPrompt):
        await engine.tokens("q")
    with pytest.raises(PromptTooLong):
        await engine.extend("p", Extend(version=3, keep=40, tokens=[7] * KV_TOKENS))
    with pytest.raises(BadOperation, match="temperature"):
        await answer(engine, "p", finish(3, 40, [7], 1, temperature=-1.0))
    events, _ = await answer(engine, "p", finish(3, 40, [7, 8], 5))
    *tokens, done = events
    assert [len(e.token_ids) for e in tokens if isinstance(e, TokenEvent)] == [1] * 5
    text = "".join(e.text for e in tokens if isinstance(e, TokenEvent))
    assert text == "simulated words mean nothing simulated"
    assert isinstance(done, DoneEvent)
    assert (done.prompt_tokens, done.completion_tokens, done.finish_reason) == (42, 5, "length")
    assert done.cached_tokens in (32, 39)
    with pytest.raises(PromptFinished):
        await engine.extend("p", Extend(version=4, keep=0, tokens=[1]))
    await engine.abort("p")
    with pytest.raises(UnknownPrompt):
        await engine.status("p")
    await until(lambda: nothing_held(engine), within_s=5)


async def test_info_names_it_and_the_policy_can_be_switched(engine: EngineClient) -> None:
    info = await engine.info()
    assert (info.model, info.policy, info.max_model_len) == (MODEL, "fcfs", KV_TOKENS - 16)
    assert (await engine.set_policy("lcas")).policy == "lcas"
    with pytest.raises(BadOperation):
        await engine.set_policy("none")
    assert (await engine.set_policy("fcfs")).policy == "fcfs"
    assert info.kv_events is None, "nothing is published"


async def test_its_blocks_are_those_that_its_prefix_cache_has(engine: EngineClient) -> None:
    before = await engine.blocks()
    await engine.open("named", Open(tokens=list(range(500_000, 500_100))))
    await until(lambda: idle(engine, "named"), within_s=5)
    now = await engine.blocks()
    assert now.instance_id == (await engine.info()).instance_id
    assert len(now.names) == len(before.names) + 6 * 8, "96 of 99 tokens are in whole blocks"
    await engine.abort("named")
    assert set_of(await engine.blocks()) == set_of(now), "what is given back is found still"


def set_of(blocks: Blocks) -> set[bytes]:
    return {blocks.names[i : i + 8] for i in range(0, len(blocks.names), 8)}


async def test_the_backlog_is_told_while_it_lasts(engine: EngineClient) -> None:
    assert (await engine.info()).waiting_tokens == 0
    await engine.open("long", Open(tokens=list(range(600_000, 660_000))))
    assert 0 < (await engine.info()).waiting_tokens < 60_000
    await until(lambda: idle(engine, "long"), within_s=30)
    assert (await engine.info()).waiting_tokens == 0
    await engine.abort("long")


async def test_ttft_is_that_of_what_was_not_yet_read(engine: EngineClient) -> None:
    whole_s, last_s = estimate_s(0, 40_000), estimate_s(39_999, 101)
    assert whole_s > 40 * last_s
    _, ttft_s = await whole(engine, "whole", list(range(40_100)))
    assert whole_s <= ttft_s < 2 * whole_s
    context = list(range(100_000, 140_000))
    await engine.open("streamed", Open(tokens=context[:20_000]))
    await engine.extend("streamed", Extend(version=1, keep=20_000, tokens=context[20_000:]))
    await until(lambda: idle(engine, "streamed"), within_s=20)
    events, ttft_s = await answer(engine, "streamed", finish(2, 40_000, [1] * 100, 1))
    assert last_s <= ttft_s < whole_s / 4
    done = events[-1]
    assert isinstance(done, DoneEvent)
    assert done.cached_tokens == 39_999


async def whole(
    engine: EngineClient, prompt_id: str, tokens: list[int]
) -> tuple[list[Event], float]:
    """A prompt that is opened with one token, and finished at once with the others."""
    await engine.open(prompt_id, Open(tokens=tokens[:1]))
    return await answer(engine, prompt_id, finish(1, 1, tokens[1:], 1))


async def test_abort_frees_the_blocks_of_an_open_prompt(engine: EngineClient) -> None:
    await until(lambda: nothing_held(engine), within_s=5)
    await engine.open("held", Open(tokens=list(range(5000))))
    await until(lambda: idle(engine, "held"), within_s=10)
    info = await engine.info()
    assert info.kv_blocks_total - info.kv_blocks_free == 313
    await engine.abort("held")
    assert await nothing_held(engine)


async def test_abort_ends_an_answer_under_way_with_an_error(engine: EngineClient) -> None:
    await engine.open("answered", Open(tokens=[1, 2]))
    async with engine.finish("answered", finish(1, 2, [], 50_000)) as events:
        assert isinstance(await anext(events), TokenEvent)
        await engine.abort("answered")
        rest = [event async for event in events]
    assert isinstance(rest[-1], ErrorEvent)
    assert rest[-1].error["code"] == "engine_unavailable"
    await until(lambda: nothing_held(engine), within_s=5)


async def test_a_reader_that_goes_away_frees_the_memory(engine: EngineClient) -> None:
    await engine.open("left", Open(tokens=list(range(3000))))
    async with engine.finish("left", finish(1, 3000, [], 50_000)) as events:
        assert isinstance(await anext(events), TokenEvent)
    await until(lambda: nothing_held(engine), within_s=5)


async def test_a_reader_that_goes_away_before_the_first_token_ends_the_prefill(
    engine: EngineClient,
) -> None:
    await engine.open("early", Open(tokens=list(range(100_000, 180_000))))
    with suppress(TimeoutError):
        async with asyncio.timeout(0.3), engine.finish("early", finish(1, 80_000, [], 1)) as events:
            await anext(events)
    await until(lambda: nothing_held(engine), within_s=estimate_s(0, 80_000) / 3)


async def test_a_prompt_whose_owner_is_silent_for_its_lease_is_freed(engine: EngineClient) -> None:
    await engine.open("silent", Open(tokens=list(range(3000)), lease_s=0.3))
    await until(lambda: nothing_held(engine), within_s=5)
    with pytest.raises(UnknownPrompt):
        await engine.status("silent")


async def test_plain_requests(
    server: Server, engine: EngineClient, http: httpx.AsyncClient
) -> None:
    models = (await http.get(server.url + "/v1/models")).json()
    assert [model["id"] for model in models["data"]] == [MODEL]
    url, body = server.url + "/v1/completions", {"model": MODEL, "prompt": [5] * 9}
    given = (await http.post(url, json=body | {"max_tokens": 3})).json()
    assert given["choices"][0]["text"] == "simulated words mean"
    assert given["usage"]["total_tokens"] == 12
    for wrong, status in (
        ({"prompt": 5}, 400),
        ({"prompt": ""}, 400),
        ({"prompt": "a", "max_tokens": -1}, 400),
        ({"prompt": [1] * KV_TOKENS}, 400),
        ({"prompt": "a", "model": "other"}, 404),
    ):
        assert (await http.post(url, json=wrong)).status_code == status
    async with http.stream("POST", url, json=body | {"max_tokens": 9999, "stream": True}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        await anext(answer.aiter_lines())
    await until(lambda: nothing_held(engine), within_s=5)


async def test_streams_through_a_gateway(client: Client, engine: EngineClient) -> None:
    whole_s = estimate_s(0, 20_000)
    pages = [" ".join(f"{subject}{i}" for i in range(2500)) for subject in ("a", "b", "c")]
    async with client.stream(MODEL, MESSAGES, max_tokens=6) as stream:
        for name, page in zip("abc", pages, strict=True):
            assert await stream.send(page, id=name) > 2500
        taken = await stream.replace([{"id": "a"}, {"id": "c"}])
        assert taken["kept"] > 2500

        async def read() -> bool:
            tokens = (await stream.status())["tokens"]
            return bool(tokens["prefilled"] >= tokens["received"] > 0)

        await until(read, within_s=30)
        begun_s = time.monotonic()
        pieces = [piece async for piece in _timed(stream.answer(), begun_s)]
    assert "".join(text for text, _ in pieces) == "simulated words mean nothing simulated words"
    assert len(pieces) == 6
    assert pieces[0][1] < whole_s
    assert stream.finish_reason == "length"
    assert stream.usage is not None
    assert stream.usage["prompt_tokens"] > 10_000
    cached = stream.usage["prompt_tokens_details"]["cached_tokens"]
    assert stream.usage["prompt_tokens"] - cached < 100
    await until(lambda: nothing_held(engine), within_s=5)


async def _timed(pieces: AsyncIterator[str], begun_s: float) -> AsyncIterator[tuple[str, float]]:
    async for piece in pieces:
        yield piece, time.monotonic() - begun_s


async def test_a_gateways_reader_that_goes_away_frees_the_memory(
    client: Client, engine: EngineClient
) -> None:
    async with client.stream(MODEL, MESSAGES, max_tokens=50_000) as stream:
        await stream.send("some context")
        await anext(stream.answer())
    await until(lambda: nothing_held(engine), within_s=5)


async def test_errors_of_the_engine_reach_a_client_of_the_gateway(client: Client) -> None:
    with pytest.raises(StreamError, match="serves"):
        async with client.stream("another", MESSAGES):
            pass
    async with client.stream(MODEL, MESSAGES, temperature=-1.0) as stream:
        with pytest.raises(StreamError, match="temperature"):
            await stream.finish()


async def test_plain_requests_through_a_gateway(
    gateway_server: Server, http: httpx.AsyncClient
) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = await http.post(gateway_server.url + "/v1/chat/completions", json=body)
    *data, done = [line[6:] for line in response.text.splitlines() if line]
    *chunks, usage = [json.loads(line) for line in data]
    assert done == "[DONE]"
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == [
        "simulated",
        " words",
        None,
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "length"]
    assert usage["usage"]["completion_tokens"] == 2


async def test_an_operation_takes_effect_at_the_end_of_the_step_under_way() -> None:
    engine = SimulatedEngine(H100X2, LLAMA_3_1_8B)
    running = RealTimeEngine(engine, SPEED)

    async def computing() -> bool:
        return engine.counters.steps == 1

    loop = asyncio.create_task(running.run())
    try:
        async with aclosing(running.generate("r", list(range(8000)), 1)) as events:
            begun_s = time.monotonic()
            first = asyncio.ensure_future(anext(events))
            await until(computing, within_s=5, every_s=0.001)
            await running.load()
            assert time.monotonic() - begun_s > 0.9 * estimate_s(0, 8000)
            assert isinstance(await first, TokenEvent)
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
