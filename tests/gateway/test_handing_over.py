"""Disaggregated serving over HTTP: a gateway, an engine that reads, and one that decodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer

from gateway.app import build
from gateway.client import Client
from gateway.settings import Settings
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine
from tests.fake_openai import FakeOpenAI

QUESTION = [{"role": "user", "content": "Why?"}]


@dataclass
class Pair:
    """An engine of each kind, and a client of the gateway before them."""

    reads: FakeEngine
    decodes: FakeOpenAI
    client: Client

    def reset(self) -> None:
        """As if nothing had happened yet."""
        self.reads.finished.clear()
        self.decodes.refuses, self.decodes.fetch = None, self.fetch
        self.decodes.answers.clear()
        self.decodes.aborted.clear()
        for gate in (self.decodes.answer_gate, self.decodes.more_gate):
            gate.set()

    def fetch(self, kv_transfer: dict[str, Any]) -> bool:
        return self.reads.core.leased.pop(kv_transfer["prompt_id"], None) is not None

    @property
    def is_clean(self) -> bool:
        core = self.reads.core
        return not core.leased and not core.tokens


@asynccontextmanager
async def running(
    model_dir: Path, timeout_s: float, eject_after: int = 1000
) -> AsyncIterator[Pair]:
    """
    Args:
        timeout_s: longest wait for the decode engine.
        eject_after: so many hand-overs that fail in a row.
    """
    reads = FakeEngine()
    decodes = FakeOpenAI(
        card={"id": MODEL, "max_model_len": 4096},
        first_token=lambda prompt: 1,
    )
    reads.core.hands_over = True
    async with AsyncExitStack() as running:
        urls = []
        for app in (reads.app(), decodes.app()):
            server = await running.enter_async_context(TestServer(app))
            urls.append(str(server.make_url("")).rstrip("/"))
        settings = Settings(
            engine=(urls[0],), decode_engine=(urls[1],), tokenizer=str(model_dir),
            handoff_min_tokens=3, handoff_idle_tokens=-1, handoff_timeout_s=timeout_s,
            eject_after=eject_after,
        )  # fmt: skip
        gateway = await running.enter_async_context(TestServer(build(settings)))
        async with Client(str(gateway.make_url(""))) as client:
            pair = Pair(reads, decodes, client)
            pair.reset()
            yield pair


@pytest_asyncio.fixture(scope="session")
async def running_pair(model_dir: Path) -> AsyncIterator[Pair]:
    async with running(model_dir, 10) as pair:
        yield pair


@pytest.fixture
def pair(running_pair: Pair) -> Pair:
    running_pair.reset()
    return running_pair


async def answer(pair: Pair, **options: Any) -> tuple[str, dict[str, Any]]:
    """Of a stream with one chunk, and its status then."""
    async with pair.client.stream(MODEL, QUESTION, temperature=0, **options) as stream:
        await stream.send("It rains.")
        text = "".join([piece async for piece in stream.answer()])
        return text, await stream.status()


async def test_the_decode_engine_gets_the_prompt_and_its_kv(pair: Pair) -> None:
    text, status = await answer(pair, max_tokens=4)
    assert text == "an 2 3 4"  # the first token of the one, the others of the other
    (asked,) = pair.decodes.answers
    ((prompt_id, prompt),) = pair.reads.finished.items()
    assert asked["prompt"] == prompt
    assert asked["kv_transfer_params"] == {"prompt_id": prompt_id}
    assert asked["max_tokens"] == 4
    assert status["handoff"]["decided"]
    assert status["handoff"]["reason"] == "busy_engine"
    assert status["handoff"]["decode_engine"] != status["engine"]
    assert pair.is_clean


async def test_a_short_answer_stays(pair: Pair) -> None:
    text, status = await answer(pair, max_tokens=2)
    assert text == "answer"
    assert status["handoff"] == {
        "decided": False, "reason": "short_answer", "decode_engine": None, "resumed": 0,
    }  # fmt: skip
    metrics = (await pair.client._http.get("/metrics")).text
    assert 'stream2llm_handoffs_total{decoded="here",reason="short_answer"} 1.0' in metrics


@pytest.mark.parametrize("failure", ["lost", "refused"])
async def test_what_the_decode_engine_can_not_have_is_read_again(pair: Pair, failure: str) -> None:
    if failure == "lost":
        pair.decodes.fetch = lambda kv_transfer: False
    else:
        pair.decodes.refuses = (500, "out of order")
    await is_read_again(pair)


@pytest.mark.slow
async def test_what_the_decode_engine_has_too_late_is_read_again(model_dir: Path) -> None:
    async with running(model_dir, 0.5) as pair:
        pair.decodes.answer_gate.clear()
        await is_read_again(pair)
        pair.decodes.answer_gate.set()


async def is_read_again(pair: Pair) -> None:
    text, status = await answer(pair, max_tokens=4)
    assert text == "ananswer"  # the engine that reads begins anew behind its own first token
    assert status["handoff"]["resumed"] == 1
    assert pair.is_clean


@pytest.mark.slow
async def test_a_decode_engine_that_never_gets_any_kv_is_ejected(model_dir: Path) -> None:
    async with running(model_dir, 5, eject_after=2) as pair:
        pair.decodes.fetch = lambda kv_transfer: False
        reasons = []
        for _ in range(3):
            text, status = await answer(pair, max_tokens=4)
            assert text in ("ananswer", "answer")
            reasons.append(status["handoff"]["reason"])
            pair.reads.core.leased.clear()
        assert reasons == ["busy_engine", "busy_engine", "no_decode_engine"]


@pytest.mark.parametrize("phase", ["transfer", "decode"])
async def test_a_client_that_hangs_up_frees_both_sides(pair: Pair, phase: str) -> None:
    gate = pair.decodes.answer_gate if phase == "transfer" else pair.decodes.more_gate
    gate.clear()

    async def hang_up() -> None:
        async with pair.client.stream(MODEL, QUESTION, max_tokens=9) as stream:
            await stream.send("It rains.")
            _ = [piece async for piece in stream.answer()]

    waiting = asyncio.create_task(hang_up())

    async def reached() -> bool:
        fetched = bool(pair.decodes.answers) and not pair.reads.core.leased
        return fetched if phase == "decode" else bool(pair.decodes.answers)

    await until(reached, within_s=3)
    waiting.cancel()

    async def freed() -> bool:
        return pair.is_clean and len(pair.decodes.aborted) == 1

    await until(freed, within_s=8)


@pytest.mark.engine
async def test_the_decode_engine_may_take_as_long_as_the_setting_says(model_dir: Path) -> None:
    async with running(model_dir, 40) as pair:
        pair.decodes.answer_gate.clear()
        asyncio.get_running_loop().call_later(22, pair.decodes.answer_gate.set)
        text, status = await answer(pair, max_tokens=4)
    assert text == "an 2 3 4"
    assert status["handoff"]["resumed"] == 0
