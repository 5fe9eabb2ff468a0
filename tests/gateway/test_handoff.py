"""Answers that move between engines: handed over, and gone on with when an engine breaks off."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine_adapter.errors import KvLost
from engine_adapter.messages import DoneEvent, ErrorEvent, Event, Sampling, TokenEvent
from gateway import course
from gateway.accounts import Account
from gateway.crowd import Crowd
from gateway.handoff import Handoff, Rule, Situation, decide, queued
from gateway.prompt import Document, Prompt
from gateway.requests import Options
from gateway.stream import Stream
from gateway.telemetry import Metrics
from tests.conftest import until
from tests.gateway.fallible import MODEL, TENANT, Decode, Failure, Kind, Prefill, World, answer

pytestmark = pytest.mark.slow

PROMPT = Prompt.framed((1, 2, 3), (4, 5))
RULE = Rule(min_tokens=2, idle_tokens=-1, timeout_s=0.05)
PATIENT = replace(RULE, timeout_s=3.0)
"""Where no engine stalls: the machine may."""
STALL_S = 0.1
GREEDY = Options(temperature=0, max_tokens=12)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "STALL_S", STALL_S)
    monkeypatch.setattr(course, "FIRST_S", STALL_S)


@dataclass
class Answer:
    """What a client got."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[str] = field(default_factory=list)
    done: DoneEvent | None = None
    failed: bool = False

    def add(self, event: Event) -> None:
        match event:
            case TokenEvent():
                self.text += event.text
                self.tokens += event.token_ids
                self.logprobs += [p.token for p in event.logprobs or []]
            case DoneEvent():
                self.done = event
            case ErrorEvent():
                self.failed = True


def stream_in(world: World, rule: Rule = RULE) -> Stream:
    metrics = Metrics()
    stream = Stream(
        "st-1",
        Account(TENANT),
        MODEL,
        PROMPT,
        options=Options(),
        lease_s=60,
        placer=world,
        keeper=None,
        rule=rule,
        metrics=metrics,
        crowd=Crowd(),
        ended=lambda _: None,
        moved=lambda _: None,
    )
    stream.take([Document((7, 8, 9), None)])
    return stream


@asynccontextmanager
async def begun(world: World, rule: Rule = RULE) -> AsyncIterator[Stream]:
    stream = stream_in(world, rule)
    await stream.begin()
    try:
        yield stream
    finally:
        await stream.close()


async def read(stream: Stream, most: int = 1000, *, found: Answer | None = None) -> Answer:
    """So many events of the answer, or all there are.

    Args:
        found: what was read before.
    """
    found = found or Answer()
    async with asyncio.timeout(3):
        for _ in range(most):
            if found.done is not None or found.failed:
                break
            event = await stream.next_event(3)
            assert event is not None
            found.add(event)
    return found


async def answered(world: World, options: Options, rule: Rule = PATIENT) -> tuple[Answer, Stream]:
    """An answer, after which nothing is left at any engine."""
    async with begun(world, rule) as stream:
        await stream.finish(options)
        found = await read(stream)
    assert world.is_clean
    return found, stream


def whole(sampling: Sampling) -> Answer:
    """The answer of one engine that nothing happens to."""
    prompt = [1, 2, 3, 7, 8, 9, 4, 5]
    expected = Answer()
    for token, text, reason in answer(prompt, sampling):
        expected.tokens.append(token)
        expected.text += text
        if sampling.logprobs is not None:
            expected.logprobs.append(str(token))
        if reason is not None:
            expected.done = DoneEvent(
                finish_reason=reason,
                prompt_tokens=len(prompt),
                cached_tokens=len(prompt) // 2,
                completion_tokens=len(expected.tokens),
            )
    return expected


# The decision.

BUSY = Situation(hands_over=True, decode_engine=True, answer_tokens=None, queued_tokens=500)


@pytest.mark.parametrize(
    ("now", "decided", "reason"),
    [
        (BUSY, True, "busy_engine"),
        (replace(BUSY, hands_over=False), False, "engine_cannot"),
        (replace(BUSY, decode_engine=False), False, "no_decode_engine"),
        (replace(BUSY, answer_tokens=15), False, "short_answer"),
        (replace(BUSY, answer_tokens=16), True, "busy_engine"),
        (replace(BUSY, queued_tokens=100), False, "idle_engine"),
    ],
)
def test_the_rule(now: Situation, decided: bool, reason: Any) -> None:
    assert decide(Rule(16, 100, 1), now) == Handoff(decided, reason)


async def test_an_idle_engine_decodes_itself() -> None:
    world = World([Prefill("p")], [Decode("d")])
    found, stream = await answered(world, GREEDY, replace(RULE, idle_tokens=0))
    assert found == whole(GREEDY.sampling())
    assert stream.course is not None
    assert stream.course.handoff == Handoff(False, "idle_engine")
    assert not world.decode[0].asked


@pytest.mark.parametrize(
    ("waiting", "others_open", "own", "expected"),
    [
        (3000, 0, 4000, 0),  # all that waits may be the prompt itself
        (3000, 0, 0, 3000),  # which is read already
        (3000, 2, 1000, 2512),
    ],
)
def test_what_is_queued_for_others(waiting: int, others_open: int, own: int, expected: int) -> None:
    prefill = Prefill("p")
    prefill.engine.info = msgspec.structs.replace(
        prefill.described(), waiting_tokens=waiting, open_prompts=others_open + 1
    )
    assert queued(prefill.engine, own) == expected


async def test_a_prompt_counts_as_queued_only_as_far_as_its_engine_may_not_have_read_it() -> None:
    prefill = Prefill("p")
    async with begun(World([prefill], [])) as stream:

        async def has(tokens: int) -> None:
            async def so() -> bool:
                return stream.line.confirmed == tokens

            await until(so, within_s=3)

        await has(6)
        assert stream.line.unread(8) == 8  # it was placed there since the engine was polled
        prefill.engine.polled_s = time.monotonic()
        assert stream.line.unread(8) == 2
        stream.take([Document((10,) * 20, None)])
        await has(26)
        assert stream.line.unread(28) == 22  # what came after the poll did not wait then
        prefill.engine.polled_s = time.monotonic()
        assert stream.line.unread(28) == 2


# The usual course.


async def test_nothing_is_told_of_an_answer_from_kv_that_was_given_up() -> None:
    """The decode engine has read memory that may have been written to since, and cannot know."""
    world = World([Prefill("p")], [Decode("d")])
    world.prefill[0].kept = "expired"
    found, stream = await answered(world, GREEDY)
    assert found == whole(GREEDY.sampling())
    assert stream.course is not None
    assert stream.course.handoff == Handoff(True, "busy_engine", "http://d", resumed=1)
    assert world.decode[0].fetched == 1


async def test_an_answer_is_handed_over() -> None:
    world = World([Prefill("p")], [Decode("d")])
    found, stream = await answered(world, GREEDY)
    assert found == whole(GREEDY.sampling())
    assert stream.course is not None
    assert stream.course.handoff == Handoff(True, "busy_engine", "http://d")
    assert world.decode[0].fetched == 1
    assert stream.engine is world.prefill[0].engine


async def test_the_first_token_does_not_wait_for_the_decode_engine() -> None:
    world = World([Prefill("p")], [Decode("d", failures=[Failure("stalls")])])
    async with begun(world, replace(RULE, timeout_s=60)) as stream:
        await stream.finish(GREEDY)
        event = await stream.next_event(1)
        assert isinstance(event, TokenEvent)
        assert event.token_ids == whole(GREEDY.sampling()).tokens[:1]
    assert world.is_clean


async def test_both_engines_draw_with_the_same_seed() -> None:
    world = World([Prefill("p")], [Decode("d")])
    found, _ = await answered(world, Options(max_tokens=12, min_tokens=2))
    (first,), (second,) = world.prefill[0].asked, world.decode[0].asked
    assert first.seed == second.seed is not None
    assert found == whole(second)


async def test_each_engine_counts_the_stream_while_it_has_something_of_it() -> None:
    prefill, decode = Prefill("p"), Decode("d")
    decode.pause.clear()
    async with begun(World([prefill], [decode])) as stream:

        async def counts_are(*wanted: int) -> bool:
            return (prefill.engine.streams, decode.engine.streams) == wanted

        await until(lambda: counts_are(1, 0), within_s=1)
        await stream.finish(GREEDY)
        await until(lambda: counts_are(0, 1), within_s=1)
        decode.pause.set()
        await read(stream)
        assert await counts_are(0, 0)


# Cancelling.


@pytest.mark.parametrize("phase", ["prefill", "transfer", "decode"])
async def test_cancelling_frees_all_engines(phase: str) -> None:
    prefill, decode = Prefill("p"), Decode("d")
    if phase == "prefill":
        prefill.failures = [Failure("stalls")]
    elif phase == "transfer":
        decode.failures = [Failure("stalls")]
    else:
        decode.pause.clear()
    world = World([prefill], [decode])
    async with begun(world, replace(RULE, timeout_s=60)) as stream:
        await stream.finish(GREEDY)

        async def reached() -> bool:
            at = prefill if phase == "prefill" else decode
            return at.under_way == 1 and (phase != "decode" or at.fetched == 1)  # type: ignore[attr-defined]

        await until(reached, within_s=1)
        async with asyncio.timeout(1):
            await stream.cancel()
        assert world.is_clean


# Failures.

ANSWERS = st.builds(
    Options,
    temperature=st.sampled_from([0, 1]),
    seed=st.none() | st.integers(0, 1000),
    max_tokens=st.integers(2, 15),
    min_tokens=st.none() | st.integers(0, 2),
    stop=st.none() | st.sampled_from(["<3>", "><1", ["<7><", "2>"]]),
    presence_penalty=st.sampled_from([None, None, 1.0]),
    logprobs=st.sampled_from([None, True]),
)

FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(["refuses", "dies", "stalls", "errs", "loses_kv"]),
    at=st.integers(0, 6),
)


@dataclass(frozen=True)
class Turn:
    """What happens to the stream itself when so many events have been read."""

    kind: Literal["lost", "left", "cancelled"]
    """`left`: the gateway takes an engine for lost that is not."""
    engine: int
    at: int


TURNS = st.builds(
    Turn,
    kind=st.sampled_from(["lost", "left", "cancelled"]),
    engine=st.integers(0, 3),
    at=st.integers(0, 6),
)

quick = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def fallible(failures: Sequence[Sequence[Failure]], burst: int) -> World:
    """Two engines that read and two that decode."""
    first, second, third, fourth = (list(f) for f in failures)
    return World(
        [Prefill("p1", failures=first, burst=burst), Prefill("p2", failures=second, burst=burst)],
        [Decode("d1", failures=third, burst=burst), Decode("d2", failures=fourth, burst=burst)],
    )


@asynccontextmanager
async def late_by() -> AsyncIterator[list[float]]:
    """By how much this process was late, again and again, meanwhile."""
    late_s = [0.0]

    async def watch() -> None:
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(0.005)
            late_s.append(time.monotonic() - begun_s - 0.005)

    watching = asyncio.create_task(watch())
    try:
        yield late_s
    finally:
        watching.cancel()


def is_right(found: Answer, world: World, options: Options) -> None:
    """It is the answer that one engine would have given, if two would give the same."""
    seeds = {asked.seed for engine in world.engines for asked in engine.asked}
    if options.temperature != 0 and seeds == {None}:
        return
    expected = whole(msgspec.structs.replace(options.sampling(), seed=max(seeds, key=bool)))
    assert (found.tokens, found.text) == (expected.tokens, expected.text)
    assert found.logprobs == expected.logprobs
    assert found.done is not None
    assert expected.done is not None
    assert found.done.finish_reason == expected.done.finish_reason
    assert found.done.prompt_tokens == expected.done.prompt_tokens
    assert found.done.completion_tokens == expected.done.completion_tokens


@quick
@given(
    options=ANSWERS,
    failures=st.tuples(*(st.lists(FAILURES, max_size=1) for _ in range(4))),
    differs=st.booleans(),
    burst=st.integers(1, 3),
    rule=st.sampled_from([RULE, replace(RULE, idle_tokens=1000)]),
)
async def test_every_answer_is_whole_or_ends_in_an_error(
    options: Options,
    failures: tuple[list[Failure], ...],
    differs: bool,
    burst: int,
    rule: Rule,
) -> None:
    first, second, third, fourth = failures
    if differs and not third:
        third = [Failure("differs")]
    world = fallible((first, second, third, fourth), burst)
    stalls = any(f.kind == "stalls" for f in (*first, *second, *third, *fourth))
    wait_s = STALL_S if stalls else 3.0
    async with late_by() as late_s:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(course, "STALL_S", wait_s)
            patch.setattr(course, "FIRST_S", wait_s)
            rule = replace(rule, timeout_s=RULE.timeout_s if stalls else wait_s)
            found, _ = await answered(world, options, rule)
    if found.done is not None:
        is_right(found, world, options)
        return
    if stalls and max(late_s) > RULE.timeout_s / 2:
        return  # an engine that did not stall seemed to
    at_once = [f.kind for f in first + second if f.at == 0]
    not_begun = len(at_once) == 2 or {*at_once} & {"errs", "loses_kv", "stalls"}
    unseeded = options.temperature != 0 and options.seed is None
    assert unseeded or not_begun or all((first, second, third, fourth))


class WithoutIds(Prefill):
    """A server that gives its text, and not the tokens of it."""

    hands_over = False

    async def told(
        self, prompt: Sequence[int], sampling: Sampling, found: Sequence[Event]
    ) -> AsyncGenerator[Event, None]:
        async with aclosing(super().told(prompt, sampling, found)) as told:
            async for event in told:
                if isinstance(event, TokenEvent):
                    event = TokenEvent(token_ids=[], text=event.text)
                yield event


@pytest.mark.parametrize("how", ["lost", "dies"])
async def test_text_without_token_ids_is_told_once(how: str) -> None:
    first, second = WithoutIds("p1"), WithoutIds("p2")
    if how == "dies":
        first.failures = [Failure("dies", 3)]
    else:
        first.pause.clear()
    async with begun(World([first, second], []), PATIENT) as stream:
        await stream.finish(GREEDY)
        found = await read(stream, 1)
        if how == "lost":
            first.engine.info = None
            stream.engine_lost(first.engine)
        await read(stream, found=found)
    expected = whole(GREEDY.sampling()).text
    assert found.text
    assert found.failed  # nobody can compare it with what another engine would say
    assert expected.startswith(found.text)


@pytest.mark.parametrize("failure", ["refuses", "stalls"])
async def test_kv_that_waits_in_vain_is_the_decode_engines_fault(failure: Kind) -> None:
    decode = Decode("d", failures=[Failure(failure)])
    decode.refusal = KvLost("the KV of the prompt did not come")
    world = World([Prefill("p")], [decode])
    found, _ = await answered(world, GREEDY, RULE)
    assert found == whole(GREEDY.sampling())
    assert world.blamed == [decode.engine]


async def test_kv_that_is_gone_is_not_the_decode_engines_fault() -> None:
    world = World([Prefill("p")], [Decode("d")])
    world.prefill[0].kept = "expired"
    await answered(world, GREEDY)
    assert not world.blamed


@quick
@given(options=ANSWERS, turn=TURNS, rule=st.sampled_from([RULE, replace(RULE, idle_tokens=1000)]))
async def test_an_engine_may_be_lost_and_a_client_gone_at_any_moment(
    options: Options, turn: Turn, rule: Rule
) -> None:
    world = fallible(((), (), (), ()), 1)
    async with begun(world, rule) as stream:
        await stream.finish(options)
        found = await read(stream, turn.at)
        if turn.kind == "cancelled":
            await stream.cancel()
            assert world.is_clean
            return
        engine = world.engines[turn.engine]
        if turn.kind == "lost":
            engine.kill()
            engine.engine.info = None
        stream.engine_lost(engine.engine)
        found = await read(stream, found=found)
    assert world.is_clean
    if found.done is not None:
        is_right(found, world, options)
    else:
        assert options.temperature != 0
        assert options.seed is None
