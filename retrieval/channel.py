"""A bounded queue that can end: between whoever finds passages and the search that yields them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class ChannelEnded(Exception):
    """Nothing more is taken in."""


class Channel(Generic[T]):
    """Items in the order they were put."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def put(self, item: T) -> None:
        """Add an item; waits while the channel is full.

        Raises:
            ChannelEnded: it ended, perhaps while this was waiting.
        """
        await self._until(lambda: self._ended or len(self._items) < self._capacity)
        if self._ended:
            raise ChannelEnded
        self._items.append(item)
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        """Take nothing more in. What is inside can still be had; then `get` raises the error."""
        if not self._ended:
            self._ended, self._error = True, error
            self._changed.set()

    async def get(self) -> T | None:
        """The next item, or None when there will be none."""
        await self._until(lambda: self._ended or len(self._items) > 0)
        if not self._items:
            if self._error is not None:
                raise self._error
            return None
        item = self._items.popleft()
        self._changed.set()
        return item

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._changed.clear()
            await self._changed.wait()


def end_at(channel: Channel[T], deadline_s: float | None) -> asyncio.TimerHandle | None:
    """End a channel at a `time.monotonic` value. Returns the timer, if there is one to cancel."""
    if deadline_s is None:
        return None
    left_s = max(deadline_s - time.monotonic(), 0)
    return asyncio.get_running_loop().call_later(left_s, channel.end)
