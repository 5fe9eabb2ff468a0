"""HTTP/1.1 by hand over kept-alive connections, for one purpose: to load a gateway from one core.

A general client costs as much processor time per request as a gateway does. This one knows only
what a gateway answers: a body with a length, or one in parts that ends with an empty part.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import cast
from urllib.parse import urlsplit

PART_END = b"\r\n0\r\n\r\n"
HEAD_END = b"\r\n\r\n"


class Broken(Exception):
    """No answer: the connection was refused, broke, or a deadline has passed."""


class Answer:
    """A whole answer."""

    __slots__ = ("body", "status")

    def __init__(self, status: int, body: bytes) -> None:
        """
        Args:
            body: with the lengths of its parts, if it came in parts.
        """
        self.status = status
        self.body = body


Done = asyncio.Future[Answer]


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._body_at = 0  # 0: the head is not complete yet
        self._length = -1  # of the body; -1: it comes in parts
        self._done: Done | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, done: Done, timeout_s: float) -> None:
        assert self._transport is not None
        self._buffer, self._body_at, self._length, self._done = bytearray(), 0, -1, done
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._too_late)
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if not self._body_at:
            at = buffer.find(HEAD_END)
            if at < 0:
                return
            self._body_at = at + len(HEAD_END)
            head = bytes(buffer[:at]).lower()
            name = head.find(b"\r\ncontent-length:")
            if name >= 0:
                self._length = int(head[name + 17 :].split(b"\r\n", 1)[0])
        if self._length >= 0:
            complete = len(buffer) - self._body_at >= self._length
        else:
            complete = buffer.endswith(PART_END)
        if complete:
            self._finish()

    def _finish(self) -> None:
        done, self._done = self._done, None
        answer = Answer(int(self._buffer[9:12]), bytes(self._buffer[self._body_at :]))
        closes = b"connection: close" in bytes(self._buffer[: self._body_at]).lower()
        self._buffer = bytearray()
        if self._deadline is not None:
            self._deadline.cancel()
        if closes and self._transport is not None:
            self._transport.abort()
        self._wire.free(self)
        if done is not None and not done.done():
            done.set_result(answer)

    def _too_late(self) -> None:
        self._fail("no answer in time")

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the connection broke" if exc is None else repr(exc))
        self._wire.lost(self)

    def _fail(self, why: str) -> None:
        done, self._done = self._done, None
        if self._deadline is not None:
            self._deadline.cancel()
        if self._transport is not None:
            self._transport.abort()
        if done is not None and not done.done():
            done.set_exception(Broken(why))

    def close(self) -> None:
        self._fail("closed")


class Wire:
    """Connections to one gateway, a bounded number of them; who comes later waits for one."""

    def __init__(self, url: str, limit: int) -> None:
        """
        Args:
            limit: of connections.
        """
        place = urlsplit(url)
        self._host, self._port = place.hostname or "127.0.0.1", place.port or 80
        self._limit = limit
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._connecting = 0
        self._waiting: deque[tuple[bytes, Done, float]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, method: str, path: str, body: bytes, timeout_s: float) -> Done:
        """Send a request; the answer, or `Broken`, comes in the future that is returned.

        Args:
            timeout_s: from now to the end of the answer, waiting for a connection included.
        """
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        loop = asyncio.get_running_loop()
        done: Done = loop.create_future()
        self._give(head.encode() + body, done, loop.time() + timeout_s)
        return done

    def _give(self, request: bytes, done: Done, until_s: float) -> None:
        left_s = until_s - asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.send(request, done, left_s)
                return
        self._waiting.append((request, done, until_s))
        if len(self._all) + self._connecting < self._limit:
            self._connecting += 1
            task = asyncio.get_running_loop().create_task(self._connect(left_s))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), self._host, self._port
                )
        except (OSError, TimeoutError) as e:
            self._connecting -= 1
            if self._waiting:
                _, done, _ = self._waiting.popleft()
                if not done.done():
                    done.set_exception(Broken(repr(e)))
            return
        self._connecting -= 1
        self._all.add(connection)
        self.free(connection)

    def free(self, connection: _Connection) -> None:
        """A connection has nothing to do any more."""
        now_s = asyncio.get_running_loop().time()
        while self._waiting and connection.usable:
            request, done, until_s = self._waiting.popleft()
            if done.done():
                continue
            if until_s <= now_s:
                done.set_exception(Broken("no connection in time"))
                continue
            connection.send(request, done, until_s - now_s)
            return
        if connection.usable:
            self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection is gone; who waits for one gets a new one."""
        self._all.discard(connection)
        if self._waiting:
            self._give(*self._waiting.popleft())

    def close(self) -> None:
        """Break everything off."""
        while self._waiting:
            _, done, _ = self._waiting.popleft()
            if not done.done():
                done.set_exception(Broken("closed"))
        for task in self._tasks:
            task.cancel()
        for connection in list(self._all):
            connection.close()
