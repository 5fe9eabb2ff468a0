"""Both published workloads on the simulated engine, beside the published figures.

The scheduler is the one that ships; the model is replaced by a first-principles estimate of what
a step costs (`engine_adapter/simulated/hardware.py`), and time is virtual. TTFT is counted from
the moment the last input is handed over, as in the paper (arXiv 2604.16395).

Where delays are multiplied, memory is short; there engines have host memory to swap to, but for
one row that has none.

`make bench-sim`; `--queries` shortens the crawl. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from loadtest.published import SPEEDUPS, TTFT_S
from loadtest.report import Cuts, machine, slashed, vllm_version
from loadtest.simulation import HOST_BYTES, POLICIES, WAITING, WITHOUT_SWAP, Case, play


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a case. Seconds, and tokens."""

    ttft_s: tuple[float, ...]
    """Of the percentiles 1 to 99, and the largest."""
    over_oracle: float
    completion_s: float
    computed_tokens: int
    invalidated_tokens: int
    preemptions: int
    fetched_tokens: int
    steps: int
    host_s: float

    @property
    def cuts_s(self) -> Cuts:
        """P50, P95, P99."""
        return self.ttft_s[49], self.ttft_s[94], self.ttft_s[98]


def run(case: Case) -> Row:
    """Play a trace to its end; see `Played` for what the figures mean."""
    played = play(case)
    cuts = statistics.quantiles(played.ttft_s, n=100, method="inclusive")
    return Row(
        ttft_s=(*cuts, max(played.ttft_s)),
        over_oracle=played.over_oracle,
        completion_s=played.completion_s,
        computed_tokens=played.computed_tokens,
        invalidated_tokens=played.invalidated_tokens,
        preemptions=played.preemptions,
        fetched_tokens=played.fetched_tokens,
        steps=played.steps,
        host_s=played.host_s,
    )


def cases(options: argparse.Namespace) -> list[Case]:
    """Every row of the tables, the longest first."""
    traces = [("crawl", 4.0, 10.0), *(("crawl", qps, 1.0) for qps in (4.0, 2.0, 1.0, 0.5))]
    traces += [("ann", 2.0, 30.0), *(("ann", qps, 1.0) for qps in (2.0, 1.0, 0.5, 0.25))]
    wanted = [t for t in traces if options.only in f"{t[0]} {t[1]:g} x{t[2]:g} "]
    return [
        Case(kind, qps, factor, policy, options.queries if kind == "crawl" else 500, options.seed,
             options.step_tokens)
        for kind, qps, factor in wanted
        for policy in (WAITING, *POLICIES, *([WITHOUT_SWAP] if factor != 1 else ()))
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=4322, help="of the crawl")
    parser.add_argument("--only", default="", help="traces whose name has this, e.g. 'crawl 4 x1 '")
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    wanted = cases(options)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = dict(zip((c.name for c in wanted), pool.map(run, wanted), strict=True))
    report(wanted, rows, options)
    return 0


def report(wanted: Sequence[Case], rows: dict[str, Row], options: argparse.Namespace) -> None:
    """Print the tables, and the JSON object as the last line."""
    print(
        f"{machine()}, {vllm_version()}; seed {options.seed}; "
        f"{options.queries} crawl and 500 ANN queries; steps of {options.step_tokens} tokens; "
        "ESTIMATED step times of Llama-3.1-8B on 2x H100 (2x H200 where delays are multiplied, "
        f"with {HOST_BYTES >> 30} GiB of host memory)"
    )
    head = f"{'trace and policy':28}{'TTFT P50 / P95 / P99, s':>25}{'published':>24}"
    head += f"{'speed-up':>20}{'published':>20}{'worst':>7}{'oracle':>8}{'ends':>8}{'preempt':>9}"
    head += f"{'recomp.':>9}{'fetched':>9}{'inval.':>9}"
    trace = ""
    for case in wanted:
        if case.trace != trace:
            trace = case.trace
            print("\n" + head)
        print(line(case, rows[case.name], rows[f"{case.trace} {WAITING}"]))
    print(LEGEND)
    trust(rows)
    result = {case.name: asdict(rows[case.name]) for case in wanted}
    print(json.dumps({"benchmark": "sim", "rows": result, "published_s": TTFT_S}))


LEGEND = """
speed-up: over non-streaming in this simulation; worst: the least of it over the percentiles 1 to
99 and the largest TTFT. oracle: median ratio of a query's TTFT to the same query's alone. ends:
completion time of the trace over non-streaming's. recomp., fetched, inval.: thousands of tokens
computed beyond what non-streaming computes, got back from host memory, given back by updates."""


def line(case: Case, row: Row, base: Row) -> str:
    """One row of a table."""
    gain = [b / t for b, t in zip(base.ttft_s, row.ttft_s, strict=True)]
    cuts = gain[49], gain[94], gain[98]
    published = slashed(SPEEDUPS.get(case.name), 1)
    return (
        f"{case.name:28}{slashed(row.cuts_s, 3):>25}{slashed(TTFT_S.get(case.name), 3):>24}"
        f"{slashed(cuts, 1):>20}{published:>20}{min(gain):>7.2f}"
        f"{row.over_oracle:>8.1f}{row.completion_s / base.completion_s:>8.3f}{row.preemptions:>9}"
        f"{(row.computed_tokens - base.computed_tokens) / 1000:>9.0f}"
        f"{row.fetched_tokens / 1000:>9.0f}{row.invalidated_tokens / 1000:>9.0f}"
    )


def trust(rows: Mapping[str, Row]) -> None:
    """Print how far the simulation is from the published rows that it was fitted to."""
    off = {
        name: [s / p for s, p in zip(rows[name].cuts_s, published, strict=True)]
        for name, published in TTFT_S.items()
        if name in rows
    }
    for kind in (WAITING, "default"):
        if of_kind := [ratios for name, ratios in off.items() if name.endswith(kind)]:
            means = [statistics.geometric_mean(column) for column in zip(*of_kind, strict=True)]
            least, most = min(map(min, of_kind)), max(map(max, of_kind))
            print(
                f"\n{kind}, simulated over published: geometric mean over {len(of_kind)} traces "
                f"{slashed(means, 2)} at P50 / P95 / P99; from {least:.2f} to {most:.2f}"
            )


if __name__ == "__main__":
    sys.exit(main())
