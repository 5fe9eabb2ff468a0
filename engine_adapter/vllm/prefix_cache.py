"""What the prefix cache holds, and the numbered batches of events that tell of its changes.

vLLM publishes the events; here they are only counted. Checked against vLLM 0.32.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import EventBatch, EventPublisher, KVEventBatch
from vllm.v1.core import kv_cache_utils

from engine_adapter.errors import BadOperation
from engine_adapter.vllm.kv import BlockTables

if TYPE_CHECKING:
    from vllm.config.kv_events import KVEventsConfig
    from vllm.v1.core.sched.scheduler import Scheduler


class CountedPublisher(EventPublisher):  # type: ignore[misc]
    """vLLM's publisher of KV events, which numbers the batches it is given from 0 on."""

    def __init__(self, publisher: EventPublisher) -> None:
        super().__init__()
        self._publisher = publisher
        self.batches = 0

    def publish(self, events: EventBatch) -> None:
        """Queue a batch; the next one's number is `batches`."""
        self._publisher.publish(events)
        self.batches += 1

    def shutdown(self) -> None:
        """End its thread."""
        self._publisher.shutdown()

    def get_publisher_config(self) -> KVEventsConfig | None:
        """Where it publishes, as bound; None if nowhere."""
        return self._publisher.get_publisher_config()


class PrefixCache:
    """The prefix cache of a scheduler as others follow it from outside."""

    def __init__(self, scheduler: Scheduler, tables: BlockTables) -> None:
        self._scheduler = scheduler
        self._tables = tables
        self._publisher = CountedPublisher(scheduler.kv_event_publisher)
        scheduler.kv_event_publisher = self._publisher

    def events(self) -> dict[str, Any]:
        """The fields of a `KvEvents`; none where nothing is published or can be followed."""
        config = self._publisher.get_publisher_config()
        caching = self._scheduler.cache_config.enable_prefix_caching
        if config is None or not caching or not self._tables.plain:
            return {}
        return {
            "endpoint": config.endpoint,
            "replay_endpoint": config.replay_endpoint,
            "topic": config.topic,
            "hash_algorithm": self._scheduler.cache_config.prefix_caching_hash_algo,
            "hash_root": kv_cache_utils.NONE_HASH.hex(),
            "block_size": self._scheduler.hash_block_size,
        }

    def blocks(self) -> dict[str, Any]:
        """The fields of a `Blocks`, but for the instance.

        Events that wait for the end of the next step are published first, so that the names
        are exactly what the batches up to now have told.

        Raises:
            BadOperation: prefix caching is off, or blocks are of several kinds.
        """
        if not self._scheduler.cache_config.enable_prefix_caching or not self._tables.plain:
            raise BadOperation("there is no prefix cache of plain full attention")
        if events := self._scheduler.kv_cache_manager.take_events():
            self._publisher.publish(KVEventBatch(ts=time.time(), events=events))
        return {"next_batch": self._publisher.batches, "names": self._tables.cached()}
