"""Answers of a server that was not modified, to prompts whose KV another engine has computed.

For stock vLLM with the connector of the engine that hands over. The server fetches the KV, samples
from the first token on, and knows no prompt before it is asked for its answer.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from engine_adapter import completions
from engine_adapter.errors import EngineError, EngineUnavailable, KvLost
from engine_adapter.messages import PROTOCOL_VERSION, EngineInfo, Event, Sampling
from engine_adapter.plain_server import LOAD_TIMEOUT_S, Identity, Load, PlainServer

OPERATIONS = ["answer", "info"]
LACKS = ["open prompts (it answers only whole ones)"]
HEALTH_TIMEOUT_S = 1.0


class DecodeClient:
    """One server. Shares a session that the caller owns and closes."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        """
        Args:
            url: where the server is, e.g. `http://127.0.0.1:8000`, without `/v1`.
        """
        self._server = PlainServer(session, url)
        self._met: _Met | None = None
        self._meeting = asyncio.Lock()

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._server.url

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        """What the server is and how busy it is."""
        try:
            async with asyncio.timeout(timeout_s):
                met, load = await self._meet(timeout_s)
        except TimeoutError as e:
            raise EngineUnavailable(f"{self.url} does not answer in time") from e
        return EngineInfo(
            instance_id=met.instance_id,
            protocol_version=PROTOCOL_VERSION,
            plugin_version="",
            engine=met.identity.engine,
            model=met.identity.model,
            operations=OPERATIONS,
            max_model_len=met.identity.max_model_len,
            block_size=load.block_size,
            kv_blocks_total=load.kv_blocks,
            kv_blocks_free=round(load.kv_blocks * (1 - load.kv_use)),
            running=load.running,
            waiting=load.waiting,
            open_prompts=0,
            preemptions=load.preemptions,
            lacks=LACKS,
        )

    async def _meet(self, timeout_s: float = LOAD_TIMEOUT_S) -> tuple[_Met, Load]:
        """The server as it is now, and how busy."""
        async with self._meeting:
            await self._server.healthy(timeout_s=timeout_s)
            load = await self._server.load(timeout_s=timeout_s)
            if self._met is None or self._met.started_s != load.started_s:
                self._met = _Met(await self._server.identify(timeout_s=timeout_s), load.started_s)
            return self._met, load

    @asynccontextmanager
    async def answer(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        kv_transfer: Mapping[str, Any] | None,
        request_id: str,
        cache_salt: str | None = None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """The answer to a whole prompt, from its first token on. Leaving the block aborts it.

        How long the KV may take is for the caller to say. Once its lease has run out the server
        still reads what is there, whatever that is by then.

        Raises:
            KvLost: the server is well, but did not get the KV. Nothing was sampled.
        """
        identity = (self._met or (await self._meet())[0]).identity
        prompt = list(tokens)
        room = max(identity.max_model_len - len(prompt), 1)
        body = completions.prompt(identity.model, prompt, cache_salt)
        body |= completions.streamed(sampling, room) | {"request_id": request_id}
        if kv_transfer is None:
            async with aclosing(self._events(body, sampling)) as events:
                yield events
        else:
            body["kv_transfer_params"] = dict(kv_transfer)
            async with aclosing(self._fetched(body, sampling)) as events:
                yield events

    async def _events(self, body: completions.Json, sampling: Sampling) -> AsyncGenerator[Event]:
        async with (
            self._server.stream(body) as reading,
            aclosing(reading.lines()) as lines,
            aclosing(
                completions.events(lines, len(body["prompt"]), 0, sampling.logprobs)
            ) as events,
        ):
            async for event in events:
                yield event

    async def _fetched(self, body: completions.Json, sampling: Sampling) -> AsyncGenerator[Event]:
        """The events of an answer, or word that its KV is lost."""
        async with aclosing(self._events(body, sampling)) as events:
            try:
                first = await anext(events)
            except EngineUnavailable as e:
                await self._check(e)
                raise KvLost(f"the KV of the prompt did not come: {e}") from e
            yield first
            async for event in events:
                yield event

    async def _check(self, failure: EngineError) -> None:
        """Returns if the server is well, though an answer of it has failed."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._server.healthy()
        except (EngineError, TimeoutError):
            raise failure from None

    async def close(self) -> None:
        """Nothing runs here."""


@dataclass(frozen=True, slots=True)
class _Met:
    """A server from one start of its process to the next."""

    identity: Identity
    started_s: float | None
    instance_id: str = field(default_factory=lambda: uuid.uuid4().hex)
