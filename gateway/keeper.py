"""Keeps the streams of this replica in the index, as far as the index can be reached.

A stream does not fail because the index does. When the index is back, or has forgotten this
replica, every stream is written anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from cache_index.index import IndexUnavailable, ReplicaIndex, Stale, StreamIndex, StreamRecord
from gateway.errors import IndexAway
from gateway.guard import Guard
from gateway.record import Kept, Ledger
from gateway.tasks import again_and_again, begin
from gateway.telemetry import Metrics

logger = logging.getLogger(__name__)

BEAT_S = 1.0
BEAT_LEASE_S = 4.0
"""A replica that is silent for so long has lost its streams to whoever is asked for them."""
NOBODY = ""
"""Holder of a stream that its last one has released."""
GONE_S = 0.001
"""Lease of a replica that ends."""
RETRY_S = 0.25
"""Between heartbeats while the index is away."""
RECOVERY_S = 5.0
"""After the index was away it may not yet have the streams that other replicas hold."""


class Moved(Exception):
    """Another replica holds the stream now."""


class Index(StreamIndex, ReplicaIndex, Protocol):
    """What the keeper needs of an index."""


class Keeper:
    """Writes and finds records."""

    def __init__(
        self,
        index: Index,
        replica: str,
        *,
        guard: Guard,
        lease_s: float,
        shared: bool,
        metrics: Metrics,
    ) -> None:
        """
        Args:
            replica: URL under which other replicas reach this one.
            lease_s: how long a record stays without a write.
            shared: other replicas read the index.
        """
        self.replica, self.shared = replica, shared
        self._index = index
        self._guard = guard
        self._lease_s = lease_s
        self._metrics = metrics
        self._returned: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._recovered_s = -float("inf")
        self._beating: asyncio.Task[None] | None = None
        self._rewriting: asyncio.Task[None] | None = None

    @property
    def reaches_index(self) -> bool:
        """Whether the index has answered when it was last asked."""
        return not self._guard.away

    async def start(self, returned: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin to tell the other replicas that this one is alive.

        Args:
            returned: writes every stream anew; called when the index may have lost or missed some.
        """
        await self._beat()
        self._returned = returned
        self._beating = asyncio.create_task(
            again_and_again(
                self._beat, lambda: RETRY_S if self._guard.away else BEAT_S, "the heartbeat"
            )
        )

    async def stop(self) -> None:
        """End what `start` has begun, and tell the others."""
        tasks = [task for task in (self._beating, self._rewriting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(IndexUnavailable):
            await self._guard.call(lambda: self._index.beat(self.replica, GONE_S))

    # This replica's streams.

    async def keep(
        self, stream_id: str, ledger: Ledger, now: Callable[[], Kept], *, renew: bool
    ) -> None:
        """Bring a stream's record to what `now` says. An index that is away is no error.

        Args:
            renew: write also when there is nothing new.

        Raises:
            Moved
        """
        async with ledger.lock:
            wanted = now()
            if wanted == ledger.written and not renew:
                return
            begun_s = time.monotonic()
            try:
                await self._write(stream_id, ledger, wanted)
                ledger.heard_of_s = begun_s
            except BaseException as e:
                ledger.version += 1  # nobody knows whether it was written
                ledger.written = None
                if not isinstance(e, IndexUnavailable):
                    raise
                self._metrics.unkept.inc()

    async def _write(self, stream_id: str, ledger: Ledger, now: Kept) -> None:
        if ledger.written is not None:
            change = ledger.change(now)
            try:
                epoch, version = ledger.epoch, ledger.version
                await self._guard.call(
                    lambda: self._index.change(stream_id, epoch, version, change, self._lease_s)
                )
            except Stale as e:
                self._must_be_ours(ledger, e)
            else:
                ledger.version += 1
                ledger.written = now
                return
        await self._write_whole(stream_id, ledger, now)

    async def _write_whole(self, stream_id: str, ledger: Ledger, now: Kept) -> None:
        for _ in range(2):
            ledger.version += 1
            record = ledger.whole(self.replica, now)
            try:
                await self._guard.call(partial(self._index.put, stream_id, record, self._lease_s))
            except Stale as e:
                self._must_be_ours(ledger, e)
                ledger.version = e.version
            else:
                ledger.written = now
                return
        raise IndexUnavailable("the record changes under its holder's hands")

    def _must_be_ours(self, ledger: Ledger, found: Stale) -> None:
        # In the same epoch: both have made it, under one idempotency key.
        elsewhere = found.epoch == ledger.epoch and found.holder != self.replica
        if found.epoch > ledger.epoch or elsewhere:
            raise Moved(found.holder) from found

    async def forget(self, stream_id: str, ledger: Ledger) -> None:
        """Take the record of a stream of this replica away, as far as the index can be told."""
        async with ledger.lock:
            with suppress(IndexUnavailable):
                await self._guard.call(lambda: self._index.delete(stream_id, ledger.epoch))

    async def release(self, stream_id: str, ledger: Ledger) -> None:
        """Let nobody hold a stream: whoever is asked for it takes it over.

        Raises:
            Moved: another replica holds it already.
            IndexAway
        """
        async with ledger.lock:
            try:
                await self._guard.call(
                    lambda: self._index.claim(stream_id, ledger.epoch, NOBODY, self._lease_s)
                )
            except Stale as e:
                if e.epoch > ledger.epoch:
                    raise Moved(e.holder) from e
                raise IndexAway("the index does not have the stream") from e
            except IndexUnavailable as e:
                raise IndexAway("the index of streams can't be reached") from e

    # Anybody's streams.

    async def find(self, stream_id: str) -> StreamRecord | None:
        """The record of a stream that this replica does not hold.

        Raises:
            IndexAway: the index can't say, or not for certain.
        """
        try:
            record = await self._guard.call(lambda: self._index.get(stream_id))
        except IndexUnavailable as e:
            raise IndexAway("the index of streams can't be reached") from e
        if record is None:
            await self._beat()  # does it know this replica? If not, it has forgotten more
            if time.monotonic() < self._recovered_s + RECOVERY_S:
                raise IndexAway("the index of streams is being rebuilt")
        return record

    async def claim(self, stream_id: str, epoch: int) -> StreamRecord:
        """Take a stream over from the holder of this epoch.

        Raises:
            Moved: somebody else was quicker.
            IndexAway
        """
        try:
            return await self._guard.call(
                lambda: self._index.claim(stream_id, epoch, self.replica, self._lease_s)
            )
        except Stale as e:
            raise Moved(e.holder) from e
        except IndexUnavailable as e:
            raise IndexAway("the index of streams can't be reached") from e

    async def others(self) -> set[str]:
        """The other replicas that are alive, as far as the index knows.

        Raises:
            IndexAway
        """
        try:
            return await self._guard.call(self._index.replicas) - {self.replica}
        except IndexUnavailable as e:
            raise IndexAway("the index of replicas can't be reached") from e

    # This replica.

    async def _beat(self) -> None:
        """Renew this replica's lease; notice an index that comes back or has forgotten."""
        was_away = self._guard.away
        try:
            known = await self._guard.attempt(lambda: self._index.beat(self.replica, BEAT_LEASE_S))
        except IndexUnavailable:
            return
        if self._returned is not None and (was_away or not known):
            self._recovered_s = time.monotonic()
            if self._rewriting is None or self._rewriting.done():
                logger.warning("the index is back: every stream is written anew")
                self._rewriting = begin(self._returned(), "writing every stream anew")
