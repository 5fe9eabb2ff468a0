"""One stream: its states, its prompt, and the single line of operations to its engine.

    open --finish--> finishing --last token--> done
      |                  |
      +------------------+--> failed (engine lost), cancelled (client), expired (silence)

Chunks and ranked lists change the prompt at once; a task of the stream's own (the pump)
brings the engine to it. At most one operation is under way, and what arrives meanwhile goes
into the next one. `finish` does not wait for an operation under way: the engine applies them
in order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from engine_adapter.errors import EngineError, EngineUnavailable, UnknownPrompt, VersionConflict
from engine_adapter.messages import (
    DoneEvent,
    ErrorEvent,
    Event,
    Extend,
    Finish,
    Open,
    Progress,
    Sampling,
    TokenEvent,
)
from gateway.errors import (
    ContextTooLong,
    EngineFailed,
    GatewayError,
    InputClosed,
    SequenceGap,
    from_engine,
)
from gateway.known import KnownDocuments
from gateway.placement import Engine
from gateway.prompt import Document, Prompt, difference
from gateway.requests import Options
from gateway.telemetry import Metrics

logger = logging.getLogger(__name__)

State = Literal["open", "finishing", "done", "failed", "cancelled", "expired"]

MAX_ATTEMPTS = 3
"""How often the end of a prompt is sent when the engine has lost it or is behind."""


class ChunksTaken(msgspec.Struct, frozen=True):
    """Acknowledges a post of chunks."""

    seq: int
    tokens: int
    tokens_received: int
    """Tokens of all documents in the prompt."""


class ListTaken(msgspec.Struct, frozen=True):
    """Acknowledges a ranked list. Counts are tokens of the prompt up to its tail."""

    seq: int
    tokens_received: int
    kept: int
    """The longest common beginning of the prompt before and after."""
    invalidated: int
    added: int


Taken = ChunksTaken | ListTaken
Tokenized = Callable[[], Awaitable[list[Document]]]


class Stream:
    """A stream and its tasks. Made by `Streams`, which ends it."""

    def __init__(
        self,
        stream_id: str,
        model: str,
        prompt: Prompt,
        engine: Engine,
        *,
        options: Options,
        lease_s: float,
        metrics: Metrics,
        ended: Callable[[Stream], None],
    ) -> None:
        self.id = stream_id
        self.model = model
        self.engine = engine
        self.prompt = prompt
        self.state: State = "open"
        self.error: GatewayError | None = None
        self.created_s = time.time()
        self.touched_s = time.monotonic()
        self.engine_touched_s = time.monotonic()
        self.known = KnownDocuments()
        self.progress: Progress | None = None
        self.options = options
        self._answer_tokens = options.answer_tokens or 1
        self._lease_s = lease_s
        self._metrics = metrics
        self._ended = ended
        self._taken: list[Taken] = []  # the answer to each post, by its seq
        self._taking = asyncio.Lock()
        self._prompt_id = stream_id
        self._generation = 0
        self._sent: list[int] | None = None  # tokens of the newest operation; None: not open
        self._sent_version = -1
        self._changed = asyncio.Event()
        self._changed.set()  # the head is there to be read
        self._pump_task = asyncio.create_task(self._pump())
        self._answer_task: asyncio.Task[None] | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        engine.streams += 1

    # What clients do.

    async def add(self, documents: Tokenized, seq: int | None) -> Taken:
        """Take in one post of chunks.

        Args:
            documents: gives the tokenized chunks of the post.
            seq: its number, or None for the next.

        Returns:
            Its acknowledgement; a repeated number gives the first one.

        Raises:
            InputClosed, SequenceGap, ContextTooLong, EngineFailed
        """

        def take(number: int, new: list[Document]) -> Taken:
            self.take(new)
            tokens = sum(len(d.tokens) for d in new)
            return ChunksTaken(number, tokens, self.prompt.context_tokens)

        return await self._in_turn(documents, seq, take)

    async def replace(self, documents: Tokenized, seq: int | None) -> Taken:
        """Put a ranked list in place of all documents; numbers and errors as of `add`.

        Args:
            documents: gives the tokenized list; called when it is this post's turn, so that
                `known` has what the posts before it brought.
        """
        return await self._in_turn(documents, seq, self._replace)

    async def _in_turn(
        self,
        documents: Tokenized,
        seq: int | None,
        take: Callable[[int, list[Document]], Taken],
    ) -> Taken:
        """One post after the other: check its number, tokenize, change the prompt."""
        async with self._taking:
            expected = len(self._taken)
            if seq is not None and 0 <= seq < expected:
                return self._taken[seq]
            self._must_be_open()
            if seq is not None and seq != expected:
                raise SequenceGap(
                    f"seq is {seq} where {expected} is next", param="seq", expected_seq=expected
                )
            self.touched_s = time.monotonic()
            new = await documents()
            self._must_be_open()
            taken = take(expected, new)
            self._taken.append(taken)
            return taken

    def take(self, new: Sequence[Document]) -> None:
        """Put documents behind those in the prompt, without a number.

        Raises:
            ContextTooLong
        """
        prompt = self.prompt.with_documents(new)
        self.check_length(prompt)
        self.prompt = prompt
        self.known.add(new)
        self._metrics.chunks.inc(len(new))
        self._metrics.context_tokens.inc(sum(len(d.tokens) for d in new))
        self._changed.set()

    def _replace(self, number: int, documents: list[Document]) -> Taken:
        prompt = self.prompt.with_only(documents)
        self.check_length(prompt, param="documents")
        before = self.prompt.open_tokens
        kept, added = difference(before, prompt.open_tokens)
        invalidated = len(before) - kept
        self.prompt = prompt
        self.known.replace(documents)
        self._metrics.lists.inc()
        self._metrics.context_tokens.inc(len(added))
        self._metrics.invalidated_tokens.inc(invalidated)
        self._changed.set()
        return ListTaken(number, prompt.context_tokens, kept, invalidated, len(added))

    def check_length(
        self, prompt: Prompt, answer_tokens: int | None = None, *, param: str = "text"
    ) -> None:
        """Raise ContextTooLong if a prompt does not leave room for the answer."""
        if self.engine.info is None:
            return
        limit = self.engine.info.max_model_len
        reserved = answer_tokens or self._answer_tokens
        if prompt.length + reserved > limit:
            raise ContextTooLong(
                f"the prompt would have {prompt.length} tokens and the answer up to {reserved}, "
                f"but the model takes {limit}",
                param=param,
            )

    async def finish(self, options: Options) -> None:
        """Close the input and begin the answer; `next_event` gives it.

        Raises:
            InputClosed, ContextTooLong, EngineFailed
        """
        async with self._taking:  # chunks that are being tokenized belong to the input
            self._must_be_open()
            self.check_length(self.prompt, options.answer_tokens)
            self.state = "finishing"
            self.touched_s = time.monotonic()
            answer = self._answer(options.sampling(), time.monotonic())
            self._answer_task = asyncio.create_task(answer)

    async def next_event(self, timeout_s: float) -> Event | None:
        """The next event of the answer, or None if none comes in time.

        A `DoneEvent` or an `ErrorEvent` is the last. Whoever stops reading before ends the
        stream with `cancel`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        except TimeoutError:
            return None

    async def status(self) -> Progress | None:
        """What the engine says of the prompt now, or said last."""
        if self.state == "open" and self._sent_version >= 0:
            with suppress(EngineError):
                self._note(await self.engine.client.status(self._prompt_id))
        return self.progress

    @property
    def waiting_tokens(self) -> int:
        """Tokens taken in that no operation has carried to the engine yet."""
        return len(difference(self._sent or [], self.prompt.open_tokens)[1])

    def _must_be_open(self) -> None:
        if self.state == "failed":
            raise self.error or EngineFailed("the stream failed")
        if self.state != "open":
            raise InputClosed(f"the stream is {self.state}")

    # How it ends.

    def fail(self, error: GatewayError) -> None:
        """Its engine is lost. Whoever waits for the answer gets an error event."""
        if self.state in ("open", "finishing"):
            self.error = error
            self._end("failed")
            self._events.put_nowait(
                ErrorEvent(error={"message": error.message, "code": error.code})
            )

    async def cancel(self, state: State = "cancelled") -> None:
        """Stop everything and free the engine's memory. No error if it has ended."""
        if self.state not in ("open", "finishing"):
            return
        self._end(state)
        tasks = [task for task in (self._pump_task, self._answer_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(EngineError):
            await self.engine.client.abort(self._prompt_id)

    async def close(self) -> None:
        """Cancel, and wait for the tasks, however it ended."""
        await self.cancel()
        tasks = [task for task in (self._pump_task, self._answer_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, state: State) -> None:
        self.state = state
        self.known.clear()
        self.touched_s = time.monotonic()
        self.engine.streams -= 1
        self._metrics.streams.labels(state).inc()
        current = asyncio.current_task()
        for task in (self._pump_task, self._answer_task):
            if task is not None and task is not current:
                task.cancel()
        self._ended(self)

    # The line of operations.

    async def _pump(self) -> None:
        """Bring the engine to the prompt, again and again, until the input is closed."""
        while self.state == "open":
            await self._changed.wait()
            self._changed.clear()
            try:
                if self.state == "open":
                    await self._send(self.prompt.open_tokens)
            except UnknownPrompt:
                self._forget_prompt()
                self._changed.set()
            except EngineUnavailable as e:
                self.fail(from_engine(e))
            except EngineError as e:
                logger.error("stream %s: engine refused an operation: %s", self.id, e)
                await self._refused(e)

    async def _send(self, wanted: list[int]) -> None:
        """One operation that makes the engine's prompt these tokens."""
        client = self.engine.client
        if self._sent is None:
            self._sent, self._sent_version = wanted, 0
            self._metrics.operations.labels("open").inc()
            op = Open(tokens=wanted, lease_s=self._lease_s)
            self._note(await client.open(self._prompt_id, op))
            return
        keep, tokens = difference(self._sent, wanted)
        if keep == len(self._sent) and not tokens:
            return
        self._sent, self._sent_version = wanted, self._sent_version + 1
        self._metrics.operations.labels("extend").inc()
        extend = Extend(version=self._sent_version, keep=keep, tokens=tokens)
        self._note(await client.extend(self._prompt_id, extend))

    def _note(self, progress: Progress) -> None:
        self.progress = progress
        self.engine_touched_s = time.monotonic()

    def _forget_prompt(self) -> None:
        """The engine does not know the prompt any more: begin again under a new id."""
        self._generation += 1
        self._prompt_id = f"{self.id}-{self._generation}"
        self._sent, self._sent_version = None, -1

    async def _answer(self, sampling: Sampling, finished_s: float) -> None:
        """Close the prompt at the engine and pass its events on."""
        try:
            for attempt in range(MAX_ATTEMPTS):
                try:
                    await self._finish_once(sampling, finished_s)
                    return
                except (UnknownPrompt, VersionConflict) as e:
                    if attempt == MAX_ATTEMPTS - 1:
                        raise
                    await self._catch_up(e)
        except EngineError as e:
            await self._refused(e)

    async def _refused(self, error: EngineError) -> None:
        """Fail, and do not leave what the engine holds to its lease."""
        self.fail(from_engine(error))
        if not isinstance(error, EngineUnavailable):
            with suppress(EngineError):
                await self.engine.client.abort(self._prompt_id)

    async def _catch_up(self, refusal: EngineError) -> None:
        """The engine was not where it should be. Either the closing operation overtook one
        under way: then that one is awaited. Or the engine has lost the prompt."""
        if not self._pump_task.done():
            await asyncio.wait([self._pump_task])
            return
        logger.info("stream %s is opened again: %s", self.id, refusal)
        self._forget_prompt()
        await self._send(self.prompt.open_tokens)

    async def _finish_once(self, sampling: Sampling, finished_s: float) -> None:
        if self._sent is None:
            await self._send(self.prompt.open_tokens)
        self._changed.set()  # a pump that waits for input sees that there is no more
        wanted = self.prompt.open_tokens + list(self.prompt.tail)
        keep, tokens = difference(self._sent or [], wanted)
        version = self._sent_version + 1
        op = Finish(version=version, keep=keep, tokens=tokens, sampling=sampling)
        self._metrics.operations.labels("finish").inc()
        async with self.engine.client.finish(self._prompt_id, op) as events:
            waiting = True
            async for event in events:
                if waiting and isinstance(event, TokenEvent):
                    self._metrics.ttft.observe(time.monotonic() - finished_s)
                    waiting = False
                self._pass_on(event)
                if isinstance(event, DoneEvent | ErrorEvent):
                    return
        raise EngineUnavailable("the engine ended the answer without completing it")

    def _pass_on(self, event: Event) -> None:
        match event:
            case DoneEvent():
                self._metrics.prompt_tokens.inc(event.prompt_tokens)
                self._metrics.cached_tokens.inc(event.cached_tokens)
                self._metrics.completion_tokens.inc(event.completion_tokens)
                self._end("done")
            case ErrorEvent():
                self.fail(from_engine(EngineError.from_json(event.error)))
                return
            case TokenEvent():
                self.touched_s = time.monotonic()
        self._events.put_nowait(event)

    async def renew_lease(self) -> None:
        """Tell the engine that somebody still cares."""
        try:
            self._note(await self.engine.client.status(self._prompt_id))
        except UnknownPrompt:
            if self.state == "open":
                self._forget_prompt()
                self._changed.set()
        except EngineError as e:
            logger.debug("stream %s: no lease renewal: %s", self.id, e)
