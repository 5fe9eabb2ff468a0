"""The policies beside each other on a real vLLM, and beside vLLM without the plug-in.

Two traces with the published statistics (arXiv 2604.16395), scaled down to what a small model on a
CPU can do: `crawl` only appends, `ann` replaces ranked lists. Arrivals are open loop (Poisson),
at the rate at which 24 prompts would be open on average if answering took no time; the KV pool has
a quarter of the tokens of 24 mean prompts. Every row plays the same trace, under a cache salt of
its own, so that none finds another's KV. The tokens are random.

- `non-streaming`: stock vLLM; each prompt is sent whole when its retrieval ends.
- `StreamingInput`: stock vLLM's own streaming, which can only append: when a list changes, its
  session is given up and a new one is begun with the whole list.
- the others: the plug-in, by that policy.

TTFT counts from when the last input is due to the first token of the answer. `preempted`: how often
KV was taken to make room. `invalidated`: computed tokens whose prompt changed. `recomputed`: tokens
computed (as vLLM itself logs for each step) beyond those of all final prompts and answers, the
invalidated ones included. A row ends early when, all input handed over, nothing is computed for
`--patience` seconds: then `answered` says how many got their answer. `differ`: greedy answers whose
tokens are not those of `non-streaming`.

`make bench-policies`; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from deploy.local import engine
from loadtest.report import machine, slashed, vllm_version
from loadtest.targets import SessionOfParts, Streamed, Whole
from loadtest.trial import (
    BLOCK_TOKENS,
    GAP_FACTORS,
    POLICIES,
    SESSIONS,
    STABLE_SHARE,
    WHOLE,
    Load,
    Outcome,
    Row,
    Side,
    compared,
    load_of,
    measure,
    pool_blocks,
    stock,
)

COLUMNS = ("preempted", "invalidated", "recomputed", "ends, s", "open", "answered", "errors",
           "differ")  # fmt: skip


def sides(options: argparse.Namespace, blocks: int) -> list[Side]:
    """The three engines, which differ in nothing but what the rows are about."""
    plain = stock(blocks, options.step_tokens)
    sessions = replace(plain, module="loadtest.stock_streaming")
    return [
        Side((WHOLE,), Whole, plain),
        Side((SESSIONS,), SessionOfParts, sessions),
        Side(POLICIES, Streamed, replace(plain, plugin=True)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=36, help="in each trace")
    parser.add_argument("--tokens", type=int, default=288, help="of the mean prompt")
    parser.add_argument("--answer-tokens", type=int, default=4)
    parser.add_argument("--step-tokens", type=int, default=128)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds; see above")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    loads = [load_of(name, options.queries, options.tokens, options.seed) for name in GAP_FACTORS]
    blocks = pool_blocks(loads)
    introduce(loads, blocks, options)
    found: list[tuple[Row, list[Outcome]]] = []
    for side in sides(options, blocks):
        with engine(side.options) as server:
            server.start().wait_ready(300)
            found += asyncio.run(measure(side, server, loads, options))
    rows = compared(found)
    report(rows, loads, options)
    return 0 if all(row.errors == 0 for row in rows) else 1


def introduce(loads: Sequence[Load], blocks: int, options: argparse.Namespace) -> None:
    """Print what the figures depend on."""
    print(
        f"{machine()}, {vllm_version()}; load average {os.getloadavg()[0]:.1f} before the start; "
        f"smollm2-135m-instruct, float32; seed {options.seed}; steps of {options.step_tokens} "
        f"tokens; KV pool of {blocks * BLOCK_TOKENS} tokens in {blocks} blocks; answers of "
        f"{options.answer_tokens} tokens; random prompts; ANN lists keep {STABLE_SHARE:.0%}"
    )
    for load in loads:
        lengths = [len(script.prompt) for script in load.scripts]
        inputs = sum(len(script.due_s) for script in load.scripts)
        print(
            f"  {load.name}: {len(lengths)} prompts of {statistics.fmean(lengths):.0f} tokens, "
            f"{max(lengths)} at most; {inputs} inputs in {load.ends_s:.0f} s; gaps "
            f"x{GAP_FACTORS[load.name]:g}; {load.qps:.2g} queries/s; up to {load.open_at_once} "
            "open at once by the trace alone"
        )


def report(rows: Sequence[Row], loads: Sequence[Load], options: argparse.Namespace) -> None:
    """Print the table, and the JSON object as the last line."""
    print(f"\n{'':23}{'TTFT P50 / P95 / P99, s':>25}" + "".join(f"{c:>12}" for c in COLUMNS))
    for row in sorted(rows, key=lambda row: [load.name for load in loads].index(row.workload)):
        name, ttft_s = f"{row.workload} {row.name}", slashed(row.ttft_s, 2) or "-"
        print(f"{name:23}{ttft_s:>25}" + "".join(f"{cell:>12}" for cell in cells(row)))
    needed = {load.name: load.needed_tokens(options.answer_tokens) for load in loads}
    print(
        f"\ntokens needed: {', '.join(f'{name} {count}' for name, count in needed.items())}. TTFT: "
        "of those answered. open: prompts between first input and end of answer, at most."
    )
    result = {"needed_tokens": needed, "settings": vars(options), "rows": list(map(asdict, rows))}
    print(json.dumps({"benchmark": "policies", **result}))


def cells(row: Row) -> list[str]:
    """A row's cells under `COLUMNS`."""
    ends = None if row.completion_s is None else f"{row.completion_s:.1f}"
    values = (
        row.preemptions,
        row.invalidated_tokens,
        row.recomputed_tokens,
        ends,
        row.open_at_once,
        f"{row.answered}/{row.queries}",
        row.errors,
        row.differing,
    )
    return ["-" if value is None else str(value) for value in values]


if __name__ == "__main__":
    sys.exit(main())
