"""How long a step takes: first principles, for engines nobody has measured yet.

A step computes `count` new tokens behind `start` cached ones for each of its requests. Its time
is the larger of arithmetic over the rate reached and of bytes over the bandwidth, plus what a
step costs whatever is in it. Attention is causal: a token looks at all before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine_adapter.scheduling.cost import CostModel, Point, Setup, fit

GIB = 1 << 30
ESTIMATED_TOKENS = tuple(1 << i for i in range(7, 18))


@dataclass(frozen=True, slots=True)
class Model:
    """What a transformer with grouped-query attention costs."""

    name: str
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    bytes_per_value: int = 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.bytes_per_value

    @property
    def weight_bytes(self) -> float:
        return self.parameters * self.bytes_per_value

    def matrix_flops(self, count: int) -> float:
        """Arithmetic of `count` tokens with the weights."""
        return 2.0 * self.parameters * count

    def attention_flops(self, start: int, count: int) -> float:
        """Arithmetic of `count` tokens with those before them, `start` others first."""
        attended = count * start + count * (count + 1) / 2
        return 4.0 * self.layers * self.heads * self.head_size * attended


@dataclass(frozen=True, slots=True)
class Hardware:
    """Accelerators that hold one copy of a model together (tensor parallel)."""

    name: str
    accelerators: int
    flops_per_s: float
    """Peak of one accelerator, dense, in the model's number format."""
    bytes_per_s: float
    """Peak memory bandwidth of one accelerator."""
    memory_bytes: float
    """Of one accelerator."""
    efficiency: float
    """Share of the peak that products with the weights reach, communication between accelerators
    included."""
    attention_efficiency: float
    """Share of the peak that attention over a paged KV cache reaches."""
    step_overhead_s: float
    """What a step costs besides: launches, sampling, the engine's own loop."""
    memory_utilization: float = 0.8
    activation_bytes: float = 4.0 * GIB
    """Taken from each accelerator's memory besides weights and KV."""
    host_bytes_per_s: float = 64e9
    """Peak of one accelerator to host memory, and back: PCI Express 5.0 with 16 lanes."""
    host_efficiency: float = 0.8
    """Share of that peak which copies of KV blocks reach; an estimate."""

    def step_s(self, model: Model, work: Iterable[tuple[int, int]]) -> float:
        """Seconds of one step.

        Args:
            work: (cached tokens, new tokens) of each request in it.
        """
        peaks, read = 0.0, model.weight_bytes
        for start, count in work:
            peaks += model.matrix_flops(count) / self.efficiency
            peaks += model.attention_flops(start, count) / self.attention_efficiency
            read += model.kv_bytes_per_token * start
        compute_s = peaks / (self.accelerators * self.flops_per_s)
        memory_s = read / (self.accelerators * self.bytes_per_s)
        return self.step_overhead_s + max(compute_s, memory_s)

    def prefill_s(self, model: Model, tokens: int, step_tokens: int) -> float:
        """Seconds to compute a prompt that is alone, in as many steps as it takes."""
        starts = range(0, tokens, step_tokens)
        return sum(self.step_s(model, [(s, min(step_tokens, tokens - s))]) for s in starts)

    def transfer_s(self, model: Model, tokens: int) -> float:
        """Seconds to move the KV of tokens to host memory, or back; all accelerators at once."""
        bytes_per_s = self.accelerators * self.host_bytes_per_s * self.host_efficiency
        return model.kv_bytes_per_token * tokens / bytes_per_s

    def kv_tokens(self, model: Model) -> int:
        """Tokens whose KV fits beside the weights."""
        usable = self.accelerators * (
            self.memory_bytes * self.memory_utilization - self.activation_bytes
        )
        return int((usable - model.weight_bytes) / model.kv_bytes_per_token)


def estimated_cost(hardware: Hardware, model: Model, step_tokens: int) -> CostModel:
    """What evictions cost where nobody has measured it; `source` says that it is an estimate."""
    moved = [Point(tokens=n, seconds=hardware.transfer_s(model, n)) for n in ESTIMATED_TOKENS]
    computed = [
        Point(tokens=n, seconds=hardware.prefill_s(model, n, step_tokens)) for n in ESTIMATED_TOKENS
    ]
    settings = f"{8 * model.bytes_per_value}-bit tp{hardware.accelerators} step{step_tokens}"
    transfer = fit(moved, degree=1)
    return CostModel(
        setup=Setup(model=model.name, hardware=hardware.name, settings=settings),
        source="estimated",
        recompute=fit(computed),
        swap_out=transfer,
        swap_in=transfer,
    )


LLAMA_3_1_8B = Model("Llama-3.1-8B", 8.03e9, layers=32, heads=32, kv_heads=8, head_size=128)

EFFICIENCY = 0.54
ATTENTION_EFFICIENCY = 0.4
STEP_OVERHEAD_S = 0.008
"""Estimates, the same for all hardware and rows; peaks are the vendor's data sheets'."""

_REACHED = (EFFICIENCY, ATTENTION_EFFICIENCY, STEP_OVERHEAD_S)
H100X2 = Hardware("2x H100 SXM", 2, 989e12, 3.35e12, 80e9, *_REACHED)
H200X2 = Hardware("2x H200 SXM", 2, 989e12, 4.8e12, 141e9, *_REACHED)

H100 = Hardware(
    "H100 80GB HBM3",
    1,
    989e12,
    3.35e12,
    80e9,
    efficiency=0.635,
    attention_efficiency=0.583,
    step_overhead_s=0.0024,
    host_efficiency=0.74,
)
"""One card. Its steps are fitted to what `loadtest.measure_gpu` measured of the model alone (vLLM's
own loop hides behind them); its copies to what vLLM's offloading connector counted."""
