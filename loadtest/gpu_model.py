"""A transformer with random weights, to time its steps: what an engine computes, without an engine.

The shape is that of Llama 3.1. Products with the weights by cuBLAS, attention by vLLM's own
FlashAttention kernel over its layout of a paged KV cache (PyTorch's where vLLM for GPUs is not
installed), the small operations between them compiled, steps of few tokens replayed as CUDA
graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from engine_adapter.simulated.hardware import LLAMA_3_1_8B, Model

BLOCK_TOKENS = 16
GRAPH_TOKENS = 512
"""Steps of up to so many tokens are replayed as graphs, as vLLM does by default."""
EPSILON = 1e-5
ROPE_BASE = 500_000.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What `Model` does not say of a transformer."""

    model: Model
    ffn: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def hidden(self) -> int:
        return self.model.heads * self.model.head_size


LLAMA_3_1_8B_SHAPE = Shape(LLAMA_3_1_8B, ffn=14336, vocabulary=128256)


@dataclass(frozen=True, slots=True)
class Work:
    """A step: so many requests, each with cached tokens and new ones behind them."""

    cached: int
    new: int
    requests: int = 1

    @property
    def blocks(self) -> int:
        """Blocks of the KV cache that one request takes."""
        return -(-(self.cached + self.new) // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's inputs on the device, over all new tokens of all requests."""

    work: Work
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    """Places in the KV cache."""
    block_table: Tensor
    """(requests, blocks)."""
    begins: Tensor
    """Where each request's tokens begin, and the end."""
    lengths: Tensor
    """Cached and new tokens of each request."""
    last: Tensor
    """The last token of each request."""


_Function = TypeVar("_Function", bound=Callable[..., object])

Attention = Callable[[Tensor, Tensor, Batch], Tensor]
"""Of queries (tokens, heads, head size) over one layer's KV cache."""


def dense_attention(queries: Tensor, cache: Tensor, batch: Batch) -> Tensor:
    """PyTorch's, over a cache in which all blocks lie one behind the other, from the first."""
    work, size = batch.work, queries.shape[-1]
    length = work.cached + work.new
    whole = cache[: work.requests * work.blocks]
    kv = whole.reshape(work.requests, -1, *cache.shape[2:])[:, :length].transpose(1, 2)
    q = queries.view(work.requests, work.new, *queries.shape[1:]).transpose(1, 2)
    causal = None if work.new == 1 else causal_lower_right(work.new, length)
    out = F.scaled_dot_product_attention(
        q, kv[..., :size], kv[..., size:], attn_mask=causal, enable_gqa=True
    )
    return out.transpose(1, 2).reshape(queries.shape)


def paged_attention() -> Attention | None:
    """vLLM's FlashAttention; None where it is not installed or not made for this GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func
    except ImportError:
        return None
    version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2

    def attention(queries: Tensor, cache: Tensor, batch: Batch) -> Tensor:
        size = queries.shape[-1]
        out: Tensor = flash_attn_varlen_func(
            queries,
            cache[..., :size],
            cache[..., size:],
            max_seqlen_q=batch.work.new,
            cu_seqlens_q=batch.begins,
            max_seqlen_k=batch.work.cached + batch.work.new,
            seqused_k=batch.lengths,
            block_table=batch.block_table,
            causal=True,
            fa_version=version,
        )
        return out

    return attention


@dataclass(slots=True)
class _Layer:
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    norm_1: Tensor
    norm_2: Tensor


@dataclass(slots=True)
class RandomModel:
    """Random weights and a KV cache of random values, on one device."""

    shape: Shape
    device: str
    kv_tokens: int
    seed: int = 1
    attention: Attention = dense_attention
    cache: Tensor = field(init=False)
    """(layers, blocks, tokens of a block, KV heads, keys and values): each layer as in vLLM."""
    _layers: list[_Layer] = field(init=False)
    _embedding: Tensor = field(init=False)
    _head: Tensor = field(init=False)
    _norm: Tensor = field(init=False)
    _rotation: Tensor = field(init=False)
    _generator: torch.Generator = field(init=False)
    _add_norm: Callable[..., tuple[Tensor, Tensor]] = field(init=False)
    _rotate: Callable[..., tuple[Tensor, Tensor]] = field(init=False)
    _gated: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape, model = self.shape, self.shape.model
        self._generator = torch.Generator(self.device).manual_seed(self.seed)
        blocks = self.kv_tokens // BLOCK_TOKENS
        self.cache = torch.empty(
            (model.layers, blocks, BLOCK_TOKENS, model.kv_heads, 2 * model.head_size),
            dtype=shape.dtype,
            device=self.device,
        )
        for layer in self.cache:
            layer.normal_(generator=self._generator)
        size = (model.heads + 2 * model.kv_heads) * model.head_size
        self._layers = [
            _Layer(
                qkv=self._weight(size, shape.hidden),
                out=self._weight(shape.hidden, shape.hidden),
                gate_up=self._weight(2 * shape.ffn, shape.hidden),
                down=self._weight(shape.hidden, shape.ffn),
                norm_1=self._ones(),
                norm_2=self._ones(),
            )
            for _ in range(model.layers)
        ]
        self._embedding = self._weight(shape.vocabulary, shape.hidden)
        self._head = self._weight(shape.vocabulary, shape.hidden)
        self._norm = self._ones()
        half = torch.arange(0, model.head_size, 2, device=self.device) / model.head_size
        angles = torch.arange(self.kv_tokens, device=self.device)[:, None] * ROPE_BASE**-half
        self._rotation = torch.stack((angles.cos(), angles.sin()))
        self._add_norm = self._compiled(_add_norm)
        self._rotate = self._compiled(_rotate)
        self._gated = self._compiled(_gated)

    def batch(self, work: Work, scattered: bool = True) -> Batch:
        """Inputs of a step: random tokens, blocks anywhere in the cache or its first ones in order.

        Raises:
            ValueError: the KV cache is too small for it.
        """
        needed = work.requests * work.blocks
        if needed > self.cache.shape[1]:
            raise ValueError(f"{work} does not fit into {self.kv_tokens} tokens of KV")
        ids = torch.arange(self.cache.shape[1], device=self.device)
        if scattered:
            ids = torch.randperm(len(ids), generator=self._generator, device=self.device)
        table = ids[:needed].view(work.requests, work.blocks)
        positions = torch.arange(work.cached, work.cached + work.new, device=self.device)
        slots = table[:, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
        begins = torch.arange(work.requests + 1, device=self.device) * work.new
        return Batch(
            work=work,
            token_ids=torch.randint(
                self.shape.vocabulary,
                (work.requests * work.new,),
                generator=self._generator,
                device=self.device,
            ),
            positions=positions.repeat(work.requests),
            slots=slots.flatten(),
            block_table=table.int(),
            begins=begins.int(),
            lengths=torch.full(
                (work.requests,), work.cached + work.new, dtype=torch.int32, device=self.device
            ),
            last=begins[1:] - 1,
        )

    @torch.inference_mode()
    def step(self, batch: Batch) -> Tensor:
        """Compute a step; returns the likeliest next token of each request."""
        return self.logits(batch).argmax(-1)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Compute a step up to the logits of each request's last token."""
        model = self.shape.model
        x = self._embedding[batch.token_ids]
        rest = torch.zeros_like(x)
        rotation = self._rotation[:, batch.positions]
        for layer, cache in zip(self._layers, self.cache, strict=True):
            x, rest = self._add_norm(x, rest, layer.norm_1)
            qkv = F.linear(x, layer.qkv).view(len(x), -1, model.head_size)
            q, kv = self._rotate(qkv, rotation, model.heads, model.kv_heads)
            cache.view(-1, *cache.shape[2:])[batch.slots] = kv
            x = F.linear(self.attention(q, cache, batch).flatten(1), layer.out)
            x, rest = self._add_norm(x, rest, layer.norm_2)
            x = F.linear(self._gated(F.linear(x, layer.gate_up)), layer.down)
        x, _ = self._add_norm(x[batch.last], rest[batch.last], self._norm)
        return F.linear(x, self._head)

    def runner(self, work: Work) -> Callable[[], object]:
        """A call that computes this step, warmed up; a replayed graph where it is small."""
        batch = self.batch(work, scattered=self.attention is not dense_attention)
        self.step(batch)
        if self.device == "cpu" or work.requests * work.new > GRAPH_TOKENS:
            return lambda: self.step(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self.step(batch)
        return _Replay(graph, batch, result)

    def _weight(self, rows: int, columns: int) -> Tensor:
        weight = torch.empty((rows, columns), dtype=self.shape.dtype, device=self.device)
        return weight.normal_(std=columns**-0.5, generator=self._generator)

    def _ones(self) -> Tensor:
        return torch.ones(self.shape.hidden, dtype=self.shape.dtype, device=self.device)

    def _compiled(self, function: _Function) -> _Function:
        if self.device == "cpu":
            return function
        return cast(_Function, torch.compile(function, dynamic=True))


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured step, with what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    result: Tensor

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.result


def _add_norm(x: Tensor, rest: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rest = x + rest
    wide = rest.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return (wide * scale).to(x.dtype) * weight, rest


def _rotate(qkv: Tensor, rotation: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Queries, and keys beside values as the cache has them, with rotary positions.

    Storing is not part of it: compiled, it would copy the whole cache of a layer there and back.
    """
    cos, sin = rotation[0, :, None], rotation[1, :, None]
    a, b = qkv[:, : heads + kv_heads].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(qkv.dtype)
    kv = torch.cat((turned[:, heads:], qkv[:, heads + kv_heads :]), dim=-1)
    return turned[:, :heads].contiguous(), kv


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
