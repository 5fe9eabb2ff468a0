"""The events and snapshots of the shipping scheduler's prefix cache tell the same."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import EventBatch, NullEventPublisher

from cache_index.event_stream import read
from cache_index.mirror import Mirror, Snapshot, unpacked
from engine_adapter.errors import BadOperation
from tests.engine_adapter.harness import SMALL_POOL_BLOCKS, Engine, _engine_config
from tests.engine_adapter.histories import History


class Told(NullEventPublisher):
    """A publisher whose subscriber has everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror(Snapshot("", 0))

    def publish(self, events: EventBatch) -> None:
        number = self.mirror.next_batch.to_bytes(8, "big")
        self.mirror.take(read(number, msgspec.msgpack.encode(events)))


def published(engine: Engine) -> Told:
    """What an engine publishes from now on."""
    told = engine.scheduler.prefix_cache._publisher._publisher = Told()
    return told


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    actions=st.integers(5, 80),
    blocks=st.sampled_from([SMALL_POOL_BLOCKS, 100]),
)
def test_events_since_any_snapshot_tell_what_the_cache_holds(
    model_dir: Path, seed: int, actions: int, blocks: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        patch.setattr(_engine_config(model_dir, 0, False), "kv_events_config", config)
        history = History(model_dir, seed, blocks)
    told = published(history.engine)
    cache = history.engine.scheduler.prefix_cache
    for _ in range(actions):
        history.act()
        if history.random.random() < 0.2:
            now = Snapshot("", **cache.blocks())
            assert now.next_batch == told.mirror.next_batch
            assert set(unpacked(now.names)) == set(unpacked(told.mirror.tell_all()[1]))
            if history.random.random() < 0.5:
                told.mirror = Mirror(now)
    history.end()
    assert set(unpacked(cache.blocks()["names"])) == set(unpacked(told.mirror.tell_all()[1]))


def test_without_a_prefix_cache_there_are_no_blocks_to_tell_of(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _engine_config(model_dir, 0, False)
    monkeypatch.setattr(config.cache_config, "enable_prefix_caching", False)
    engine = Engine(model_dir, 20)
    with pytest.raises(BadOperation):
        engine.scheduler.prefix_cache.blocks()
    assert engine.scheduler.prefix_cache.events() == {}


def test_the_backlog_is_what_prompts_and_requests_still_have_to_compute(model_dir: Path) -> None:
    engine = Engine(model_dir, 100, step_tokens=16)

    def waiting() -> int:
        return int(engine.scheduler.load()["waiting_tokens"])

    assert waiting() == 0
    engine.scheduler.open_prompt("p", [5] * 41, None, engine.hasher)
    assert waiting() == 40, "the last token of an open prompt is held back"
    engine.request("plain", [7] * 30, 3)
    assert waiting() == 70
    engine.step()
    assert waiting() == 54
    engine.drain()
    assert waiting() == 0
