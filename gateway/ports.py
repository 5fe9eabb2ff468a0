"""Where clients come in: they are taken in as they come, also where many come together."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

from aiohttp import web

from gateway.connections import Connection, Door
from gateway.settings import Current
from gateway.tasks import begin
from gateway.telemetry import Metrics

logger = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that the system holds until the gateway takes them."""
AT_ONCE = 64
"""Of those, to be taken in one turn of the event loop."""
PAUSE_S = 1.0
"""Before the next is taken, when the system has no file left for it."""


class Port:
    """Takes the connections that come in, until it is closed.

    An event loop of libuv takes one of them in each of its turns, so that, while there is much to
    do, a hundred clients that come together wait for hundreds of turns, with nothing else to blame.
    """

    def __init__(self, door: Door, sockets: Sequence[socket.socket]) -> None:
        """
        Args:
            sockets: that listen.
        """
        self.sockets = sockets
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._paused: asyncio.TimerHandle | None = None
        self._open()

    def close(self) -> None:
        """Take no more. What is open stays."""
        if self._paused is not None:
            self._paused.cancel()
        for listening in self.sockets:
            if listening.fileno() >= 0:
                self._loop.remove_reader(listening)
                listening.close()

    def _open(self) -> None:
        self._paused = None
        for listening in self.sockets:
            self._loop.add_reader(listening, self._take, listening)

    def _take(self, listening: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                taken, _ = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as e:
                logger.error("no connection can be taken for %g s: %s", PAUSE_S, e)
                for each in self.sockets:
                    self._loop.remove_reader(each)
                self._paused = self._loop.call_later(PAUSE_S, self._open)
                return
            taken.setblocking(False)
            protocol = self._door()
            self._door.coming += isinstance(protocol, Connection)
            begin(self._connect(taken, protocol), "taking a connection")

    async def _connect(self, taken: socket.socket, protocol: asyncio.Protocol) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, taken)
        except OSError:  # it is gone again
            taken.close()
        finally:
            self._door.coming -= isinstance(protocol, Connection)


async def listen(
    runner: web.AppRunner, host: str, port: int, settings: Current, metrics: Metrics
) -> Port:
    """Take connections for an application that was set up.

    Raises:
        OSError: the port is taken, or there is no such host.
    """
    assert runner.server is not None
    loop, sockets = asyncio.get_running_loop(), list[socket.socket]()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    try:
        for family, address in dict.fromkeys((family, where) for family, *_, where in found):
            listening = socket.create_server(address, family=family, backlog=BACKLOG)
            sockets.append(listening)
            listening.setblocking(False)
    except OSError:
        for listening in sockets:
            listening.close()
        raise
    return Port(Door(runner.server, settings, metrics), sockets)
