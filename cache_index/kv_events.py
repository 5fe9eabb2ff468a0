"""Keeps the index true to what one engine holds, by the KV events that the engine publishes.

Two tasks share a `Mirror` of the engine. One reads the engine's events into it: from a snapshot
on, batch by batch, lost ones by asking for them again, and from a new snapshot where that does not
help. The other tells the index what has changed, as often as the index can take it. So an index
that was away, or has lost everything, is told from memory, and an engine is never held up.

Several gateways may follow one engine: all see the same batches, the index takes each once, and
whoever comes second goes on behind the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from cache_index.event_stream import Batch, ConnectionLost, EventStream, Source
from cache_index.index import BlockIndex, IndexUnavailable, OutOfOrder
from cache_index.mirror import Mirror, Snapshot

logger = logging.getLogger(__name__)

TakeSnapshot = Callable[[], Awaitable[Snapshot | None]]
"""Asks an engine what it holds now; None from one that can't say. Whatever it raises means: later.
"""

IDLE_S = 2.0
"""After so long without a batch the engine is asked whether one was lost."""

ANEW_S = 900.0
"""After so long begin from a snapshot again. An engine whose clients ask it to report blocks that
it has already (vLLM's `kv_cache_report_mode`) tells of more copies than there are."""

SNAPSHOT_S = 30.0
INDEX_S = 10.0
"""Longest waits for an answer."""

PAUSE_S = 0.05
"""Between two writes: what an engine does meanwhile is told together."""

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 5.0

EXPECTED = (IndexUnavailable, TimeoutError)


class Follower:
    """Follows one engine into an index. `start` and `stop`."""

    def __init__(
        self,
        index: BlockIndex,
        source: Source,
        snapshot: TakeSnapshot,
        *,
        family: str,
        engine: str,
        lease_s: float,
    ) -> None:
        """
        Args:
            family, engine, lease_s: what the index is told, see `BlockIndex`.
        """
        self._index = index
        self._source = source
        self._snapshot = snapshot
        self._family = family
        self._engine = engine
        self._lease_s = lease_s
        self._mirror: Mirror | None = None
        self._connected = False
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to follow."""
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    async def stop(self) -> None:
        """Stop; what the index knows stays there until its lease ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # From the engine into the mirror.

    async def _read(self) -> None:
        """Follow one connection after another."""
        retry_s = FIRST_RETRY_S
        while True:
            begun_s = time.monotonic()
            try:
                async with EventStream(self._source) as events:
                    await self._follow(events)
            except ConnectionLost as e:
                logger.debug("%s: %s", self._engine, e)
            except Exception as e:  # e.g. whatever a snapshot raises
                logger.warning("can't follow %s: %r", self._engine, e)
            finally:
                self._connected = False
            if time.monotonic() - begun_s > LAST_RETRY_S:
                retry_s = FIRST_RETRY_S
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _follow(self, events: EventStream) -> None:
        """Until the connection is lost, or it is time to begin anew."""
        mirror = await self._begin(events, upcoming=0)
        anew_s = time.monotonic() + ANEW_S
        while time.monotonic() < anew_s:
            batch = await events.next(IDLE_S)
            if batch is None:
                await self._fill(events, mirror, None)
                continue
            if not await self._fill(events, mirror, batch.number):
                mirror = await self._begin(events, upcoming=batch.number)
                if not await self._fill(events, mirror, batch.number):
                    raise ConnectionLost(f"batches before {batch.number} are lost")
            self._take(mirror, batch)

    async def _begin(self, events: EventStream, upcoming: int) -> Mirror:
        """A new mirror: of a snapshot, or else of all that the engine's buffer still tells.

        Args:
            upcoming: the number of a batch that has arrived.
        """
        async with asyncio.timeout(SNAPSHOT_S):
            snapshot = await self._snapshot()
        if snapshot is None:
            async with aclosing(events.replay(0)) as batches:
                first = await anext(batches, None)
            snapshot = Snapshot("", upcoming if first is None else first.number)
        mirror = self._mirror = Mirror(snapshot)
        self._connected = True
        self._changed.set()
        await self._fill(events, mirror, None)
        return mirror

    async def _fill(self, events: EventStream, mirror: Mirror, until: int | None) -> bool:
        """Ask for the batches that were lost, up to the one that has arrived, or to the last.

        Returns:
            Whether none is missing before that one.
        """
        progress = True
        while progress and (until is None or mirror.next_batch < until):
            before = mirror.next_batch
            async with aclosing(events.replay(before)) as batches:
                async for batch in batches:
                    self._take(mirror, batch)
            progress = mirror.next_batch > before
        return until is None or mirror.next_batch >= until

    def _take(self, mirror: Mirror, batch: Batch) -> None:
        """Take a batch in if it is the next; one that is known, or too early, is not."""
        if batch.number == mirror.next_batch:
            mirror.take(batch)
            self._changed.set()

    # From the mirror into the index.

    async def _write(self) -> None:
        """Tell the index what is new, and that the old still holds, as long as that is known."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                async with asyncio.timeout(INDEX_S):
                    await self._tell()
                retry_s = FIRST_RETRY_S
            except Exception as e:  # to die of it would be to tell nothing ever again
                level = logging.DEBUG if isinstance(e, EXPECTED) else logging.WARNING
                logger.log(level, "the index does not take what %s holds: %r", self._engine, e)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
                continue
            await asyncio.sleep(PAUSE_S)
            await self._news()

    async def _news(self) -> None:
        """Wait until there is something to tell, or the lease wants to be renewed."""
        try:
            async with asyncio.timeout(self._lease_s / 3):
                while self._mirror is None or not self._mirror.has_news:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _tell(self) -> None:
        mirror = self._mirror
        if mirror is None or not (mirror.has_news or self._connected):
            return
        try:
            if mirror.told_whole:
                await self._tell_news(mirror)
            else:
                await self._tell_whole(mirror)
        except OutOfOrder as e:
            mirror.contradicted(e.expected)

    async def _tell_news(self, mirror: Mirror) -> None:
        news = mirror.news()
        await self._index.apply(
            self._family,
            self._engine,
            mirror.instance,
            news.first,
            news.after,
            news.stored,
            news.removed,
            self._lease_s,
        )
        mirror.told(news.after)

    async def _tell_whole(self, mirror: Mirror) -> None:
        after, names = mirror.tell_all()
        try:
            await self._index.rebuild(
                self._family, self._engine, mirror.instance, after, names, self._lease_s
            )
        except BaseException:
            mirror.tell_whole()
            raise
