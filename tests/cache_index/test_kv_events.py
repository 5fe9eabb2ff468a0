"""The index follows an engine's KV events: lost, replayed, cleared, restarted, far behind."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from cache_index import kv_events
from cache_index.event_stream import Source
from cache_index.kv_events import Follower
from cache_index.mirror import Snapshot
from tests.cache_index.publisher import (
    ENGINE,
    FAMILY,
    PublishedEngine,
    TinyIndex,
    cleared,
    removed,
    stored,
)
from tests.conftest import until

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "IDLE_S", 0.15)
    monkeypatch.setattr(kv_events, "PAUSE_S", 0.001)


@pytest.fixture
def engine() -> Iterator[PublishedEngine]:
    engine = PublishedEngine()
    yield engine
    engine.stop()


@pytest.fixture
def short_engine() -> Iterator[PublishedEngine]:
    """Remembers three batches."""
    engine = PublishedEngine(buffer_batches=3)
    yield engine
    engine.stop()


@asynccontextmanager
async def following(
    engine: PublishedEngine, index: TinyIndex, lease_s: float = 30
) -> AsyncIterator[Follower]:
    follower = Follower(
        index, engine.source, engine.snapshot, family=FAMILY, engine=ENGINE, lease_s=lease_s
    )
    follower.start()
    try:
        yield follower
    finally:
        begun_s = time.monotonic()
        await follower.stop()
        assert time.monotonic() - begun_s < 5  # 10 is a wait for news


async def agreed(engine: PublishedEngine, index: TinyIndex, within_s: float = 30) -> None:
    """Wait until the index has all that the engine has told."""

    async def agree() -> bool:
        same = index.names == engine.held
        return same and (index.instance, index.expected) == (engine.instance, engine.batches)

    await until(agree, within_s=within_s)


async def test_the_index_follows_what_is_stored_removed_and_cleared(
    engine: PublishedEngine,
) -> None:
    engine.publish(stored(1, 2, 3), removed(2))  # before anybody listens
    index = TinyIndex()
    async with following(engine, index):
        await agreed(engine, index)
        assert index.names == {1, 3}
        engine.publish(stored(4, 2**64 - 1))
        engine.publish(removed(1), stored(5))
        await agreed(engine, index)
        engine.publish(cleared(), stored(6))
        await agreed(engine, index)
        assert index.names == {6}
        assert engine.snapshots == 1


async def test_a_name_is_held_until_its_last_copy_is_gone(engine: PublishedEngine) -> None:
    engine.publish(stored(1), stored(1, 2))
    index = TinyIndex()
    async with following(engine, index):
        await agreed(engine, index)
        engine.publish(removed(1))
        engine.publish(stored(2))
        engine.publish(removed(2))
        await agreed(engine, index)
        assert index.names == {1, 2}
        engine.publish(removed(1), removed(2))
        await agreed(engine, index)
        assert index.names == set()


async def test_only_whole_kv_in_the_devices_memory_counts_and_hashes_may_be_whole(
    engine: PublishedEngine,
) -> None:
    index = TinyIndex()
    async with following(engine, index):
        engine.publish(stored(1))
        engine.send(stored(2, medium="CPU"), stored(3, group_idx=1), removed(1, medium="CPU"))
        engine.send(stored(4, kv_cache_spec_kind="sliding_window"), removed(1, group_idx=1))
        await agreed(engine, index)
        engine.send(stored(b"\xff" * 24 + (7).to_bytes(8, "big")), removed(1))
        engine.copies = Counter([7])
        await agreed(engine, index)


async def test_lost_batches_are_asked_for_again(engine: PublishedEngine) -> None:
    index = TinyIndex()
    async with following(engine, index):
        engine.publish(stored(1))
        await agreed(engine, index)
        for name in range(10, 30):
            engine.publish(stored(name), lose=True)
        engine.publish(removed(1))
        await agreed(engine, index)
        engine.publish(removed(10), lose=True)  # and nothing behind it
        await agreed(engine, index)
        assert engine.snapshots == 1


async def test_more_lost_batches_than_an_engine_remembers_need_a_snapshot(
    short_engine: PublishedEngine,
) -> None:
    engine, index = short_engine, TinyIndex()
    async with following(engine, index):
        engine.publish(stored(1, 2))
        await agreed(engine, index)
        engine.publish(removed(2), lose=True)
        for name in range(10, 20):
            engine.publish(stored(name), lose=True)
        engine.publish(stored(3))
        await agreed(engine, index)


async def test_an_engine_that_was_started_anew_is_followed_from_its_beginning(
    engine: PublishedEngine,
) -> None:
    index = TinyIndex()
    async with following(engine, index):
        for name in range(5):
            engine.publish(stored(name))
        await agreed(engine, index)
        engine.restart()
        for name in range(10, 20):  # beyond the number that was expected
            engine.publish(stored(name))
        await agreed(engine, index)
        engine.restart()
        await agreed(engine, index)
        assert index.names == set()


async def test_an_engine_may_be_away_at_first(engine: PublishedEngine) -> None:
    engine.stop()
    index = TinyIndex()
    async with following(engine, index):
        engine.start()
        engine.publish(stored(1))
        await agreed(engine, index)


@pytest.mark.parametrize("forgets", [False, True])
async def test_an_index_that_was_away_is_told_from_memory(
    engine: PublishedEngine, forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_index.mirror.MOST_UNTOLD", 50)
    index = TinyIndex()
    async with following(engine, index):
        engine.publish(stored(1, 2))
        await agreed(engine, index)
        index.away = True
        for name in range(100):
            engine.publish(stored(name + 1), removed(name))
        calls = index.calls

        async def tried() -> bool:
            return index.calls > calls + 1

        await until(tried, within_s=30)
        if forgets:
            index.forget()
        index.away = False
        await agreed(engine, index)
        assert engine.snapshots == 1


async def test_an_index_that_lost_everything_is_told_anew(engine: PublishedEngine) -> None:
    index = TinyIndex()
    async with following(engine, index, lease_s=0.5):
        engine.publish(stored(1, 2))
        await agreed(engine, index)
        index.forget()
        await agreed(engine, index)
        assert engine.snapshots == 1


async def test_a_lease_is_renewed_while_an_engine_is_silent_and_not_when_it_is_gone(
    engine: PublishedEngine,
) -> None:
    index = TinyIndex()
    async with following(engine, index, lease_s=0.3):
        engine.publish(stored(1))
        await agreed(engine, index)
        calls = index.calls

        async def renewed() -> bool:
            return index.calls >= calls + 3

        assert await until(renewed, within_s=10) > 0.15
        engine.stop()
        calls = index.calls
        with pytest.raises(AssertionError, match="not true in time"):
            await until(renewed, within_s=0.7)
        engine.start()


async def test_followers_of_one_engine_do_not_disturb_each_other(engine: PublishedEngine) -> None:
    index = TinyIndex()
    async with following(engine, index):
        engine.publish(stored(1))
        await agreed(engine, index)
        async with following(engine, index):
            for name in range(200):
                engine.publish(stored(name + 10), removed(name + 9), lose=name % 7 == 0)
            engine.publish(stored(0))
            await agreed(engine, index)
            engine.restart()
            for name in range(50):
                engine.publish(stored(name))
            await agreed(engine, index)
        engine.publish(removed(1))
        await agreed(engine, index)


async def test_an_engine_may_end_in_the_middle_of_what_it_is_asked_for(
    engine: PublishedEngine,
) -> None:
    index = TinyIndex()
    async with following(engine, index):
        for round_ in range(5):
            for name in range(200):
                engine.publish(stored(name), lose=name % 7 == 0)
            await until(engine.all_sent, within_s=30)
            for _ in range(4 * round_):
                await asyncio.sleep(0)
            engine.restart()
            engine.publish(stored(round_))
            await agreed(engine, index)


async def test_without_snapshots_an_engine_is_followed_from_what_it_remembers(
    short_engine: PublishedEngine,
) -> None:
    engine, index = short_engine, TinyIndex()
    engine.can_say, engine.instance = False, ""
    for name in range(10):
        engine.publish(stored(name))
    await until(engine.all_sent, within_s=30)

    async def up_to_date() -> bool:
        return index.expected == engine.batches

    async with following(engine, index):
        await until(up_to_date, within_s=30)
        assert index.names == {7, 8, 9}, "what is older is not known"
        for name in range(20, 40):
            engine.publish(stored(name), lose=True)
        engine.publish(removed(39), stored(40))
        await until(up_to_date, within_s=30)
        assert {38, 40} <= index.names <= engine.held
        engine.restart()
        engine.instance = ""
        engine.publish(stored(1))
        await agreed(engine, index)


async def test_an_engine_without_replay_is_followed_by_snapshots() -> None:
    engine, index = PublishedEngine(replay=False), TinyIndex()
    try:
        async with following(engine, index):
            engine.publish(stored(1))
            await agreed(engine, index)
            engine.publish(stored(2), lose=True)
            engine.publish(stored(3))
            await agreed(engine, index)
    finally:
        engine.stop()


async def test_an_engine_is_followed_by_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    engine, index = PublishedEngine(endpoint="tcp://*:0"), TinyIndex()
    assert engine.source.endpoint.startswith("tcp://127.0.0.1:")
    try:
        async with following(engine, index):
            engine.publish(stored(1))
            await agreed(engine, index)
            engine.publish(stored(2), lose=True)
            engine.publish(stored(3))
            await agreed(engine, index)
            assert engine.snapshots == 1
    finally:
        engine.stop()


async def test_thousands_of_lost_batches_are_asked_for_again(engine: PublishedEngine) -> None:
    index = TinyIndex()
    async with following(engine, index):
        engine.publish(stored(1))
        await agreed(engine, index)
        for name in range(4000):
            engine.publish(stored(name), lose=True)
        engine.publish(removed(1))
        await agreed(engine, index)
        assert engine.snapshots == 1


async def test_stopping_waits_for_nobody(engine: PublishedEngine) -> None:
    asked = asyncio.Event()

    async def snapshot() -> Snapshot | None:
        asked.set()
        await asyncio.Event().wait()
        return None

    follower = Follower(
        TinyIndex(), engine.source, snapshot, family=FAMILY, engine=ENGINE, lease_s=30
    )
    follower.start()
    async with asyncio.timeout(30):
        await asked.wait()
    async with asyncio.timeout(10):  # a snapshot may take 30
        await follower.stop()


async def test_a_snapshot_that_fails_is_taken_later(engine: PublishedEngine) -> None:
    index, asked = TinyIndex(), 0

    async def snapshot() -> Snapshot | None:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise OSError("no answer")
        return await engine.snapshot()

    follower = Follower(index, engine.source, snapshot, family=FAMILY, engine=ENGINE, lease_s=30)
    follower.start()
    engine.publish(stored(1))
    await agreed(engine, index)
    await follower.stop()


def test_endpoints_are_reached_at_the_host_of_the_engines_url() -> None:
    here = Source.at("http://10.1.2.3:8000", "tcp://*:5557", "tcp://0.0.0.0:5558", "kv")
    assert here == Source("tcp://10.1.2.3:5557", "tcp://10.1.2.3:5558", "kv")
    six = Source.at("http://[fd00::1]:8000", "tcp://[::]:5557", None, "")
    assert six == Source("tcp://[fd00::1]:5557", None, "")
    ipc = Source.at("http://127.0.0.1:8000", "ipc://@events", "tcp://127.0.0.1:1", "")
    assert ipc == Source("ipc://@events", "tcp://127.0.0.1:1", "")


NAMES = st.integers(0, 8)
Act = Callable[[PublishedEngine, TinyIndex], None]


def publishes(names: list[int], lose: bool) -> Act:
    """Store those of the names that are even in number of copies, remove one of the others."""

    def act(engine: PublishedEngine, index: TinyIndex) -> None:
        events = []
        copies = engine.copies.copy()
        for name in names:
            add = copies[name] < 1 or (copies[name] < 2 and name % 2 == 0)
            copies[name] += 1 if add else -1
            events.append(stored(name) if add else removed(name))
        engine.publish(*events, lose=lose)

    return act


ACTS: st.SearchStrategy[Act] = st.one_of(
    st.builds(publishes, st.lists(NAMES, min_size=1, max_size=6), st.booleans()),
    st.builds(publishes, st.lists(NAMES, min_size=1, max_size=6), st.booleans()),
    st.builds(publishes, st.lists(NAMES, min_size=1, max_size=6), st.booleans()),
    st.just(lambda engine, index: engine.publish(cleared())),
    st.just(lambda engine, index: engine.restart()),
    st.just(lambda engine, index: index.forget()),
    st.just(lambda engine, index: setattr(index, "away", not index.away)),
)


async def ends_agreed(bursts: list[list[Act]]) -> None:
    """Bursts of whatever can happen; after each, two followers bring the index up to date."""
    engine, index = PublishedEngine(buffer_batches=4), TinyIndex()
    try:
        async with following(engine, index, lease_s=0.4), following(engine, index, lease_s=0.4):
            for burst in bursts:
                for act in burst:
                    act(engine, index)
                index.away = False
                await agreed(engine, index)
    finally:
        engine.stop()


histories = given(bursts=st.lists(st.lists(ACTS, max_size=8), min_size=1, max_size=4))
patient = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@settings(patient, max_examples=4)
@histories
async def test_the_index_ends_with_what_the_engine_holds(bursts: list[list[Act]]) -> None:
    await ends_agreed(bursts)


@pytest.mark.engine  # not for its needs, for its time
@settings(patient, max_examples=100)
@histories
async def test_a_hundred_histories(bursts: list[list[Act]]) -> None:
    await ends_agreed(bursts)
