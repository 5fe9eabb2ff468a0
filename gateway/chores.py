"""The tasks of one stream, or of a kept answer: what keeps it going, and what is still to be done
when it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

Work = Coroutine[Any, Any, None]


class Chores:
    """Tasks that end with their owner, and last words that do not."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._last_words: list[asyncio.Task[None]] = []

    def begin(self, work: Work) -> None:
        """What the stream lives by."""
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.create_task(work))

    def say(self, work: Work) -> None:
        """Something that is done whatever becomes of the stream; `all_done` waits for it."""
        self._last_words = [task for task in self._last_words if not task.done()]
        self._last_words.append(asyncio.create_task(work))

    def stop(self, *, others: bool = False) -> None:
        """Cancel what was begun.

        Args:
            others: but for the task that asks for it.
        """
        current = asyncio.current_task() if others else None
        for task in self._tasks:
            if task is not current:
                task.cancel()

    async def stopped(self) -> None:
        """Cancel what was begun, and wait for its end."""
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def all_done(self) -> None:
        """Nothing is under way any more."""
        await self.stopped()
        await asyncio.gather(*self._last_words, return_exceptions=True)
