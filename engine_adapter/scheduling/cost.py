"""What it costs to bring a victim's KV back: to compute it again, or to move it to host memory and
back. Fitted curves over tokens, and the choice between the two ways.

Pure: values in, values out; `engine_adapter/cost_files.py` keeps them as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Way = Literal["recompute", "swap"]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is kept in a file."""


class Point(Value, frozen=True):
    """One count of tokens and its median time."""

    tokens: Annotated[int, msgspec.Meta(gt=0)]
    seconds: Annotated[float, msgspec.Meta(gt=0)]


class Curve(Value, frozen=True):
    """Seconds as a polynomial in tokens. No coefficient is negative, so it never falls."""

    fixed_s: NonNegative
    s_per_token: NonNegative
    s_per_token2: NonNegative
    r2: float
    """Share of the variance of the points' seconds that the curve explains; 1 is all."""
    points: Annotated[tuple[Point, ...], msgspec.Meta(min_length=1)]
    """What it was fitted to, by tokens."""

    @property
    def fitted_tokens(self) -> tuple[int, int]:
        """The range it was fitted on; beyond it the curve only extrapolates."""
        return self.points[0].tokens, self.points[-1].tokens

    def seconds(self, tokens: int) -> float:
        """Seconds for this many tokens."""
        return self.fixed_s + tokens * (self.s_per_token + tokens * self.s_per_token2)


class Setup(Value, frozen=True):
    """What a cost model holds for: other models, machines and settings have other costs."""

    model: str
    """Under which it is served."""
    hardware: str
    settings: str
    """What else the times depend on, e.g. `bfloat16 tp2 step8192 block16`."""


class CostModel(Value, frozen=True):
    """The costs of one engine."""

    setup: Setup
    source: Literal["measured", "estimated"]
    recompute: Curve
    swap_out: Curve | None = None
    """To host memory; None where the engine does not swap."""
    swap_in: Curve | None = None
    date: str = ""
    """Of the measurement, e.g. `2026-01-31`."""
    versions: dict[str, str] = {}
    """Of the software measured."""

    def recompute_s(self, computed_tokens: int, keep_tokens: int = 0) -> float:
        """Seconds to compute again the tokens of `computed_tokens` behind the first `keep_tokens`.

        They attend to what is kept, so the last tokens of a prompt cost more than its first.
        """
        if computed_tokens <= keep_tokens:
            return 0.0
        whole, kept = self.recompute.seconds(computed_tokens), self.recompute.seconds(keep_tokens)
        return whole - kept + self.recompute.fixed_s

    def swap_s(self, tokens: int) -> float:
        """Seconds to move the KV of tokens out and back; infinite where the engine can't."""
        if self.swap_out is None or self.swap_in is None:
            return math.inf
        return self.swap_out.seconds(tokens) + self.swap_in.seconds(tokens) if tokens > 0 else 0.0

    def restore_s(
        self, computed_tokens: int, keep_tokens: int = 0, host_free_tokens: int = 0
    ) -> tuple[Way, float]:
        """The cheaper way to bring back what a victim loses, and its seconds.

        Args:
            computed_tokens: what the victim has.
            keep_tokens: what it keeps.
            host_free_tokens: for how many tokens host memory has room: only what fits is swapped.
        """
        lost_tokens = max(computed_tokens - keep_tokens, 0)
        recompute_s = self.recompute_s(computed_tokens, keep_tokens)
        swap_s = self.swap_s(lost_tokens) if lost_tokens <= host_free_tokens else math.inf
        return ("swap", swap_s) if swap_s < recompute_s else ("recompute", recompute_s)

    def __str__(self) -> str:
        swap = "recompute and swap" if math.isfinite(self.swap_s(1)) else "recompute only"
        return (
            f"{self.source}, {self.setup.model} on {self.setup.hardware} "
            f"(R^2 {self.recompute.r2:.4f}), {swap}"
        )


def fit(points: Sequence[Point], degree: int = 2) -> Curve:
    """The curve with the least relative errors, in the sense of least squares.

    Relative, because token counts and times span orders of magnitude: with absolute errors the
    largest prompts alone would decide, and small ones could be wrong by a multiple.

    Args:
        degree: 2 for a computation with attention, 1 for a transfer.

    Raises:
        ValueError: there are not more counts of tokens than `degree`.
    """
    ordered = tuple(sorted(points, key=lambda p: p.tokens))
    if len({p.tokens for p in ordered}) <= degree:
        raise ValueError(f"a curve of degree {degree} needs {degree + 1} counts of tokens or more")
    seconds = np.array([p.seconds for p in ordered])
    powers = np.array([[float(p.tokens**i) for i in range(degree + 1)] for p in ordered])
    found = _non_negative(powers / seconds[:, None], np.ones(len(ordered)))
    found += [0.0] * (2 - degree)
    curve = Curve(
        fixed_s=found[0], s_per_token=found[1], s_per_token2=found[2], r2=1.0, points=ordered
    )
    return msgspec.structs.replace(curve, r2=_r2(curve))


def _r2(curve: Curve) -> float:
    mean_s = sum(p.seconds for p in curve.points) / len(curve.points)
    total = sum((p.seconds - mean_s) ** 2 for p in curve.points)
    left = sum((p.seconds - curve.seconds(p.tokens)) ** 2 for p in curve.points)
    if total <= len(curve.points) * (1e-9 * mean_s) ** 2:  # there is nothing to explain
        return 1.0
    return 1 - left / total


def _non_negative(columns: Matrix, wanted: Matrix) -> list[float]:
    """The x >= 0 for which `columns` times x is nearest to `wanted`, in least squares.

    The best one is the unconstrained solution over those columns where it is positive. There are
    three columns at most, so every choice of them is tried.
    """
    count = columns.shape[1]
    sizes = np.linalg.norm(columns, axis=0)
    best, least = np.zeros(count), math.inf
    for chosen in chain.from_iterable(combinations(range(count), n + 1) for n in range(count)):
        x = np.zeros(count)
        x[list(chosen)] = np.linalg.lstsq((columns / sizes)[:, chosen], wanted, rcond=None)[0]
        error = float(np.linalg.norm((columns / sizes) @ x - wanted))
        if x.min() >= 0 and error < least:
            best, least = x, error
    return [float(value) for value in best / sizes]
