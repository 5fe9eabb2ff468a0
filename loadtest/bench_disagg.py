"""The ways to have an engine read a prompt that is still arriving, on a real vLLM.

The traces of `loadtest.bench_policies`, scaled down to a small model on a CPU, but with room for
the KV of all prompts: how each way fares when memory is short is that benchmark's matter. Every row
plays the same trace, under a cache salt of its own. The tokens are random. One engine at a time.

- `wait-then-send`: stock vLLM; each prompt is sent whole when its retrieval ends.
- `cache warming`: stock vLLM; one-token completions leave the growing prompt in its prefix cache.
- `StreamingInput`: stock vLLM's own streaming, which can only append: when a list changes, its
  session is given up and a new one is begun with the whole list.
- `plug-in`: this project's, by its default policy.

TTFT counts from when the last input is due to the first token of the answer. `computed`: tokens
computed, as vLLM itself logs for each step, by tokens of all final prompts and answers; 1.00 is
each of them once. `ends`: when the last answer was complete. `differ`: greedy answers whose tokens
are not those of `wait-then-send`.

`make bench-disagg`; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from deploy.local import engine
from loadtest.bench_policies import introduce
from loadtest.report import slashed
from loadtest.targets import SessionOfParts, Streamed, Warmed, Whole
from loadtest.trial import (
    GAP_FACTORS,
    SESSIONS,
    WARMING,
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

PLUGIN = "srpf"
"""The policy that the plug-in has by default."""
NAMES = {WHOLE: "wait-then-send", PLUGIN: "plug-in"}
COLUMNS = ("computed", "ends, s", "answered", "errors", "differ")


def sides(options: argparse.Namespace, blocks: int) -> Iterator[list[Side]]:
    """The rows, those together that are played on one engine."""
    plain = stock(blocks, options.step_tokens)
    sessions = replace(plain, module="loadtest.stock_streaming")
    yield [Side((WHOLE,), Whole, plain), Side((WARMING,), Warmed, plain)]
    yield [Side((SESSIONS,), SessionOfParts, sessions)]
    yield [Side((PLUGIN,), Streamed, replace(plain, plugin=True))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=24, help="in each trace")
    parser.add_argument("--tokens", type=int, default=288, help="of the mean prompt")
    parser.add_argument("--answer-tokens", type=int, default=4)
    parser.add_argument("--step-tokens", type=int, default=128)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds without a step")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    loads = [load_of(name, options.queries, options.tokens, options.seed) for name in GAP_FACTORS]
    blocks = pool_blocks(loads, memory_share=1)
    introduce(loads, blocks, options)
    found: list[tuple[Row, list[Outcome]]] = []
    for together in sides(options, blocks):
        with engine(together[0].options) as server:
            server.start().wait_ready(300)
            for side in together:
                found += asyncio.run(measure(side, server, loads, options))
    rows = compared(found)
    report(rows, loads, options)
    return 0 if all(row.errors == 0 for row in rows) else 1


def report(rows: Sequence[Row], loads: Sequence[Load], options: argparse.Namespace) -> None:
    """Print the table, and the JSON object as the last line."""
    print(f"\n{'':23}{'TTFT P50 / P95, s':>20}" + "".join(f"{c:>12}" for c in COLUMNS))
    needed = {load.name: load.needed_tokens(options.answer_tokens) for load in loads}
    for row in sorted(rows, key=lambda row: list(needed).index(row.workload)):
        name = f"{row.workload} {NAMES.get(row.name, row.name)}"
        ttft_s = slashed(row.ttft_s and row.ttft_s[:2], 2) or "-"
        print(
            f"{name:23}{ttft_s:>20}"
            + "".join(f"{cell:>12}" for cell in cells(row, needed[row.workload]))
        )
    print(f"\ntokens needed: {', '.join(f'{name} {count}' for name, count in needed.items())}")
    result = {"needed_tokens": needed, "settings": vars(options), "rows": list(map(asdict, rows))}
    print(json.dumps({"benchmark": "disagg", **result}))


def cells(row: Row, needed_tokens: int) -> list[str]:
    """A row's cells under `COLUMNS`."""
    recomputed, ends_s = row.recomputed_tokens, row.completion_s
    return [
        "-" if recomputed is None else f"{1 + recomputed / needed_tokens:.2f}",
        "-" if ends_s is None else f"{ends_s:.1f}",
        f"{row.answered}/{row.queries}",
        str(row.errors),
        str(row.differing),
    ]


if __name__ == "__main__":
    sys.exit(main())
