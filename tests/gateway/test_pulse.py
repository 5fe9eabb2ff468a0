"""What counts against an engine, and what does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from engine_adapter.errors import EngineUnavailable
from gateway.engines import AnyEngine
from gateway.pool import Callbacks, Pool
from gateway.settings import Settings
from gateway.telemetry import Metrics
from tests.fake_engine import FakeEngine
from tests.gateway.pools import served


@asynccontextmanager
async def watching(url: str, lost: list[str]) -> AsyncIterator[tuple[Pool, AnyEngine]]:
    """A pool of this one engine, which is polled only when it is told to."""

    def noted(engine: AnyEngine) -> None:
        lost.append(engine.url)

    def nothing(*_: AnyEngine | bool) -> None:
        """Nobody listens."""

    async with aiohttp.ClientSession() as session:
        pool = Pool(session, Settings(engine=(url,), poll_s=3600.0), Metrics())
        await pool.start(Callbacks(lost=noted, left=nothing, seen=nothing, removed=nothing))
        yield pool, pool.all[0]
        await pool.stop()


def timed_out() -> EngineUnavailable:
    error = EngineUnavailable("no answer")
    error.__cause__ = TimeoutError()
    return error


async def test_a_late_answer_counts_against_an_engine_only_if_this_process_had_time() -> None:
    lost = list[str]()
    async with served(FakeEngine().app()) as url, watching(url, lost) as (pool, engine):
        late_s = 1.0

        async def too_late(*, timeout_s: float = 5.0) -> None:
            time.sleep(late_s)  # noqa: ASYNC251 - nothing runs meanwhile
            raise timed_out()

        engine.client.info = too_late  # type: ignore[method-assign, assignment]
        await pool.check(engine)
        for _ in range(5):
            pool.told(engine, timed_out())
        assert engine.info is not None
        assert engine.takes
        assert not lost
        late_s = 0.0
        async with asyncio.timeout(10):
            while engine.takes:
                await pool.check(engine)
                await asyncio.sleep(0.05)
        assert lost == [url]


async def test_operations_that_shared_a_request_have_failed_once() -> None:
    async with served(FakeEngine().app()) as url, watching(url, []) as (pool, engine):
        for shared in range(9):
            error = EngineUnavailable("reset")
            error.told = shared > 0
            pool.told(engine, error)
        assert engine.health.failures == 1
        assert engine.takes
