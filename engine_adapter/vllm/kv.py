"""KV blocks of vLLM requests: counted, handed from one request to its successor, cut back.

The only file that touches vLLM's block tables. Checked against vLLM 0.32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request

FreeBlocks = Callable[[list["KVCacheBlock"]], None]


class BlockTables:
    """The block tables of all requests, over every KV cache group of the model.

    Blocks change owner only whole and only forwards: a full block is hashed, may be shared
    and is never written again, so a cut always ends on a block border.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._pool = manager.block_pool
        self._groups: Sequence[SingleTypeKVCacheManager] = manager.coordinator.single_type_managers
        self._only = self._groups[0] if len(self._groups) == 1 else None  # asked very often
        self.can_inherit = all(type(g) is FullAttentionManager for g in self._groups)
        """Sliding-window, state-space and other layouts keep more than a list of blocks per
        request; there a successor finds its prefix through the prefix cache instead."""
        self.plain = self.can_inherit and self._only is not None
        """All KV of a token is in one block."""
        self.block_size: int = max(g.block_size for g in self._groups)
        """Tokens; a multiple of every group's block size."""
        self.smallest_block: int = min(g.block_size for g in self._groups)
        """Tokens."""

    def needed(self, tokens: int) -> int:
        """Blocks that this many tokens occupy."""
        if self._only is not None:
            return -(-tokens // self.block_size)
        return sum(-(-tokens // g.block_size) for g in self._groups)

    def held(self, request_id: str) -> int:
        """Blocks a request holds, shared ones included."""
        if self._only is not None:
            return len(self._only.req_to_blocks.get(request_id, ()))
        return sum(len(g.req_to_blocks.get(request_id, ())) for g in self._groups)

    def hashed_tokens(self, request_id: str) -> int:
        """Tokens in a request's first blocks that the prefix cache may give to others."""
        groups = self._groups if self._only is None else (self._only,)
        hashed: list[int] = [g.num_cached_block.get(request_id, 0) * g.block_size for g in groups]
        return max(hashed)

    def exclusive(self, request_id: str) -> int:
        """Blocks that only this request holds."""
        return sum(
            block.ref_cnt == 1 and not block.is_null
            for g in self._groups
            for block in g.req_to_blocks.get(request_id, ())
        )

    def cached(self) -> bytes:
        """Names of all blocks that the prefix cache finds, of an only group: see `Blocks`."""
        found = self._pool.cached_block_hash_to_block._cache.items()  # the key ends in the group
        copies = ((key, len(b) if isinstance(b, dict) else 1) for key, b in found)
        return b"".join(key[-12:-4] * count for key, count in copies)

    def hand_over(self, old_id: str, new_id: str) -> None:
        """Make a request's blocks those of its successor."""
        for g in self._groups:
            if (blocks := g.req_to_blocks.pop(old_id, None)) is not None:
                g.req_to_blocks[new_id] = blocks
            if (cached := g.num_cached_block.pop(old_id, None)) is not None:
                g.num_cached_block[new_id] = cached

    def take_cached(self, request: Request, room_blocks: int, free: FreeBlocks) -> int:
        """Let a request share the blocks that the prefix cache has behind its own whole ones.
        What it has begun of the first of them is given back. For an only group.

        Args:
            room_blocks: how many free blocks may be taken for it.

        Returns:
            Its computed tokens, 0 if nothing was found.
        """
        assert self._only is not None
        whole = request.num_computed_tokens // self.block_size
        found: list[KVCacheBlock] = []
        for block_hash in request.block_hashes[whole : (request.num_tokens - 1) // self.block_size]:
            cached = self._pool.get_cached_block(block_hash, [self._only.kv_cache_group_id])
            room_blocks -= cached is not None and cached[0].ref_cnt == 0
            if cached is None or room_blocks < 0:
                break
            found += cached
        if not found:
            return 0
        blocks = self._only.req_to_blocks[request.request_id]
        begun = blocks[whole:]
        self._pool.touch(found)
        blocks[whole:] = found
        self._only.num_cached_block[request.request_id] = len(blocks)
        free(begun)
        return len(blocks) * self.block_size

    def cut(self, request_id: str, keep_tokens: int, free: FreeBlocks) -> None:
        """Give back a request's blocks behind `keep_tokens`, a multiple of `block_size`.

        Freed blocks keep their hash: until they are taken for something else, the prefix
        cache still finds them.
        """
        for g in self._groups:
            keep_blocks = keep_tokens // g.block_size
            blocks = g.req_to_blocks.get(request_id)
            if blocks is None or len(blocks) <= keep_blocks:
                continue
            tail = blocks[keep_blocks:]
            del blocks[keep_blocks:]
            g.num_cached_block[request_id] = min(g.num_cached_block.get(request_id, 0), keep_blocks)
            if not blocks:
                g.req_to_blocks.pop(request_id)
                g.num_cached_block.pop(request_id)
            free(tail)

    def check(self, request_ids: Iterable[str], unaccounted: int = 0) -> None:
        """Compare every block's reference count with the requests that hold it.

        Args:
            request_ids: all requests that may hold blocks.
            unaccounted: blocks that wait to be freed and belong to nobody.

        Raises:
            RuntimeError: the accounts do not balance.
        """
        known = set(request_ids)
        holders: Counter[int] = Counter()
        for g in self._groups:
            if strangers := g.req_to_blocks.keys() - known:
                raise RuntimeError(f"blocks held by unknown requests: {sorted(strangers)}")
            for blocks in g.req_to_blocks.values():
                holders.update(b.block_id for b in blocks if not b.is_null)
        wrong = [
            (b.block_id, b.ref_cnt, holders[b.block_id])
            for b in self._pool.blocks
            if not b.is_null and b.ref_cnt != holders[b.block_id]
        ]
        if len(wrong) > unaccounted:
            raise RuntimeError(f"blocks with (id, ref_cnt, holders) that differ: {wrong[:8]}")
        free = self._pool.get_num_free_blocks()
        expected = len(self._pool.blocks) - 1 - len(holders) - unaccounted
        if free != expected:
            raise RuntimeError(f"{free} blocks are free, {expected} should be")
