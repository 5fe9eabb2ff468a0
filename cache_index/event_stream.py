"""The numbered batches of KV events that one vLLM engine publishes by ZMQ.

vLLM publishes (topic, number, batch) by a PUB socket, and keeps the last batches for a ROUTER
socket that answers the number of a batch with that batch and all behind it. Checked against
vLLM 0.32. A subscriber may lose batches: those published before its subscription has arrived,
and those it is too slow for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from cache_index.index import NAME_BYTES

CONNECT_S = 5.0
REPLAY_S = 2.0
"""Longest wait for the next batch of a replay."""

NEVER_MS = 24 * 3600 * 1000
HEARTBEAT_S = 5
"""An engine whose machine has vanished closes no connection."""

QUEUED_BATCHES = 10_000
"""What arrives beyond them while nobody reads is lost, and asked for again."""

NUMBER_BYTES = 8
_ALL_BITS = (1 << 8 * NAME_BYTES) - 1
END_OF_REPLAY = (-1).to_bytes(NUMBER_BYTES, "big", signed=True)

MEDIA = (None, "GPU")
GROUPS = (None, 0)
FULL_ATTENTION = (None, "full_attention", "mla_attention")


class ConnectionLost(Exception):
    """The engine is gone, or another one answers in its place."""


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """Blocks that are found from now on. A block's name comes once for each copy of it."""

    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None

    @property
    def counts(self) -> bool:
        """Whether the blocks hold all the KV of their tokens, in the device's own memory."""
        place = self.medium in MEDIA and self.group_idx in GROUPS
        return place and self.kv_cache_spec_kind in FULL_ATTENTION


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    """Blocks of which one copy is found no longer."""

    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None

    @property
    def counts(self) -> bool:
        """As of `BlockStored`."""
        return self.medium in MEDIA and self.group_idx in GROUPS


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing is found any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Event]


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one step of an engine; engines number their batches from 0 on."""

    number: int
    events: list[Event]


_decoder = msgspec.msgpack.Decoder(_Batch)


def read(number: bytes, payload: bytes) -> Batch:
    """A batch as it was published.

    Raises:
        msgspec.DecodeError: it can't be read.
    """
    return Batch(int.from_bytes(number, "big"), _decoder.decode(payload).events)


def name_of(block_hash: int | bytes) -> int:
    """A block's name as a number: vLLM publishes the hash, or its last 8 bytes as a number."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-NAME_BYTES:], "big")
    return block_hash & _ALL_BITS


@dataclass(frozen=True, slots=True)
class Source:
    """Where an engine publishes, for sockets that connect."""

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""

    @classmethod
    def at(cls, url: str, endpoint: str, replay_endpoint: str | None, topic: str) -> Self:
        """
        Args:
            url: of the engine's HTTP server.
            endpoint, replay_endpoint: as the engine binds them, perhaps to all interfaces.
        """
        host = urlsplit(url).hostname or "localhost"
        replay = None if replay_endpoint is None else _reachable(replay_endpoint, host)
        return cls(_reachable(endpoint, host), replay, topic)


def _reachable(endpoint: str, host: str) -> str:
    host = f"[{host}]" if ":" in host else host
    for anywhere in ("*", "0.0.0.0", "[::]"):
        endpoint = endpoint.replace(f"tcp://{anywhere}:", f"tcp://{host}:")
    return endpoint


class EventStream:
    """One connection to one engine; when that ends, so does this. Use as a context manager.

    A new engine at the same place is another connection: batches of two engines never mix.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._last = -1

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            ConnectionLost: nobody is there.
        """
        self._sub = _socket(zmq.SUB)
        self._monitor = self._sub.get_monitor_socket()
        try:
            self._sub.subscribe(self._source.topic)
            self._sub.connect(self._source.endpoint)
            async with asyncio.timeout(CONNECT_S):
                while await self._monitor_event() != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    pass
        except BaseException as e:
            self._close()
            if isinstance(e, TimeoutError):
                raise ConnectionLost(f"{self._source.endpoint} does not answer") from e
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._close()

    def _close(self) -> None:
        self._sub.disable_monitor()
        self._monitor.close(linger=0)
        self._sub.close(linger=0)

    async def _monitor_event(self) -> int:
        event = int(parse_monitor_message(await self._monitor.recv_multipart())["event"])
        if event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED, zmq.EVENT_MONITOR_STOPPED):
            raise ConnectionLost(f"{self._source.endpoint} is closed")
        return event

    async def _receive(self, socket: zmq.asyncio.Socket, within_s: float) -> list[bytes] | None:
        """The message that comes in time, as long as the engine is there; else None."""
        poller = zmq.asyncio.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(await poller.poll(round(within_s * 1000)))
        if self._monitor in ready:
            await self._monitor_event()
        if socket not in ready:
            return None
        try:
            frames: list[bytes] = await socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:  # it went with the connection: to wait for it would be to wait for ever
            return None
        return frames

    async def next(self, within_s: float) -> Batch | None:
        """The next batch that arrives, numbers may be missing; None if none comes in time.

        Raises:
            ConnectionLost
            msgspec.DecodeError: the batch can't be read.
        """
        frames = await self._receive(self._sub, within_s)
        if frames is None:
            return None
        _, number, payload = frames
        batch = read(number, payload)
        if batch.number <= self._last:
            raise ConnectionLost("the numbers begin anew")
        self._last = batch.number
        return batch

    async def replay(self, first: int) -> AsyncGenerator[Batch, None]:
        """What the engine still has from this batch on, in order. Numbers may be missing.

        To be closed by whoever reads it. Ends early if the engine does not go on in time; gives
        nothing where nothing can be asked.

        Raises:
            ConnectionLost
            msgspec.DecodeError: a batch can't be read.
        """
        if self._source.replay_endpoint is None:
            return
        socket = _socket(zmq.DEALER)
        try:
            socket.connect(self._source.replay_endpoint)
            await socket.send_multipart([b"", first.to_bytes(NUMBER_BYTES, "big")])
            while (frames := await self._receive(socket, REPLAY_S)) is not None:
                *_, number, payload = frames
                if number == END_OF_REPLAY:
                    return
                yield read(number, payload)
        finally:
            socket.close(linger=0)


def _socket(kind: int) -> zmq.asyncio.Socket:
    socket = zmq.asyncio.Context.instance().socket(kind)
    socket.rcvhwm = QUEUED_BATCHES
    socket.linger = 0
    socket.sndtimeo = round(REPLAY_S * 1000)
    socket.ipv6 = True
    # Two engines may not come through one connection. -1, which forbids it, would throw away what
    # has arrived, in the middle of a message too, and libzmq aborts the process when that is read.
    socket.reconnect_ivl = NEVER_MS
    socket.heartbeat_ivl = HEARTBEAT_S * 1000
    socket.heartbeat_timeout = 3 * HEARTBEAT_S * 1000
    return socket
