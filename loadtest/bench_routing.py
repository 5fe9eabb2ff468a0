"""Which engine a stream goes to: by prefix, by load, in turn, on two real engines.

A third of the queries share their documents with others; the rest have documents of their own.
Queries arrive at Poisson times, stream their documents in chunks, and ask. The engines have a core
each. All policies get the same queries in the same rounds; only the first words differ from round
to round, so that no round finds the KV of another.

- `hits`: share of prompt tokens that vLLM's prefix cache had, by its own counters.
- `shared`, `own`: TTFT of the queries that share documents and of the others, from the end of the
  input, in seconds.

`make bench-routing`; the last line is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import httpx

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
            for policy in POLICIES:
                rounds.append(asyncio.run(play(policy, seed, fronts[policy], engines, queries)))
    report(rounds, options)
    return 0


def start(running: ExitStack) -> tuple[list[Server], dict[str, Server]]:
    """Two engines, and a gateway for each policy in front of both."""
    engines = [
        running.enter_context(engine(EngineOptions(cores=core, kv_events=True))).start()
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
    before = await counters(engines)
    begun_s = time.perf_counter()
    async with Client(front.url, timeout_s=300) as client:
        ttfts = await asyncio.gather(
            *(ask(client, f"{policy} {seed}", query, begun_s) for query in queries)
        )
    all_s = time.perf_counter() - begun_s
    after = await counters(engines)
    queried, hit = (b - a for a, b in zip(before, after, strict=True))
    both = list(zip(queries, ttfts, strict=True))
    return Round(
        policy=policy,
        seed=seed,
        hits=hit / queried if queried else 0.0,
        shared=p50_p95_p99([t for query, t in both if query.shared]),
        own=p50_p95_p99([t for query, t in both if not query.shared]),
        all_s=all_s,
    )


async def ask(client: Client, salt: str, query: Query, begun_s: float) -> float:
    """Seconds from the end of the input to the first token."""
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
    return first_s - closed_s


async def counters(engines: list[Server]) -> tuple[float, float]:
    """Tokens that prefix caches were asked for, and that they had, on all engines."""
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    sums = [0.0, 0.0]
    async with httpx.AsyncClient(trust_env=False) as http:
        for server in engines:
            for line in (await http.get(server.url + "/metrics")).text.splitlines():
                for i, name in enumerate(names):
                    if line.startswith(name):
                        sums[i] += float(line.rsplit(" ", 1)[1])
    return sums[0], sums[1]


def report(rounds: list[Round], options: argparse.Namespace) -> None:
    """Print medians over the rounds, and the JSON object as the last line."""
    print(f"{machine()}, {vllm_version()}, {MODEL_NAME}, two engines on a core each; seeds "
          f"{options.seed}..{options.seed + options.rounds - 1}, {options.queries} queries a round, "
          f"{options.rate:g} a second; medians of rounds")  # fmt: skip
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
