"""Which engine a stream goes to: by prefix, by load, in turn, on two real engines.

A third of the queries share their documents with others; the rest have documents of their own.
Queries arrive at Poisson times, stream their documents in chunks, and ask. The engines have a core
each. All policies get the same queries in the same rounds; only the first words differ from round
to round, so that no round finds the KV of another.

- `hits`: share of all prompt tokens that no engine had to compute, by what vLLM logs of each step.
- `shared`, `own`: TTFT of the queries that share documents and of the others, from the end of the
  input, in seconds.

`make bench-routing`; the last line is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from deploy.local import EngineOptions, Server, engine, gateway, redis_server
from deploy.model import MODEL_NAME
from gateway.client import Client
from loadtest.report import Cuts, machine, p50_p95_p99, slashed, vllm_version

POLICIES = ("prefix", "least-load", "round-robin")
SHARED_SETS = 3
CHUNKS = 4
CHUNK_WORDS = 110
GAP_S = 0.15
ANSWER_TOKENS = 8
LOG_STEPS = ("--enable-logging-iteration-details",)
SETTLED_S = 1.0
CONTEXT = re.compile(r"(\d+) context tokens, ")


@dataclass(frozen=True, slots=True)
class Query:
    """When it comes, and what it brings."""

    due_s: float
    shared: bool
    chunks: tuple[str, ...]
    question: str


@dataclass(frozen=True, slots=True)
class Round:
    """What one policy did with one round of queries. Times in seconds."""

    policy: str
    seed: int
    hits: float
    shared: Cuts
    own: Cuts
    all_s: float
    """From the first query to the last answer."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=36, help="in each round")
    parser.add_argument("--rate", type=float, default=1.0, help="queries per second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with ExitStack() as running:
        engines, fronts = start(running)
        rounds = []
        for seed in range(options.seed, options.seed + options.rounds):
            queries = workload(random.Random(seed), options.queries, options.rate)
            rounds += [
                asyncio.run(play(policy, seed, fronts[policy], engines, queries))
                for policy in POLICIES
            ]
    report(rounds, options)
    return 0


def start(running: ExitStack) -> tuple[list[Server], dict[str, Server]]:
    """Two engines, and a gateway for each policy in front of both."""
    engines = [
        running.enter_context(
            engine(EngineOptions(cores=core, kv_events=True, extra_args=LOG_STEPS))
        ).start()
        for core in ("0", "1")
    ]
    redis = running.enter_context(redis_server()).start()
    for server in engines:
        server.wait_ready(300)
    redis.wait_ready(20)
    fronts = {}
    for policy in POLICIES:
        extra = ["--index", redis.url, "--routing", policy]
        fronts[policy] = running.enter_context(gateway([e.url for e in engines], extra)).start()
    for front in fronts.values():
        front.wait_ready(60)
    return engines, fronts


def workload(rng: random.Random, n: int, rate: float) -> list[Query]:
    """Queries at Poisson times, every third of which has one of a few sets of documents."""
    sets = [documents(rng) for _ in range(SHARED_SETS)]
    due_s, queries = 0.0, []
    for i in range(n):
        due_s += rng.expovariate(rate)
        shared = i % 3 == 0
        chunks = rng.choice(sets) if shared else documents(rng)
        queries.append(Query(due_s, shared, chunks, f"Question {rng.randrange(10**6)}?"))
    return queries


def documents(rng: random.Random) -> tuple[str, ...]:
    words = [
        f"{rng.choice('bcdfgl')}{rng.choice('aeiou')}{rng.choice('mnrst')}" for _ in range(300)
    ]
    return tuple(" ".join(rng.choices(words, k=CHUNK_WORDS)) for _ in range(CHUNKS))


async def play(
    policy: str, seed: int, front: Server, engines: list[Server], queries: list[Query]
) -> Round:
    """One round."""
    before = await computed_tokens(engines)
    begun_s = time.perf_counter()
    async with Client(front.url, timeout_s=300) as client:
        asked = await asyncio.gather(
            *(ask(client, f"{policy} {seed}", query, begun_s) for query in queries)
        )
    all_s = time.perf_counter() - begun_s
    computed = await computed_tokens(engines) - before
    prompt_tokens = sum(tokens for _, tokens in asked)
    both = [(query, ttft_s) for query, (ttft_s, _) in zip(queries, asked, strict=True)]
    return Round(
        policy=policy,
        seed=seed,
        hits=1 - computed / prompt_tokens,
        shared=p50_p95_p99([t for query, t in both if query.shared]),
        own=p50_p95_p99([t for query, t in both if not query.shared]),
        all_s=all_s,
    )


async def ask(client: Client, salt: str, query: Query, begun_s: float) -> tuple[float, int]:
    """Seconds from the end of the input to the first token, and tokens of the prompt."""
    await asyncio.sleep(max(begun_s + query.due_s - time.perf_counter(), 0))
    messages = [
        {"role": "system", "content": f"{salt}. Use this: {{{{documents}}}}"},
        {"role": "user", "content": query.question},
    ]
    options = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    async with client.stream(MODEL_NAME, messages, **options) as stream:
        for chunk in query.chunks:
            await stream.send(chunk)
            await asyncio.sleep(GAP_S)
        closed_s, first_s = time.perf_counter(), None
        async for _ in stream.answer():
            first_s = first_s or time.perf_counter()
    assert first_s is not None
    assert stream.usage is not None
    return first_s - closed_s, stream.usage["prompt_tokens"]


async def computed_tokens(engines: list[Server]) -> int:
    """Prompt tokens that all engines have computed since their start, once they are idle."""
    before, computed = -1, 0
    while computed != before:
        await asyncio.sleep(SETTLED_S)
        before, computed = computed, 0
        for server in engines:
            steps = CONTEXT.findall(server.log_path.read_text(errors="replace"))
            computed += sum(map(int, steps))
    return computed


def report(rounds: list[Round], options: argparse.Namespace) -> None:
    """Print medians over the rounds, and the JSON object as the last line."""
    print(f"{machine()}, {vllm_version()}, {MODEL_NAME}, two engines on a core each; seeds "
          f"{options.seed}..{options.seed + options.rounds - 1}, {options.queries} queries a "
          f"round, {options.rate:g} a second; medians of rounds")  # fmt: skip
    print(f"{'policy':14}{'hits (spread)':>22}{'shared P50/95/99':>24}{'own P50/95/99':>24}"
          f"{'all, s':>10}")  # fmt: skip
    for policy in POLICIES:
        mine = [r for r in rounds if r.policy == policy]
        hits = [r.hits for r in mine]
        spread = f"{statistics.median(hits):.2f} ({min(hits):.2f} - {max(hits):.2f})"
        shared, own = (
            slashed([statistics.median(cut) for cut in zip(*cuts, strict=True)], 2)
            for cuts in ([r.shared for r in mine], [r.own for r in mine])
        )
        all_s = statistics.median(r.all_s for r in mine)
        print(f"{policy:14}{spread:>22}{shared:>24}{own:>24}{all_s:>10.1f}")
    print(json.dumps({"benchmark": "routing", "rounds": [asdict(r) for r in rounds]}))


if __name__ == "__main__":
    sys.exit(main())
