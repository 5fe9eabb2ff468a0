"""What a report is made of: results, and the files they are kept in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from loadtest.published import SPEEDUPS, TTFT_S
from loadtest.report import Cuts, p50_p95_p99, slashed
from loadtest.timeline import Line

BASE = "non-streaming"
"""The target that speed-ups are over: each prompt is sent whole when its retrieval ends."""
SIMULATED = "simulated"
REAL = "real"


@dataclass(frozen=True, slots=True)
class Result:
    """One workload at one rate on one target. Seconds and tokens; None where nobody can tell."""

    engine: str
    """`SIMULATED` or `REAL`."""
    workload: str
    qps: float
    delay_factor: float
    target: str
    queries: int
    errors: int
    ttft_s: tuple[float, ...]
    """Of every query that was answered, in the order of arrival."""
    completion_s: float | None
    computed_tokens: int | None
    invalidated_tokens: int | None
    preemptions: int | None
    over_oracle: float | None = None
    lines: tuple[Line, ...] = ()

    @property
    def load(self) -> tuple[str, str, float, float]:
        """What results that may be compared have in common."""
        return self.engine, self.workload, self.delay_factor, self.qps

    @property
    def title(self) -> str:
        """The load in words."""
        pressed = f", delays x{self.delay_factor:g}" if self.delay_factor != 1 else ""
        return f"{self.workload}, {self.qps:.3g} queries/s{pressed}, {self.engine} engine"

    @property
    def cuts_s(self) -> Cuts | None:
        """TTFT P50, P95, P99; None if nothing was answered."""
        return p50_p95_p99(self.ttft_s) if self.ttft_s else None

    @property
    def published_name(self) -> str:
        """The row of the paper's tables that this one is like, if it has one."""
        pressed = f" x{self.delay_factor:g}" if self.delay_factor != 1 else ""
        return f"{self.workload}{pressed} {self.qps:g} {self.target}"


def grouped(results: Iterable[Result]) -> dict[tuple[str, str, float, float], list[Result]]:
    """Results by load, in the order in which the loads first come."""
    groups: dict[tuple[str, str, float, float], list[Result]] = {}
    for result in results:
        groups.setdefault(result.load, []).append(result)
    return groups


class _File(msgspec.Struct):
    about: dict[str, Any]
    summary: list[dict[str, Any]]
    """For readers of the file; all of it follows from the results."""
    results: list[Result]


def save(path: Path, results: Sequence[Result], about: Mapping[str, Any]) -> None:
    """Write all of it as one JSON object."""
    summary = [
        {"load": r.title, "target": r.target, "ttft_p50_p95_p99_s": r.cuts_s, "errors": r.errors}
        for r in results
    ]
    path.write_bytes(msgspec.json.encode(_File(dict(about), summary, list(results))) + b"\n")


def load(path: Path) -> tuple[list[Result], dict[str, Any]]:
    """What `save` has written.

    Raises:
        msgspec.MsgspecError: it is something else.
    """
    file = msgspec.json.decode(path.read_bytes(), type=_File)
    return file.results, file.about


HEAD = (
    "| target | TTFT P50 / P95 / P99, s | published | speed-up | published | answered "
    "| preempted | invalidated | computed, tokens | ends, s | over oracle |"
)
LEGEND = """\
TTFT: from when the last input is due to the first token of the answer. Speed-up: over
non-streaming under the same load, at the same percentiles. Preempted: how often KV was taken to
make room. Invalidated: computed tokens that an update made useless. Computed: all tokens computed,
prompts and answers. Ends: when the last answer was complete. Over oracle: median ratio of a query's
TTFT to that of the same query alone on an idle engine with its context read. An empty cell:
nobody can tell.
"""


def markdown(results: Sequence[Result]) -> str:
    """A table for each load."""
    tables = []
    for group in grouped(results).values():
        base = next((r for r in group if r.target == BASE), None)
        rows = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
        rows += [_row(result, base) for result in group]
        tables.append(f"### {group[0].title}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(tables)


def _row(result: Result, base: Result | None) -> str:
    published, speedups = TTFT_S.get(result.published_name), SPEEDUPS.get(result.published_name)
    if result.engine != SIMULATED:
        published = speedups = None
    cells = (
        result.target,
        slashed(result.cuts_s, 3) or "-",
        slashed(published, 3),
        slashed(_gain(result, base), 1),
        slashed(speedups, 1),
        f"{len(result.ttft_s)}/{result.queries}",
        _cell(result.preemptions),
        _cell(result.invalidated_tokens),
        _cell(result.computed_tokens),
        _cell(result.completion_s, 1),
        _cell(result.over_oracle, 1),
    )
    return "| " + " | ".join(cells) + " |"


def _gain(result: Result, base: Result | None) -> list[float] | None:
    """How many times shorter than the base's; None without one, or if it answered not all."""
    if base is None or result.cuts_s is None or base.cuts_s is None:
        return None
    if len(result.ttft_s) != len(base.ttft_s):
        return None
    return [b / r if r else math.inf for b, r in zip(base.cuts_s, result.cuts_s, strict=True)]


def _cell(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
