"""What it costs to decide one step: order all unfinished requests, and plan.

Two mixes of requests: `streams` (nine of ten are open prompts, most of them idle, as in a crawl)
and `answers` (all are decoding). Views are made beforehand: making them is the scheduler's part
and is not in the figures. `make bench-plan`; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable

from engine_adapter.scheduling.plan import View, plan
from engine_adapter.scheduling.policies import POLICIES, Policy, order

SIZES = (100, 500, 1000, 5000)
GOAL_US = 100.0
STEP_TOKENS = 8192


def stream_mix(rng: random.Random, i: int) -> View:
    """One of a crawl's requests: mostly idle open prompts, some with work, some full."""
    full, idle = rng.random() < 0.1, rng.random() < 0.8
    arrival_s, computed = rng.uniform(0, 20), rng.randrange(0, 9000)
    held = -(-computed // 16)
    return View(
        request_id=f"r{i}",
        full=full,
        arrival_s=arrival_s,
        last_input_s=arrival_s + rng.uniform(0, 9),
        computed_tokens=computed,
        remaining_tokens=0 if idle and not full else rng.randrange(1, 2000),
        held_blocks=held,
        needed_blocks=held + 10,
        divisible=not full,
        step_tokens=STEP_TOKENS,
    )


def answer_mix(rng: random.Random, i: int) -> View:
    """A request that is being answered, one token a step."""
    arrival_s, computed = rng.uniform(0, 20), rng.randrange(100, 9000)
    held = -(-computed // 16)
    return View(
        request_id=f"r{i}",
        full=True,
        arrival_s=arrival_s,
        last_input_s=arrival_s,
        computed_tokens=computed,
        remaining_tokens=1,
        held_blocks=held,
        needed_blocks=held,
        decoding=True,
        running=True,
        step_tokens=STEP_TOKENS,
    )


MIXES: dict[str, Callable[[random.Random, int], View]] = {
    "streams": stream_mix,
    "answers": answer_mix,
}


def measure_us(views: list[View], policy: Policy, repeats: int) -> list[float]:
    """Microseconds of each repetition of order and plan."""
    taken = []
    for _ in range(repeats):
        begun_ns = time.perf_counter_ns()
        plan(
            order(views, policy),
            budget_tokens=STEP_TOKENS,
            free_blocks=1000,
            slots=1024,
            may_take=policy.may_take,
        )
        taken.append((time.perf_counter_ns() - begun_ns) / 1000)
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"machine: {platform.processor() or platform.machine()}, {os.cpu_count()} cores; "
          f"Python {platform.python_version()}; seed {options.seed}; microseconds, "
          f"P50 (P99) of {options.repeats}; goal at 500: P50 {GOAL_US:g}")  # fmt: skip
    print(f"{'mix and policy':20}" + "".join(f"{n:>18}" for n in SIZES))
    rows = {}
    for mix, make in MIXES.items():
        for policy in POLICIES.values():
            line = []
            for size in SIZES:
                rng = random.Random(options.seed)
                views = [make(rng, i) for i in range(size)]
                cuts = statistics.quantiles(measure_us(views, policy, options.repeats), n=100)
                line.append((round(cuts[49], 1), round(cuts[98], 1)))
            rows[f"{mix} {policy.name}"] = dict(zip(map(str, SIZES), line, strict=True))
            cells = "".join(f"{f'{p50:.0f} ({p99:.0f})':>18}" for p50, p99 in line)
            print(f"{mix + ' ' + policy.name:20}{cells}")
    print(json.dumps({"benchmark": "plan", "unit": "us", "goal_us": GOAL_US, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
