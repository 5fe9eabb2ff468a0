"""The answer to a prompt whose input is closed: one stream, which an update can still turn.

Lives in the engine's HTTP server. Whether an update is in time is decided by the engine's
loop, where tokens are made; this side follows. An update that was taken means that the loop
has given up the request under way before it had a token: the stream drops it and begins
anew with the newest prompt. One that was refused changes nothing here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from engine_adapter.errors import EngineError
from engine_adapter.messages import ErrorEvent, Event

Generate = Callable[[int, list[int]], AsyncGenerator[Event, None]]
"""Has the engine answer one version of a prompt, of these tokens. Closing it aborts that."""


class Answer:
    """The one answer to a finished prompt, and the newest version that it is to answer."""

    def __init__(self, version: int, tokens: list[int]) -> None:
        self.version = version
        self.tokens = tokens
        self.begun = False
        """Something has come of it: no update is in time any more."""
        self.streaming = False
        """Somebody is reading it."""
        self.over = False
        self._error: EngineError | None = None
        self._changed = False
        self._first: asyncio.Future[Event | None] | None = None

    def update(self, version: int, tokens: list[int]) -> None:
        """Answer another version: the loop has given up the one before."""
        self.version, self.tokens = version, tokens
        self._turn()

    def break_off(self, error: EngineError) -> None:
        """End an answer that has not begun with an error. One that has begun goes on."""
        self._error = error
        self._turn()

    def end(self) -> None:
        """Nobody reads it any more."""
        self.begun, self.streaming, self.over = True, False, True
        self.tokens = []

    def _turn(self) -> None:
        self._changed = True
        if self._first is not None:
            self._first.cancel()

    async def events(self, generate: Generate) -> AsyncGenerator[Event, None]:
        """The events of the answer. To be read once, and closed by whoever reads it."""
        self.streaming = True
        while self._error is None:
            self._changed = False
            try:
                events = generate(self.version, self.tokens)
            except EngineError as e:
                self._error = e
                break
            self._first = first = asyncio.ensure_future(anext(events, None))
            try:
                await asyncio.wait((first,))
                if self._changed:
                    continue
                self.begun = True
                if (event := first.result()) is not None:
                    yield event
                async for event in events:
                    yield event
                return
            finally:
                first.cancel()
                await asyncio.shield(_close(first, events))
        yield ErrorEvent(error=self._error.to_json())


async def _close(first: asyncio.Future[Event | None], events: AsyncGenerator[Event, None]) -> None:
    """Close a generator that may be at its first event in another task."""
    await asyncio.gather(first, return_exceptions=True)
    await events.aclose()
