"""What one tenant's flood does to the others: TTFT on the simulated engine, in virtual time.

Tenants of equal weight bring synthetic crawls (`workload.py`) to one engine, the same share each of
a load that it holds; then one of them brings ten times its share on top of the same arrivals of
the others. Both with turns among tenants and without, where the engine knows of no tenants. The
scheduler is the one that ships, step times are estimates (`engine_adapter/simulated/hardware.py`),
and a seed gives the same figures however busy the machine is.

`make bench-fairness`. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context

from loadtest.report import machine, p50_p95_p99, vllm_version
from loadtest.simulation import Replay, simulated_engine
from loadtest.workload import Query, crawl

CAPACITY_QPS = 6.2
"""Crawls of 8,900 tokens a second that full steps would compute, by the estimates: a load is a
share of it."""

STEP_TOKENS = 8192
ANSWER_TOKENS = 32
FIRST_S = 15.0
"""Queries that come sooner are not counted: open streams and backlogs must build up."""

SCENES = ("at their share", "one at 10x")


@dataclass(frozen=True, slots=True)
class Case:
    """One run. Its name is what is compared."""

    load: float
    """Of all tenants together, each at its share, over what the engine can compute."""
    flooded: bool
    fair: bool
    seed: int
    tenants: int
    seconds: float
    """Of arrivals."""
    flood: float


@dataclass(frozen=True, slots=True)
class Row:
    """TTFT of the tenants that keep to their share, all of them together."""

    p50_s: float
    p95_s: float
    queries: int
    flooder_p50_s: float
    """Of what the first tenant got answered in the same time."""


def run(case: Case) -> Row:
    """Play one case until all others have their first tokens."""
    traces = [_arrivals(case, tenant) for tenant in range(case.tenants)]
    trace = sorted((q for queries in traces for q in queries), key=lambda query: query.arrival_s)
    salts = {str(q.query_id): f"t{t}" for t, queries in enumerate(traces) for q in queries}
    counted = {str(q.query_id) for q in trace if q.arrival_s >= FIRST_S}
    others = {name for name in counted if salts[name] != "t0"}
    replay = Replay(
        simulated_engine(step_tokens=STEP_TOKENS),
        trace,
        salts=salts,
        weight=1.0 if case.fair else None,
        max_tokens=ANSWER_TOKENS,
    )
    replay.run(others)
    p50_s, p95_s, _ = p50_p95_p99([replay.ttft_s[name] for name in others])
    own = [s for name, s in replay.ttft_s.items() if name in counted - others]
    return Row(p50_s, p95_s, len(others), statistics.median(own))


def _arrivals(case: Case, tenant: int) -> list[Query]:
    """A tenant's queries: the same for all cases with one seed and load, but the flood's."""
    qps = case.load * CAPACITY_QPS / case.tenants
    if tenant == 0 and case.flooded:
        qps *= case.flood
    queries = crawl(round(qps * case.seconds), qps, case.seed * 1000 + tenant)
    return [
        replace(
            query,
            query_id=query.query_id * case.tenants + tenant,
            inputs=tuple(
                replace(
                    given,
                    documents=tuple(
                        replace(d, doc_id=d.doc_id * case.tenants + tenant) for d in given.documents
                    ),
                )
                for given in query.inputs
            ),
        )
        for query in queries
    ]


def cases(options: argparse.Namespace) -> list[Case]:
    """All runs, those that are compared one after the other."""
    return [
        Case(load, flooded, fair, seed, options.tenants, options.seconds, options.flood)
        for load in options.loads
        for fair in (True, False)
        for flooded in (False, True)
        for seed in range(1, options.seeds + 1)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tenants", type=int, default=5)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.8])
    parser.add_argument("--flood", type=float, default=10.0, help="times its share")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    wanted = cases(options)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        rows = dict(zip(wanted, pool.map(run, wanted), strict=True))
    report(rows, options)
    return 0


def report(rows: dict[Case, Row], options: argparse.Namespace) -> None:
    """Print the table, and the JSON object as the last line."""
    print(
        f"{machine()}, {vllm_version()}; seeds 1 to {options.seeds}; {options.tenants} tenants of "
        f"equal weight, {options.seconds:g} s of crawls, the first {FIRST_S:g} s not counted; "
        f"answers of {ANSWER_TOKENS} tokens, steps of {STEP_TOKENS}; ESTIMATED step times of "
        "Llama-3.1-8B on 2x H100"
    )
    print(
        "\nTTFT of the others, s, and by how much it rises with the flood: median over the seeds "
        "(least - most).\n'over none': P95 over that of an engine that knows no tenants and has no "
        f"flood.\n{'load':>5}  {'turns':6}{'':15}{'P50':>22}{'P95':>22}{'P50 rises':>22}"
        f"{'P95 rises':>22}{'over none':>22}{'flooder P50':>12}"
    )
    for load in options.loads:
        none = [row.p95_s for row in _of(rows, load, False, False)]
        for fair in (True, False):
            calm = _of(rows, load, fair, False)
            for flooded in (False, True):
                found = _of(rows, load, fair, flooded)
                p50_s, p95_s = [row.p50_s for row in found], [row.p95_s for row in found]
                rises = ("", "")
                if flooded:
                    rises = (
                        _rise(p50_s, [row.p50_s for row in calm]),
                        _rise(p95_s, [row.p95_s for row in calm]),
                    )
                print(
                    f"{load:>5.0%}  {'yes' if fair else 'no':6}{SCENES[flooded]:15}"
                    f"{_spread(p50_s):>22}{_spread(p95_s):>22}{rises[0]:>22}{rises[1]:>22}"
                    f"{_rise(p95_s, none):>22}"
                    f"{statistics.median(row.flooder_p50_s for row in found):>12.2f}"
                )
    result = [asdict(case) | asdict(row) for case, row in rows.items()]
    print(json.dumps({"benchmark": "fairness", "rows": result}))


def _of(rows: dict[Case, Row], load: float, fair: bool, flooded: bool) -> list[Row]:
    """Of all seeds."""
    wanted = (load, fair, flooded)
    return [row for case, row in rows.items() if (case.load, case.fair, case.flooded) == wanted]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def _rise(after: Sequence[float], before: Sequence[float]) -> str:
    """Of each seed's own."""
    times = [a / b for a, b in zip(after, before, strict=True)]
    middle, least, most = map(_change, (statistics.median(times), min(times), max(times)))
    return f"{middle} ({least} - {most})"


def _change(times: float) -> str:
    return f"{times - 1:+.0%}" if times < 3 else f"{times:.0f}x"


if __name__ == "__main__":
    sys.exit(main())
