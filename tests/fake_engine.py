"""An engine without a model that speaks the real protocol: for unit tests and for measuring
the gateway alone. It keeps every prompt's tokens and computes nothing.

`python -m tests.fake_engine --port N` serves one.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvloop
from aiohttp import web

from engine_adapter.errors import BadOperation, PromptFinished
from engine_adapter.messages import DoneEvent, Event, Sampling, TokenEvent
from engine_adapter.prompts import StreamingPrompts
from engine_adapter.sessions import Limits, Status
from engine_adapter.simulated.routes import PROMPTS, errors, routes

MODEL = "fake"
LONG_TOKENS = 1000


@dataclass
class FakeCore:
    """The loop of an engine that has computed everything the moment it hears of it."""

    delay_s: Callable[[], float] = lambda: 0.0
    prefill_s: Callable[[list[int]], float] = lambda tokens: 0.0
    """From closing the input, which is these tokens, to the first token."""
    kv_blocks: int = 100_000
    long_answers: bool = False
    """An answer that may have `LONG_TOKENS` is 200 kB."""
    hands_over: bool = False
    leased: dict[str, list[int]] = field(default_factory=dict)
    """Prompts whose KV waits for another engine."""
    publishes: Mapping[str, Any] = field(default_factory=dict)
    """What it says of its KV events, of which it has none."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)
    finished: dict[str, list[int]] = field(default_factory=dict)
    """The whole prompt of every answered id."""
    answering: int = 0
    """Answers under way."""
    sampled: dict[str, Sampling] = field(default_factory=dict)
    """And how it was asked to answer."""

    async def open(
        self, prompt_id: str, tokens: list[int], cache_salt: str | None, weight: float | None
    ) -> Status:
        self.tokens[prompt_id] = list(tokens)
        return await self._done("open", prompt_id)

    async def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> Status:
        self.tokens[prompt_id] = self.tokens[prompt_id][:keep] + tokens
        return await self._done("extend", prompt_id)

    async def reopen(self, prompt_id: str, version: int, tokens: list[int]) -> Status:
        if prompt_id not in self.tokens:
            raise PromptFinished("the answer has begun")
        self.tokens[prompt_id] = list(tokens)
        return await self._done("reopen", prompt_id)

    async def status(self, prompt_id: str) -> Status:
        length = len(self.tokens[prompt_id])
        return {"state": "idle", "length": length, "computed": length}

    async def handed_over(self, prompt_id: str, forget: bool) -> Status:
        return {"state": "handed_over" if prompt_id in self.leased else "fetched"}

    async def close(self, prompt_id: str) -> Status:
        self.tokens.pop(prompt_id, None)
        self.leased.pop(prompt_id, None)
        self.operations.append("close")
        return {}

    async def _done(self, operation: str, prompt_id: str) -> Status:
        self.operations.append(operation)
        status = await self.status(prompt_id)
        await asyncio.sleep(self.delay_s())
        return status

    async def load(self) -> Status:
        return {
            "kv_blocks_total": self.kv_blocks,
            "kv_blocks_free": self.kv_blocks,
            "running": 0,
            "waiting": 0,
            "open_prompts": len(self.tokens),
            "policy": "default",
            "hardware": "2x Fake",
            "accelerators": 2,
            "settings": "none",
            "hands_over": self.hands_over,
        }

    async def kv_events(self) -> Mapping[str, Any]:
        return self.publishes

    async def blocks(self) -> Mapping[str, Any]:
        raise BadOperation("there is no prefix cache")

    async def set_policy(self, policy: str) -> None:
        """There is nothing to order."""

    def sampling_params(
        self, sampling: Sampling, prompt_id: str, version: int, room: int
    ) -> Sampling:
        return sampling

    def first_token_only(self, params: Sampling) -> Sampling:
        if not self.hands_over:
            raise BadOperation("this engine hands no prompt over")
        return msgspec.structs.replace(params, max_tokens=1)

    async def answer(
        self,
        prompt_id: str,
        tokens: list[int],
        cache_salt: str | None,
        params: Sampling,
        request_id: str,
    ) -> AsyncGenerator[Event, None]:
        self.finished[prompt_id], self.sampled[prompt_id] = tokens, params
        await self.close(prompt_id)
        self.answering += 1
        try:
            await asyncio.sleep(self.prefill_s(tokens))
        finally:
            self.answering -= 1
        over = self.hands_over and params.max_tokens == 1
        texts = ["an"] if over else ["an", "swer"]
        if self.long_answers and (params.max_tokens or 0) >= LONG_TOKENS:
            texts = ["long " * 4000] * 10
        for text in texts:
            yield TokenEvent(token_ids=[1], text=text)
        if over:
            self.leased[prompt_id] = tokens
        yield DoneEvent(
            finish_reason="length" if over else "stop",
            prompt_tokens=len(tokens),
            cached_tokens=0,
            completion_tokens=len(texts),
            kv_transfer={"prompt_id": prompt_id} if over else None,
        )

    async def abort(self, request_id: str) -> None:
        """Answers come at once."""


class FakeEngine:
    """The HTTP side."""

    def __init__(
        self, max_model_len: int = 100_000, model: str = MODEL, most_open: int = 100_000
    ) -> None:
        self.max_model_len = max_model_len
        self.core = FakeCore(kv_blocks=max_model_len)
        limits = Limits(max_model_len, 1_000_000, most_open)
        self.prompts = StreamingPrompts(self.core, limits, name="fake", model=model, block_size=16)
        self.sessions = self.prompts.sessions
        self.finished = self.core.finished

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20, middlewares=[errors])
        app[PROMPTS] = self.prompts
        app.add_routes(routes)
        return app


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--long-answers", action="store_true")
    options, fake = parser.parse_args(), FakeEngine()
    fake.core.long_answers = options.long_answers
    web.run_app(fake.app(), host="127.0.0.1", port=options.port, access_log=None)
