"""What the index in Redis costs: time of its operations on loopback, and memory.

64 engines hold a million blocks of 16 tokens. The prompt has 16,000 tokens, 1,000 whole blocks:

- `one engine`: one engine holds all of it, each of the others the first 20 blocks.
- `nobody`: no engine holds any of it.
- `everybody`: every engine holds all of it, the worst case.

`hash` names the blocks of the prompt. `apply` takes a batch of 64 blocks stored. `change` adds a
chunk of 250 tokens to a stream of 8,000, whose record is as the gateway keeps it. `ping` is the
shortest round trip there is, to compare with. One client asks one thing after the other.

Memory is what `MEMORY USAGE` says with all samples, and what the server as a whole grew by.

`make bench-index`; the last line is a JSON object. Every run has a server of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise

import uvloop
from redis.asyncio import Redis

from cache_index.index import NAME_BYTES, Change, Splice, StreamRecord
from cache_index.names import Hashing, packed
from cache_index.redis import RedisIndex, engine_keys, record_key
from deploy.local import redis_server
from loadtest.report import Cuts, machine, p50_p95_p99, slashed

ENGINES = [f"http://10.0.0.{n}:8000" for n in range(64)]
BLOCKS = 1_000_000
HEAD_BLOCKS = 20
PROMPT_TOKENS = 16_000
BATCH_BLOCKS = 64
STREAM_TOKENS = 8_000
CHUNK_TOKENS = 250
LEASE_S = 3600.0
HASHING = Hashing.of("sha256", 16)

GOALS = {
    "longest, one engine": (1.0, 3.0),
    "longest, nobody": (1.0, 3.0),
    "longest, everybody": (1.0, 3.0),
}
"""P50 and P99 in milliseconds."""
MEMORY_GOALS = {"block": 64, "stream": 2048}


@dataclass(frozen=True, slots=True)
class Run:
    times_ms: dict[str, Cuts]
    memory_bytes: dict[str, float]


async def measure(url: str, repeats: int, seed: int) -> Run:
    """Fill an empty server, and ask it everything many times."""
    rng = random.Random(seed)
    index, client = RedisIndex(url, timeout_s=10), Redis.from_url(url)
    try:
        empty_bytes = await used_bytes(client)
        prompts = [prompt(rng) for _ in range(3)]
        one, nobody, everybody = [packed(HASHING.chain(tokens)) for tokens in prompts]
        await fill(index, one, everybody, rng)
        full_bytes = await used_bytes(client)
        await index.put("stream", record(rng), LEASE_S)
        memory = {
            "block": await engines_bytes(client) / BLOCKS,
            "block, server": (full_bytes - empty_bytes) / BLOCKS,
            "stream": await stream_bytes(client),
        }

        async def longest(of: bytes) -> None:
            await index.longest(HASHING.family, of, ENGINES)

        async def hash_prompt() -> None:
            packed(HASHING.chain(prompts[0]))

        versions, batches = iter(range(repeats)), iter(range(repeats))

        async def change() -> None:
            await index.change("stream", 0, next(versions), chunk(rng), LEASE_S)

        async def apply() -> None:
            first, stored = next(batches), rng.randbytes(BATCH_BLOCKS * NAME_BYTES)
            await index.apply(
                HASHING.family, ENGINES[0], "i", first, first + 1, stored, b"", LEASE_S
            )

        operations: dict[str, Callable[[], Awaitable[object]]] = {
            "ping": client.ping,
            "hash": hash_prompt,
            "longest, one engine": lambda: longest(one),
            "longest, nobody": lambda: longest(nobody),
            "longest, everybody": lambda: longest(everybody),
            "apply": apply,
            "change": change,
        }
        times = {name: await timed_ms(ask, repeats) for name, ask in operations.items()}
        return Run(times, memory)
    finally:
        await index.close()
        await client.aclose()


async def fill(index: RedisIndex, one: bytes, everybody: bytes, rng: random.Random) -> None:
    """Let the engines hold what they hold, and other blocks to make up the number."""
    cuts = [BLOCKS * n // len(ENGINES) for n in range(len(ENGINES) + 1)]
    for n, (first, last) in enumerate(pairwise(cuts)):
        known = everybody + (one if n == 7 else one[: HEAD_BLOCKS * NAME_BYTES])
        others = rng.randbytes((last - first) * NAME_BYTES - len(known))
        await index.rebuild(HASHING.family, ENGINES[n], "i", 0, others + known, LEASE_S)


async def timed_ms(ask: Callable[[], Awaitable[object]], repeats: int) -> Cuts:
    taken = []
    for _ in range(repeats):
        begun_ns = time.perf_counter_ns()
        await ask()
        taken.append((time.perf_counter_ns() - begun_ns) / 1e6)
    return p50_p95_p99(taken)


def prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(128_000) for _ in range(PROMPT_TOKENS)]


def record(rng: random.Random) -> StreamRecord:
    """Of an open stream of 8 documents, as big as the gateway's."""
    return StreamRecord(
        epoch=0,
        version=0,
        holder="http://10.1.0.1:8080",
        engine=ENGINES[0],
        state="open",
        about=rng.randbytes(400),
        posts=rng.randbytes(8 * 20),
        documents=rng.randbytes(8 * 40),
        names=rng.randbytes(STREAM_TOKENS // HASHING.block_size * NAME_BYTES),
    )


def chunk(rng: random.Random) -> Change:
    """One more chunk; the oldest goes, so that the record stays as long as it was."""
    names = CHUNK_TOKENS // HASHING.block_size * NAME_BYTES
    return Change(
        posts=Splice(drop=20, add=rng.randbytes(20)),
        documents=Splice(drop=40, add=rng.randbytes(40)),
        names=Splice(drop=names, add=rng.randbytes(names)),
    )


async def used_bytes(client: Redis) -> int:
    return int((await client.info("memory"))["used_memory"])


async def key_bytes(client: Redis, keys: Sequence[str]) -> int:
    return sum([await client.memory_usage(key, samples=0) or 0 for key in keys])


async def engines_bytes(client: Redis) -> int:
    """Of all that is kept about engines."""
    return sum([await key_bytes(client, engine_keys(HASHING.family, e)) for e in ENGINES])


async def stream_bytes(client: Redis) -> int:
    """Of a stream's record, without the names in it."""
    names_bytes = STREAM_TOKENS // HASHING.block_size * NAME_BYTES
    return await key_bytes(client, [record_key("stream")]) - names_bytes


async def server_version(url: str) -> str:
    async with Redis.from_url(url) as client:
        info = await client.info("server")
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000, help="of each operation in a run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    runs, server = [], ""
    for seed in range(options.seed, options.seed + options.runs):
        with redis_server() as redis:
            redis.start().wait_ready(10)
            server = uvloop.run(server_version(redis.url))
            runs.append(uvloop.run(measure(redis.url, options.repeats, seed)))
    report(runs, options, server)
    return 0


def report(runs: list[Run], options: argparse.Namespace, server: str) -> None:
    """Print the tables, and the JSON object as the last line."""
    print(f"{machine()}; {server}, redis-py {version('redis')}, hiredis {version('hiredis')}, "
          f"uvloop {version('uvloop')}; seeds {options.seed}..{options.seed + options.runs - 1}, "
          f"{options.repeats} of each in a run")  # fmt: skip
    print(f"{'milliseconds':22}{'median P50 / P95 / P99':>26}{'P50 of runs':>18}"
          f"{'P99 of runs':>18}{'goal P50 / P99':>18}")  # fmt: skip
    medians = {}
    for name in runs[0].times_ms:
        of_runs = [run.times_ms[name] for run in runs]
        p50, p95, p99 = zip(*of_runs, strict=True)
        medians[name] = [round(statistics.median(cut), 3) for cut in (p50, p95, p99)]
        print(f"{name:22}{slashed(medians[name], 3):>26}{spread(p50):>18}"
              f"{spread(p99):>18}{slashed(GOALS.get(name), 0):>18}")  # fmt: skip
    print(f"{'bytes':22}{'median':>26}{'of runs':>20}{'':16}{'goal':>18}")
    memory = {}
    for name in runs[0].memory_bytes:
        values = [run.memory_bytes[name] for run in runs]
        memory[name] = round(statistics.median(values), 1)
        print(f"{name:22}{memory[name]:>26}{spread(values):>20}{'':16}"
              f"{MEMORY_GOALS.get(name, ''):>18}")  # fmt: skip
    print(json.dumps({"benchmark": "index", "server": server, "median_ms": medians,
                      "goals_ms": GOALS, "median_bytes": memory, "goals_bytes": MEMORY_GOALS,
                      "runs_ms": [run.times_ms for run in runs]}))  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Least and greatest."""
    return f"{min(values):.2f} .. {max(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
