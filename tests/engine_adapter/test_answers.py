"""Updates of finished prompts: HTTP side, front end and scheduler together, in random orders."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from engine_adapter.client import decode_event
from engine_adapter.errors import PromptFinished
from engine_adapter.messages import (
    DoneEvent,
    Event,
    Extend,
    Finish,
    Open,
    Progress,
    Sampling,
    TokenEvent,
)
from engine_adapter.prompts import StreamingPrompts
from engine_adapter.vllm.routes import streaming_prompts
from tests.engine_adapter.fake_llm import FakeLLM
from tests.engine_adapter.harness import (
    MAX_MODEL_LEN,
    SMALL_POOL_BLOCKS,
    VOCABULARY,
    Engine,
    expected_answer,
)


class Life:
    """One prompt from `open` to the end of its answer, updated while it is being answered."""

    def __init__(
        self, prompts: StreamingPrompts[Any], llm: FakeLLM, seed: int, number: int
    ) -> None:
        self.prompts = prompts
        self.llm = llm
        self.rng = random.Random(f"{seed}-{number}")
        self.id = f"p{number}"
        self.tokens: list[int] = []
        self.version = 0
        self.events: list[Event] = []
        self.answer_tokens = self.rng.randint(1, 4)
        self.taken = 0
        self.refused = 0
        self.aborted = False

    def text(self, least: int, most: int) -> list[int]:
        return [self.rng.randrange(VOCABULARY) for _ in range(self.rng.randint(least, most))]

    async def live(self) -> None:
        self.tokens = self.text(1, 40)
        await self.prompts.sessions.open(self.id, Open(tokens=self.tokens))
        await self.llm.some_turns(20)
        tail = self.text(1, 10)
        sampling = Sampling(max_tokens=self.answer_tokens, temperature=0.0, ignore_eos=True)
        self.version, keep = 1, len(self.tokens)
        op = Finish(version=1, keep=keep, tokens=tail, sampling=sampling)
        self.tokens = self.tokens + tail
        lines = self.prompts.finish(self.id, op)
        async with aclosing(lines), anyio.create_task_group() as group:
            group.start_soon(self.read, lines)
            for _ in range(self.rng.randint(0, 4)):
                await self.llm.some_turns(self.rng.choice([1, 4, 15]))
                await self.update()
            if self.rng.random() < 0.15:  # the client goes away
                self.aborted = True
                group.cancel_scope.cancel()
            elif self.rng.random() < 0.15:
                self.aborted = True
                await self.prompts.abort(self.id)

    async def read(self, lines: AsyncIterator[bytes]) -> None:
        async for line in lines:
            self.events.append(decode_event(line))
            if self.rng.random() < 0.2:
                await self.llm.some_turns()

    async def update(self) -> None:
        """An update, sometimes twice, as by a client that sends again without an answer."""
        keep = self.rng.randint(1, len(self.tokens))
        new = self.text(0, min(25, MAX_MODEL_LEN - 6 - keep))
        op = Extend(version=self.version + 1, keep=keep, tokens=new)
        tries = [self.try_update(op) for _ in range(self.rng.choice([1, 1, 2]))]
        answers = await asyncio.gather(*tries)
        assert all(answer == answers[0] for answer in answers)
        if answers[0] is None:
            self.refused += 1
            return
        assert not self.refused, "an update in time after one that was too late"
        self.taken += 1
        self.version, self.tokens = op.version, self.tokens[:keep] + new
        told = answers[0]
        assert (told.version, told.state) == (op.version, "finishing")
        assert (told.length, told.kept) == (len(self.tokens), keep)
        assert told.computed <= len(self.tokens)
        assert await self.prompts.sessions.extend(self.id, op) == told, "a retry"

    async def try_update(self, op: Extend) -> Progress | None:
        try:
            return await self.prompts.sessions.extend(self.id, op)
        except PromptFinished:
            return None

    def check(self) -> None:
        output = [t for e in self.events if isinstance(e, TokenEvent) for t in e.token_ids]
        expected = expected_answer(self.tokens, self.answer_tokens)
        assert output == expected[: len(output)]
        if not self.aborted:
            assert output == expected
            done = self.events[-1]
            assert isinstance(done, DoneEvent)
            assert done.prompt_tokens == len(self.tokens)
            assert done.completion_tokens == len(output)
            assert done.cached_tokens < len(self.tokens)


@asynccontextmanager
async def engine(
    model_dir: Path, seed: int, blocks: int
) -> AsyncIterator[tuple[StreamingPrompts[Any], FakeLLM]]:
    rng = random.Random(seed)
    llm = FakeLLM(Engine(model_dir, blocks, step_tokens=rng.choice([5, 16, 40])), rng)
    prompts = streaming_prompts(llm, "model")  # type: ignore[arg-type]
    running = asyncio.create_task(llm.run())
    try:
        yield prompts, llm
    finally:
        await prompts.stop()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def all_free(llm: FakeLLM) -> None:
    """Wait until nothing of any prompt is left."""
    async with asyncio.timeout(10):
        while (
            llm.engine.free_blocks != llm.engine.idle_blocks
            or llm.engine.scheduler.load()["open_prompts"]
            or llm.engine.scheduler.requests
        ):
            await llm.some_turns()


async def lived(model_dir: Path, seed: int, blocks: int, at_once: int) -> Counter[str]:
    """Play some lives on one engine; what became of their updates."""
    async with engine(model_dir, seed, blocks) as (prompts, llm):
        lives = [Life(prompts, llm, seed, number) for number in range(at_once)]
        async with asyncio.timeout(30):
            await asyncio.gather(*(life.live() for life in lives))
        for life in lives:
            life.check()
        await all_free(llm)
        return Counter(taken=sum(i.taken for i in lives), refused=sum(i.refused for i in lives))


@pytest.mark.parametrize("blocks", [SMALL_POOL_BLOCKS, 400], ids=["small pool", "large pool"])
@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), at_once=st.integers(1, 6))
async def test_the_answer_is_to_the_newest_prompt_whatever_overtakes_what(
    model_dir: Path, blocks: int, seed: int, at_once: int
) -> None:
    await lived(model_dir, seed, blocks, at_once)


async def test_updates_come_in_time_and_too_late(model_dir: Path) -> None:
    """Else the test above would show nothing."""
    became = Counter[str]()
    for seed in range(12):
        became += await lived(model_dir, seed, SMALL_POOL_BLOCKS, 4)
    assert became["taken"] >= 20
    assert became["refused"] >= 10
