"""What a query's deadline means for one step of a search."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from retrieval.source import Query

T = TypeVar("T")


class DeadlinePassed(Exception):
    """The query's time is over; the search ends with what it has."""


def left_s(query: Query) -> float | None:
    """Seconds to the deadline, negative behind it; None without one."""
    return None if query.deadline_s is None else query.deadline_s - time.monotonic()


async def in_time(query: Query, step: Awaitable[T]) -> T:
    """The result of a step, which is cancelled at the deadline.

    Raises:
        DeadlinePassed: there is no result by then.
    """
    limit = asyncio.timeout(left_s(query))
    try:
        async with limit:
            return await step
    except TimeoutError:
        if limit.expired():
            raise DeadlinePassed from None
        raise
