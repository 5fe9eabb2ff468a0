"""What engines hold of a prompt, by the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cache_index.index import BlockIndex, IndexUnavailable
from cache_index.names import Hashing, packed
from gateway.guard import Guard
from gateway.placement import Engine


class Prefixes:
    """Asks the index, and follows the engines that publish what they hold."""

    def __init__(self, index: BlockIndex, guard: Guard) -> None:
        self._index = index
        self._guard = guard

    async def held(self, engines: Sequence[Engine], tokens: Sequence[int]) -> Mapping[str, int]:
        """How many tokens at the front of a prompt each engine has the KV of, by its URL. Engines
        of which nothing is known are left out."""
        held: dict[str, int] = {}
        for hashing in {e.hashing for e in engines if e.hashing is not None}:
            urls = [e.url for e in engines if e.hashing == hashing]
            blocks = await self._blocks(hashing, tokens, urls)
            held |= {url: n * hashing.block_size for url, n in blocks.items()}
        return held

    async def _blocks(
        self, hashing: Hashing, tokens: Sequence[int], urls: Sequence[str]
    ) -> Mapping[str, int]:
        names = packed(hashing.chain(tokens))
        try:
            return await self._guard.call(lambda: self._index.longest(hashing.family, names, urls))
        except IndexUnavailable:
            return {}

    def follow(self, engine: Engine) -> None:
        """Follow an engine from now on, if it can be followed."""

    async def stop(self) -> None:
        """Follow none any more."""
