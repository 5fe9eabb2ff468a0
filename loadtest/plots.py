"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from loadtest.results import BASE, Result, grouped
from loadtest.timeline import Line

mpl.use("Agg")

COLORS = {
    BASE: "#222222",
    "default": "#8c8c8c",
    "fcfs": "#1f77b4",
    "lcas": "#2ca02c",
    "mcps": "#9467bd",
    "srpf": "#d62728",
    "cache warming": "#ff7f0e",
    "StreamingInput": "#17becf",
}
OTHERS = ("#8c564b", "#e377c2", "#bcbd22")
STREAMS_SHOWN = 24
CUTS = ("P50", "P95", "P99")


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write all pictures that these results have enough for; their paths, in reading order."""
    drawn = []
    for engine, workload, factor in dict.fromkeys(r.load[:3] for r in results):
        mine = [r for r in results if r.load[:3] == (engine, workload, factor) and r.ttft_s]
        name = f"{workload}{f'-x{factor:g}' if factor != 1 else ''}-{engine}"
        if not mine:
            continue
        drawn.append(_saved(ccdf(mine), folder / f"ttft-ccdf-{name}.png"))
        if len({r.qps for r in mine}) > 1:
            drawn.append(_saved(against_qps(mine), folder / f"ttft-qps-{name}.png"))
        recorded = [r for r in mine if r.lines and r.qps == max(m.qps for m in mine if m.lines)]
        if recorded:
            drawn.append(_saved(gantt(recorded), folder / f"gantt-{name}.png"))
    return drawn


def ccdf(results: Sequence[Result]) -> Figure:
    """For each rate, the share of queries whose TTFT is longer than so many seconds."""
    groups = list(grouped(results).values())
    across = min(len(groups), 2)
    down = -(-len(groups) // across)
    figure = Figure(figsize=(1 + 5 * across, 0.9 + 3.7 * down), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for ax in list(axes.flat)[len(groups) :]:
        ax.remove()
    for ax, group in zip(axes.flat, groups, strict=False):
        _ccdf_of(ax, group)
    figure.suptitle(f"TTFT, {_about(results)}")
    for ax in axes[-1]:
        ax.set_xlabel("TTFT, s")
    for ax in axes[:, 0]:
        ax.set_ylabel("share of queries that wait longer")
    _legend(figure, results)
    return figure


def _ccdf_of(ax: Axes, group: Sequence[Result]) -> None:
    for result in group:
        ax.ecdf(result.ttft_s, complementary=True, **_style(result.target))
    ax.set(xscale="log", yscale="log", title=f"{group[0].qps:.3g} queries/s")
    ax.set_ylim(0.8 / max(r.queries for r in group), 1.1)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    _seconds(ax, "x")
    ax.grid(alpha=0.3)


def against_qps(results: Sequence[Result]) -> Figure:
    """TTFT at three percentiles by queries per second."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, len(CUTS), sharey=True)
    for i, (ax, cut) in enumerate(zip(axes, CUTS, strict=True)):
        for target in _targets(results):
            points = sorted(
                (r.qps, r.cuts_s[i]) for r in results if r.target == target and r.cuts_s
            )
            ax.plot(*zip(*points, strict=True), marker="o", ms=4, label=target, **_style(target))
        ax.set(xscale="log", yscale="log", title=cut, xlabel="queries per second")
        ticks = sorted({r.qps for r in results})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.xaxis.set_minor_formatter(NullFormatter())
        _seconds(ax, "y")
        ax.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("TTFT, s")
    figure.suptitle(f"TTFT against load, {_about(results)}")
    _legend(figure, results)
    return figure


def gantt(results: Sequence[Result]) -> Figure:
    """The same streams on several targets, one above the other; see `_shown`."""
    shown = _shown(results)
    height = 1.6 + 0.2 * sum(min(len(r.lines), STREAMS_SHOWN) for r in shown)
    figure = Figure(figsize=(13, height), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for ax, result in zip(axes, shown, strict=True):
        _gantt_of(ax, result.lines[:STREAMS_SHOWN])
        ax.set_title(result.target, loc="left", fontweight="bold")
    axes[-1].set_xlabel("seconds since the first of these streams began")
    figure.suptitle(
        f"{shown[0].title}: {len(shown[0].lines[:STREAMS_SHOWN])} streams in succession"
    )
    figure.legend(handles=_gantt_keys(), loc="outside lower center", ncols=7, frameon=False)
    return figure


def _shown(results: Sequence[Result]) -> list[Result]:
    """Without streaming, the last target, and of the others the one that preempted most, if any."""
    others = [r for r in results if r.target != BASE]
    most = max(others[:-1], key=_preempted, default=None)
    between = [most] if most is not None and _preempted(most) else []
    return [r for r in results if r.target == BASE][:1] + between + others[-1:]


def _preempted(result: Result) -> int:
    return sum(len(line.preempted) for line in result.lines[:STREAMS_SHOWN])


def _gantt_of(ax: Axes, lines: Sequence[Line]) -> None:
    begun_s = min(line.inputs_s[0] for line in lines)
    for row, line in enumerate(sorted(lines, key=lambda line: line.inputs_s[0])):
        closed_s, first_s = line.inputs_s[-1], line.first_token_s
        ax.hlines(row, line.inputs_s[0] - begun_s, closed_s - begun_s, color="#c8d6e5", lw=8)
        if first_s is not None:
            ax.hlines(row, closed_s - begun_s, first_s - begun_s, color="#f6b26b", lw=8)
        for start_s, end_s in line.computed:
            ax.hlines(row, start_s - begun_s, end_s - begun_s, color="#1f4e79", lw=5)
        inputs_s = [at_s - begun_s for at_s in line.inputs_s]
        ax.plot(inputs_s, [row] * len(inputs_s), "|", color="#333333", ms=9, mew=1)
        _marks(ax, row, [at_s - begun_s for at_s, _ in line.preempted], "x", "#7b1fa2")
        _marks(ax, row, [at_s - begun_s for at_s, _ in line.invalidated], "v", "#d62728")
        if first_s is not None:
            _marks(ax, row, [first_s - begun_s], "o", "#2e7d32")
    ax.set(ylabel="stream", ylim=(len(lines) - 0.4, -0.6))
    ax.set_yticks([])
    ax.grid(axis="x", alpha=0.3)


def _marks(ax: Axes, row: int, at_s: Sequence[float], marker: str, color: str) -> None:
    ax.plot(at_s, [row] * len(at_s), marker, color=color, ms=5.5, mew=1.6, ls="", zorder=3)


def _gantt_keys() -> list[Patch | Line2D]:
    def mark(marker: str, color: str, label: str) -> Line2D:
        return Line2D([], [], marker=marker, color=color, ls="", mew=1.4, label=label)

    return [
        Patch(color="#c8d6e5", label="input open"),
        Patch(color="#f6b26b", label="waiting for the first token (TTFT)"),
        Patch(color="#1f4e79", label="being prefilled"),
        mark("|", "#333333", "chunk or list arrives"),
        mark("o", "#2e7d32", "first token"),
        mark("v", "#d62728", "tokens invalidated"),
        mark("x", "#7b1fa2", "preempted"),
    ]


def _style(target: str) -> dict[str, Any]:
    """Color by policy; without streaming dashed; ours thicker."""
    name = target.removeprefix("gateway ")
    color = COLORS.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]
    return {
        "color": color,
        "lw": 2.2 if name == "srpf" else 1.4,
        "ls": "--" if name == BASE else "-",
    }


def _targets(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(r.target for r in results))


def _about(results: Sequence[Result]) -> str:
    first = results[0]
    pressed = f", delays x{first.delay_factor:g}" if first.delay_factor != 1 else ""
    return f"{first.workload}{pressed}, {first.engine} engine, {first.queries} queries each"


def _legend(figure: Figure, results: Sequence[Result]) -> None:
    handles = [Line2D([], [], label=t, **_style(t)) for t in _targets(results)]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)


def _seconds(ax: Axes, which: str) -> None:
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _saved(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
