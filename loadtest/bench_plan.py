"""What it costs to decide one step, in the scheduler that ships.

All of deciding is in the figures: finding out what has become of the requests, keeping them in
order, and planning grants and evictions. Carrying a plan out, and vLLM's own `schedule`, are not.
The model is simulated; the scheduler and vLLM's KV cache manager are not.

Three mixes, each with ten updates of a context before every step:

- `streams`: all requests are open prompts, most of them idle, as in a crawl.
- `answers`: every second one is being answered, a token at each step.
- `pressed`: streams in half the memory that they would need.

`make bench-plan`; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import time
from dataclasses import replace

from engine_adapter.scheduling.plan import Plan
from engine_adapter.scheduling.policies import POLICIES
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.simulated.hardware import H200X2, LLAMA_3_1_8B
from loadtest.report import machine

SIZES = (100, 500, 2000, 5000)
MIXES = ("streams", "answers", "pressed")
GOAL_US = 100.0
PROMPT_TOKENS = 256
UPDATES_PER_STEP = 10


def measure_us(mix: str, policy: str, size: int, steps: int, seed: int) -> list[float]:
    """Microseconds that each step's decision took."""
    rng = random.Random(seed)
    room_tokens = size * (PROMPT_TOKENS + 1024) if mix != "pressed" else size * PROMPT_TOKENS // 2
    weights = (LLAMA_3_1_8B.weight_bytes + LLAMA_3_1_8B.kv_bytes_per_token * room_tokens) / 2
    memory = (weights + H200X2.activation_bytes) / H200X2.memory_utilization
    engine = SimulatedEngine(
        replace(H200X2, memory_bytes=memory), LLAMA_3_1_8B, policy=policy, max_requests=size
    )
    streams = range(size if mix != "answers" else size // 2)
    contexts = {i: [i << 16 | n for n in range(PROMPT_TOKENS)] for i in streams}
    for i, context in contexts.items():
        engine.open(str(i), context)
    for i in range(len(streams), size):
        tokens = [i << 16 | n for n in range(PROMPT_TOKENS)]
        engine.finish(str(i), tokens, None, max_tokens=steps + size)
    while any(r.is_prefill_chunk for r in engine.scheduler.running) or engine.counters.steps == 0:
        engine.step()
    for _ in range(-(-size * PROMPT_TOKENS // 2048)):
        engine.step()

    taken: list[float] = []
    decide = engine.scheduler.decide

    def timed() -> Plan:
        begun_ns = time.perf_counter_ns()
        plan = decide()
        taken.append((time.perf_counter_ns() - begun_ns) / 1000)
        return plan

    engine.scheduler.decide = timed  # type: ignore[method-assign]
    for step in range(steps):
        for i in rng.sample(streams, UPDATES_PER_STEP):
            keep = rng.randrange(PROMPT_TOKENS)
            new = [(size + step) << 16 | n for n in range(PROMPT_TOKENS - keep)]
            engine.extend(str(i), keep, new)
        engine.step()
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.getLogger("vllm").setLevel(logging.ERROR)
    print(f"{machine()}; seed {options.seed}; microseconds, "
          f"P50 (P99) of {options.steps} steps; goal at 500: P50 {GOAL_US:g}")  # fmt: skip
    print(f"{'mix and policy':20}" + "".join(f"{n:>18}" for n in SIZES))
    rows = {}
    for mix in MIXES:
        for policy in POLICIES:
            line = []
            for size in SIZES:
                taken = measure_us(mix, policy, size, options.steps, options.seed)
                cuts = statistics.quantiles(taken, n=100)
                line.append((round(cuts[49], 1), round(cuts[98], 1)))
            rows[f"{mix} {policy}"] = dict(zip(map(str, SIZES), line, strict=True))
            cells = "".join(f"{f'{p50:.0f} ({p99:.0f})':>18}" for p50, p99 in line)
            print(f"{mix + ' ' + policy:20}{cells}", flush=True)
    print(json.dumps({"benchmark": "plan", "unit": "us", "goal_us": GOAL_US, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
