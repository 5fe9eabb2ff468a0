"""The index within one process: for a single gateway, without Redis."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from msgspec.structs import replace

from cache_index.index import (
    EXACT_NAMES,
    NAME_BYTES,
    Change,
    OutOfOrder,
    Stale,
    StreamRecord,
)

SWEEP_EVERY_WRITES = 1024

V = TypeVar("V")


class Leased(Generic[V]):
    """A dictionary whose entries expire. What has expired is swept out now and then."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: dict[str, tuple[V, float]] = {}
        self._writes = 0

    def get(self, key: str) -> V | None:
        value, until_s = self._entries.get(key, (None, 0.0))
        return value if self._clock() < until_s else None

    def put(self, key: str, value: V, lease_s: float) -> None:
        self._writes += 1
        if self._writes % SWEEP_EVERY_WRITES == 0:
            now_s = self._clock()
            self._entries = {k: e for k, e in self._entries.items() if now_s < e[1]}
        self._entries[key] = (value, self._clock() + lease_s)

    def keys(self) -> set[str]:
        return {key for key in list(self._entries) if self.get(key) is not None}

    def pop(self, key: str) -> None:
        self._entries.pop(key, None)


class Held:
    """The blocks of one engine."""

    def __init__(self, instance: str, after: int, names: bytes) -> None:
        self.instance = instance
        self.expected = after
        self.names = set(split(names))


def split(names: bytes) -> list[bytes]:
    """Packed names, one by one."""
    return [names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES)]


class MemoryIndex:
    """`StreamIndex`, `ReplicaIndex` and `BlockIndex` in dictionaries."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: seconds, by which leases run out.
        """
        self._streams = Leased[StreamRecord](clock)
        self._replicas = Leased[bool](clock)
        self._engines = Leased[Held](clock)

    async def get(self, stream_id: str) -> StreamRecord | None:
        return self._streams.get(stream_id)

    async def put(self, stream_id: str, record: StreamRecord, lease_s: float) -> None:
        old = self._streams.get(stream_id)
        if old is not None and (old.epoch, old.version) >= (record.epoch, record.version):
            raise stale(old)
        self._streams.put(stream_id, record, lease_s)

    async def change(
        self, stream_id: str, epoch: int, version: int, change: Change, lease_s: float
    ) -> None:
        old = self._streams.get(stream_id)
        if old is None or (old.epoch, old.version) != (epoch, version):
            raise stale(old)
        self._streams.put(stream_id, changed(old, change), lease_s)

    async def claim(self, stream_id: str, epoch: int, holder: str, lease_s: float) -> StreamRecord:
        old = self._streams.get(stream_id)
        if old is None or old.epoch != epoch:
            raise stale(old)
        new = replace(old, epoch=epoch + 1, version=old.version + 1, holder=holder)
        self._streams.put(stream_id, new, lease_s)
        return new

    async def delete(self, stream_id: str, epoch: int) -> None:
        old = self._streams.get(stream_id)
        if old is not None and old.epoch == epoch:
            self._streams.pop(stream_id)

    async def beat(self, replica: str, lease_s: float) -> bool:
        known = self._replicas.get(replica) is not None
        self._replicas.put(replica, True, lease_s)
        return known

    async def replicas(self) -> set[str]:
        return self._replicas.keys()

    async def longest(self, family: str, names: bytes, engines: Sequence[str]) -> Mapping[str, int]:
        wanted = split(names)
        return {engine: self._held_of(family, engine, wanted) for engine in engines}

    def _held_of(self, family: str, engine: str, wanted: Sequence[bytes]) -> int:
        held = self._engines.get(key(family, engine))
        if held is None:
            return 0
        names, exact = held.names, min(EXACT_NAMES, len(wanted))
        for i in range(exact):
            if wanted[i] not in names:
                return i
        behind = range(exact, len(wanted))
        return exact + bisect_left(behind, True, key=lambda i: wanted[i] not in names)

    async def apply(
        self,
        family: str,
        engine: str,
        instance: str,
        first: int,
        after: int,
        stored: bytes,
        removed: bytes,
        lease_s: float,
    ) -> None:
        held = self._engines.get(key(family, engine))
        if held is None or held.instance != instance:
            raise OutOfOrder(None)
        if held.expected != first:
            raise OutOfOrder(held.expected)
        held.names.difference_update(split(removed))
        held.names.update(split(stored))
        held.expected = after
        self._engines.put(key(family, engine), held, lease_s)

    async def rebuild(
        self, family: str, engine: str, instance: str, after: int, names: bytes, lease_s: float
    ) -> None:
        self._engines.put(key(family, engine), Held(instance, after, names), lease_s)

    async def drop(self, family: str, engine: str) -> None:
        self._engines.pop(key(family, engine))

    async def close(self) -> None:
        """Nothing to close; other implementations have."""


def key(family: str, engine: str) -> str:
    return f"{family} {engine}"


def stale(record: StreamRecord | None) -> Stale:
    """Says where the record is; there may be none."""
    if record is None:
        return Stale(-1, -1, "")
    return Stale(record.epoch, record.version, record.holder)


def changed(record: StreamRecord, change: Change) -> StreamRecord:
    """The record's next version."""
    return replace(
        record,
        version=record.version + 1,
        engine=record.engine if change.engine is None else change.engine,
        state=record.state if change.state is None else change.state,
        about=record.about if change.about is None else change.about,
        posts=change.posts.of(record.posts),
        documents=change.documents.of(record.documents),
        tail=change.tail.of(record.tail),
        names=change.names.of(record.names),
    )
