"""Copies of KV between a GPU and pinned host memory, as blocks anywhere in each layer's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loadtest.gpu_model import BLOCK_TOKENS
from loadtest.gpu_raw import Direction, Moving

Run = Callable[[], None]

SINGLE_COPIES_TOKENS = 8192
"""A call for each block takes the host so long that more tokens tell nothing new."""


class Copies:
    """Ways to move the KV of tokens, all over the same host memory."""

    def __init__(self, cache: Tensor, tokens: int, seed: int) -> None:
        """
        Args:
            cache: (layers, blocks, ...).
            tokens: the most that are moved at once.
        """
        layers, blocks = cache.shape[:2]
        most = min(tokens // BLOCK_TOKENS, blocks)
        cuda = cache.is_cuda
        self._cache = cache
        self._host = torch.empty(
            (layers, most, *cache.shape[2:]), dtype=cache.dtype, pin_memory=cuda
        ).fill_(1)
        self._gathered = torch.empty_like(self._host, device=cache.device)
        generator = torch.Generator().manual_seed(seed)
        self._ids = torch.randperm(blocks, generator=generator)[:most]

    def ways(self, tokens: int) -> dict[tuple[Moving, Direction], Run]:
        """Every way to move so many tokens."""
        found: dict[tuple[Moving, Direction], Run] = {}
        for out in (True, False):
            direction: Direction = "out" if out else "in"
            found["contiguous", direction] = self.contiguous(tokens, out)
            found["gathered", direction] = self.gathered(tokens, out)
            if (batched := self.batched(tokens, out)) is not None:
                found["batched", direction] = batched
            if tokens <= SINGLE_COPIES_TOKENS:
                found["blocks", direction] = self.blocks(tokens, out)
        return found

    def contiguous(self, tokens: int, out: bool) -> Run:
        """One copy of as many bytes."""
        host, device = self._part(self._host, tokens), self._part(self._gathered, tokens)
        target, source = (host, device) if out else (device, host)

        def run() -> None:
            target.copy_(source, non_blocking=True)

        return run

    def gathered(self, tokens: int, out: bool) -> Run:
        """All blocks gathered by one kernel and one copy; back, a copy and a kernel."""
        cache, ids = self._cache, self._ids[: tokens // BLOCK_TOKENS].to(self._cache.device)
        host = self._part(self._host, tokens)
        device = self._part(self._gathered, tokens)
        shaped = device.view(cache.shape[0], len(ids), *cache.shape[2:])

        def to_host() -> None:
            torch.index_select(cache, 1, ids, out=shaped)
            host.copy_(device, non_blocking=True)

        def to_device() -> None:
            device.copy_(host, non_blocking=True)
            cache.index_copy_(1, ids, shaped)

        return to_host if out else to_device

    def batched(self, tokens: int, out: bool) -> Run | None:
        """vLLM's one call for a list of copies; None where vLLM for GPUs is not installed."""
        if not self._cache.is_cuda:
            return None
        try:
            import vllm._C_stable_libtorch  # noqa: F401
        except ImportError:
            return None
        ids = self._ids[: tokens // BLOCK_TOKENS]
        device = _addresses(self._cache, ids)
        host = _addresses(self._host, torch.arange(len(ids)))
        sizes = torch.full_like(host, self._cache[0, 0].nbytes)
        source, target = (device, host) if out else (host, device)

        def run() -> None:
            torch.ops._C_cache_ops.swap_blocks_batch(source, target, sizes, not out)

        return run

    def blocks(self, tokens: int, out: bool) -> Run:
        """A call for each block of each layer."""
        ids = self._ids[: tokens // BLOCK_TOKENS].tolist()
        layers = zip(self._cache, self._host, strict=True)
        pairs = [(cache[j], host[i]) for cache, host in layers for i, j in enumerate(ids)]

        def run() -> None:
            for device, host in pairs:
                target, source = (host, device) if out else (device, host)
                target.copy_(source, non_blocking=True)

        return run

    def _part(self, whole: Tensor, tokens: int) -> Tensor:
        token_size = self._cache[:, 0, 0].numel()
        return whole.view(-1)[: tokens * token_size]


def _addresses(blocks: Tensor, ids: Tensor) -> Tensor:
    """Of these blocks in each layer."""
    layers = torch.arange(len(blocks))[:, None] * blocks.stride(0)
    places = (layers + ids * blocks.stride(1)) * blocks.element_size()
    return (blocks.data_ptr() + places).flatten()
