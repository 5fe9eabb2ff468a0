"""Tasks of which nobody awaits the result: none of them ends without a word."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)


def begin(work: Coroutine[Any, Any, Any], what: str) -> asyncio.Task[Any]:
    """Do something beside everything else. An error that ends it is logged.

    Args:
        what: for the log.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(lambda ended: log_failure(ended, what))
    return task


def log_failure(task: asyncio.Task[Any], what: str) -> None:
    """Log the error that has ended a task, if one has."""
    if not task.cancelled() and (e := task.exception()) is not None:
        logger.error("%s failed: %r", what, e, exc_info=e)


async def again_and_again(
    step: Callable[[], Awaitable[None]], pause_s: Callable[[], float], what: str
) -> None:
    """Do something for as long as the gateway lives. An error costs one turn.

    Args:
        pause_s: how long to wait now until the next turn.
        what: for the log.
    """
    while True:
        try:
            await step()
        except Exception:
            logger.exception("%s failed", what)
        await asyncio.sleep(pause_s())
