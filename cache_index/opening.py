"""The index of an address."""

from __future__ import annotations

from cache_index.memory import MemoryIndex
from cache_index.redis import RedisIndex


def open_index(url: str | None, *, timeout_s: float) -> MemoryIndex | RedisIndex:
    """The index in a Redis, or one in this process. `close` it at the end.

    Args:
        url: see `RedisIndex`; None for one in this process, which no other gateway shares.
        timeout_s: longest wait for an answer.
    """
    if url is None:
        return MemoryIndex()
    return RedisIndex(url, timeout_s=timeout_s, connect_timeout_s=timeout_s)
