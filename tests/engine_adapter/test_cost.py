"""Cost curves and the choice between recomputing and swapping."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.scheduling.cost import CostModel, Curve, Point, Setup, fit
from engine_adapter.simulated.hardware import H100X2, LLAMA_3_1_8B, estimated_cost

GRID = (128, 256, 512, 1024, 2048, 4096, 8192)
SETUP = Setup(model="m", hardware="h", settings="s")

fixed_s = st.one_of(st.just(0.0), st.floats(1e-4, 1.0))
s_per_token = st.one_of(st.just(0.0), st.floats(1e-6, 1e-2))
s_per_token2 = st.one_of(st.just(0.0), st.floats(1e-11, 1e-6))
coefficients = st.tuples(fixed_s, s_per_token, s_per_token2).filter(any)
seconds = st.floats(1e-4, 100.0)
tokens = st.integers(0, 200_000)


def exact(fixed: float, linear: float, square: float, grid: tuple[int, ...] = GRID) -> Curve:
    points = [Point(tokens=n, seconds=fixed + linear * n + square * n * n) for n in grid]
    return fit(points, 2 if square else 1)


def model(recompute: Curve, out: Curve | None = None, back: Curve | None = None) -> CostModel:
    return CostModel(
        setup=SETUP, source="measured", recompute=recompute, swap_out=out, swap_in=back
    )


@st.composite
def models(draw: st.DrawFn) -> CostModel:
    swap = st.tuples(fixed_s, s_per_token, st.just(0.0)).filter(any)
    out, back = (exact(*draw(swap)), exact(*draw(swap))) if draw(st.booleans()) else (None, None)
    return model(exact(*draw(coefficients)), out, back)


@given(coefficients)
def test_a_fit_finds_the_polynomial_that_its_points_are_of(known: tuple[float, ...]) -> None:
    fixed, linear, square = known
    curve = fit([Point(tokens=n, seconds=fixed + linear * n + square * n * n) for n in GRID])
    for n in (128, 300, 1000, 5000, 8192):
        assert curve.seconds(n) == pytest.approx(fixed + linear * n + square * n * n, rel=1e-6)
    found = (curve.fixed_s, curve.s_per_token, curve.s_per_token2)
    assert found == pytest.approx(known, rel=1e-3, abs=1e-9)
    assert curve.r2 == pytest.approx(1.0)
    assert curve.fitted_tokens == (128, 8192)


@given(st.dictionaries(st.integers(1, 100_000), seconds, min_size=3), tokens, tokens)
def test_a_fit_never_falls_whatever_was_measured(
    measured: dict[int, float], a: int, b: int
) -> None:
    curve = fit([Point(tokens=n, seconds=s) for n, s in measured.items()])
    low, high = sorted((a, b))
    assert 0 <= curve.seconds(low) <= curve.seconds(high)
    assert curve.r2 <= 1


@given(coefficients, st.lists(st.floats(-0.05, 0.05), min_size=7, max_size=7))
def test_small_prompts_are_fitted_as_well_as_large_ones(
    known: tuple[float, ...], noise: list[float]
) -> None:
    fixed, linear, square = known
    points = [
        Point(tokens=n, seconds=(fixed + linear * n + square * n * n) * (1 + off))
        for n, off in zip(GRID, noise, strict=True)
    ]
    curve = fit(points)
    assert all(curve.seconds(p.tokens) == pytest.approx(p.seconds, rel=0.15) for p in points)


def test_r2_says_how_much_of_the_variance_is_explained() -> None:
    points = [Point(tokens=n, seconds=s) for n, s in ((1, 1.0), (2, 3.0), (3, 2.0), (4, 4.0))]
    curve = fit(points)
    left = sum((p.seconds - curve.seconds(p.tokens)) ** 2 for p in points)
    assert curve.r2 == pytest.approx(1 - left / 5.0)
    flat = fit([Point(tokens=n, seconds=2.0) for n in (1, 2, 3)])
    assert (flat.seconds(100), flat.r2) == (pytest.approx(2.0), pytest.approx(1.0))


def test_too_few_counts_of_tokens_are_an_error() -> None:
    same = [Point(tokens=5, seconds=1.0), Point(tokens=5, seconds=2.0)]
    with pytest.raises(ValueError, match="needs 3 counts"):
        fit([*same, Point(tokens=6, seconds=2.0)])
    with pytest.raises(ValueError, match="needs 2 counts"):
        fit(same, degree=1)


def test_what_is_kept_is_attended_to_and_the_fixed_part_paid_once() -> None:
    cost = model(exact(0.5, 0.01, 1e-5))
    assert cost.recompute_s(1000) == pytest.approx(0.5 + 10 + 10)
    assert cost.recompute_s(1000, 600) == pytest.approx(0.5 + 4 + 6.4)
    assert cost.recompute_s(1000, 1000) == 0
    assert cost.recompute_s(400) < cost.recompute_s(1000, 600)  # as many tokens, further behind


@given(models(), tokens, tokens, tokens)
def test_the_cheaper_way_is_chosen_and_swapping_only_into_room(
    cost: CostModel, computed: int, keep: int, free: int
) -> None:
    way, restore_s = cost.restore_s(computed, keep, free)
    lost = max(computed - keep, 0)
    recompute_s, swap_s = cost.recompute_s(computed, keep), cost.swap_s(lost)
    assert math.isfinite(restore_s)
    assert restore_s <= recompute_s
    if way == "swap":
        assert lost <= free
        assert restore_s == swap_s < recompute_s
    else:
        assert restore_s == recompute_s
        assert lost > free or recompute_s <= swap_s


def test_a_victim_larger_than_the_room_in_host_memory_is_recomputed() -> None:
    cheap = exact(0.0, 1e-6, 0.0)
    cost = model(exact(0.1, 1e-3, 0.0), cheap, cheap)
    assert cost.restore_s(1000, 0, 1000) == ("swap", pytest.approx(2e-3))
    assert cost.restore_s(1000, 0, 999) == ("recompute", pytest.approx(1.1))
    assert cost.restore_s(1000, 500, 500) == ("swap", pytest.approx(1e-3))
    assert cost.restore_s(1000) == ("recompute", pytest.approx(1.1))


def test_without_both_swap_curves_nothing_is_swapped() -> None:
    curve = exact(0.0, 1e-6, 0.0)
    for cost in (model(exact(1, 1, 0)), model(exact(1, 1, 0), curve), model(exact(1, 1, 0), None)):
        assert cost.swap_s(100) == math.inf
        assert cost.restore_s(100, 0, 10**9)[0] == "recompute"


@given(models())
def test_a_cost_model_survives_json(cost: CostModel) -> None:
    assert msgspec.json.decode(msgspec.json.encode(cost), type=CostModel) == cost


def test_the_estimate_is_of_the_same_arithmetic_as_the_simulated_engine() -> None:
    cost = estimated_cost(H100X2, LLAMA_3_1_8B, 8192)
    assert cost.source == "estimated"
    assert str(cost).startswith("estimated, Llama-3.1-8B on 2x H100 SXM (R^2 0.999")
    for n in (200, 3000, 8192, 30_000):
        prefill_s = H100X2.prefill_s(LLAMA_3_1_8B, n, 8192)
        assert cost.recompute_s(n) == pytest.approx(prefill_s, rel=0.05)
    # 131,072 bytes a token over two links of 51.2 GB/s, there and back
    assert cost.swap_s(8192) == pytest.approx(2 * 8192 * 131_072 / 102.4e9)
    assert cost.restore_s(8192, 0, 8192)[0] == "swap"
