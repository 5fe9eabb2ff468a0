"""What only many clients of a real Redis show: races, round trips, and Redis failing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_index.index import Change, IndexUnavailable, OutOfOrder, Splice, Stale, StreamRecord
from cache_index.redis import RedisIndex, blocks_key, engine_keys
from deploy.local import Server, redis_server
from tests.conftest import until

pytestmark = pytest.mark.slow

TIMEOUT_S = 0.3  # of a Redis that hangs
RECORD = StreamRecord(epoch=0, version=0, holder="g1", engine="", state="open", about=b"a")


@asynccontextmanager
async def opened(
    url: str, *, connections: int = 16, timeout_s: float = 10.0
) -> AsyncIterator[RedisIndex]:
    index = RedisIndex(
        url, timeout_s=timeout_s, connect_timeout_s=timeout_s, connections=connections
    )
    try:
        yield index
    finally:
        await index.close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A Redis that a test may do anything to."""
    with redis_server() as server:
        yield server.start().wait_ready(10)


@pytest_asyncio.fixture
async def index(server: Server) -> AsyncIterator[RedisIndex]:
    async with opened(server.url) as index:
        yield index


async def append(index: RedisIndex, stream: str, what: bytes) -> int:
    """Add to a stream's tail, however many others do; the version after it."""
    while True:
        record = await index.get(stream)
        assert record is not None
        try:
            change = Change(tail=Splice(add=what))
            await index.change(stream, record.epoch, record.version, change, 60)
        except Stale:
            continue
        return record.version + 1


async def test_of_many_writers_none_loses_a_write(redis_url: str) -> None:
    stream = uuid.uuid4().hex
    writes = [bytes([n]) for n in range(100)]
    async with opened(redis_url) as one, opened(redis_url) as other:
        await one.put(stream, RECORD, 60)
        both = [one, other] * 50
        versions = await asyncio.gather(*map(append, both, [stream] * 100, writes))
        record = await one.get(stream)
    assert record is not None
    assert record.version == 100
    in_order = [write for _, write in sorted(zip(versions, writes, strict=True))]
    assert record.tail == b"".join(in_order)


async def test_of_many_replicas_one_takes_a_stream_over(redis_url: str) -> None:
    stream = uuid.uuid4().hex
    async with opened(redis_url) as index:
        await index.put(stream, RECORD, 60)
        claims = [index.claim(stream, 0, f"g{n}", 60) for n in range(20)]
        outcomes = await asyncio.gather(*claims, return_exceptions=True)
        (record,) = [o for o in outcomes if isinstance(o, StreamRecord)]
        losers = [o for o in outcomes if isinstance(o, Stale)]
        assert len(losers) == 19
        assert {(o.epoch, o.version, o.holder) for o in losers} == {(1, 1, record.holder)}
        with pytest.raises(Stale):  # the one before, who does not know it yet
            await index.change(stream, 0, 0, Change(), 60)


async def test_every_operation_is_one_round_trip(server: Server, index: RedisIndex) -> None:
    names = os.urandom(8 * 1000)
    operations = [
        lambda: index.put("s", RECORD, 60),
        lambda: index.get("s"),
        lambda: index.change("s", 0, 0, Change(about=b"b", names=Splice(add=names)), 60),
        lambda: index.claim("s", 0, "g2", 60),
        lambda: index.delete("s", 1),
        lambda: index.beat("g", 60),
        index.replicas,
        lambda: index.rebuild("f", "e0", "i", 0, names, 60),
        lambda: index.apply("f", "e0", "i", 0, 5, os.urandom(8 * 1000), names[:800], 60),
        lambda: index.longest("f", names, [f"e{n}" for n in range(64)]),
        lambda: index.drop("f", "e0"),
    ]
    for operation in operations:  # the scripts, and a connection
        await operation()
    async with opened(server.url) as observer, observer._client.monitor() as monitor:
        for operation in operations:
            await operation()
        await index.beat("last", 60)
        seen = []
        async for command in monitor.listen():
            if "last" in command["command"]:
                break
            if command["client_type"] != "lua":
                seen.append(command["command"].split()[0])
    assert len(seen) == len(operations), seen


async def test_of_many_blocks_none_is_lost_between_slices(redis_url: str) -> None:
    family = uuid.uuid4().hex
    names = [os.urandom(8) for _ in range(3000)]
    async with opened(redis_url) as index:
        await index.rebuild(family, "e", "i", 0, b"".join(names[:2999]), 60)
        await index.apply(
            family, "e", "i", 0, 1, b"".join(names[2999:]), b"".join(names[1700:2300]), 60
        )
        held = await index._client.smismember(blocks_key(family, "e"), names)
        assert held == [1] * 1700 + [0] * 600 + [1] * 700
        await index.drop(family, "e")


@given(
    wanted=st.integers(0, 1000),
    held=st.lists(st.integers(0, 1000) | st.integers(0, 24), min_size=1, max_size=8),
)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
async def test_the_longest_prefix_of_prompts_of_all_lengths(
    redis_url: str, wanted: int, held: list[int]
) -> None:
    family = uuid.uuid4().hex
    names = b"".join(n.to_bytes(8, "big") for n in range(1000))
    expected = {f"e{n}": min(count, wanted) for n, count in enumerate(held)}
    async with opened(redis_url) as index:
        for engine, count in zip(expected, held, strict=True):
            await index.rebuild(family, engine, "i", 0, names[: 8 * count], 60)
        found = await index.longest(family, names[: 8 * wanted], list(expected))
        for engine in expected:
            await index.drop(family, engine)
    assert found == expected


async def test_a_batch_renews_the_lease_of_all_that_is_kept_of_an_engine(index: RedisIndex) -> None:
    await index.rebuild("f", "e", "i", 0, bytes(8), 10)
    await index.apply("f", "e", "i", 0, 0, b"", b"", 60)
    leases_ms = [await index._client.pttl(key) for key in engine_keys("f", "e")]
    assert all(50_000 < lease_ms <= 60_000 for lease_ms in leases_ms)


async def test_blocks_that_redis_evicted_are_asked_for_anew(index: RedisIndex) -> None:
    await index.rebuild("f", "e", "i", 0, bytes(8), 60)
    await index._client.delete(blocks_key("f", "e"))
    with pytest.raises(OutOfOrder) as refused:
        await index.apply("f", "e", "i", 0, 1, b"", b"", 60)
    assert refused.value.expected is None


async def test_a_redis_that_came_back_empty_serves_again(server: Server, index: RedisIndex) -> None:
    await index.put("s", RECORD, 60)
    server.kill()
    with pytest.raises(IndexUnavailable):
        await index.get("s")
    server.start().wait_ready(10)
    assert await index.get("s") is None
    with pytest.raises(Stale) as stale:
        await index.change("s", 0, 0, Change(), 60)
    assert (stale.value.epoch, stale.value.version, stale.value.holder) == (-1, -1, "")
    await index.put("s", RECORD, 60)
    assert await index.get("s") == RECORD


async def test_a_redis_that_hangs_costs_every_caller_its_timeout_and_no_more(
    server: Server, index: RedisIndex
) -> None:
    for stream in ("a", "b"):
        await index.put(stream, RECORD, 60)
    async with opened(server.url, connections=2, timeout_s=TIMEOUT_S) as hasty:

        async def answers() -> bool:
            try:
                record = await hasty.get("b")
            except IndexUnavailable:
                return False
            assert record == RECORD
            return True

        await until(answers, within_s=10)
        os.kill(server.pid, signal.SIGSTOP)
        begun_s = time.monotonic()
        calls = [hasty.get("a") for _ in range(100)]  # 15 s, each pair after the one before
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        took_s = time.monotonic() - begun_s
        os.kill(server.pid, signal.SIGCONT)
        assert {type(outcome) for outcome in outcomes} == {IndexUnavailable}
        assert took_s < 2 * TIMEOUT_S + 5
        await until(answers, within_s=10)


async def test_the_answer_to_a_cancelled_call_goes_to_nobody(server: Server) -> None:
    async with opened(server.url, connections=1) as index:
        for stream in ("a", "b"):
            record = StreamRecord(epoch=0, version=0, holder=stream, engine="", state="open")
            await index.put(stream, record, 60)
        for _ in range(3):
            os.kill(server.pid, signal.SIGSTOP)
            call = asyncio.create_task(index.get("a"))
            await asyncio.wait([call], timeout=0.05)
            call.cancel()
            await asyncio.wait([call])
            assert call.cancelled()
            os.kill(server.pid, signal.SIGCONT)
            record = await index.get("b")
            assert record is not None
            assert record.holder == "b"


async def test_a_crowd_of_calls_shares_few_connections(server: Server) -> None:
    async with opened(server.url, connections=4) as index:
        await asyncio.gather(*(index.replicas() for _ in range(100)))
        assert 1 < len(await index._client.client_list()) <= 4


async def test_a_redis_without_memory_is_as_good_as_none(index: RedisIndex) -> None:
    await index._client.config_set("maxmemory", "1")
    with pytest.raises(IndexUnavailable, match="memory"):
        await index.put("s", RECORD, 60)


async def test_nobody_listens() -> None:
    with redis_server() as server:  # not started
        async with opened(server.url) as index:
            with pytest.raises(IndexUnavailable):
                await index.replicas()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1",
        "redis+sentinel://127.0.0.1:26379",
        "redis+sentinel:///service",
        "redis+cluster://",
        "redis+cluster://a:1,:2",
    ],
)
def test_a_url_of_nothing_known_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        RedisIndex(url)
