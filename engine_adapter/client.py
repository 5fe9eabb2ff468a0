"""The engine operations over HTTP, with aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import msgspec

from engine_adapter.batching import Batching
from engine_adapter.errors import BadOperation, EngineError, EngineUnavailable, WithoutPlugin
from engine_adapter.messages import (
    PREFIX,
    Answered,
    Answers,
    Batch,
    Blocks,
    EngineInfo,
    Event,
    Extend,
    Finish,
    Invalidate,
    Message,
    Open,
    Operation,
    Progress,
    PromptTokens,
    SetPolicy,
    decode,
    encode,
)

M = TypeVar("M", bound=Message)

MAX_EVENT_BYTES = 1 << 20


class EngineClient:
    """One engine. Shares a session that the caller owns and closes.

    Every method raises an `EngineError`; `EngineUnavailable` if the engine can't be reached,
    breaks off, or lets a deadline pass.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, timeout_s: float = 150.0
    ) -> None:
        """
        Args:
            url: where the engine's HTTP server is, e.g. `http://127.0.0.1:8100`.
            timeout_s: longest wait for the answer to one operation. An operation waits for
                the engine's step under way, so this is far above the usual.
        """
        self.url = url.rstrip("/")
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=5.0)
        self._batching = Batching(self._alone, self._together)
        self._takes_batches = False

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        """What the engine is and how busy it is."""
        limits = aiohttp.ClientTimeout(total=timeout_s, connect=min(timeout_s, 2.0))
        info = await self._ask(EngineInfo, "GET", "/info", limits=limits)
        self._takes_batches = "batch" in info.operations
        return info

    async def set_policy(self, policy: str) -> EngineInfo:
        """Order requests by another policy from the next step on."""
        return await self._ask(EngineInfo, "PUT", "/policy", SetPolicy(policy=policy))

    async def open(self, prompt_id: str, op: Open) -> Progress:
        """Begin an incremental prefill."""
        return await self._carry(Operation(prompt_id=prompt_id, open=op))

    async def extend(self, prompt_id: str, op: Extend) -> Progress:
        """Apply the next version, also after `finish` while the answer has no token."""
        return await self._carry(Operation(prompt_id=prompt_id, extend=op))

    async def invalidate(self, prompt_id: str, op: Invalidate) -> Progress:
        """Cut the prompt and give back the KV behind the cut."""
        return await self._ask(Progress, "POST", f"/prompts/{prompt_id}/invalidate", op)

    async def status(self, prompt_id: str) -> Progress:
        """Where a prompt stands; renews its lease."""
        return await self._ask(Progress, "GET", f"/prompts/{prompt_id}")

    async def tokens(self, prompt_id: str) -> PromptTokens:
        """What the engine has of a prompt; renews its lease."""
        return await self._ask(PromptTokens, "GET", f"/prompts/{prompt_id}/tokens")

    async def blocks(self) -> Blocks:
        """What its prefix cache could find now."""
        return await self._ask(Blocks, "GET", "/blocks")

    async def abort(self, prompt_id: str) -> Progress:
        """Forget a prompt and free its memory."""
        return await self._ask(Progress, "DELETE", f"/prompts/{prompt_id}")

    async def close(self) -> None:
        """Break off the operations that are under way together."""
        await self._batching.close()

    @asynccontextmanager
    async def finish(self, prompt_id: str, op: Finish) -> AsyncIterator[AsyncIterator[Event]]:
        """Close the input; gives the events of the answer. Leaving the block aborts it.

        Until the first token `extend` and `invalidate` may still change what is answered.
        """
        await self._batching.hurry(prompt_id)  # finish comes after the operations before it
        path = f"{PREFIX}/prompts/{prompt_id}/finish"
        timeout = aiohttp.ClientTimeout(total=None, connect=5.0)
        async with (
            translated(),
            answered(
                self._session,
                "POST",
                self.url + path,
                data=encode(op),
                headers={"Content-Type": "application/json"},
                timeout=timeout,
                read_bufsize=MAX_EVENT_BYTES,
            ) as response,
        ):
            if response.status != 200:
                raise _error(await response.read())
            async with aclosing(self._events(response)) as events:
                yield events

    @staticmethod
    async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[Event, None]:
        async with translated():
            async for line in response.content:
                yield decode_event(line)

    async def _carry(self, operation: Operation) -> Progress:
        ask = self._batching.ask if self._takes_batches else self._alone
        return await ask(operation)

    async def _alone(self, operation: Operation) -> Progress:
        path = f"/prompts/{operation.prompt_id}"
        if operation.extend is not None:
            return await self._ask(Progress, "POST", path + "/extend", operation.extend)
        return await self._ask(Progress, "POST", path, operation.open)

    async def _together(self, batch: Batch) -> list[Answered]:
        return (await self._ask(Answers, "POST", "/operations", batch)).answers

    async def _ask(
        self,
        kind: type[M],
        method: str,
        path: str,
        op: Message | None = None,
        limits: aiohttp.ClientTimeout | None = None,
    ) -> M:
        async with (
            translated(),
            answered(
                self._session,
                method,
                self.url + PREFIX + path,
                data=None if op is None else encode(op),
                headers={"Content-Type": "application/json"},
                timeout=limits or self._timeout,
            ) as response,
        ):
            body = await response.read()
            if response.status == 404 and path == "/info":
                raise WithoutPlugin(f"{self.url} runs without the plug-in of stream2llm")
            if response.status != 200:
                raise _error(body)
        try:
            return decode(kind, body)
        except BadOperation as e:
            raise EngineUnavailable(f"{self.url} does not speak this protocol: {e}") from e


@asynccontextmanager
async def answered(
    session: aiohttp.ClientSession, method: str, url: str, **how: Any
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The answer to a request that does no harm when it is carried out twice: it is sent again, on
    another connection, where the first one breaks before the answer. Servers close idle connections
    (vLLM's after 5 s), perhaps in the moment in which one is used again."""
    try:
        response = await session.request(method, url, **how)
    except aiohttp.ClientConnectorError:  # nobody is there
        raise
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
        response = await session.request(method, url, **how)
    async with response:
        yield response


def decode_event(line: bytes) -> Event:
    """One line of an answer.

    Raises:
        EngineUnavailable: it is not an event.
    """
    try:
        event: Event = msgspec.json.decode(line, type=Event)
        return event
    except msgspec.DecodeError as e:
        raise EngineUnavailable(f"the engine sent a line that is no event: {e}") from e


class _Refusal(msgspec.Struct):
    error: dict[str, Any]


def _error(body: bytes) -> EngineError:
    try:
        error = msgspec.json.decode(body, type=_Refusal).error
        return EngineError.from_json(error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return EngineUnavailable(f"the engine answers {body[:200]!r}")


@asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Errors of aiohttp become errors of the engine, here and nowhere else."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError) as e:
        reason = str(e) or type(e).__name__
        raise EngineUnavailable(f"the engine can't be reached or broke off: {reason}") from e
