"""Connections of clients: how many there are, and how long each may keep the gateway waiting.

    waits for a request          `keepalive_s`, then closed (aiohttp does that)
    a head has begun             `client_timeout_s`, then 408 and closed
    a body has begun             see `bodies`
    takes nothing that is sent   `client_timeout_s`, then cut off
    is gone without a word       `client_timeout_s` after something was sent, by TCP_USER_TIMEOUT

What was sent and not taken stays below a buffer of asyncio (64 KiB) and what the system holds.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from contextlib import suppress
from typing import cast

import orjson
from aiohttp import web

from gateway.errors import GatewayError, Overloaded, RequestTimeout
from gateway.logs import only_own_errors
from gateway.settings import Current
from gateway.telemetry import Metrics

logger = logging.getLogger(__name__)
logger.addFilter(only_own_errors)

LINGERING_S = 1.0
"""How long the rest of a body is read of a request that was answered without it, so that the client
sees the answer and no reset."""
OWN_FILES = 128
"""Files of the gateway that are no connections."""
REFUSED_S = 1.0
"""How long a connection beyond the bound may take to ask for what it will not get."""


class Door:
    """Makes the connections of one port."""

    def __init__(self, server: web.Server, settings: Current, metrics: Metrics) -> None:
        self.server = server
        self.metrics = metrics
        self.open = 0
        self.coming = 0
        """Taken from the system, and not open yet."""
        self._settings = settings
        self._most = most_connections()

    @property
    def client_timeout_s(self) -> float:
        return self._settings.now.client_timeout_s

    @property
    def keepalive_s(self) -> float:
        return self._settings.now.keepalive_s

    def __call__(self) -> asyncio.Protocol:
        if self.open + self.coming >= min(self._settings.now.max_connections, self._most):
            return Refusal(Overloaded(f"{self.open} connections are open"), self.metrics)
        return Connection(self)


class Connection(web.RequestHandler):
    """One connection, with the deadlines that aiohttp lacks."""

    def __init__(self, door: Door) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            door.server,
            loop=loop,
            logger=logger,
            access_log=None,  # type: ignore[arg-type]  # as the runner does
            keepalive_timeout=door.keepalive_s,
            lingering_time=LINGERING_S,
        )
        self._door = door
        self._loop = loop
        self._wire: asyncio.Transport | None = None
        self._head: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self._begun = self._closing = False

    @property
    def _waits(self) -> bool:
        """Whether no request is under way: what aiohttp itself looks at in `_process_keepalive`.
        What comes before the first turn of `start` counts too."""
        if not self._begun:
            return not self._messages
        return self._waiter is not None and not self._waiter.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, transport)  # uvloop's is not derived of it
        self._door.open += 1
        self._door.metrics.connections.set(self._door.open)
        with suppress(OSError, AttributeError):  # not every system has it
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP,
                socket.TCP_USER_TIMEOUT,
                int(self._door.client_timeout_s * 1000),
            )
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._wire, self._closing = None, True
        self._door.open -= 1
        self._door.metrics.connections.set(self._door.open)
        self._stop_head()
        self._stop_taking()
        super().connection_lost(exc)

    async def start(self) -> None:
        """Answer one request after the other. Then what is left to send has its deadline too."""
        self._begun = True
        try:
            await super().start()
        finally:
            if self._wire is not None:
                self._closing = True
                self._begin_taking()

    # A head that does not come.

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._waits:
            self._stop_head()
        elif self._head is None and data.strip(b"\r\n"):  # empty lines between requests are none
            self._head = self._loop.call_later(self._door.client_timeout_s, self._no_head)

    def _no_head(self) -> None:
        self._head = None
        if self.transport is None or not self._waits:
            return
        error = RequestTimeout("the head of the request did not arrive in time")
        self._door.metrics.errors.labels(error.code or "").inc()
        self.transport.write(rendered(error))
        self.force_close()

    def _stop_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    # A client that does not take what is sent.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin_taking()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._closing:
            self._stop_taking()

    def _begin_taking(self) -> None:
        if self._taking is None:
            self._taking = self._loop.call_later(self._door.client_timeout_s, self._cut)

    def _stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _cut(self) -> None:
        self._taking = None
        if self._wire is not None:
            self._door.metrics.cut_readers.inc()
            self._wire.abort()


class Refusal(asyncio.Protocol):
    """A connection beyond the bound: its first request gets an error, whatever it is."""

    def __init__(self, error: GatewayError, metrics: Metrics) -> None:
        self._error = error
        self._metrics = metrics
        self._wire: asyncio.Transport | None = None
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, transport)
        self._waiting = asyncio.get_running_loop().call_later(REFUSED_S, self._wire.abort)

    def data_received(self, data: bytes) -> None:
        assert self._wire is not None
        if not self._wire.is_closing():
            self._metrics.errors.labels(self._error.code or "").inc()
            self._wire.write(rendered(self._error))
            self._wire.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        assert self._waiting is not None
        self._waiting.cancel()


def rendered(error: GatewayError) -> bytes:
    """An error as the last response of a connection on which there is no request to answer."""
    body = orjson.dumps(error.to_json())
    headers = error.headers | {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    reason = web.Response(status=error.status).reason
    return f"HTTP/1.1 {error.status} {reason}\r\n{lines}\r\n".encode() + body


def most_connections() -> int:
    """How many the system allows. Each may need another one to an engine. The limit of this process
    is raised as far as it may be; the lower one that systems begin with is for `select`, which is
    not used here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max((soft - OWN_FILES) // 2, 1) if soft != resource.RLIM_INFINITY else 1 << 30
