"""The source that the app feeds."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.push import InputEnded, Push
from retrieval.source import Passage, Query, SourceFailed
from tests.retrieval.sites import gather, tasks


def passage(number: int) -> Passage:
    return Passage(str(number), f"text {number}")


@given(count=st.integers(0, 30), capacity=st.integers(1, 5))
def test_everything_put_comes_out_in_order(count: int, capacity: int) -> None:
    async def both() -> list[Passage]:
        push = Push(capacity=capacity)

        async def feed() -> None:
            for number in range(count):
                await push.put(passage(number))
            push.end()

        got, _ = await asyncio.gather(gather(push), feed())
        return got

    assert asyncio.run(both()) == [passage(number) for number in range(count)]


async def test_what_is_put_comes_out_before_the_end() -> None:
    push = Push()
    async with aclosing(push.search(Query(""))) as found:
        for number in range(3):
            await push.put(passage(number))
            assert (await asyncio.wait_for(anext(found), 10)).passage == passage(number)


async def test_a_full_queue_makes_the_app_wait() -> None:
    push = Push(capacity=2)
    await push.put(passage(0))
    await push.put(passage(1))
    third = asyncio.create_task(push.put(passage(2)))
    await asyncio.sleep(0)
    assert not third.done()
    async with aclosing(push.search(Query(""))) as found:
        await anext(found)
        await asyncio.wait_for(third, 10)


async def test_it_ends_at_the_deadline_with_what_was_put() -> None:
    push = Push()
    await push.put(passage(0))
    begun_s = time.monotonic()
    assert await gather(push, deadline_s=begun_s + 0.2) == [passage(0)]
    assert 0.2 <= time.monotonic() - begun_s < 10
    with pytest.raises(InputEnded):
        await push.put(passage(1))


async def test_after_its_end_nothing_is_taken_in() -> None:
    push = Push(capacity=1)
    await push.put(passage(0))
    waiting = asyncio.create_task(push.put(passage(1)))
    await asyncio.sleep(0)
    push.end()
    with pytest.raises(InputEnded):
        await asyncio.wait_for(waiting, 10)
    assert await gather(push) == [passage(0)]


async def test_closing_the_search_frees_who_waits_to_put_and_leaves_no_task() -> None:
    before = tasks()
    push = Push(capacity=1)
    searching = push.search(Query("", deadline_s=time.monotonic() + 60))
    await push.put(passage(0))
    await anext(searching)
    await push.put(passage(1))
    waiting = asyncio.create_task(push.put(passage(2)))
    await asyncio.sleep(0)
    await searching.aclose()
    with pytest.raises(InputEnded):
        await asyncio.wait_for(waiting, 10)
    assert tasks() == before


async def test_it_can_be_searched_once() -> None:
    push = Push()
    push.end()
    assert await gather(push) == []
    with pytest.raises(SourceFailed):
        await gather(push)
