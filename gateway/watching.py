"""Clients of engines that tell how each operation went, so that an engine which answers when it is
asked for its info, and nothing else, is found out by the streams that it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from engine_adapter.errors import EngineError, EngineUnavailable
from engine_adapter.messages import (
    Blocks,
    DoneEvent,
    EngineInfo,
    ErrorEvent,
    Event,
    Extend,
    Finish,
    Invalidate,
    Open,
    Progress,
    PromptTokens,
    Sampling,
)
from engine_adapter.operations import Decoding, Operations

T = TypeVar("T")
Told = Callable[[EngineUnavailable | None], None]
"""Hears of each operation: what failed it, or None. An error that the engine itself gives is an
answer like any other; what was cut off here says nothing."""


class WatchedEngine:
    """An engine's operations. Asking for its info or its blocks is not watched: no stream does."""

    def __init__(self, client: Operations, told: Told) -> None:
        self._client = client
        self._told = told

    @property
    def url(self) -> str:
        return self._client.url

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        return await self._client.info(timeout_s=timeout_s)

    async def set_policy(self, policy: str) -> EngineInfo:
        return await self._client.set_policy(policy)

    async def blocks(self) -> Blocks:
        return await self._client.blocks()

    async def open(self, prompt_id: str, op: Open) -> Progress:
        return await _watched(self._client.open(prompt_id, op), self._told)

    async def extend(self, prompt_id: str, op: Extend) -> Progress:
        return await _watched(self._client.extend(prompt_id, op), self._told)

    async def invalidate(self, prompt_id: str, op: Invalidate) -> Progress:
        return await _watched(self._client.invalidate(prompt_id, op), self._told)

    async def status(self, prompt_id: str) -> Progress:
        return await _watched(self._client.status(prompt_id), self._told)

    async def tokens(self, prompt_id: str) -> PromptTokens:
        return await _watched(self._client.tokens(prompt_id), self._told)

    async def abort(self, prompt_id: str) -> Progress:
        return await _watched(self._client.abort(prompt_id), self._told)

    @asynccontextmanager
    async def finish(self, prompt_id: str, op: Finish) -> AsyncIterator[AsyncIterator[Event]]:
        async with _answer(self._client.finish(prompt_id, op), self._told) as events:
            yield events

    async def close(self) -> None:
        await self._client.close()


class WatchedDecoding:
    """A decode engine's operations."""

    def __init__(self, client: Decoding, told: Told, asked: Callable[[], None]) -> None:
        """
        Args:
            asked: called before each operation.
        """
        self._client = client
        self._told = told
        self._asked = asked

    @property
    def url(self) -> str:
        return self._client.url

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        return await self._client.info(timeout_s=timeout_s)

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
        self._asked()
        answer = self._client.answer(
            tokens,
            sampling,
            kv_transfer=kv_transfer,
            request_id=request_id,
            cache_salt=cache_salt,
        )
        async with _answer(answer, self._told) as events:
            yield events

    async def close(self) -> None:
        await self._client.close()


async def _watched(operation: Awaitable[T], told: Told) -> T:
    try:
        result = await operation
    except EngineUnavailable as e:
        told(e)
        raise
    except EngineError:
        told(None)
        raise
    told(None)
    return result


@asynccontextmanager
async def _answer(
    asked: AbstractAsyncContextManager[AsyncIterator[Event]], told: Told
) -> AsyncIterator[AsyncIterator[Event]]:
    async with AsyncExitStack() as answering:
        try:
            events = await answering.enter_async_context(asked)
        except EngineUnavailable as e:
            told(e)
            raise
        yield _followed(events, told)


async def _followed(events: AsyncIterator[Event], told: Told) -> AsyncIterator[Event]:
    """An answer that is accepted is no success yet: its first event is, and its end. Whoever reads
    beyond its last event has the connection read to its end too, so that it is used again."""
    first, over = True, False
    try:
        async for event in events:
            if over:
                continue
            if isinstance(event, ErrorEvent):
                error = EngineError.from_json(event.error)
                told(error if isinstance(error, EngineUnavailable) else None)
            elif first or isinstance(event, DoneEvent):
                told(None)
            first, over = False, isinstance(event, DoneEvent | ErrorEvent)
            yield event
    except EngineUnavailable as e:
        if over:
            return
        told(e)
        raise
    if not over:
        told(EngineUnavailable("the engine ended the answer without completing it"))
