"""Open prompts as an engine's clients see them: versions, retries, leases, limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.answers import Answer
from engine_adapter.errors import (
    BadOperation,
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    PromptExists,
    PromptFinished,
    UnknownPrompt,
    VersionConflict,
)
from engine_adapter.messages import (
    ErrorEvent,
    Event,
    Extend,
    Finish,
    Invalidate,
    Open,
    Sampling,
    TokenEvent,
)
from engine_adapter.sessions import Limits, Sessions, Status
from tests.fake_engine import FakeCore

LIMITS = Limits(max_model_len=50, vocab_size=100, max_open_prompts=2)


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def sessions(core: FakeCore) -> Sessions:
    return Sessions(core, LIMITS)


def finish(version: int, keep: int) -> Finish:
    return Finish(version=version, keep=keep, tokens=[9], sampling=Sampling())


async def test_a_retry_is_answered_without_being_applied_again(
    sessions: Sessions, core: FakeCore
) -> None:
    await sessions.open("p", Open(tokens=[1, 2]))
    op = Extend(version=1, keep=2, tokens=[3])
    first = await sessions.extend("p", op)
    assert await sessions.extend("p", op) == first
    assert core.operations == ["open", "extend"]
    assert core.tokens["p"] == [1, 2, 3]


@pytest.mark.parametrize(
    "other",
    [
        Extend(version=1, keep=1, tokens=[3]),
        Extend(version=1, keep=2, tokens=[4]),
        Extend(version=1, keep=2, tokens=[]),
        Extend(version=0, keep=2, tokens=[]),
    ],
)
async def test_another_operation_of_a_version_that_was_given_is_no_retry(
    sessions: Sessions, core: FakeCore, other: Extend
) -> None:
    await sessions.open("p", Open(tokens=[1, 2]))
    first = await sessions.extend("p", Extend(version=1, keep=2, tokens=[3]))
    with pytest.raises(VersionConflict) as conflict:
        await sessions.extend("p", other)
    assert conflict.value.details == {"expected_version": 2}
    assert core.tokens["p"] == [1, 2, 3]
    assert await sessions.extend("p", Extend(version=1, keep=2, tokens=[3])) == first


@pytest.mark.parametrize("other", [Open(tokens=[2]), Open(tokens=[1], cache_salt="other")])
async def test_another_open_is_no_retry(sessions: Sessions, other: Open) -> None:
    await sessions.open("p", Open(tokens=[1], cache_salt="one"))
    with pytest.raises(PromptExists):
        await sessions.open("p", other)


async def test_another_client_is_told_the_tokens_of_a_prompt(
    sessions: Sessions, core: FakeCore
) -> None:
    with pytest.raises(UnknownPrompt):
        await sessions.tokens("p")
    await sessions.open("p", Open(tokens=[1, 2], lease_s=5))
    await sessions.extend("p", Extend(version=1, keep=1, tokens=[3]))
    told = await sessions.tokens("p")
    assert (told.version, told.finished, told.tokens) == (1, False, [1, 3])
    session, answer = sessions.finish("p", finish(2, 2))
    told = await sessions.tokens("p")
    assert (told.version, told.finished, told.tokens) == (2, True, [1, 3, 9])
    sessions.answered(session, answer)
    told = await sessions.tokens("p")  # its reader may have died, and another may begin again
    assert (told.version, told.finished, told.tokens) == (2, True, [1, 3, 9])


async def test_asking_for_its_tokens_renews_the_lease_of_a_prompt(sessions: Sessions) -> None:
    await sessions.open("p", Open(tokens=[1], lease_s=0.2))
    asked = 0
    begun_s = time.monotonic()
    while time.monotonic() < begun_s + 0.4:
        await sessions.tokens("p")
        assert await sessions.expire(time.monotonic()) == []
        asked += 1
        await asyncio.sleep(0.01)
    assert asked > 1


async def test_tokens_are_told_when_an_update_of_a_finished_prompt_is_decided(
    sessions: Sessions, core: FakeCore
) -> None:
    await sessions.open("p", Open(tokens=[1]))
    sessions.finish("p", finish(1, 1))
    await core.close("p")  # as the loop does when it has produced a token
    refused = asyncio.create_task(sessions.extend("p", Extend(version=2, keep=0, tokens=[5])))
    await asyncio.sleep(0)
    told = await sessions.tokens("p")
    assert (told.version, told.tokens) == (1, [1, 9])
    with pytest.raises(PromptFinished):
        await refused


async def test_a_retry_while_the_first_try_is_under_way_waits_for_its_answer(
    sessions: Sessions, core: FakeCore
) -> None:
    core.delay_s = lambda: 0.05
    answers = await asyncio.gather(*(sessions.open("p", Open(tokens=[1])) for _ in range(3)))
    assert answers[0] == answers[1] == answers[2]
    assert core.operations == ["open"]


async def test_a_caller_that_goes_away_does_not_undo_its_operation(
    sessions: Sessions, core: FakeCore
) -> None:
    core.delay_s = lambda: 0.05
    caller = asyncio.create_task(sessions.open("p", Open(tokens=[1])))
    await asyncio.sleep(0)
    caller.cancel()
    answer = await sessions.extend("p", Extend(version=1, keep=1, tokens=[2]))
    assert answer.length == 2


async def test_invalidate_leaves_the_beginning_of_a_prompt(
    sessions: Sessions, core: FakeCore
) -> None:
    await sessions.open("p", Open(tokens=[1, 2, 3]))
    op = Invalidate(version=1, keep=1)
    first = await sessions.invalidate("p", op)
    assert (first.version, first.length, first.kept) == (1, 1, 1)
    assert core.tokens["p"] == [1]
    assert await sessions.invalidate("p", op) == first, "a retry has the first answer"
    assert core.operations == ["open", "extend"]
    with pytest.raises(VersionConflict):
        await sessions.invalidate("p", Invalidate(version=3, keep=1))
    assert sessions.finish("p", finish(2, 1))[0].tokens == [1, 9]


@pytest.mark.parametrize("keep", [-1, 0, 4])
async def test_invalidate_keeps_at_least_one_token_and_no_more_than_there_are(
    sessions: Sessions, core: FakeCore, keep: int
) -> None:
    await sessions.open("p", Open(tokens=[1, 2, 3]))
    with pytest.raises(BadOperation):
        await sessions.invalidate("p", Invalidate(version=1, keep=keep))
    assert core.tokens["p"] == [1, 2, 3]


async def test_progress_tells_the_blocks_that_the_engine_counted(
    sessions: Sessions, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await sessions.open("p", Open(tokens=[1, 2, 3]))
    assert first.freed_blocks == 0

    async def counted(prompt_id: str, keep: int, tokens: list[int]) -> Status:
        return {"state": "idle", "length": keep, "computed": keep, "freed_blocks": 2}

    monkeypatch.setattr(core, "extend", counted)
    assert (await sessions.invalidate("p", Invalidate(version=1, keep=1))).freed_blocks == 2


async def test_nothing_follows_an_answer_that_has_begun(sessions: Sessions, core: FakeCore) -> None:
    await sessions.open("p", Open(tokens=[1]))
    session, answer = sessions.finish("p", finish(1, 1))
    await core.close("p")  # as the loop does when it has produced a token
    for _ in range(2):
        with pytest.raises(PromptFinished):
            await sessions.extend("p", Extend(version=2, keep=2, tokens=[3]))
    with pytest.raises(PromptFinished):
        await sessions.invalidate("p", Invalidate(version=2, keep=1))
    with pytest.raises(PromptFinished):
        sessions.finish("p", finish(2, 2))
    assert (session.version, session.tokens) == (answer.version, answer.tokens) == (1, [1, 9])


async def test_a_finished_prompt_is_updated_until_its_answer_begins(
    sessions: Sessions, core: FakeCore
) -> None:
    await sessions.open("p", Open(tokens=[1, 2]))
    _, answer = sessions.finish("p", finish(1, 2))
    with pytest.raises(VersionConflict) as gap:
        await sessions.extend("p", Extend(version=1, keep=2, tokens=[9]))
    assert gap.value.details == {"expected_version": 2}
    op = Extend(version=2, keep=1, tokens=[3, 9])
    first = await sessions.extend("p", op)
    assert (first.version, first.state, first.length, first.kept) == (2, "finishing", 3, 1)
    assert (answer.version, answer.tokens) == (2, [1, 3, 9])
    assert core.tokens["p"] == [1, 3, 9]
    cut = await sessions.invalidate("p", Invalidate(version=3, keep=2))
    assert (cut.version, cut.length, cut.kept) == (3, 2, 2)
    assert (answer.version, answer.tokens) == (3, [1, 3])
    await core.close("p")
    with pytest.raises(PromptFinished):
        await sessions.extend("p", Extend(version=4, keep=2, tokens=[9]))
    assert await sessions.invalidate("p", Invalidate(version=3, keep=2)) == cut, "a retry"
    assert core.operations == ["open", "reopen", "reopen", "close"]


async def test_updates_that_are_sent_without_waiting_are_taken_or_refused_in_order(
    sessions: Sessions, core: FakeCore
) -> None:
    await sessions.open("p", Open(tokens=[1]))
    session, answer = sessions.finish("p", finish(1, 1))
    core.delay_s = lambda: 0.02
    ops = [Extend(version=v, keep=2, tokens=[v] * v) for v in (2, 3)]
    taken = await asyncio.gather(*(sessions.extend("p", op) for op in ops))
    assert [progress.length for progress in taken] == [4, 5]
    assert (answer.version, answer.tokens) == (3, [1, 9, 3, 3, 3])
    await core.close("p")
    ops = [Extend(version=v, keep=2, tokens=[]) for v in (4, 5)]
    refused = await asyncio.gather(
        *(sessions.extend("p", op) for op in ops), return_exceptions=True
    )
    assert [type(e) for e in refused] == [PromptFinished] * 2
    assert (session.version, session.tokens) == (3, answer.tokens)


async def answer_events(answer: Answer) -> list[Event]:
    """Read an answer of an engine that says how long the prompt is, when it is not stopped."""

    async def generate(version: int, tokens: list[int]) -> AsyncGenerator[Event, None]:
        await asyncio.sleep(0.05)
        yield TokenEvent(token_ids=[len(tokens)], text="")

    async with aclosing(answer.events(generate)) as events:
        return [event async for event in events]


async def test_an_update_turns_the_answer_that_is_being_read(sessions: Sessions) -> None:
    await sessions.open("p", Open(tokens=[1]))
    _, answer = sessions.finish("p", finish(1, 1))
    reading = asyncio.create_task(answer_events(answer))
    await asyncio.sleep(0)
    await sessions.extend("p", Extend(version=2, keep=1, tokens=[2, 3, 4]))
    assert await reading == [TokenEvent(token_ids=[4], text="")]
    with pytest.raises(PromptFinished):
        await sessions.extend("p", Extend(version=3, keep=1, tokens=[2]))


async def test_an_update_that_is_lost_on_its_way_ends_the_answer(
    sessions: Sessions, core: FakeCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(prompt_id: str, version: int, tokens: list[int]) -> Status:
        raise EngineUnavailable("the engine does not answer")

    monkeypatch.setattr(core, "reopen", lost)
    await sessions.open("p", Open(tokens=[1]))
    _, answer = sessions.finish("p", finish(1, 1))
    reading = asyncio.create_task(answer_events(answer))
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailable):
        await sessions.extend("p", Extend(version=2, keep=1, tokens=[2]))
    (event,) = await reading
    assert isinstance(event, ErrorEvent)
    assert event.error["code"] == "engine_unavailable"


async def test_an_answer_that_is_aborted_before_it_begins_ends_with_an_error(
    sessions: Sessions, core: FakeCore
) -> None:
    await sessions.open("p", Open(tokens=[1]))
    _, answer = sessions.finish("p", finish(1, 1))
    reading = asyncio.create_task(answer_events(answer))
    await asyncio.sleep(0)
    await sessions.abort("p")
    assert [type(event) for event in await reading] == [ErrorEvent]
    assert core.tokens == {}


async def test_an_operation_that_overtakes_is_told_which_version_is_next(
    sessions: Sessions,
) -> None:
    await sessions.open("p", Open(tokens=[1]))
    with pytest.raises(VersionConflict) as gap:
        sessions.finish("p", finish(2, 1))
    assert gap.value.details == {"expected_version": 1}
    assert EngineError.from_json(gap.value.to_json()).details == gap.value.details


async def test_only_prompts_with_open_input_count_against_the_limit(sessions: Sessions) -> None:
    for name in ("a", "b"):
        await sessions.open(name, Open(tokens=[1]))
    with pytest.raises(EngineOverloaded):
        await sessions.open("c", Open(tokens=[1]))
    sessions.finish("a", finish(1, 1))
    await sessions.open("c", Open(tokens=[1]))


async def test_silence_longer_than_the_lease_frees_a_prompt(
    sessions: Sessions, core: FakeCore
) -> None:
    await sessions.open("short", Open(tokens=[1], lease_s=1))
    await sessions.open("long", Open(tokens=[1], lease_s=100))
    assert await sessions.expire(time.monotonic() + 2) == ["short"]
    assert list(core.tokens) == ["long"]
    with pytest.raises(UnknownPrompt):
        await sessions.status("short")


async def test_a_prompt_stays_while_its_answer_is_read_and_not_if_nobody_ever_reads_it(
    sessions: Sessions, core: FakeCore
) -> None:
    for name in ("read", "unread"):
        await sessions.open(name, Open(tokens=[1], lease_s=1))
    session, answer = sessions.finish("read", finish(1, 1))
    sessions.finish("unread", finish(1, 1))
    reading = asyncio.create_task(answer_events(answer))
    await asyncio.sleep(0)
    assert await sessions.expire(time.monotonic() + 2) == ["unread"]
    assert list(core.tokens) == ["read"]
    await reading
    sessions.answered(session, answer)
    assert await sessions.expire(time.monotonic() + 2) == ["read"]


operations = st.lists(
    st.tuples(
        st.sampled_from(["open", "extend", "invalidate", "finish", "abort", "status", "tokens"]),
        st.sampled_from(["p", "q", "r"]),
        st.integers(-1, 4),
        st.integers(-1, 60),
        st.lists(st.integers(-1, 101), max_size=30),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(operations=operations)
async def test_no_operation_is_answered_by_anything_but_its_answer_or_a_typed_error(
    operations: list[tuple[str, str, int, int, list[int]]],
) -> None:
    core = FakeCore()
    sessions, statuses = Sessions(core, LIMITS), set[int]()
    for kind, prompt_id, version, keep, tokens in operations:
        try:
            match kind:
                case "open":
                    await sessions.open(prompt_id, Open(tokens=tokens))
                case "extend":
                    op = Extend(version=version, keep=keep, tokens=tokens)
                    await sessions.extend(prompt_id, op)
                case "invalidate":
                    await sessions.invalidate(prompt_id, Invalidate(version=version, keep=keep))
                case "finish":
                    sessions.finish(prompt_id, finish(version, keep))
                    await core.close(prompt_id)
                case "abort":
                    await sessions.abort(prompt_id)
                case "status":
                    await sessions.status(prompt_id)
                case "tokens":
                    assert len((await sessions.tokens(prompt_id)).tokens) > 0
        except EngineError as e:
            statuses.add(e.status)
        for held in core.tokens.values():
            assert 0 < len(held) < LIMITS.max_model_len
            assert all(0 <= token < LIMITS.vocab_size for token in held)
    assert statuses <= {400, 404, 409, 503}


async def test_a_prompt_that_is_aborted_in_the_same_moment_does_not_stay_in_the_loop(
    sessions: Sessions, core: FakeCore
) -> None:
    opened = asyncio.create_task(sessions.open("p", Open(tokens=[1, 2])))
    await asyncio.gather(opened, sessions.abort("p"))
    assert core.operations == ["open", "close"]
    assert core.tokens == {}


async def test_only_an_abort_reaches_what_an_answer_has_left_in_the_engine(
    sessions: Sessions, core: FakeCore
) -> None:
    """KV for another engine: it has a lease of its own, longer perhaps than that of the prompt."""
    for prompt_id in ("kept", "aborted"):
        await sessions.open(prompt_id, Open(tokens=[1, 2], lease_s=0.01))
        session, answer = sessions.finish(prompt_id, finish(1, 2))
        sessions.answered(session, answer)
    core.operations.clear()
    await sessions.abort("aborted")
    assert core.operations == ["close"]
    assert await sessions.expire(time.monotonic() + 1) == ["kept"]
    assert core.operations == ["close"]
