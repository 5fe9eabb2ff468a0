"""Two prefill engines and a decode engine beside one engine that does both, on the same cores.

Both are real vLLM behind a gateway. The prefill engines share the first core, the decode engine has
the second; the one engine has both. The same queries go to both, first to the one, then to the
other, in each round; the first words differ from round to round, so that no round finds the KV of
another.

- `streams`: streams that begin at Poisson times, post their context in pieces and are answered; at
  most `--streams` at once.
- `beside`: long answers run while long contexts stream in: the time between their tokens is what
  disaggregation is for.

TTFT: from the end of the input to the first token. ITL: between tokens of one answer. `differ`:
answers that are not those of the one engine, token for token (greedy, float32).

`make bench-pools`; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise

from deploy.local import EngineOptions, Server, engine, gateway
from deploy.model import MODEL_NAME
from gateway.client import Client
from loadtest.report import Cuts, machine, p50_p95_p99, slashed, vllm_version

ONE, POOLS = "one engine", "2 + 1 engines"
LONG_ANSWER_TOKENS = 192
LONG_CONTEXT_WORDS = 300
PIECES, LONG_PIECES = 4, 10
SETTLED_S = 0.5


@dataclass(frozen=True, slots=True)
class Query:
    """When it begins, what it posts, how far apart, and how long its answer is."""

    due_s: float
    chunks: tuple[str, ...]
    gap_s: float
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Times in seconds."""

    text: str
    ttft_s: float
    itl_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What one target did with the queries of one round. Times in seconds."""

    workload: str
    target: str
    seed: int
    ttft: Cuts
    itl: Cuts
    all_s: float
    texts: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=32, help="streams in each round")
    parser.add_argument("--streams", type=int, default=16, help="at once, at most")
    parser.add_argument("--rate", type=float, default=0.8, help="streams that begin per second")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"{machine()}, {vllm_version()}, {MODEL_NAME}, float32; seeds {options.seed}.."
          f"{options.seed + options.rounds - 1}; {options.queries} streams a round, "
          f"{options.rate:g} a second, at most {options.streams} at once", flush=True)  # fmt: skip
    rounds: list[Round] = []
    workloads: dict[str, Callable[[random.Random], list[Query]]] = {
        "streams": lambda rng: streams(rng, options),
        "beside": beside,
    }
    for target, start in ((ONE, start_one), (POOLS, start_pools)):
        with ExitStack() as running:
            front = start(running)
            for seed in range(options.seed, options.seed + options.rounds):
                for name, make in workloads.items():
                    asked = make(random.Random(seed))
                    played = asyncio.run(play(front, f"{name} {seed}", asked, options.streams))
                    rounds.append(measured(name, target, seed, asked, *played))
                    print(f"  {target}, {name} {seed}: {played[1]:.0f} s", flush=True)
    report(rounds, options)
    return 0


def start_one(running: ExitStack) -> Server:
    """A gateway before one engine."""
    server = running.enter_context(engine(EngineOptions(dtype="float32"))).start()
    server.wait_ready(300)
    return running.enter_context(gateway([server.url])).start().wait_ready(60)


def start_pools(running: ExitStack) -> Server:
    """A gateway before two engines that prefill and one that decodes."""
    prefill = EngineOptions(dtype="float32", cores="0", kv_role="kv_producer")
    decode = EngineOptions(dtype="float32", cores="1", kv_role="kv_consumer", plugin=False)
    servers = [
        running.enter_context(engine(options)).start() for options in (prefill, prefill, decode)
    ]
    for server in servers:
        server.wait_ready(300)
    extra = ["--decode-engine", servers[2].url, "--handoff-idle-tokens", "-1"]
    front = gateway([server.url for server in servers[:2]], extra)
    return running.enter_context(front).start().wait_ready(60)


def streams(rng: random.Random, options: argparse.Namespace) -> list[Query]:
    """Contexts of some 180 tokens in pieces; each is open for as long as
    keeps `--streams` of them open."""
    due_s, found = 0.0, []
    for _ in range(options.queries):
        due_s += rng.expovariate(options.rate)
        chunks = tuple(words(rng, 20) for _ in range(PIECES))
        gap_s = options.streams / options.rate / PIECES
        found.append(Query(due_s, chunks, gap_s, options.answer_tokens))
    return found


def beside(rng: random.Random) -> list[Query]:
    """Two long answers, and behind them long contexts with short ones."""
    long = [Query(0.0, (words(rng, 50),), 0.0, LONG_ANSWER_TOKENS) for _ in range(2)]
    return long + [
        Query(
            1.0 + 2 * i,
            tuple(words(rng, LONG_CONTEXT_WORDS // LONG_PIECES) for _ in range(LONG_PIECES)),
            0.2,
            2,
        )
        for i in range(3)
    ]


def words(rng: random.Random, n: int) -> str:
    """Words that nobody has written before."""
    letters = ("bcdfgl", "aeiou", "mnrst")
    return " ".join("".join(map(rng.choice, letters)) for _ in range(n))


async def play(
    front: Server, salt: str, asked: Sequence[Query], at_once: int
) -> tuple[list[Answer], float]:
    """The answers, and the seconds until the last was complete."""
    room = asyncio.Semaphore(at_once)
    begun_s = time.perf_counter()
    async with Client(front.url, timeout_s=300) as client:
        answers = await asyncio.gather(
            *(ask(client, salt, query, begun_s, room) for query in asked)
        )
    all_s = time.perf_counter() - begun_s
    await asyncio.sleep(SETTLED_S)
    return answers, all_s


async def ask(
    client: Client, salt: str, query: Query, begun_s: float, room: asyncio.Semaphore
) -> Answer:
    """One stream, from its beginning to the end of its answer."""
    await asyncio.sleep(max(begun_s + query.due_s - time.perf_counter(), 0))
    messages = [
        {"role": "system", "content": f"{salt}. Use this: {{{{documents}}}}"},
        {"role": "user", "content": "What was that?"},
    ]
    options = {"max_tokens": query.answer_tokens, "temperature": 0, "ignore_eos": True}
    async with room, client.stream(MODEL_NAME, messages, **options) as stream:
        for chunk in query.chunks:
            await stream.send(chunk)
            await asyncio.sleep(query.gap_s)
        closed_s, at_s, pieces = time.perf_counter(), [], []
        async for piece in stream.answer():
            at_s.append(time.perf_counter())
            pieces.append(piece)
    gaps = tuple(after - before for before, after in pairwise(at_s))
    return Answer("".join(pieces), at_s[0] - closed_s, gaps)


def measured(
    workload: str,
    target: str,
    seed: int,
    asked: Sequence[Query],
    answers: Sequence[Answer],
    all_s: float,
) -> Round:
    """The figures of a round. In `beside` only the long answers count."""
    counted = [
        answer
        for query, answer in zip(asked, answers, strict=True)
        if workload != "beside" or query.answer_tokens == LONG_ANSWER_TOKENS
    ]
    return Round(
        workload,
        target,
        seed,
        p50_p95_p99([a.ttft_s for a in answers]),
        p50_p95_p99([gap for a in counted for gap in a.itl_s]),
        all_s,
        tuple(a.text for a in answers),
    )


def report(rounds: list[Round], options: argparse.Namespace) -> None:
    """Print medians over the rounds, and the JSON object as the last line."""
    print(f"\n{'':26}{'TTFT P50 / P95, s':>20}{'ITL P50 / P95, ms':>20}{'ends, s':>9}{'differ':>9}")
    for workload in ("streams", "beside"):
        rows = {}
        for target in (ONE, POOLS):
            mine = [r for r in rounds if (r.workload, r.target) == (workload, target)]
            ttft = middle([r.ttft for r in mine])
            itl = [1000 * gap_s for gap_s in middle([r.itl for r in mine])]
            rows[target] = (*ttft, *itl)
            print(f"{workload + ' ' + target:26}{slashed(ttft, 2):>20}{slashed(itl, 1):>20}"
                  f"{statistics.median(r.all_s for r in mine):>9.1f}"
                  f"{differing(rounds, mine):>9}")  # fmt: skip
        ratios = [a / b for a, b in zip(rows[POOLS], rows[ONE], strict=True)]
        print(f"{workload + ' ratio':26}{slashed(ratios[:2], 2):>20}{slashed(ratios[2:], 2):>20}")
    told = [asdict(r) | {"texts": None} for r in rounds]
    print(json.dumps({"benchmark": "pools", "settings": vars(options), "rounds": told}))


def middle(cuts: Sequence[Cuts]) -> list[float]:
    """Medians of P50 and P95 over rounds."""
    return [statistics.median(cut[i] for cut in cuts) for i in range(2)]


def differing(rounds: Sequence[Round], mine: Sequence[Round]) -> str:
    """Answers of these rounds that are not those of the one engine, of how many."""
    right = {(r.workload, r.seed): r.texts for r in rounds if r.target == ONE}
    pairs = [pair for r in mine for pair in zip(r.texts, right[r.workload, r.seed], strict=True)]
    return f"{sum(a != b for a, b in pairs)}/{len(pairs)}"


if __name__ == "__main__":
    sys.exit(main())
