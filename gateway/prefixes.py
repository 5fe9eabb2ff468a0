"""What engines hold of a prompt: by the index, and by what was sent to them a moment ago."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cache_index.event_stream import Source
from cache_index.index import NAME_BYTES, BlockIndex, IndexUnavailable
from cache_index.kv_events import Follower
from cache_index.mirror import Snapshot
from cache_index.names import Hashing, packed
from engine_adapter.messages import KvEvents
from gateway.engines import AnyEngine, Engine
from gateway.guard import Guard
from gateway.tasks import begin

logger = logging.getLogger(__name__)

LEASE_S = 60.0
"""An index that hears nothing of an engine for so long forgets what it held."""
UNDER_WAY_S = 10.0
"""An engine is taken to hold what was sent to it for so long; then its own word counts."""
MAX_UNDER_WAY = 65_536
"""Blocks, per engine."""


@dataclass(frozen=True, slots=True)
class _Following:
    follower: Follower
    events: KvEvents
    family: str


class Prefixes:
    """Asks the index, and keeps it true to the engines that publish what they hold."""

    def __init__(self, index: BlockIndex, guard: Guard) -> None:
        self._index = index
        self._guard = guard
        self._following: dict[str, _Following] = {}
        self._under_way: dict[str, dict[bytes, float]] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    async def held(
        self, engines: Sequence[Engine], tokens: Sequence[int], salt: str | None = None
    ) -> Mapping[str, int]:
        """How many tokens at the front of a prompt each engine has the KV of, or soon will have,
        by its URL. Engines of which nothing can be known are left out.

        Args:
            salt: of the prompt's tenant; what others hold is of no use to it.
        """
        held: dict[str, int] = {}
        for hashing in {e.hashing for e in engines if e.hashing is not None}:
            urls = [e.url for e in engines if e.hashing == hashing]
            names = packed(hashing.chain(tokens, salt=salt))
            blocks = await self._blocks(hashing, names, urls)
            for url in urls:
                known = self._with_under_way(url, names, blocks.get(url, 0))
                held[url] = known * hashing.block_size
        return held

    async def _blocks(
        self, hashing: Hashing, names: bytes, urls: Sequence[str]
    ) -> Mapping[str, int]:
        try:
            return await self._guard.call(lambda: self._index.longest(hashing.family, names, urls))
        except IndexUnavailable:
            return {}

    def sent(self, engine: Engine, tokens: Sequence[int], salt: str | None = None) -> None:
        """A prompt that begins with these tokens is on its way to an engine: others with the same
        documents may be close behind it, before any KV event can tell."""
        if engine.hashing is None:
            return
        names = packed(engine.hashing.chain(tokens, salt=salt))
        recent = self._under_way.setdefault(engine.url, {})
        until_s = time.monotonic() + UNDER_WAY_S
        for name in _split(names):
            recent.pop(name, None)
            recent[name] = until_s
        while len(recent) > MAX_UNDER_WAY:
            del recent[next(iter(recent))]

    def _with_under_way(self, url: str, names: bytes, held: int) -> int:
        recent, now_s = self._under_way.get(url, {}), time.monotonic()
        for name in _split(names[held * NAME_BYTES :]):
            if recent.get(name, 0.0) < now_s:
                break
            held += 1
        return held

    # Keeping the index true.

    def follow(self, engine: AnyEngine) -> None:
        """Follow an engine from now on as it says it can be followed, if it does."""
        if engine.info is None or not isinstance(engine, Engine):
            return
        events, before = engine.info.kv_events, self._following.get(engine.url)
        if before is not None and before.events != events:
            self.unfollow(engine)
        if events is None or engine.hashing is None or engine.url in self._following:
            return
        source = Source.at(engine.url, events.endpoint, events.replay_endpoint, events.topic)

        async def snapshot() -> Snapshot:
            blocks = await engine.client.blocks()
            return Snapshot(blocks.instance_id, blocks.next_batch, blocks.names)

        follower = Follower(
            self._index,
            source,
            snapshot,
            family=engine.hashing.family,
            engine=engine.url,
            lease_s=LEASE_S,
        )
        self._following[engine.url] = _Following(follower, events, engine.hashing.family)
        follower.start()
        logger.info("following what %s holds", engine.url)

    def unfollow(self, engine: AnyEngine) -> None:
        """What an engine holds is of no use any more."""
        self._under_way.pop(engine.url, None)
        if (following := self._following.pop(engine.url, None)) is not None:
            stopping = begin(
                self._stop_following(engine.url, following), f"following {engine.url} no more"
            )
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopping.discard)

    async def _stop_following(self, url: str, following: _Following) -> None:
        """The engine was started anew, in another way: what it held under those names is gone."""
        await following.follower.stop()
        if following.family != self._family_of(url):
            with suppress(IndexUnavailable):
                await self._guard.call(lambda: self._index.drop(following.family, url))

    def _family_of(self, url: str) -> str | None:
        return self._following[url].family if url in self._following else None

    async def stop(self) -> None:
        """Follow none any more."""
        followers = [following.follower for following in self._following.values()]
        self._following.clear()
        await asyncio.gather(*self._stopping, *(follower.stop() for follower in followers))


def _split(names: bytes) -> list[bytes]:
    return [names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES)]
