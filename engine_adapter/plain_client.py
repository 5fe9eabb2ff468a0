"""The engine operations for a server that was not modified; see `warming.py` for how.

Everything that the plug-in does in an engine's HTTP server is done here instead: versions, retries,
leases. So a prompt is known to the client that opened it, and to no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import aiohttp
import msgspec

from engine_adapter.completions import Json
from engine_adapter.errors import BadOperation, EngineUnavailable
from engine_adapter.messages import (
    Blocks,
    EngineInfo,
    Event,
    Extend,
    Finish,
    Invalidate,
    Open,
    Progress,
    PromptTokens,
)
from engine_adapter.plain_server import LOAD_TIMEOUT_S, Identity, Load, PlainServer
from engine_adapter.prompts import StreamingPrompts
from engine_adapter.sessions import DEFAULT_OPEN_PROMPTS, Limits
from engine_adapter.warming import Warming

VOCABULARY = 1 << 31
"""The server does not say how many tokens it knows; it refuses those that it does not."""
OPERATIONS = ["open", "extend", "invalidate", "finish", "abort", "status", "info"]
LACKS = [
    "exact invalidation (the KV of replaced tokens stays until the server needs the room)",
    "eviction by cost or policy (the server does not know that a prompt is open)",
    "exact counts of open prompts (computed and invalidated tokens are estimates)",
    "a choice of policies",
    "a list of its blocks",
    "the tokens of a prompt, for another gateway (the gateways' index keeps them instead)",
    "tenants' prefixes apart from each other, where the server does not know `cache_salt`",
]
NO_CACHE = "a prefix cache (nothing is computed before the prompt is complete)"


class PlainClient:
    """One server. Shares a session that the caller owns and closes."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        """
        Args:
            url: where the server is, e.g. `http://127.0.0.1:8000`, without `/v1`.
        """
        self._server = PlainServer(session, url)
        self._met: _Met | None = None
        self._meeting = asyncio.Lock()
        self._lost = 0  # how often the server did not answer

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._server.url

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        """What the server is and how busy it is. Finds out that it was restarted: by the start
        time in its metrics, or, where it gives none, by its absence."""
        try:
            async with asyncio.timeout(timeout_s):
                met = await self._meet(timeout_s)
                return met.described(await met.prompts.info())
        except TimeoutError as e:
            self._lost += 1
            raise EngineUnavailable(f"{self.url} does not answer in time") from e
        except EngineUnavailable:
            self._lost += 1
            raise

    async def _meet(self, timeout_s: float = LOAD_TIMEOUT_S) -> _Met:
        """The server as it is now."""
        async with self._meeting:
            await self._server.healthy(timeout_s=timeout_s)
            load = await self._server.load(timeout_s=timeout_s)
            life = load.started_s if load.started_s is not None else self._lost
            if self._met is None or self._met.life != life:
                identity = await self._server.identify(timeout_s=timeout_s)
                await self.close()
                self._met = _Met(self._server, identity, load, life)
            return self._met

    async def _prompts(self) -> StreamingPrompts[Json]:
        return (self._met or await self._meet()).prompts

    async def close(self) -> None:
        """End all warmings, and forget the prompts."""
        met, self._met = self._met, None
        if met is not None:
            await met.prompts.stop()
            await met.warming.stop()

    async def set_policy(self, policy: str) -> EngineInfo:
        """Not to be had.

        Raises:
            BadOperation
        """
        raise BadOperation(f"{self.url} runs without the plug-in: it has no policies")

    async def blocks(self) -> Blocks:
        """Not to be had.

        Raises:
            BadOperation
        """
        return await (await self._prompts()).blocks()

    async def open(self, prompt_id: str, op: Open) -> Progress:
        """Begin a prompt."""
        return await (await self._prompts()).sessions.open(prompt_id, op)

    async def extend(self, prompt_id: str, op: Extend) -> Progress:
        """Apply the next version, also after `finish` while the answer has no token."""
        return await (await self._prompts()).sessions.extend(prompt_id, op)

    async def invalidate(self, prompt_id: str, op: Invalidate) -> Progress:
        """Cut the prompt. The server keeps the KV behind the cut until it needs the room."""
        return await (await self._prompts()).sessions.invalidate(prompt_id, op)

    async def status(self, prompt_id: str) -> Progress:
        """Where a prompt stands; renews its lease."""
        return await (await self._prompts()).sessions.status(prompt_id)

    async def tokens(self, prompt_id: str) -> PromptTokens:
        """What a prompt is; renews its lease."""
        return await (await self._prompts()).sessions.tokens(prompt_id)

    async def abort(self, prompt_id: str) -> Progress:
        """Forget a prompt and end what the server does for it."""
        return await (await self._prompts()).abort(prompt_id)

    @asynccontextmanager
    async def finish(self, prompt_id: str, op: Finish) -> AsyncIterator[AsyncIterator[Event]]:
        """Close the input; gives the events of the answer. Leaving the block aborts it."""
        async with aclosing((await self._prompts()).answer(prompt_id, op)) as events:
            yield events


class _Met:
    """A server from one start of its process to the next, with its prompts."""

    def __init__(self, server: PlainServer, identity: Identity, load: Load, life: float) -> None:
        self.life = life
        self.warming = Warming(server, identity, load)
        self.prompts = StreamingPrompts(
            self.warming,
            Limits(identity.max_model_len, VOCABULARY, DEFAULT_OPEN_PROMPTS),
            name=identity.engine,
            model=identity.model,
            block_size=load.block_size,
        )
        self.prompts.start()
        self._lacks = LACKS if load.caching else [*LACKS, NO_CACHE]

    def described(self, info: EngineInfo) -> EngineInfo:
        """The info without what only the plug-in has."""
        return msgspec.structs.replace(
            info, operations=OPERATIONS, plugin_version="", policies=[], lacks=self._lacks
        )
