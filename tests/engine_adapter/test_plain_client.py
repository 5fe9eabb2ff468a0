"""The operations on a server that was not modified, one that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_adapter import completions
from engine_adapter.errors import (
    BadOperation,
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    PromptFinished,
    PromptTooLong,
    UnknownPrompt,
    VersionConflict,
)
from engine_adapter.messages import (
    DoneEvent,
    Event,
    Extend,
    Finish,
    Invalidate,
    Open,
    Sampling,
    TokenEvent,
    TokenLogprob,
)
from engine_adapter.plain_client import PlainClient
from engine_adapter.plain_server import Load, load_of
from engine_adapter.warming import AT_ONCE, MIN_NEW_TOKENS
from tests.conftest import until
from tests.fake_openai import BLOCK_TOKENS, MODEL, FakeOpenAI

ANSWER = Sampling(max_tokens=2, temperature=0.0)
PART = MIN_NEW_TOKENS


@dataclass
class Pair:
    """A server and a client of it."""

    fake: FakeOpenAI
    client: PlainClient


@asynccontextmanager
async def running(fake: FakeOpenAI) -> AsyncIterator[Pair]:
    runner = web.AppRunner(fake.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as session:
        client = PlainClient(session, f"http://{host}:{port}/")
        yield Pair(fake, client)
        await client.close()
    for gate in (fake.gate, fake.answer_gate, fake.more_gate):
        gate.set()
    await runner.cleanup()


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[Pair]:
    async with running(FakeOpenAI()) as pair:
        yield pair


def ids(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def holds(condition: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def asked() -> bool:
        return condition()

    return asked


async def soon(condition: Callable[[], bool]) -> None:
    await until(holds(condition), within_s=5, every_s=0.005)


async def answered(pair: Pair, prompt_id: str, op: Finish) -> list[Event]:
    async with pair.client.finish(prompt_id, op) as events:
        return [event async for event in events]


def sent(pair: Pair) -> list[list[int]]:
    return [body["prompt"] for body in pair.fake.warmings]


async def test_a_growing_prompt_is_warmed_in_whole_blocks_and_answered_whole(pair: Pair) -> None:
    tokens = ids(2 * PART + 5)
    progress = await pair.client.open("a", Open(tokens=tokens[: PART + 3], cache_salt="salt"))
    assert (progress.version, progress.length, progress.computed) == (0, PART + 3, 0)

    async def warmed() -> bool:
        return (await pair.client.status("a")).computed == PART

    await until(warmed, within_s=5)
    await pair.client.extend("a", Extend(version=1, keep=PART + 3, tokens=tokens[PART + 3 :]))
    await soon(lambda: len(pair.fake.warmings) == 2 and not pair.fake.at_once)
    assert sent(pair) == [tokens[:PART], tokens[: 2 * PART]]

    tail = [7, 8]
    op = Finish(version=2, keep=len(tokens), tokens=tail, sampling=ANSWER)
    *pieces, done = await answered(pair, "a", op)
    first = sum(tokens + tail)
    assert [p.token_ids for p in pieces if isinstance(p, TokenEvent)] == [[first], [first + 1]]
    assert done == DoneEvent(
        finish_reason="length",
        prompt_tokens=len(tokens) + 2,
        cached_tokens=2 * PART,
        completion_tokens=2,
    )
    bodies = pair.fake.warmings + pair.fake.answers
    assert {(body["model"], body["cache_salt"]) for body in bodies} == {(MODEL, "salt")}
    assert [body["max_tokens"] for body in bodies] == [1, 1, 2]


async def test_what_arrives_during_a_warming_goes_into_the_next(pair: Pair) -> None:
    pair.fake.gate.clear()
    await pair.client.open("a", Open(tokens=ids(PART)))
    await soon(lambda: bool(pair.fake.warmings))
    for number in range(1, 6):
        await pair.client.extend(
            "a", Extend(version=number, keep=number * PART, tokens=ids(PART, number * PART))
        )
    assert (await pair.client.status("a")).state == "running"
    pair.fake.gate.set()
    await soon(lambda: len(pair.fake.warmings) == 2)
    assert sent(pair) == [ids(PART), ids(6 * PART)]
    assert pair.fake.most_at_once == 1


async def test_small_additions_wait_until_they_are_worth_a_warming(pair: Pair) -> None:
    await pair.client.open("a", Open(tokens=ids(PART)))
    length, version = PART, 0
    while length + BLOCK_TOKENS < 2 * PART:
        version += 1
        op = Extend(version=version, keep=length, tokens=ids(BLOCK_TOKENS, length))
        await pair.client.extend("a", op)
        length += BLOCK_TOKENS
    await soon(lambda: len(pair.fake.warmings) == 1 and not pair.fake.at_once)
    assert (await pair.client.status("a")).state == "idle"
    op = Extend(version=version + 1, keep=length, tokens=ids(2 * PART - length, length))
    await pair.client.extend("a", op)
    await soon(lambda: len(pair.fake.warmings) == 2)
    assert sent(pair)[1] == ids(2 * PART)


async def test_no_more_warmings_at_once_than_the_limit(pair: Pair) -> None:
    pair.fake.gate.clear()
    for number in range(6):
        await pair.client.open(str(number), Open(tokens=ids(PART, 1000 * number)))
    await soon(lambda: pair.fake.at_once == AT_ONCE)
    pair.fake.gate.set()
    await soon(lambda: len(pair.fake.warmings) == 6)
    assert pair.fake.most_at_once == AT_ONCE


async def test_warming_gives_way_to_a_queue_at_the_server(pair: Pair) -> None:
    pair.fake.waiting = 1
    await pair.client.open("a", Open(tokens=ids(PART)))
    await asyncio.sleep(0.3)
    assert not pair.fake.warmings
    pair.fake.waiting = 0
    await soon(lambda: len(pair.fake.warmings) == 1)


async def test_warming_gives_way_to_an_answer_without_a_token(pair: Pair) -> None:
    pair.fake.answer_gate.clear()
    await pair.client.open("a", Open(tokens=ids(5)))
    op = Finish(version=1, keep=5, tokens=[], sampling=ANSWER)
    answering = asyncio.create_task(answered(pair, "a", op))
    await soon(lambda: len(pair.fake.answers) == 1)
    await pair.client.open("b", Open(tokens=ids(PART)))
    await asyncio.sleep(0.3)
    assert not pair.fake.warmings
    pair.fake.answer_gate.set()
    await soon(lambda: len(pair.fake.warmings) == 1)
    await answering


async def test_a_warming_goes_on_when_its_prompt_grows_and_ends_when_much_of_it_is_replaced(
    pair: Pair,
) -> None:
    pair.fake.gate.clear()
    await pair.client.open("a", Open(tokens=ids(3 * PART)))
    await soon(lambda: pair.fake.at_once == 1)
    await pair.client.extend("a", Extend(version=1, keep=3 * PART, tokens=ids(PART)))
    progress = await pair.client.extend("a", Extend(version=2, keep=PART, tokens=ids(PART, 900)))
    assert (progress.kept, progress.length) == (PART, 2 * PART)
    await soon(lambda: len(pair.fake.aborted) == 1 and len(pair.fake.warmings) == 2)
    pair.fake.gate.set()
    assert sent(pair) == [ids(3 * PART), ids(PART) + ids(PART, 900)]


async def test_finish_ends_the_warming_under_way(pair: Pair) -> None:
    pair.fake.gate.clear()
    await pair.client.open("a", Open(tokens=ids(PART)))
    await soon(lambda: pair.fake.at_once == 1)
    await answered(pair, "a", Finish(version=1, keep=PART, tokens=[1], sampling=ANSWER))
    await soon(lambda: pair.fake.aborted == pair.fake.warmings)


async def test_an_aborted_prompt_leaves_nothing_behind(pair: Pair) -> None:
    pair.fake.gate.clear()
    await pair.client.open("a", Open(tokens=ids(PART)))
    await soon(lambda: pair.fake.at_once == 1)
    await pair.client.abort("a")
    await soon(lambda: len(pair.fake.aborted) == 1)
    with pytest.raises(UnknownPrompt):
        await pair.client.status("a")


async def test_a_silent_prompt_is_forgotten_after_its_lease(pair: Pair) -> None:
    await pair.client.open("a", Open(tokens=ids(PART), lease_s=0.1))

    async def open_prompts() -> bool:
        return (await pair.client.info()).open_prompts == 0

    await until(open_prompts, within_s=5)


async def test_whoever_stops_reading_aborts_the_answer(pair: Pair) -> None:
    pair.fake.more_gate.clear()
    await pair.client.open("a", Open(tokens=ids(5)))
    op = Finish(version=1, keep=5, tokens=[], sampling=ANSWER)
    async with pair.client.finish("a", op) as events:
        await anext(events)
    await soon(lambda: pair.fake.aborted == pair.fake.answers)


async def test_abort_ends_an_answer_that_is_being_read(pair: Pair) -> None:
    pair.fake.more_gate.clear()
    await pair.client.open("a", Open(tokens=ids(5)))
    op = Finish(version=1, keep=5, tokens=[], sampling=ANSWER)
    async with pair.client.finish("a", op) as events:
        await anext(events)
        reading = asyncio.ensure_future(anext(events))
        await pair.client.abort("a")
        with pytest.raises(EngineUnavailable):
            await reading
    await soon(lambda: pair.fake.aborted == pair.fake.answers)


async def test_a_finished_prompt_is_updated_until_its_answer_has_a_token(pair: Pair) -> None:
    pair.fake.answer_gate.clear()
    pair.fake.more_gate.clear()
    await pair.client.open("a", Open(tokens=ids(5)))
    op = Finish(version=1, keep=5, tokens=[9], sampling=ANSWER)
    async with pair.client.finish("a", op) as events:
        first = asyncio.ensure_future(anext(events))
        await soon(lambda: len(pair.fake.answers) == 1)
        await pair.client.extend("a", Extend(version=2, keep=2, tokens=[50, 60]))
        await soon(lambda: len(pair.fake.answers) == 2)
        pair.fake.answer_gate.set()
        event = await first
        assert isinstance(event, TokenEvent)
        assert event.token_ids == [sum([0, 1, 50, 60])]
        with pytest.raises(PromptFinished):
            await pair.client.extend("a", Extend(version=3, keep=2, tokens=[70]))


async def test_versions_and_lengths_are_checked_as_an_engine_does(pair: Pair) -> None:
    await pair.client.open("a", Open(tokens=ids(5)))
    op = Extend(version=1, keep=5, tokens=ids(3, 5))
    assert await pair.client.extend("a", op) == await pair.client.extend("a", op)
    with pytest.raises(VersionConflict) as conflict:
        await pair.client.extend("a", Extend(version=3, keep=5, tokens=[1]))
    assert conflict.value.details["expected_version"] == 2
    with pytest.raises(PromptTooLong):
        await pair.client.extend("a", Extend(version=2, keep=5, tokens=ids(5000)))
    cut = await pair.client.invalidate("a", Invalidate(version=2, keep=4))
    assert (cut.length, cut.version) == (4, 2)
    assert (await pair.client.tokens("a")).tokens == ids(4)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadOperation),
        (429, EngineOverloaded),
        (404, EngineUnavailable),
        (500, EngineUnavailable),
    ],
)
async def test_a_refusal_becomes_the_error_of_an_engine(
    pair: Pair, status: int, kind: type[EngineError]
) -> None:
    await pair.client.open("a", Open(tokens=ids(5)))
    pair.fake.refuses = (status, "because")
    with pytest.raises(kind, match="because") as refused:
        await answered(pair, "a", Finish(version=1, keep=5, tokens=[], sampling=ANSWER))
    assert type(refused.value) is kind


@pytest.mark.parametrize("reason", ["abort", "error", None])
async def test_an_answer_without_a_proper_end_is_a_failure(pair: Pair, reason: str | None) -> None:
    pair.fake.finish_reason = reason
    await pair.client.open("a", Open(tokens=ids(5)))
    with pytest.raises(EngineUnavailable):
        await answered(pair, "a", Finish(version=1, keep=5, tokens=[], sampling=ANSWER))


async def test_a_failed_warming_is_no_error_and_the_next_input_tries_again(pair: Pair) -> None:
    await pair.client.info()
    pair.fake.refuses = (503, "busy")
    await pair.client.open("a", Open(tokens=ids(PART)))

    async def given_up() -> bool:
        return (await pair.client.status("a")).state == "idle"

    await until(given_up, within_s=5)
    pair.fake.refuses = None
    await pair.client.extend("a", Extend(version=1, keep=PART, tokens=[1]))
    await soon(lambda: sent(pair) == [ids(PART)])


async def test_info_says_what_the_server_is_and_what_it_lacks(pair: Pair) -> None:
    info = await pair.client.info()
    assert (info.model, info.max_model_len, info.block_size) == (MODEL, 4096, BLOCK_TOKENS)
    assert info.engine == "vllm 0 without the plug-in"
    assert (info.kv_blocks_total, info.kv_blocks_free) == (200, 150)
    assert {"open", "extend", "finish"} <= set(info.operations)
    assert not {"policy", "blocks"} & set(info.operations)
    assert "invalidation" in info.lacks[0]
    with pytest.raises(BadOperation):
        await pair.client.set_policy("fcfs")
    with pytest.raises(BadOperation):
        await pair.client.blocks()


async def test_a_restart_shows_as_another_instance_and_ends_all_prompts(pair: Pair) -> None:
    before = await pair.client.info()
    assert (await pair.client.info()).instance_id == before.instance_id
    await pair.client.open("a", Open(tokens=ids(5)))
    pair.fake.started_s = 200.0
    assert (await pair.client.info()).instance_id != before.instance_id
    with pytest.raises(UnknownPrompt):
        await pair.client.status("a")


@pytest.mark.parametrize("no_metrics", [404, 405, 501])  # the last as llama.cpp's server
async def test_without_a_start_time_an_absence_counts_as_a_restart(no_metrics: int) -> None:
    fake = FakeOpenAI(started_s=None, no_metrics=no_metrics)
    async with running(fake) as pair:
        before = await pair.client.info()
        assert (await pair.client.info()).instance_id == before.instance_id
        with pytest.raises(EngineUnavailable):
            await pair.client.info(timeout_s=0)
        assert (await pair.client.info()).instance_id != before.instance_id


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (FakeOpenAI(card={"id": MODEL}), "how many tokens"),
        (FakeOpenAI(counts_tokens=False), "token ids"),
    ],
)
async def test_a_server_that_lacks_what_is_needed_is_refused_by_name(
    fake: FakeOpenAI, reason: str
) -> None:
    async with running(fake) as pair:
        with pytest.raises(EngineUnavailable, match=reason):
            await pair.client.info()


async def test_the_context_may_be_told_apart_from_the_list_of_models() -> None:
    async with running(FakeOpenAI(card={"id": MODEL}, context_tokens=512)) as pair:
        assert (await pair.client.info()).max_model_len == 512


def test_the_load_is_read_from_metrics_of_several_servers() -> None:
    assert load_of("llamacpp:requests_processing 3\nllamacpp:requests_deferred 2\n") == Load(
        running=3, waiting=2
    )
    assert load_of('sglang:num_running_reqs{model_name="m"} 4.0\n') == Load(running=4)


async def test_logprobs_are_read_in_either_shape() -> None:
    best = {"token": "a", "logprob": -0.5}
    shapes = [
        {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -2.0}]},
        {"content": [best | {"top_logprobs": [best, {"token": "b", "logprob": -2.0}]}]},
    ]

    async def lines(logprobs: Any) -> AsyncIterator[bytes]:
        choice = {"text": "a", "token_ids": [1], "logprobs": logprobs, "finish_reason": "stop"}
        yield b"data: " + msgspec.json.encode({"choices": [choice]})

    for shape in shapes:
        event, _ = [e async for e in completions.events(lines(shape), 1, 0, 1)]
        assert isinstance(event, TokenEvent)
        assert event.logprobs == [
            TokenLogprob(token="a", logprob=-0.5, top=[TokenLogprob(token="a", logprob=-0.5)])
        ]


async def test_cached_tokens_are_estimated_where_the_server_does_not_tell() -> None:
    async with running(FakeOpenAI(cached_details=False)) as pair:
        await pair.client.open("a", Open(tokens=ids(PART)))

        async def warmed() -> bool:
            return (await pair.client.status("a")).computed == PART

        await until(warmed, within_s=5)
        op = Finish(version=1, keep=PART, tokens=[1], sampling=ANSWER)
        done = (await answered(pair, "a", op))[-1]
        assert isinstance(done, DoneEvent)
        assert done.cached_tokens == PART


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    operations=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 150), st.booleans()), max_size=5),
    number=st.integers(0, 10**9),
)
async def test_any_history_is_answered_as_its_last_prompt(
    pair: Pair, operations: list[tuple[float, int, bool]], number: int
) -> None:
    prompt_id, fake = f"{number}-{len(pair.fake.answers)}", pair.fake
    tokens, next_id = ids(PART), 10_000
    await pair.client.open(prompt_id, Open(tokens=tokens))
    for version, (share, added, pause) in enumerate(operations, 1):
        keep = max(round(share * len(tokens)), 1)
        new = ids(added, next_id)
        next_id += added
        tokens = tokens[:keep] + new
        await pair.client.extend(prompt_id, Extend(version=version, keep=keep, tokens=new))
        if pause:
            await soon(lambda: not fake.at_once)
        assert fake.at_once <= 1
    op = Finish(version=len(operations) + 1, keep=len(tokens), tokens=[1], sampling=ANSWER)
    done = (await answered(pair, prompt_id, op))[-1]
    assert isinstance(done, DoneEvent)
    assert fake.answers[-1]["prompt"] == [*tokens, 1]
    for body in fake.warmings:
        assert len(body["prompt"]) % BLOCK_TOKENS == 0
