"""The answer of one stream, from its engine to whoever reads it."""

from __future__ import annotations

import asyncio
import time

from engine_adapter.messages import DoneEvent, ErrorEvent, Event, Sampling, TokenEvent
from gateway.crowd import Crowd
from gateway.errors import GatewayError
from gateway.telemetry import Metrics


class Answering:
    """Events that wait to be read. Never more than one answer's."""

    def __init__(self, metrics: Metrics, crowd: Crowd, opened_s: float) -> None:
        """
        Args:
            crowd: of the streams that wait with this one.
            opened_s: when the stream was, by the monotonic clock.
        """
        self.sampling: Sampling | None = None
        """How to answer; None before the input is closed."""
        self.begun = False
        """The engine has given an event: the answer can't begin again."""
        self.asked_at_s: float | None = None
        """When the input was closed, in Unix time."""
        self.ttft_s: float | None = None
        self.done: DoneEvent | None = None
        self._metrics, self._crowd = metrics, crowd
        self._opened_s = opened_s
        self._asked_s = 0.0
        self._waits = False
        self._tokens = 0
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def ask(self, sampling: Sampling) -> None:
        """The input is closed."""
        self.sampling, self._asked_s = sampling, time.monotonic()
        self.asked_at_s = time.time()
        self._waits = True
        self._crowd.asked()

    def put(self, event: Event) -> int:
        """An event of the engine, to be passed on.

        Returns:
            How many tokens the answer has beyond those that were counted with earlier events.
        """
        before = self._tokens
        if isinstance(event, TokenEvent):
            self._tokens += len(event.token_ids)
        if isinstance(event, TokenEvent) and not self.begun:
            now_s = time.monotonic()
            self.ttft_s = now_s - self._asked_s
            self._metrics.ttft.observe(self.ttft_s)
            if self._waits:
                self._waits = False
                self._crowd.answered(self.ttft_s, now_s - self._opened_s)
        if isinstance(event, DoneEvent):
            self.done, self._tokens = event, max(event.completion_tokens, before)
            self._metrics.prompt_tokens.inc(event.prompt_tokens)
            self._metrics.cached_tokens.inc(event.cached_tokens)
            self._metrics.completion_tokens.inc(event.completion_tokens)
            if self.ttft_s is not None:
                self._crowd.ended(self.ttft_s, time.monotonic() - self._opened_s)
        self.begun = True
        self._events.put_nowait(event)
        return self._tokens - before

    def stop_waiting(self) -> None:
        """There will be no first token, if there was none."""
        if self._waits:
            self._waits = False
            self._crowd.left()

    def break_off(self, error: GatewayError) -> None:
        """Nothing follows."""
        event = ErrorEvent(error={"message": error.message, "code": error.code})
        self._events.put_nowait(event)

    async def next_event(self, timeout_s: float) -> Event | None:
        """The next event, or None if none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        except TimeoutError:
            return None
