"""How a gateway ends without failing anybody.

Drained, it says that it is not ready, refuses new streams, and lets what is under way end: answers,
requests that are passed through, retrievals. Open streams go on at another replica, as soon as
there is one and they are between two requests; where there is none they have to end here, unless
whoever is started next can go on with them. What is asked of streams elsewhere is still sent on for
a while; then clients that keep coming here have to go there.

What is still under way when the gateway ends, drained or not, is cut off: clients are told to ask
another replica, which finds the stream as it was before its `finish`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.errors import Draining, IndexAway
from gateway.keeper import Keeper
from gateway.settings import Current
from gateway.streams import Streams
from gateway.tasks import begin

logger = logging.getLogger(__name__)

NEW = frozenset(
    {
        ("POST", "/v1/streams"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
    }
)
"""What is refused while the gateway is drained; all else belongs to what is open."""
WATCHING = frozenset({"/health", "/ready", "/metrics"})
"""Requests that nobody has to wait for."""
ENDS = "this gateway ends: ask another one"
LOOK_S = 0.05
LEAVE_S = 2.0
"""So long a drained gateway that has nothing left lets those in who come all the same, to be sent
on. Those who are there have their connections closed with their next answers."""
QUIET_S = 0.5
"""Behind the last request, before connections that are still there are closed: closed in the moment
in which a client uses it, one would take the request with it."""
LAST_S = 5.0
"""Longest wait for that."""


class Lifecycle:
    """Whether this gateway takes new streams, and what it still has to do."""

    def __init__(self) -> None:
        self.draining = False
        self.ending = False
        """Nothing is answered any more; that connections break says nothing of clients."""
        self.close_door: Callable[[], None] = lambda: None
        """Lets nobody in any more; once more is no error."""
        self.requests = 0
        """Under way."""
        self._last_s = -float("inf")
        self._drain: asyncio.Task[bool] | None = None
        self._waits: set[asyncio.Timeout] = set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """While a request is under way."""
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1
            self._last_s = time.monotonic()

    def begin_drain(self, current: Current, streams: Streams, keeper: Keeper) -> asyncio.Task[bool]:
        """Drain, once; the task says whether all had ended in time."""
        if self._drain is None:
            self.draining = True
            logger.warning("drained: no new streams from now on")
            self._drain = begin(self._drained(current, streams, keeper), "the drain")
        return self._drain

    @property
    def drained(self) -> bool:
        """Whether a drain has come to its end in time."""
        drain = self._drain
        return drain is not None and drain.done() and not drain.cancelled() and drain.result()

    async def quiet(self) -> None:
        """Wait until nobody has asked anything for a while, if that comes in time."""
        deadline_s = time.monotonic() + LAST_S
        while (now_s := time.monotonic()) < deadline_s:
            if not self.requests and now_s > self._last_s + QUIET_S:
                return
            await asyncio.sleep(LOOK_S)

    def end(self) -> None:
        """The gateway ends: nobody waits for anybody any longer."""
        if self.ending:
            return
        self.draining = self.ending = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def until_the_end(self) -> AsyncIterator[None]:
        """While a request waits for others.

        Raises:
            Draining: the gateway ends first.
        """
        wait = asyncio.timeout(0 if self.ending else None)
        try:
            async with wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError as e:
            if wait.expired():
                raise Draining(ENDS) from e
            raise

    async def stop(self) -> None:
        """End a drain that is under way."""
        if self._drain is not None:
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)

    async def _drained(self, current: Current, streams: Streams, keeper: Keeper) -> bool:
        begun_s = time.monotonic()
        while (left := self.requests + streams.bound) or streams.movable:
            took_s = time.monotonic() - begun_s
            others = await _others(keeper)
            if not left and not others:
                break
            if took_s > current.now.drain_timeout_s:
                logger.warning("drained for %.1f s: %d are cut off", took_s, left)
                return False
            if others:
                await asyncio.gather(*(stream.release() for stream in streams.movable))
                if took_s > LEAVE_S and not (streams.bound or streams.movable):
                    self.close_door()  # or, with enough of them, somebody always asks
            await asyncio.sleep(LOOK_S)
        logger.info("drained in %.1f s", time.monotonic() - begun_s)
        return True


async def _others(keeper: Keeper) -> bool:
    """Whether another replica is there to go on with streams."""
    try:
        return bool(await keeper.others())
    except IndexAway:
        return False


def counting(lifecycle: Lifecycle) -> Middleware:
    """Middleware that counts the requests under way, and refuses new streams while drained."""

    @web.middleware
    async def counted(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in WATCHING:
            return await handler(request)
        with lifecycle.request():
            if lifecycle.ending:
                raise Draining(ENDS)
            if lifecycle.draining and (request.method, request.path) in NEW:
                raise Draining("this gateway takes no new streams: it is about to end")
            return await handler(request)

    return counted
