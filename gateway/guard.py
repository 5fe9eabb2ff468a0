"""Calls to the index that never hold up a request for long.

After a call that failed or took too long the index counts as away: nobody waits for it again
until a heartbeat (`gateway.keeper`) has found it there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cache_index.index import IndexUnavailable
from gateway.telemetry import Metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Guard:
    """Stands between the gateway and its index."""

    def __init__(self, *, timeout_s: float, metrics: Metrics) -> None:
        """
        Args:
            timeout_s: longest wait for one call.
        """
        self.away = False
        self._timeout_s = timeout_s
        self._metrics = metrics

    async def call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, unless the index is away.

        Raises:
            IndexUnavailable: it is, or has just turned out to be.
        """
        if self.away:
            raise IndexUnavailable("it is away")
        return await self._timed(call)

    async def attempt(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, also if the index is away; afterwards it is away if the call failed.

        Raises:
            IndexUnavailable
        """
        result = await self._timed(call)
        self.away = False
        self._metrics.index_up.set(1)
        return result

    async def _timed(self, call: Callable[[], Awaitable[T]]) -> T:
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await call()
        except (IndexUnavailable, TimeoutError) as e:
            self._set_away(str(e) or f"no answer in {self._timeout_s:g} s")
            raise IndexUnavailable("it does not answer") from e
        finally:
            self._metrics.index_seconds.observe(time.monotonic() - begun_s)

    def _set_away(self, reason: str) -> None:
        if not self.away:
            logger.warning("the index is away: %s", reason)
        self.away = True
        self._metrics.index_up.set(0)
