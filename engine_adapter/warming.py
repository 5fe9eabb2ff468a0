"""The engine operations on a server that was not modified: by warming its prefix cache.

A prompt lives here, not in the server. While it grows, completions of one token leave the KV of
its beginning in the server's prefix cache; at the end the whole prompt goes there as one request,
and the server computes what it does not find. A warming is a hint: one that fails costs time, never
an answer.

- Merged: at most one warming of a prompt is under way. What arrives meanwhile goes into the next.
- Limited: so many at once on one server, each of at least `MIN_NEW_TOKENS` new tokens.
- They give way: none is begun while the server has requests waiting, or while an answer asked for
  here has no token yet. But a gauge may be stale, so after `GIVE_WAY_S` one is begun all the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from engine_adapter import completions
from engine_adapter.completions import Json
from engine_adapter.errors import BadOperation, EngineError, PromptFinished, UnknownPrompt
from engine_adapter.messages import Event, Sampling
from engine_adapter.plain_server import Identity, Load, PlainServer, Reading
from engine_adapter.sessions import Status

logger = logging.getLogger(__name__)

AT_ONCE = 2
"""Warmings on one server. Each stands in front of the answers that are asked for after it."""
MIN_NEW_TOKENS = 64
"""A smaller warming costs the server more than it saves."""
GIVE_WAY_S = 1.0
LOOK_S = 0.2
"""How old the server's word about its queue may be."""


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A warming under way."""

    sent: int
    """Its tokens."""
    shared: int
    """How many of them are still the front of the prompt."""


@dataclass(slots=True, eq=False)
class _Prompt:
    """An open prompt, and what the server has computed of it."""

    tokens: list[int]
    cache_salt: str | None
    warmed: int = 0
    """Tokens at its front that are in the server's cache, if that has not evicted them."""
    under_way: _UnderWay | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    answered: bool = False
    """Its answer has a token."""


class Warming:
    """The loop that `StreamingPrompts` expects of an engine, for a server without one."""

    def __init__(self, server: PlainServer, identity: Identity, load: Load) -> None:
        self._server = server
        self._model = identity.model
        self._block = max(load.block_size, 1)
        self._least = max(MIN_NEW_TOKENS, self._block)
        self._caching = load.caching
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._prompts: dict[str, _Prompt] = {}
        self._starting = 0  # answers without a token
        self._answers: dict[str, Reading] = {}

    async def open(
        self, prompt_id: str, tokens: list[int], cache_salt: str | None, weight: float | None
    ) -> Status:
        """Begin a prompt. A server without the plug-in knows no weights."""
        opened = self._prompts[prompt_id] = _Prompt(list(tokens), cache_salt)
        self._warm_soon(opened)
        return _status(opened)

    async def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> Status:
        """Replace what is behind the first `keep` tokens."""
        changed = self._get(prompt_id)
        before = changed.warmed
        self._replace(changed, keep, changed.tokens[:keep] + tokens)
        self._warm_soon(changed)
        return {**_status(changed), "invalidated": before - changed.warmed}

    def _replace(self, changed: _Prompt, keep: int, tokens: list[int]) -> None:
        changed.tokens = tokens
        changed.warmed = min(changed.warmed, keep)
        if (under_way := changed.under_way) is not None:
            under_way.shared = min(under_way.shared, keep)
            if under_way.sent - under_way.shared >= self._least:  # much would be for nothing
                _stop(changed)

    async def reopen(self, prompt_id: str, version: int, tokens: list[int]) -> Status:
        """Replace a prompt whose input is closed, if its answer has no token yet.

        Raises:
            PromptFinished
        """
        closed = self._prompts.get(prompt_id)
        if closed is None or closed.answered:
            raise PromptFinished(f"the answer to prompt {prompt_id!r} has begun")
        closed.tokens = tokens
        return _status(closed)

    async def status(self, prompt_id: str) -> Status:
        """State of a prompt."""
        return _status(self._get(prompt_id))

    async def handed_over(self, prompt_id: str, forget: bool) -> Status:
        """What has become of handed-over KV: there never is any."""
        return {}

    async def close(self, prompt_id: str) -> Status:
        """Forget a prompt."""
        if (closed := self._prompts.pop(prompt_id, None)) is not None:
            _stop(closed)
        return {}

    def _get(self, prompt_id: str) -> _Prompt:
        if (found := self._prompts.get(prompt_id)) is None:
            raise UnknownPrompt(f"no prompt {prompt_id!r} is open here")
        return found

    # Warming.

    def _warm_soon(self, prompt: _Prompt) -> None:
        idle = prompt.task is None or prompt.task.done()
        if self._caching and idle and self._next(prompt):
            prompt.task = asyncio.create_task(self._warm(prompt))

    def _next(self, prompt: _Prompt) -> int:
        """Tokens of the next warming; 0 for none. Servers cache whole blocks: what is behind the
        last one would be computed twice."""
        whole = len(prompt.tokens) - len(prompt.tokens) % self._block
        return whole if whole - prompt.warmed >= self._least else 0

    async def _warm(self, prompt: _Prompt) -> None:
        """Until the server has all there is."""
        while self._next(prompt):
            async with self._turns:
                try:
                    await self._give_way()
                    if length := self._next(prompt):
                        await self._warm_once(prompt, length)
                except EngineError as e:
                    logger.info("a warming on %s failed: %s", self._server.url, e)
                    return  # the next input tries again

    async def _warm_once(self, prompt: _Prompt, length: int) -> None:
        under_way = prompt.under_way = _UnderWay(length, length)
        body = completions.warming(self._model, prompt.tokens[:length], prompt.cache_salt)
        try:
            await self._server.complete(body)
            prompt.warmed = max(prompt.warmed, under_way.shared)
        finally:
            if prompt.under_way is under_way:
                prompt.under_way = None

    async def _give_way(self) -> None:
        deadline_s = time.monotonic() + GIVE_WAY_S
        while time.monotonic() < deadline_s:
            if not self._starting and not (await self._server.load(at_most_s=LOOK_S)).waiting:
                return
            await asyncio.sleep(LOOK_S)

    # Answering.

    def sampling_params(self, sampling: Sampling, prompt_id: str, version: int, room: int) -> Json:
        """The server's form of a `Sampling`, of which it says itself what it refuses."""
        return completions.streamed(sampling, room)

    def first_token_only(self, params: Json) -> Json:
        """Not to be had.

        Raises:
            BadOperation
        """
        raise BadOperation("a server without the plug-in hands no prompt over")

    async def answer(
        self,
        prompt_id: str,
        tokens: list[int],
        cache_salt: str | None,
        params: Json,
        request_id: str,
    ) -> AsyncGenerator[Event, None]:
        """Generate the answer to a whole prompt. Closing the iterator aborts it."""
        answered = self._prompts.setdefault(prompt_id, _Prompt(tokens, cache_salt))
        warmed = answered.warmed
        _stop(answered)  # the answer computes what is missing, and finds what was computed
        body = completions.prompt(self._model, tokens, cache_salt) | params
        self._starting += 1
        try:
            async with (
                self._server.stream(body) as reading,
                aclosing(reading.lines()) as lines,
                aclosing(
                    completions.events(lines, len(tokens), warmed, params.get("logprobs"))
                ) as found,
            ):
                self._answers[request_id] = reading
                async for event in found:
                    if not answered.answered:
                        answered.answered = True
                        self._starting -= 1
                    yield event
        finally:
            self._answers.pop(request_id, None)
            if not answered.answered:
                self._starting -= 1

    async def abort(self, request_id: str) -> None:
        """Stop an answer."""
        if (reading := self._answers.get(request_id)) is not None:
            reading.close()

    # What it says of itself.

    async def load(self) -> Status:
        """How busy the server is, as it said a moment ago."""
        load = await self._server.load(at_most_s=LOOK_S)
        return {
            "kv_blocks_total": load.kv_blocks,
            "kv_blocks_free": round(load.kv_blocks * (1 - load.kv_use)),
            "running": load.running,
            "waiting": load.waiting,
            "open_prompts": len(self._prompts),
            "preemptions": load.preemptions,
            "waiting_tokens": sum(len(p.tokens) - p.warmed for p in self._prompts.values()),
        }

    async def kv_events(self) -> Mapping[str, Any]:
        """None that are followed."""
        return {}

    async def blocks(self) -> Mapping[str, Any]:
        """Not to be had."""
        raise BadOperation("a server without the plug-in does not list its blocks")

    async def set_policy(self, policy: str) -> None:
        """There is none to choose."""
        raise BadOperation("a server without the plug-in has no policies to choose from")

    async def stop(self) -> None:
        """End all warmings."""
        tasks = [p.task for p in self._prompts.values() if p.task is not None]
        for prompt_id in list(self._prompts):
            await self.close(prompt_id)
        await asyncio.gather(*tasks, return_exceptions=True)


def _stop(prompt: _Prompt) -> None:
    if prompt.task is not None:
        prompt.task.cancel()
        prompt.task = prompt.under_way = None


def _status(prompt: _Prompt) -> Status:
    waits = prompt.task is not None and not prompt.task.done()
    return {
        "state": "running" if prompt.under_way else "waiting" if waits else "idle",
        "length": len(prompt.tokens),
        "computed": min(prompt.warmed, len(prompt.tokens)),
    }
