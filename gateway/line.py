"""The line of operations between one stream and its engine.

It knows what the engine has of the prompt, and gets it from there to what it should have, on
another engine if this one is gone. At most one operation is under way, but for the closing one,
which may overtake another: versions keep the order.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Protocol

from engine_adapter.errors import (
    EngineError,
    EngineOverloaded,
    EngineUnavailable,
    PromptExists,
    PromptFinished,
    UnknownPrompt,
    VersionConflict,
)
from engine_adapter.messages import (
    DoneEvent,
    ErrorEvent,
    Event,
    Extend,
    Finish,
    Open,
    Progress,
    Sampling,
)
from engine_adapter.operations import Operations
from gateway.engines import Engine
from gateway.errors import EngineFailed
from gateway.handoff import Decoders
from gateway.prefix import Prefix
from gateway.routing import Decision
from gateway.telemetry import Metrics
from gateway.tenants import Tenant

logger = logging.getLogger(__name__)

LOOK_S = 10.0
"""Longest wait for an engine's word on where a prompt stands."""
ABORT_S = 10.0
"""Longest wait for an engine that is to forget a prompt; then its lease ends it."""
MAX_ATTEMPTS = 4
"""How often one thing is asked of engines that lost the prompt, are behind, or are gone."""


class Placer(Decoders, Protocol):
    """Finds engines for one model."""

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer that every engine takes; None while none answers."""

    @property
    def wants_documents(self) -> bool:
        """Whether the choice depends on the documents, so that it should wait for them."""

    async def place(self, tokens: list[int], avoid: set[Engine]) -> tuple[Engine, Decision]:
        """The engine for a prompt that begins with these tokens, and why.

        Raises:
            EngineFailed: there is none but those to avoid.
        """


@dataclass(frozen=True, slots=True)
class Asked:
    """How an engine is to answer."""

    sampling: Sampling
    hand_over: bool = False
    """Only the first token."""


class Line:
    """One stream's line. It leads to an engine once it has something to carry."""

    def __init__(
        self,
        stream_id: str,
        placer: Placer,
        *,
        lease_s: float,
        tenant: Tenant,
        contested: Callable[[], Awaitable[None] | None],
        free: Callable[[Engine, str], None],
        metrics: Metrics,
    ) -> None:
        """
        Args:
            free: has an engine forget a prompt, behind everybody's back.
            contested: called when somebody else seems to change the prompt; raises if that one
                has the right to.
        """
        self.tenant = tenant
        self.engine: Engine | None = None
        self.left: Engine | None = None
        """The engine it led to last."""
        self.decision: Decision | None = None
        self.prompt_id = stream_id
        self.progress: Progress | None = None
        self.confirmed = 0
        """Tokens at the front of the prompt that the engine has for certain, and keeps with every
        operation that is under way or still to be sent."""
        self.heard_of_s = -float("inf")
        """When the last operation that the engine answered was sent."""
        self._stream_id = stream_id
        self._placer = placer
        self._lease_s = lease_s
        self._contested = contested
        self._free = free
        self._metrics = metrics
        self._avoid: set[Engine] = set()
        self._full: EngineOverloaded | None = None  # said by one of these
        self._bringing = asyncio.Lock()
        self._sent: Prefix | None = None  # the prompt of the newest operation; None: not open
        self._version = -1
        self._common = 0  # what `confirmed` becomes when the newest operation is answered
        # Tokens computed there, by its last word, and by its last word before it was polled.
        self._computed = self._computed_polled = 0

    @property
    def _held(self) -> Prefix:
        return Prefix.of() if self._sent is None else self._sent

    @property
    def is_open(self) -> bool:
        """Whether an engine was asked to open the prompt."""
        return self._sent is not None

    def connect(self, engine: Engine, decision: Decision | None = None) -> None:
        """Operations go to this engine from now on."""
        self.engine, self.decision = engine, decision
        engine.streams += 1

    def disconnect(self) -> None:
        """What the engine has of the prompt is of no use any more."""
        if self.engine is not None:
            self.engine.streams -= 1
            self.engine, self.left = None, self.engine
        self._forget()

    def give_up(self) -> None:
        """Begin again with whatever comes next. An engine that only stood still would keep what it
        has of the prompt until the lease ends, so it is told to forget that."""
        if self.engine is not None and self.is_open:
            self._free(self.engine, self.prompt_id)
        self.disconnect()

    def leave(self) -> None:
        """Its engine is gone: go to another one with whatever comes next."""
        if self.engine is not None:
            self._avoid.add(self.engine)
        self.give_up()

    def begin_anew(self) -> None:
        """Take an id that no engine has heard of, before the first operation."""
        self._forget()

    def resume(self, prompt_id: str, version: int, tokens: list[int], confirmed: int) -> None:
        """Go on with a prompt that another replica has opened at the engine."""
        self.prompt_id, self._version, self._sent = prompt_id, version, Prefix.of(tokens)
        self._common = self.confirmed = confirmed

    def rewritten(self, kept: int) -> None:
        """The prompt has changed behind its first `kept` tokens."""
        self._common, self.confirmed = min(self._common, kept), min(self.confirmed, kept)

    def unread(self, tokens: int) -> int:
        """How many of the prompt's tokens the engine may have counted as waiting when it was polled
        last.

        Args:
            tokens: that the prompt has.
        """
        polled = self.engine is not None and self.engine.polled_s > self.heard_of_s
        return max(tokens - (self._computed if polled else self._computed_polled), 0)

    def ahead(self, wanted: Prefix) -> int:
        """Tokens of a prompt that no operation has carried to an engine yet."""
        return len(self._held.difference(wanted)[1])

    # What is carried.

    async def bring(self, wanted: Prefix) -> None:
        """Make the engine's prompt these tokens.

        Raises:
            EngineError, EngineFailed: no engine can.
            Moved: another replica has taken the stream over.
        """
        async with self._bringing:
            for attempt in range(MAX_ATTEMPTS):
                prompt_id = self.prompt_id
                try:
                    if self.engine is None:
                        await self._find_engine(wanted)
                    prompt_id = self.prompt_id
                    await self._send(wanted)
                    self._avoid.clear()
                    self._full = None
                    return
                except EngineError as e:
                    if attempt == MAX_ATTEMPTS - 1:
                        raise
                    if prompt_id == self.prompt_id:  # else somebody has recovered from it
                        await self._recover(e)

    async def answer(
        self, wanted: Prefix, tail: Sequence[int], how: Callable[[Engine], Asked]
    ) -> AsyncGenerator[Event, None]:
        """Close the prompt with these tokens and its tail; the events of the answer.

        Args:
            how: called with each engine that is to answer.

        Raises:
            EngineError, EngineFailed: no engine can; or one broke off after the first event.
            Moved: another replica has taken the stream over.
        """
        for attempt in range(MAX_ATTEMPTS):
            begun, prompt_id = False, self.prompt_id
            try:
                if self._sent is None:
                    await self.bring(wanted)
                prompt_id = self.prompt_id
                async with aclosing(self._finish(wanted.extended(tail), how)) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except EngineError as e:
                if begun or attempt == MAX_ATTEMPTS - 1:
                    raise
                if self._bringing.locked():  # it overtook an operation: that one comes first
                    async with self._bringing:
                        continue
                if prompt_id == self.prompt_id:
                    await self._recover(e)

    async def _find_engine(self, wanted: Prefix) -> None:
        try:
            self.connect(*await self._placer.place(wanted.all(), self._avoid))
        except EngineFailed as e:
            if self._full is not None:  # there are engines, but none has room
                raise self._full from e
            raise

    async def _send(self, wanted: Prefix) -> None:
        """One operation."""
        client, sent_s = self._client, time.monotonic()
        if self._sent is None:
            self._sent, self._version, self._common = wanted, 0, len(wanted)
            self._metrics.operations.labels("open").inc()
            salt, weight = self.tenant.cache_salt, self.tenant.weight
            op = Open(tokens=wanted.all(), cache_salt=salt, weight=weight, lease_s=self._lease_s)
            self._note(await client.open(self.prompt_id, op), sent_s)
            return
        keep, tokens = self._sent.difference(wanted)
        if keep == len(self._sent) and not tokens:
            return
        self._sent, self._version, self._common = wanted, self._version + 1, len(wanted)
        self._metrics.operations.labels("extend").inc()
        extend = Extend(version=self._version, keep=keep, tokens=tokens)
        self._note(await client.extend(self.prompt_id, extend), sent_s)

    async def _finish(
        self, wanted: Prefix, how: Callable[[Engine], Asked]
    ) -> AsyncGenerator[Event, None]:
        client, engine = self._client, self.engine
        assert engine is not None
        asked = how(engine)
        keep, tokens = self._held.difference(wanted)
        op = Finish(
            version=self._version + 1,
            keep=keep,
            tokens=tokens,
            sampling=asked.sampling,
            hand_over=asked.hand_over,
        )
        self._metrics.operations.labels("finish").inc()
        async with client.finish(self.prompt_id, op) as events:
            async for event in events:
                if isinstance(event, ErrorEvent):
                    raise EngineError.from_json(event.error)
                yield event
                if isinstance(event, DoneEvent):
                    with suppress(EngineError):  # an engine takes who leaves early for one that
                        async for _ in events:  # gives up, and may free what it has handed over
                            pass
                    return
        raise EngineUnavailable("the engine ended the answer without completing it")

    def _note(self, progress: Progress, sent_s: float) -> None:
        """An operation was answered: what it carried is there."""
        self._hear(progress, sent_s)
        self.confirmed = self._common

    def _hear(self, progress: Progress, sent_s: float) -> None:
        if self.engine is not None and self.engine.polled_s > self.heard_of_s:
            self._computed_polled = self._computed
        self.progress, self.heard_of_s = progress, sent_s
        self._computed = progress.computed

    # When it is not as it should be.

    async def _recover(self, error: EngineError) -> None:
        """Do what makes another attempt worth it, or raise the error."""
        match error:
            case UnknownPrompt() | PromptFinished() | PromptExists():
                logger.info("stream %s is opened again: %s", self._stream_id, error)
                self._forget()
            case VersionConflict():
                if (contest := self._contested()) is not None:
                    await contest
                await self._catch_up()
            case EngineUnavailable():
                if self.engine is not None:
                    logger.warning(
                        "stream %s leaves %s: %s", self._stream_id, self.engine.url, error
                    )
                self.leave()
            case EngineOverloaded() if self.engine is not None:
                logger.info("stream %s leaves %s: %s", self._stream_id, self.engine.url, error)
                self._full = error
                self.leave()
            case _:
                raise error

    async def _catch_up(self) -> None:
        """Learn from the engine what it has of the prompt."""
        try:
            has = await self._client.tokens(self.prompt_id)
        except UnknownPrompt:
            self._forget()
        else:
            self._sent, self._version = Prefix.of(has.tokens), has.version
            self._common = self.confirmed

    def _forget(self) -> None:
        """The engine does not have the prompt: begin again under a new id."""
        self.prompt_id = f"{self._stream_id}-{uuid.uuid4().hex[:12]}"
        self._sent, self._version = None, -1
        self._common = self.confirmed = 0
        self._computed = self._computed_polled = 0

    # The engine's side of leases.

    async def look(self) -> bool:
        """Ask the engine where the prompt stands, which renews its lease.

        Returns:
            Whether the engine still has the prompt; if not, it wants to be brought there again.

        Raises:
            EngineError: nobody knows.
        """
        if self._sent is None or self._bringing.locked():
            return True  # an operation under way says as much
        prompt_id, sent_s = self.prompt_id, time.monotonic()
        try:
            async with asyncio.timeout(LOOK_S):
                self._hear(await self._client.status(prompt_id), sent_s)
        except TimeoutError as e:
            raise EngineUnavailable("the engine does not say where the prompt stands") from e
        except UnknownPrompt:
            if prompt_id == self.prompt_id and not self._bringing.locked():
                self._forget()
                return False
        return True

    @property
    def _client(self) -> Operations:
        if self.engine is None:
            raise EngineUnavailable("the stream has no engine")
        return self.engine.client


async def abort(engine: Engine | None, prompt_id: str) -> None:
    """Free an engine's memory of a prompt. No error if it has nothing of it."""
    if engine is not None:
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(ABORT_S):
                await engine.client.abort(prompt_id)
