"""An engine that is only its KV events, by vLLM's own publisher; and an index to follow it into."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import zmq
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
    KVEventBatch,
    ZmqEventPublisher,
)

from cache_index.event_stream import Source
from cache_index.index import IndexUnavailable, OutOfOrder
from cache_index.mirror import Snapshot, unpacked
from cache_index.names import packed

_numbers = itertools.count()

FAMILY, ENGINE = "family", "http://engine"


class LossySocket:
    """A publisher's socket that loses the next messages when told to."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.to_lose = 0

    def send_multipart(self, frames: Sequence[bytes]) -> None:
        if self.to_lose:
            self.to_lose -= 1
        else:
            self._socket.send_multipart(frames)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def stored(*hashes: int | bytes, **others: Any) -> BlockStored:
    fields = {"medium": "GPU", "group_idx": 0, "kv_cache_spec_kind": "full_attention"} | others
    return BlockStored(
        block_hashes=list(hashes),
        parent_block_hash=None,
        token_ids=[1, 2, 3],
        block_size=1,
        lora_id=None,
        lora_name=None,
        session_id="somebody",
        extra_keys=[("salt",)],
        **fields,
    )


def removed(*hashes: int | bytes, **others: Any) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(hashes), **{"medium": "GPU", "group_idx": 0} | others)


class PublishedEngine:
    """Holds blocks, as copies of names, and publishes what becomes of them."""

    def __init__(
        self, buffer_batches: int = 10_000, replay: bool = True, endpoint: str | None = None
    ) -> None:
        """
        Args:
            endpoint: to bind both sockets to, if it is free for any number of them.
        """
        place = endpoint or f"ipc://@stream2llm-test-{os.getpid()}-{next(_numbers)}"
        self.source = Source(place, (endpoint or place + "-replay") if replay else None, "kv")
        self.can_say = True
        self.snapshots = 0
        self._buffer_batches = buffer_batches
        self.start()

    def start(self) -> None:
        self.instance = f"instance-{next(_numbers)}"
        self.copies: Counter[int] = Counter()
        self.batches = 0
        deadline_s = time.monotonic() + 5
        while True:
            try:
                self._publisher = ZmqEventPublisher(
                    0,
                    endpoint=self.source.endpoint,
                    replay_endpoint=self.source.replay_endpoint,
                    buffer_steps=self._buffer_batches,
                    topic=self.source.topic,
                )
                break
            except zmq.ZMQError:  # the address is not free yet
                assert time.monotonic() < deadline_s, "can't bind"
                time.sleep(0.01)
        bound = self._publisher.get_publisher_config()
        self.source = Source(bound.endpoint, bound.replay_endpoint, bound.topic)
        self._socket = self._publisher._pub = LossySocket(self._publisher._pub)

    def stop(self) -> None:
        # It closes its sockets a second later, also under a thread that still uses them: a crash.
        self._publisher._running = False
        self._publisher._event_queue.put(None)
        self._publisher._thread.join(60)
        self._publisher.SHUTDOWN_TIMEOUT = 0.0
        self._publisher.shutdown()

    def restart(self) -> None:
        self.stop()
        self.start()

    def publish(self, *events: KVCacheEvent, lose: bool = False) -> None:
        """A batch of events, told by the same rules as they are followed by."""
        for event in events:
            if isinstance(event, BlockStored):
                self.copies.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.copies.subtract(event.block_hashes)
            else:
                self.copies.clear()
        self.send(*events, lose=lose)

    def send(self, *events: KVCacheEvent, lose: bool = False) -> None:
        """A batch that changes nothing of what is held."""
        self.batches += 1
        self._socket.to_lose += lose
        self._publisher.publish(KVEventBatch(ts=time.time(), events=list(events)))

    async def all_sent(self) -> bool:
        """Whether the publisher's thread has sent, or lost, all batches."""
        return bool(self._publisher._event_queue.unfinished_tasks == 0)

    @property
    def held(self) -> set[int]:
        return set(+self.copies)

    async def snapshot(self) -> Snapshot | None:
        self.snapshots += 1
        if not self.can_say:
            return None
        return Snapshot(self.instance, self.batches, packed((+self.copies).elements()))


class TinyIndex:
    """A `BlockIndex` for one engine, which can be away."""

    def __init__(self) -> None:
        self.away = False
        self.calls = 0
        self.forget()

    def forget(self) -> None:
        self.instance: str | None = None
        self.expected = 0
        self.names: set[int] = set()

    async def longest(self, family: str, names: bytes, engines: Sequence[str]) -> Mapping[str, int]:
        raise NotImplementedError

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
        self._called(family, engine)
        assert first <= after
        if instance != self.instance:
            raise OutOfOrder(None)
        if first != self.expected:
            raise OutOfOrder(self.expected)
        added, gone = set(unpacked(stored)), set(unpacked(removed))
        assert not added & gone
        self.expected, self.names = after, (self.names | added) - gone

    async def rebuild(
        self, family: str, engine: str, instance: str, after: int, names: bytes, lease_s: float
    ) -> None:
        self._called(family, engine)
        held = list(unpacked(names))
        self.instance, self.expected, self.names = instance, after, set(held)
        assert len(held) == len(self.names), "each name once"

    async def drop(self, family: str, engine: str) -> None:
        self.forget()

    def _called(self, family: str, engine: str) -> None:
        assert (family, engine) == (FAMILY, ENGINE)
        self.calls += 1
        if self.away:
            raise IndexUnavailable


def cleared() -> AllBlocksCleared:
    return AllBlocksCleared()
