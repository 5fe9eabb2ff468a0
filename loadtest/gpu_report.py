"""Tables of a measured card, how far the estimates are from it, and what fits it better."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from engine_adapter.scheduling.cost import CostModel, Curve, Point, Setup, fit
from engine_adapter.simulated.hardware import H100X2, H200X2, LLAMA_3_1_8B, Hardware
from loadtest.gpu_raw import Copy, Direction, Moving, Raw, Step

SWAPPING: tuple[Moving, ...] = ("batched", "gathered")
"""How an engine would move KV, the best known first."""
FITTED = ("efficiency", "attention_efficiency", "step_overhead_s")
LEAST_RATE, MOST_RATE = 0.05, 1.0
LEAST_CHANGE, MOST_CHANGES = 1.002, 300


def report(raw: Raw) -> str:
    """All tables."""
    return "\n\n".join("\n".join(part) for part in (
        _head(raw), _steps(raw), _decodes(raw), _prompts(raw), _copies(raw), _overlaps(raw),
        _fits(raw),
    ))  # fmt: skip


def cost_model(raw: Raw) -> CostModel:
    """What evictions cost on this card, as engines load it."""
    computed = [Point(tokens=p.tokens, seconds=p.median_s) for p in raw.prompts]
    return CostModel(
        setup=Setup(
            model=raw.model,
            hardware=raw.card,
            settings=f"bfloat16 tp1 step{raw.step_tokens} block16 no engine",
        ),
        source="measured",
        recompute=fit(computed),
        swap_out=_moved(raw, "out"),
        swap_in=_moved(raw, "in"),
        date=raw.date,
        versions={**raw.versions, "attention": raw.attention},
    )


def estimate(raw: Raw) -> Hardware:
    """The card as `hardware.py` would estimate it: the data sheet and the common constants."""
    of_two = H200X2 if "H200" in raw.card else H100X2
    return dataclasses.replace(of_two, name=raw.card, accelerators=1)


def fitted(raw: Raw) -> Hardware:
    """The card with the constants that are nearest to its steps and copies.

    Least squares of the logarithms of predicted over measured, one constant after the other in
    steps that become smaller: the steps are max(arithmetic, memory), which has corners.
    """
    best = estimate(raw)
    least = _error(best, raw.steps)
    change = 1.3
    for _ in range(MOST_CHANGES):
        if change < LEAST_CHANGE:
            break
        tried = [
            dataclasses.replace(best, **{name: value})
            for name in FITTED
            for factor in (change, 1 / change)
            if LEAST_RATE * (name != "step_overhead_s")
            <= (value := getattr(best, name) * factor) <= MOST_RATE
        ]  # fmt: skip
        error, nearest = min(((_error(one, raw.steps), i) for i, one in enumerate(tried)))
        if error < least:
            best, least = tried[nearest], error
        else:
            change = math.sqrt(change)
    slopes = [curve.s_per_token for curve in (_moved(raw, "out"), _moved(raw, "in"))]
    per_s = LLAMA_3_1_8B.kv_bytes_per_token / statistics.mean(slopes)
    return dataclasses.replace(best, host_efficiency=per_s / best.host_bytes_per_s)


def _error(hardware: Hardware, steps: Sequence[Step]) -> float:
    return math.fsum(math.log(_predicted(hardware, step) / step.median_s) ** 2 for step in steps)


def _predicted(hardware: Hardware, step: Step) -> float:
    return hardware.step_s(LLAMA_3_1_8B, [(step.cached, step.new)] * step.requests)


def _moved(raw: Raw, direction: Direction) -> Curve:
    """Seconds to move KV, by the way that an engine would take."""
    for moving in SWAPPING:
        points = [
            Point(tokens=c.tokens, seconds=c.median_s)
            for c in raw.copies
            if (c.moving, c.direction) == (moving, direction)
        ]
        if points:
            return fit(points, degree=1)
    raise ValueError("no copies of KV were measured")


def _head(raw: Raw) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in raw.versions.items())
    yield f"{raw.card}; {raw.host}; {versions}; seed {raw.seed}; {raw.date}"
    yield f"{raw.model}, random weights, bfloat16; attention: {raw.attention}"
    for clock in raw.clocks:
        least, median, most = clock.sm_mhz
        yield (
            f"during {clock.part}: SM {median} MHz ({least} - {most}), memory "
            f"{clock.memory_mhz[1]} MHz, {clock.watts[1]} W ({clock.watts[0]} - {clock.watts[2]}), "
            f"{clock.celsius[0]} - {clock.celsius[2]} C"
        )
    yield from (f"not measured: {what}" for what in raw.skipped)


def _steps(raw: Raw) -> Iterator[str]:
    steps = {(s.cached, s.new): s for s in raw.steps if s.requests == 1}
    of_grid = Counter(cached for cached, _ in steps)
    cached = sorted(c for c, count in of_grid.items() if count > 1)  # the others only decode
    new = sorted({n for _, n in steps})
    tables: list[tuple[str, Callable[[Step], str]]] = [
        ("a step, ms: new tokens (down) behind cached ones (across)",
         lambda s: f"{1000 * s.median_s:.2f}"),
        ("estimated over measured", lambda s: f"{_predicted(estimate(raw), s) / s.median_s:.2f}"),
        ("fitted over measured", lambda s: f"{_predicted(fitted_to, s) / s.median_s:.2f}"),
    ]  # fmt: skip
    fitted_to = fitted(raw)
    for title, cell in tables:
        yield title
        yield f"{'':>8}" + "".join(f"{c:>10}" for c in cached)
        for n in new:
            cells = (cell(steps[c, n]) if (c, n) in steps else "-" for c in cached)
            yield f"{n:>8}" + "".join(f"{text:>10}" for text in cells)
    widest = max(raw.steps, key=lambda s: s.spread)
    spreads = sorted(s.spread for s in raw.steps)
    yield (
        f"longest over shortest repeat: median {statistics.median(spreads):.3f}, at most "
        f"{widest.spread:.2f} ({widest.new} behind {widest.cached})"
    )


def _decodes(raw: Raw) -> Iterator[str]:
    yield f"{'decode: requests':>17}{'context':>9}{'ms':>9}{'estimated/meas.':>17}{'fitted/m.':>14}"
    guess, nearest = estimate(raw), fitted(raw)
    for step in raw.steps:
        if step.new == 1 and (step.cached + 1) % 1024 == 0:
            yield (
                f"{step.requests:>17}{step.cached + 1:>9}{1000 * step.median_s:>9.2f}"
                f"{_predicted(guess, step) / step.median_s:>17.2f}"
                f"{_predicted(nearest, step) / step.median_s:>14.2f}"
            )


def _prompts(raw: Raw) -> Iterator[str]:
    guess, nearest, curve = estimate(raw), fitted(raw), cost_model(raw).recompute
    yield (
        f"whole prompts in steps of {raw.step_tokens}\n"
        f"{'tokens':>8}{'s':>10}{'estimated/meas.':>17}{'fitted/meas.':>14}{'curve/meas.':>13}"
    )
    for p in raw.prompts:
        ratios = [
            hardware.prefill_s(LLAMA_3_1_8B, p.tokens, raw.step_tokens) / p.median_s
            for hardware in (guess, nearest)
        ]
        yield (
            f"{p.tokens:>8}{p.median_s:>10.4f}{ratios[0]:>17.2f}{ratios[1]:>14.2f}"
            f"{curve.seconds(p.tokens) / p.median_s:>13.2f}"
        )
    yield f"curve: {_formula(curve)}"


def _copies(raw: Raw) -> Iterator[str]:
    rows: dict[int, dict[tuple[str, str], Copy]] = {}
    for copy in raw.copies:
        rows.setdefault(copy.tokens, {})[copy.moving, copy.direction] = copy
    columns = sorted({key for row in rows.values() for key in row}, key=lambda key: key[::-1])
    yield "copies of KV, GB/s (median); out: to host memory"
    yield f"{'tokens':>8}" + "".join(f"{moving + ' ' + way:>16}" for moving, way in columns)
    for tokens, row in rows.items():
        size = LLAMA_3_1_8B.kv_bytes_per_token * tokens
        yield f"{tokens:>8}" + "".join(
            f"{size / row[key].median_s / 1e9:>16.1f}" if key in row else f"{'-':>16}"
            for key in columns
        )
    largest = max((c for c in raw.copies if c.moving == SWAPPING[0]), default=raw.copies[-1],
                  key=lambda copy: copy.tokens)  # fmt: skip
    yield (
        f"{largest.moving} {largest.direction}, {largest.tokens} tokens: the call returns after "
        f"{largest.call_s / largest.median_s:.0%} of the time"
    )
    for direction in ("out", "in"):
        yield f"swap {direction}: {_formula(_moved(raw, direction))}"


def _overlaps(raw: Raw) -> Iterator[str]:
    yield "steps while copies run in another stream, one after the other (GB/s on the card)"
    yield f"{'requests x new':>16}{'cached':>8}  {'copies':18}{'step':>7}{'GB/s':>7}"
    for o in raw.overlaps:
        size = LLAMA_3_1_8B.kv_bytes_per_token * o.tokens
        yield (
            f"{f'{o.requests} x {o.new}':>16}{o.cached:>8}  {o.moving + ' ' + o.direction:18}"
            f"{o.beside_s / o.alone_s - 1:>+7.0%}{size / o.copy_beside_s / 1e9:>7.1f}"
        )


def _fits(raw: Raw) -> Iterator[str]:
    guess, nearest = estimate(raw), fitted(raw)
    for name in (*FITTED, "host_efficiency"):
        yield f"{name}: estimated {getattr(guess, name):.3g}, fitted {getattr(nearest, name):.3g}"
    for what, hardware in (("estimated", guess), ("fitted", nearest)):
        ratios = [_predicted(hardware, step) / step.median_s for step in raw.steps]
        yield (
            f"{what} over measured, {len(ratios)} steps: geometric mean "
            f"{statistics.geometric_mean(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        )


def _formula(curve: Curve) -> str:
    return (
        f"{curve.fixed_s:.3g} + {curve.s_per_token:.4g} n + {curve.s_per_token2:.4g} n^2 s, "
        f"R^2 {curve.r2:.5f}"
    )
