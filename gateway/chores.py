"""The tasks of one stream, or of a kept answer: what keeps it going, and what is still to be done
when it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from gateway.tasks import begin

Work = Coroutine[Any, Any, None]


class Chores:
    """Tasks that end with their owner, and last words that do not."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_words: set[asyncio.Task[None]] = set()

    def begin(self, work: Work) -> None:
        """What the stream lives by."""
        _begin_among(self._tasks, work)

    def say(self, work: Work) -> None:
        """Something that is done whatever becomes of the stream; `all_done` waits for it."""
        _begin_among(self._last_words, work)

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


def _begin_among(tasks: set[asyncio.Task[None]], work: Work) -> None:
    """One that has ended is not kept: what has ended it may hold on to the owner."""
    task = begin(work, "a task of a stream")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
