"""The engine operations as the HTTP side of an engine carries them out, whichever framework
serves them and whatever computes the answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, Generic, Protocol, TypeVar

from engine_adapter.answers import Answer
from engine_adapter.errors import BadOperation, EngineError
from engine_adapter.messages import (
    PROTOCOL_VERSION,
    Answered,
    Answers,
    Batch,
    Blocks,
    DoneEvent,
    EngineInfo,
    Event,
    Finish,
    KvEvents,
    Operation,
    Progress,
    Sampling,
    SetPolicy,
    encode,
)
from engine_adapter.scheduling.policies import POLICIES, named
from engine_adapter.sessions import Core, Limits, Session, Sessions, Status

OPERATIONS = [
    *("open", "extend", "invalidate", "finish", "abort", "status", "tokens"),
    *("info", "policy", "blocks", "batch"),
]

logger = logging.getLogger("vllm.stream2llm")

LEASE_SWEEP_S = 0.5

P = TypeVar("P")
"""An engine's own form of a `Sampling`."""


class Engine(Core, Protocol[P]):
    """What the operations need of an engine besides its loop."""

    def load(self) -> Awaitable[Status]:
        """Policy, hardware, and how busy the engine is, named as in `EngineInfo`."""

    def kv_events(self) -> Awaitable[Mapping[str, Any]]:
        """The fields of a `KvEvents`, or none. They never change."""

    def blocks(self) -> Awaitable[Mapping[str, Any]]:
        """The fields of a `Blocks`, but for the instance.

        Raises:
            BadOperation: the engine has no prefix cache.
        """

    def set_policy(self, policy: str) -> Awaitable[None]:
        """Order by another policy from the next step on."""

    def sampling_params(self, sampling: Sampling, prompt_id: str, version: int, room: int) -> P:
        """The engine's form of a `Sampling`.

        Args:
            prompt_id, version: what is answered.
            room: tokens that the answer may have at most.

        Raises:
            BadOperation: the engine refuses a value.
        """

    def first_token_only(self, params: P) -> P:
        """The same answer, cut behind its first token; then `answer` ends in a `DoneEvent` that
        says where the KV of the prompt is, if the answer would have gone on.

        Raises:
            BadOperation: the engine hands nothing over.
        """

    def answer(
        self, prompt_id: str, tokens: list[int], cache_salt: str | None, params: P, request_id: str
    ) -> AsyncGenerator[Event, None]:
        """Generate the answer to a whole prompt. Closing the iterator aborts it."""

    def abort(self, request_id: str) -> Awaitable[None]:
        """Stop an answer."""


class StreamingPrompts(Generic[P]):
    """What the routes share: the engine, its open prompts, and the task that ends leases."""

    def __init__(
        self, engine: Engine[P], limits: Limits, *, name: str, model: str, block_size: int
    ) -> None:
        """
        Args:
            name: of the serving engine, with its version.
            model: the name that clients know the model by.
            block_size: tokens in one KV block.
        """
        self.engine = engine
        self.sessions = Sessions(engine, limits)
        self._limits = limits
        self._name = name
        self._model = model
        self._block_size = block_size
        self._instance_id = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._answers: dict[str, str] = {}  # prompt id -> the engine's request id, while answering
        self._sweeper: asyncio.Task[None] | None = None
        self._kv_events: Mapping[str, Any] | None = None  # None: not asked yet

    def start(self) -> None:
        """Begin to free prompts whose lease has run out."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SWEEP_S)
            try:
                await self.sessions.expire(time.monotonic())
                await self.sessions.look_after_handed_over()
            except EngineError as e:  # the engine may answer again
                logger.warning("leases could not be looked after: %s", e)
            except Exception:  # whatever it was: no lease would ever end again
                logger.exception("leases could not be looked after")

    async def stop(self) -> None:
        """End what `start` has begun."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    async def info(self) -> EngineInfo:
        """Identity, limits and load of this engine."""
        load: dict[str, Any] = dict(await self.engine.load())
        if self._kv_events is None:
            self._kv_events = await self.engine.kv_events()
        return EngineInfo(
            instance_id=self._instance_id,
            protocol_version=PROTOCOL_VERSION,
            plugin_version=version("stream2llm"),
            engine=self._name,
            model=self._model,
            operations=OPERATIONS,
            max_model_len=self._limits.max_model_len,
            block_size=self._block_size,
            policies=list(POLICIES),
            kv_events=KvEvents(**self._kv_events) if self._kv_events else None,
            **load,
        )

    async def blocks(self) -> Blocks:
        """What the engine's prefix cache could find now.

        Raises:
            BadOperation: it has none.
        """
        return Blocks(instance_id=self._instance_id, **await self.engine.blocks())

    async def set_policy(self, op: SetPolicy) -> EngineInfo:
        """Order requests by another policy from the next step on.

        Raises:
            BadOperation: there is none of that name.
        """
        try:
            named(op.policy)
        except ValueError as e:
            raise BadOperation(str(e)) from e
        await self.engine.set_policy(op.policy)
        return await self.info()

    async def batch(self, batch: Batch) -> Answers:
        """Carry out operations side by side; none fails another."""
        return Answers(answers=await asyncio.gather(*map(self._one_of_many, batch.operations)))

    async def _one_of_many(self, operation: Operation) -> Answered:
        prompt_id = operation.prompt_id
        try:
            if operation.open is not None:
                return Answered(progress=await self.sessions.open(prompt_id, operation.open))
            if operation.extend is not None:
                return Answered(progress=await self.sessions.extend(prompt_id, operation.extend))
            raise BadOperation("an operation of a batch is `open` or `extend`")
        except EngineError as e:
            return Answered(error=e.to_json())

    def finish(self, prompt_id: str, op: Finish) -> AsyncGenerator[bytes, None]:
        """As `answer`, in lines of JSON."""
        return _lines(self.answer(prompt_id, op))

    def answer(self, prompt_id: str, op: Finish) -> AsyncGenerator[Event, None]:
        """Close a prompt's input; the events of its answer.

        Whoever reads them closes them.

        Raises:
            EngineError: the operation is not valid; the prompt stays as it was.
        """
        self._params(prompt_id, op.version, op.keep + len(op.tokens), op)
        session, answer = self.sessions.finish(prompt_id, op)
        return self._events(session, answer, op)

    async def _events(
        self, session: Session, answer: Answer, op: Finish
    ) -> AsyncGenerator[Event, None]:
        prompt_id, salt = session.prompt_id, session.cache_salt

        def generate(version: int, tokens: list[int]) -> AsyncGenerator[Event, None]:
            params = self._params(prompt_id, version, len(tokens), op)
            request_id = f"{prompt_id}-answer-{next(self._numbers)}"
            self._answers[prompt_id] = request_id
            return self.engine.answer(prompt_id, tokens, salt, params, request_id)

        try:
            async with aclosing(answer.events(generate)) as events:
                async for event in events:
                    if isinstance(event, DoneEvent) and event.kv_transfer:
                        session.handed_over = session.kv_waits = True
                    yield event
        finally:
            self._answers.pop(prompt_id, None)
            self.sessions.answered(session, answer)
            # The engine may not have taken the request in: then the prompt is still open there.
            # Or it keeps KV for another engine, though nobody can have learnt where.
            if not session.handed_over:
                await asyncio.shield(self.engine.close(prompt_id))

    def _params(self, prompt_id: str, version: int, length: int, op: Finish) -> P:
        room = max(self._limits.max_model_len - length, 1)
        params = self.engine.sampling_params(op.sampling, prompt_id, version, room)
        return self.engine.first_token_only(params) if op.hand_over else params

    async def abort(self, prompt_id: str) -> Progress:
        """Forget a prompt, also while it is being answered or when its KV waits for another
        engine. Nobody may fetch that any more: it would read what others write there."""
        if (request_id := self._answers.get(prompt_id)) is not None:
            await self.engine.abort(request_id)
        return await self.sessions.abort(prompt_id)


async def _lines(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield encode(event) + b"\n"
