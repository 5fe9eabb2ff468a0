"""The source that the app itself feeds."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from retrieval.channel import Channel, ChannelEnded, end_at
from retrieval.source import Found, Mode, Passage, Query, SourceFailed


class InputEnded(Exception):
    """A passage came after the end: the app's own, the deadline's, or that of the search."""


class Push:
    """Yields what is put, until `end` or the query's deadline. For one search."""

    mode: Mode = "append"

    def __init__(self, name: str = "push", *, capacity: int = 64) -> None:
        """
        Args:
            capacity: passages that wait to be yielded; `put` waits while there are as many.
        """
        self.name = name
        self._passages = Channel[Passage](capacity)
        self._searched = False

    async def put(self, passage: Passage) -> None:
        """Add a passage; waits while the queue is full.

        Raises:
            InputEnded: nothing is taken in any more.
        """
        try:
            await self._passages.put(passage)
        except ChannelEnded as error:
            raise InputEnded(f"{self.name} has ended") from error

    def end(self) -> None:
        """That was all. What was put is still yielded."""
        self._passages.end()

    async def search(self, query: Query) -> AsyncGenerator[Found, None]:
        """Yield the passages in the order in which they are put.

        Raises:
            SourceFailed: it has been searched before.
        """
        if self._searched:
            raise SourceFailed(f"{self.name}: what was pushed is gone with the first search")
        self._searched = True
        timer = end_at(self._passages, query.deadline_s)
        try:
            while (passage := await self._passages.get()) is not None:
                yield Found(passage)
        finally:
            if timer is not None:
                timer.cancel()
            self._passages.end()
