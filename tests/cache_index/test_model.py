"""Both implementations do what one simple model does, call by call, while time passes.

Time in Redis passes by shortening the leases of all keys, so that nothing waits: a key that has
outlived its lease is gone either way.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_index.index import OutOfOrder, Stale
from cache_index.memory import MemoryIndex
from cache_index.redis import RedisIndex
from tests.cache_index.model import METHODS, Model, next_call

RUN = uuid.uuid4().hex
COUNTER = itertools.count()

PASS = """
local endless = 0
for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
  local left_ms = redis.call('PTTL', key)
  if left_ms < 0 then endless = endless + 1 end
  redis.call('PEXPIRE', key, left_ms - ARGV[2] * 1000)
end
for _, replica in ipairs(redis.call('ZRANGE', 's2l:replicas', 0, -1)) do
  if string.find(replica, ARGV[3], 1, true) then
    redis.call('ZINCRBY', 's2l:replicas', -ARGV[2] * 1000, replica)
  end
end
return endless
"""


class InRedis:
    """A part of a Redis: an index whose streams, families and replicas have a prefix."""

    def __init__(self, index: RedisIndex) -> None:
        self.index = index
        self.prefix = f"{RUN}-{next(COUNTER)}-"

    async def do(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == "advance":
            pattern = f"*{self.prefix}*"
            endless = await self.index._client.eval(PASS, 0, pattern, args[0], self.prefix)
            assert endless == 0, "a key without a lease"
            return None
        if method == "replicas":
            mine = {r for r in await self.index.replicas() if r.startswith(self.prefix)}
            return {replica.removeprefix(self.prefix) for replica in mine}
        return await getattr(self.index, method)(self.prefix + args[0], *args[1:])


class InMemory:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.index = MemoryIndex(lambda: self.now_s)

    async def do(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == "advance":
            self.now_s += args[0]
            return None
        return await getattr(self.index, method)(*args)


class InModel:
    def __init__(self) -> None:
        self.model = Model()

    async def do(self, method: str, args: tuple[Any, ...]) -> Any:
        if method == "advance":
            self.model.now_s += args[0]
            return None
        return getattr(self.model, method)(*args)


async def outcome(
    side: InRedis | InMemory | InModel, method: str, args: tuple[Any, ...]
) -> tuple[str, Any]:
    try:
        return "returned", await side.do(method, args)
    except Stale as exc:
        return "stale", (exc.epoch, exc.version, exc.holder)
    except OutOfOrder as exc:
        return "out of order", exc.expected


@pytest_asyncio.fixture(scope="session")
async def index(redis_url: str) -> AsyncIterator[RedisIndex]:
    index = RedisIndex(redis_url, timeout_s=10, connect_timeout_s=10)
    yield index
    await index.close()


async def check(index: RedisIndex, data: st.DataObject) -> None:
    said, redis, memory = InModel(), InRedis(index), InMemory()
    methods = data.draw(st.sampled_from(METHODS), "methods")
    try:
        for _ in range(data.draw(st.integers(5, 25), "calls")):
            call = data.draw(next_call(said.model, methods), "call")
            expected = await outcome(said, *call)
            assert await outcome(redis, *call) == expected
            assert await outcome(memory, *call) == expected
    finally:
        await redis.do("advance", (1_000_000,))


QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=2000)


@QUICK
@given(data=st.data())
async def test_both_do_what_the_model_does(index: RedisIndex, data: st.DataObject) -> None:
    await check(index, data)


@pytest.mark.engine
@LONG
@given(data=st.data())
async def test_both_do_what_the_model_does_in_2000_sequences(
    index: RedisIndex, data: st.DataObject
) -> None:
    await check(index, data)
