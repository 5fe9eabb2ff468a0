"""Answers that outlive a broken connection: kept while somebody may come back for them.

Only those whose `finish` had an `Idempotency-Key`; with any other the client's going is the end of
the stream, within a second. An answer is kept for `resume_s` without a reader, then its stream is
cancelled; one that is complete is kept as long as the stream can be looked up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

from engine_adapter.messages import DoneEvent, ErrorEvent, TokenEvent
from gateway.answers import Chunks, Whole, next_event, why_broken
from gateway.chores import Chores
from gateway.errors import AnswerGone, Draining, GatewayError
from gateway.keeper import Moved
from gateway.requests import Options
from gateway.stream import Stream

logger = logging.getLogger(__name__)

MAX_KEPT_BYTES = 4 << 20
"""Of one answer; of a longer one the beginning is forgotten."""
LOOK_S = 0.5
"""How often it is checked that the stream has not ended otherwise."""


class KeptAnswer:
    """The answer of one stream as its readers get it: numbered events, or one body."""

    def __init__(
        self,
        stream: Stream,
        options: Options,
        seq: int | None,
        *,
        key: str,
        digest: bytes,
        resume_s: float,
        refused: Callable[[KeptAnswer], None],
    ) -> None:
        """
        Args:
            seq: of the last post that is to be in the prompt, if the client says.
            key, digest: of the request that asked for it.
            refused: called if the stream's input can't be closed, before its readers hear of it.
        """
        self.key, self.digest = key, digest
        self.whole = options.stream is False
        """One body, no events."""
        self._stream = stream
        self._options, self._seq = options, seq
        self._resume_s = resume_s
        self._events: deque[bytes] = deque()
        self._forgotten = 0  # events before the first of these
        self._kept_bytes = 0
        self._body: dict[str, Any] | None = None
        self._error: GatewayError | Moved | None = None
        self._refused = refused
        self._closed = asyncio.Event()  # the stream's input, or there is an error
        self._ended = False
        self._news = asyncio.Event()
        self._readers = 0
        self._chores = Chores()
        self._leaving: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Finish the stream and follow its answer, whoever goes away meanwhile."""
        self._chores.begin(self._run())

    async def closed(self) -> None:
        """Wait until the stream's input is closed.

        Raises:
            GatewayError: it can't be.
            Moved: another replica holds the stream.
        """
        await self._closed.wait()
        if self._error is not None:
            raise copy(self._error)

    def stop(self) -> None:
        """The gateway ends."""
        self._chores.stop()
        if self._leaving is not None:
            self._leaving.cancel()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While somebody reads."""
        self._readers += 1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers and not self._ended:
                loop = asyncio.get_running_loop()
                self._leaving = loop.call_later(self._resume_s, self._abandon)

    async def events(
        self, after: int, heartbeat_s: float
    ) -> AsyncGenerator[tuple[int, bytes] | None, None]:
        """The events behind number `after`, each with its number; None where a sign of life is due.

        Raises:
            AnswerGone: they begin with one that is forgotten, or that number is not this answer's.
            GatewayError: it broke off.
        """
        at = after + 1
        if at > self._forgotten + len(self._events):
            raise AnswerGone(f"event {after} is none of this answer's")
        while True:
            news = self._news
            if at < self._forgotten:
                raise AnswerGone(f"the answer is kept from event {self._forgotten} on")
            if at < self._forgotten + len(self._events):
                yield at, self._events[at - self._forgotten]
                at += 1
            elif self._ended:
                if self._error is not None:
                    raise copy(self._error)
                return
            elif not await _heard(news, heartbeat_s):
                yield None

    async def body(self) -> dict[str, Any]:
        """The whole answer.

        Raises:
            GatewayError: it broke off.
        """
        while not self._ended:
            await self._news.wait()
        if self._body is None:
            raise copy(self._error) or why_broken(self._stream)
        return self._body

    async def _run(self) -> None:
        try:
            await self._finish()
            self._closed.set()
            await self._follow()
        except BaseException as e:  # its readers would wait for ever
            self._break_off(e)
            if not isinstance(e, GatewayError | Moved | asyncio.CancelledError):
                logger.exception("the answer of stream %s failed", self._stream.id)
                self._abandon()

    async def _finish(self) -> None:
        if self._stream.retrieval is not None:
            await self._stream.retrieval.ended()
        await self._stream.finish(self._options, self._seq)
        await self._stream.keep()

    def _break_off(self, reason: BaseException) -> None:
        if isinstance(reason, GatewayError | Moved):
            self._error = copy(reason)  # one that was raised holds on to whoever raised it
        elif isinstance(reason, asyncio.CancelledError):
            self._error = Draining("the gateway ends")
        else:
            self._error = GatewayError("the gateway failed")
        self._ended = True
        if not self._closed.is_set():
            self._refused(self)
            self._closed.set()
        self._tell()

    async def _follow(self) -> None:
        usage = self._options.stream_options
        chunks = Chunks(self._stream, usage is not None and usage.include_usage)
        whole = Whole(self._stream)
        self._put(chunks.first())
        while not self._ended:
            event = await next_event(self._stream, LOOK_S)
            if event is None:
                continue
            if self.whole and isinstance(event, TokenEvent):
                whole.add(event)
            elif self.whole and isinstance(event, DoneEvent):
                self._body = whole.body(event)
            else:
                for part in chunks.of(event):
                    self._put(part)
            self._ended = isinstance(event, DoneEvent | ErrorEvent)
        self._tell()

    def _put(self, event: bytes) -> None:
        self._events.append(event)
        self._kept_bytes += len(event)
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= len(self._events.popleft())
            self._forgotten += 1
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _abandon(self) -> None:
        self._leaving = None
        self._chores.say(self._cancelled())

    async def _cancelled(self) -> None:
        with suppress(Moved):
            await self._stream.cancel()


async def _heard(news: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await news.wait()
    except TimeoutError:
        return False
    return True
