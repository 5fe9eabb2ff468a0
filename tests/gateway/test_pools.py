"""Engines that come, go, fail and are full, while streams are open."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from engine_adapter.errors import EngineUnavailable
from engine_adapter.messages import DoneEvent, EngineInfo, Event, Sampling, TokenEvent
from engine_adapter.operations import Decoding
from gateway.client import Stream, StreamError
from gateway.engines import AnyEngine, DecodeEngine
from gateway.errors import EngineFailed, EngineThere
from gateway.placement import Engines
from gateway.pool import Callbacks, Pool
from gateway.prefixes import Prefixes
from gateway.prompt import PromptBuilder
from gateway.settings import Settings
from gateway.telemetry import Metrics
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine
from tests.gateway.pools import QUESTION, Breakable, Front, front, served

pytestmark = pytest.mark.slow


async def answered(front: Front, **options: Any) -> str:
    async with front.client.stream(MODEL, QUESTION, **options) as stream:
        return await whole_answer(stream)


async def whole_answer(stream: Stream) -> str:
    await stream.send("some context")
    return str((await stream.finish())["choices"][0]["message"]["content"])


async def test_an_engine_that_fails_its_streams_gets_none_until_one_has_worked_there(
    model_dir: Path,
) -> None:
    async with front(model_dir, 2, eject_after=2, routing="round-robin") as f:
        bad, good = f.engines
        bad.breaks = True
        assert [await answered(f) for _ in range(6)] == ["answer"] * 6
        assert len(good.fake.finished) == 6
        assert f.at(bad).health.ejections >= 1
        metrics = (await f.http.get(f.url + "/metrics")).text
        assert f'stream2llm_engine_ejections_total{{engine="{bad.url}"}}' in metrics
        assert f.at(bad).standing in ("ejected", "half-open")
        bad.breaks = False

        async def back() -> bool:
            assert await answered(f) == "answer"
            return f.at(bad).standing == "healthy"

        await until(back, within_s=20)
        assert bad.fake.finished


async def test_a_trial_that_fails_ejects_for_longer(model_dir: Path) -> None:
    async with front(model_dir, 2, eject_after=1, routing="round-robin") as f:
        bad = f.engines[0]
        bad.breaks = True
        assert [await answered(f) for _ in range(2)] == ["answer"] * 2
        await f.standing(bad, "half-open")
        assert [await answered(f) for _ in range(2)] == ["answer"] * 2
        assert f.at(bad).health.ejections >= 2


async def test_open_streams_leave_an_engine_that_says_nothing(model_dir: Path) -> None:
    async with front(model_dir, 2, poll_timeout_s=0.2, routing="round-robin") as f:
        streams = []
        async with AsyncExitStack() as opened:
            for n in range(4):
                stream = await opened.enter_async_context(f.client.stream(MODEL, QUESTION))
                await stream.send(f"context {n}")
                streams.append(stream)
            stuck = f.engines[0]

            async def read() -> bool:
                return [len(engine.fake.core.tokens) for engine in f.engines] == [2, 2]

            await until(read, within_s=20)
            stuck.runs.clear()
            await f.standing(stuck, "away")
            async with asyncio.timeout(20):
                for stream in streams:
                    whole = await stream.finish()
                    assert whole["choices"][0]["message"]["content"] == "answer"
            assert len(f.engines[1].fake.finished) == 4
            assert stuck.fake.core.tokens
            stuck.runs.set()
        await f.standing(stuck, "healthy")

        async def forgotten() -> bool:
            return not stuck.fake.core.tokens

        await until(forgotten, within_s=5)


async def test_streams_beyond_what_engines_may_have_are_refused_and_those_let_in_are_not(
    model_dir: Path,
) -> None:
    async with front(model_dir, 2, engine_max_streams=2) as f:

        async def open_one() -> httpx.Response:
            body = {"model": MODEL, "messages": QUESTION}
            return await f.http.post(f.url + "/v1/streams", json=body)

        created = await asyncio.gather(*(open_one() for _ in range(4)))  # none is placed yet
        assert [response.status_code for response in created] == [201] * 4
        refused = await open_one()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert "Retry-After" in refused.headers
        for response in created:
            path = f"{f.url}/v1/streams/{response.json()['id']}"
            await f.http.post(path + "/chunks", json={"text": "same for all"})
        finished = [
            await f.http.post(f"{f.url}/v1/streams/{r.json()['id']}/finish", json={"stream": False})
            for r in created
        ]
        assert [response.status_code for response in finished] == [200] * 4
        assert (await open_one()).status_code == 201


async def test_a_burst_of_streams_is_let_in_as_far_as_there_is_room(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, held = PromptBuilder.frame, Prefixes.held

    async def slow_frame(self: PromptBuilder, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0.1)
        return await frame(self, *args, **options)

    async def slow_held(self: Prefixes, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(0.1)
        return await held(self, *args, **options)

    monkeypatch.setattr(PromptBuilder, "frame", slow_frame)
    monkeypatch.setattr(Prefixes, "held", slow_held)
    async with front(model_dir, 2, engine_max_streams=3) as f:
        body = {"model": MODEL, "messages": QUESTION}
        created = await asyncio.gather(
            *(f.http.post(f.url + "/v1/streams", json=body) for _ in range(20))
        )
        let_in = [r.json()["id"] for r in created if r.status_code == 201]
        assert sorted(r.status_code for r in created) == [201] * 6 + [503] * 14
        passed = await f.http.post(f.url + "/v1/chat/completions", json=body)
        assert passed.status_code == 503, "it would take a place that was promised"
        path = f"{f.url}/v1/streams/"
        posted = {"text": "the same for all"}
        await asyncio.gather(*(f.http.post(f"{path}{name}/chunks", json=posted) for name in let_in))

        async def all_placed() -> bool:
            return sum(f.at(engine).streams for engine in f.engines) == 6

        await until(all_placed, within_s=5)
        assert [f.at(engine).streams for engine in f.engines] == [3, 3]


async def test_a_stream_goes_on_elsewhere_when_its_engine_says_that_it_is_full(
    model_dir: Path,
) -> None:
    full = Breakable(FakeEngine(most_open=0))
    async with (
        served(full.app()) as full.url,
        front(model_dir, 0, engine=(full.url,), routing="round-robin") as f,
    ):
        async with f.client.stream(MODEL, QUESTION) as stream:
            with pytest.raises(StreamError) as refused:
                await whole_answer(stream)
            assert (refused.value.status, refused.value.code) == (503, "overloaded")
        roomy = Breakable()
        async with served(roomy.app()) as roomy.url:
            f.pool.add(roomy.url, "engine")
            await f.standing(roomy, "healthy")
            assert [await answered(f) for _ in range(4)] == ["answer"] * 4
            assert len(roomy.fake.finished) == 4
            assert f.at(full).health.failures == 0
            f.pool.drain(f.at(roomy), remove=True)

            async def gone() -> bool:
                return f.pool.by_url(roomy.url) is None

            await until(gone, within_s=5)


async def test_requests_that_are_passed_through_count_too(model_dir: Path) -> None:
    async with front(model_dir, 1, engine_max_streams=1) as f:
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("text")

            async def passed() -> int:
                body = {"model": MODEL, "messages": QUESTION}
                url = f.url + "/v1/chat/completions"
                return (await f.http.post(url, json=body)).status_code

            assert f.at(f.engines[0]).load == 1
            assert await passed() == 503
        assert await passed() == 404  # the engine has no such route, and says so itself


async def test_engines_join_drain_and_leave_while_streams_are_open(model_dir: Path) -> None:
    async with front(model_dir, 2) as f:
        old, new = f.engines
        f.pool.drain(f.at(new), remove=True)

        async def alone() -> bool:
            return f.pool.by_url(new.url) is None

        await until(alone, within_s=5)
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("read at the old one")
            f.pool.add(new.url, "engine")
            with pytest.raises(EngineThere):
                f.pool.add(new.url, "engine")
            await f.standing(new, "healthy")
            f.pool.drain(f.at(old))
            assert [await answered(f) for _ in range(3)] == ["answer"] * 3
            assert f.at(old).standing == "draining"
            await stream.finish()
            await f.standing(old, "drained")
        assert [len(e.fake.finished) for e in (old, new)] == [1, 3]
        f.pool.undrain(f.at(old))
        assert f.at(old).standing == "healthy"


async def forgotten(engine: Breakable) -> bool:
    """Whether an engine has no prompt any more."""
    return not engine.fake.core.tokens


async def test_an_engine_is_drained_under_load_and_no_request_fails(model_dir: Path) -> None:
    rng = random.Random(8)
    async with front(model_dir, 2, drain_timeout_s=0.3) as f:
        over, done = asyncio.Event(), 0
        for engine in f.engines:
            engine.fake.core.delay_s = lambda: rng.uniform(0, 0.02)
            engine.fake.core.prefill_s = lambda tokens: 0.05

        async def load(number: int) -> None:
            nonlocal done
            while not over.is_set():
                async with f.client.stream(MODEL, QUESTION) as stream:
                    for piece in range(3):
                        await stream.send(f"context {number} {piece}")
                        await asyncio.sleep(rng.uniform(0, 0.2))
                    assert await whole_answer(stream) == "answer"
                done += 1

        async def more(count: int) -> None:
            async def so() -> bool:
                return done >= wanted

            wanted = done + count
            await until(so, within_s=30)

        async with asyncio.TaskGroup() as clients:
            for number in range(8):  # fewer than are ever refused as a crowd
                clients.create_task(load(number))
            await more(8)
            engine = f.engines[0]
            f.pool.drain(f.at(engine))
            await f.standing(engine, "drained", within_s=10)
            assert f.at(engine).streams == 0
            await until(partial(forgotten, engine), within_s=5)
            await more(8)
            f.pool.undrain(f.at(engine))
            await more(8)
            over.set()
        assert engine.fake.finished


async def test_a_drain_does_not_take_a_removal_back(model_dir: Path) -> None:
    async with front(model_dir, 1) as f:
        [engine] = f.engines
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("keeps it busy")
            f.pool.drain(f.at(engine), remove=True)
            f.pool.drain(f.at(engine))
            await stream.finish()

        async def gone() -> bool:
            return f.pool.by_url(engine.url) is None

        await until(gone, within_s=5)


async def test_an_engine_on_its_way_out_comes_back_in_another_role(model_dir: Path) -> None:
    async with front(model_dir, 2) as f:
        _, changed = f.engines
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("keeps one of them busy")
            f.pool.drain(f.at(changed), remove=True)
            f.pool.add(changed.url, "plain")

        async def changed_role() -> bool:
            found = f.pool.by_url(changed.url)
            return found is not None and found.role == "plain"

        await until(changed_role, within_s=5)


async def test_what_is_still_open_at_the_end_of_a_drain_goes_on_elsewhere(model_dir: Path) -> None:
    async with front(model_dir, 2, drain_timeout_s=0.2, routing="round-robin") as f:
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("one")
            left = next(e for e in f.engines if f.at(e).streams)
            f.pool.drain(f.at(left))
            await f.standing(left, "drained")
            await stream.send("two")
            await stream.finish()
        assert not left.fake.finished
        assert not left.fake.core.tokens, "it keeps the prompt that has left"


# Decode engines.


class FakeDecoding:
    """A decode engine as its client sees it."""

    def __init__(self, url: str, running: int) -> None:
        self.url = url
        self.breaks = False
        self._running = running

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        return EngineInfo(
            instance_id="1", protocol_version=1, plugin_version="", engine="fake", model=MODEL,
            operations=[], max_model_len=1000, block_size=16, kv_blocks_total=1, kv_blocks_free=1,
            running=self._running, waiting=0, open_prompts=0,
        )  # fmt: skip

    @asynccontextmanager
    async def answer(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        kv_transfer: Mapping[str, Any] | None,
        request_id: str,
        cache_salt: str | None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        async def events() -> AsyncIterator[Event]:
            yield TokenEvent(token_ids=[1], text="a")
            if self.breaks:
                raise EngineUnavailable("it broke off")
            yield DoneEvent(
                finish_reason="stop", prompt_tokens=1, cached_tokens=0, completion_tokens=1
            )

        yield events()

    async def close(self) -> None:
        """Nothing runs."""


class NothingHeld:
    """Knows of no prefixes."""

    async def held(
        self, engines: Sequence[Any], tokens: Sequence[int], salt: str | None
    ) -> Mapping[str, int]:
        return {}

    def sent(self, engine: Any, tokens: Sequence[int], salt: str | None) -> None:
        """Forgotten."""


@asynccontextmanager
async def decoders(**running: int) -> AsyncIterator[tuple[Engines, dict[str, FakeDecoding]]]:
    """Engines that decode, each with so many requests of others."""
    fakes = {f"http://{name}": FakeDecoding(f"http://{name}", n) for name, n in running.items()}
    settings = Settings(decode_engine=tuple(fakes), eject_after=1)

    def client(session: aiohttp.ClientSession, url: str) -> Decoding:
        return fakes[url]

    def nothing(*_: AnyEngine | bool) -> None:
        """Nobody listens."""

    async with aiohttp.ClientSession() as session:
        pool = Pool(session, settings, Metrics(), decoding=client)
        await pool.start(Callbacks(lost=nothing, left=nothing, seen=nothing, removed=nothing))
        yield Engines(pool, NothingHeld(), "prefix"), fakes
        await pool.stop()


async def test_an_answer_goes_to_the_decode_engine_with_the_least_to_do() -> None:
    async with decoders(a=2, b=1, c=7) as (engines, _):
        chosen: list[str] = []
        for _ in range(3):
            engine = engines.choose(MODEL, 100, set())
            engine.streams += 1
            chosen.append(engine.url)
        assert chosen[0] == "http://b"
        assert set(chosen) == {"http://a", "http://b"}
        assert not engines.ready, "one that only decodes takes no prompts"


async def test_a_decode_engine_to_be_avoided_or_too_small_is_not_chosen() -> None:
    async with decoders(a=0, b=5) as (engines, _):
        first = engines.choose(MODEL, 100, set())
        assert engines.choose(MODEL, 100, {first}).url == "http://b"
        for length, avoid in ((1001, set[DecodeEngine]()), (1, set(engines.pool.decoders))):
            with pytest.raises(EngineFailed):
                engines.choose(MODEL, length, avoid)
        with pytest.raises(EngineFailed):
            engines.choose("another", 1, set())


async def test_a_decode_engine_that_breaks_off_is_ejected() -> None:
    async with decoders(a=0, b=5) as (engines, fakes):
        fakes["http://a"].breaks = True
        engine = engines.choose(MODEL, 1, set())

        async def answer() -> list[Event]:
            asked = engine.client.answer(
                [1], Sampling(), kv_transfer=None, request_id="1", cache_salt=None
            )
            async with asked as events:
                return [event async for event in events]

        with pytest.raises(EngineUnavailable):
            await answer()
        assert engine.standing == "ejected"
        assert engines.choose(MODEL, 1, set()).url == "http://b"
