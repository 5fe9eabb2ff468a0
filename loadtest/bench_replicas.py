"""Chunks per second of one and of two gateways, with the index in the process or in Redis.

Closed loop: a number of clients each post a chunk to a random stream, wait for the answer, and
post the next, as fast as the gateways take them. The engine computes nothing and every chunk's text
has been tokenized before. Rows:

- `1, in process`: one gateway without Redis.
- `1, Redis`: one gateway, every chunk written to Redis before it is acknowledged.
- `2, own streams`: two gateways, clients send a stream's chunks to the gateway that holds it.
- `2, alternating`: clients send each chunk to either, so half of them are sent on to the other.

The first gateway has a core of its own; all others, the load generator, Redis, the engine and the
second gateway, share the remaining cores. On two cores the second gateway competes with them all,
so what a second process adds shows in `chunks/s per core`: chunks divided by the processor time of
the gateways' processes, which is what they could take if each had a core.

`make bench-index` runs this too; the last line is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version

import aiohttp
import psutil
import uvloop

from deploy.local import Server, free_port, gateway, redis_server
from loadtest.bench_gateway import CHUNK_WORDS, TEXTS, busy_s, open_stream, pin, post
from loadtest.report import machine, p50_p95_p99, slashed

WIDTHS = (">22", ">22", ">12", ">10", ">22", ">8")
ROWS = ("1, in process", "1, Redis", "2, own streams", "2, alternating")


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of one row. Times in milliseconds."""

    row: str
    chunks_per_s: float
    per_core: float
    """Chunks a second for each core that the gateways' processes keep busy."""
    gateway_cpu_ms: float
    redis_cpu_ms: float
    """Processor time per chunk."""
    seen: tuple[float, float, float]
    """P50, P95, P99 of a post, from the client."""
    errors: int


@dataclass(frozen=True, slots=True)
class Load:
    streams: int
    clients: int
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16, help="posts at once")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    load = Load(options.streams, options.clients, options.seconds)
    figures = [measure(row, load, options.seed + i) for i in range(options.runs) for row in ROWS]
    report(figures, options)
    return 0


def measure(row: str, load: Load, seed: int) -> Figures:
    """One run, with servers of its own."""
    port = free_port()
    command = [sys.executable, "-m", "tests.fake_engine", "--port", str(port)]
    engine = Server("fake-engine", command, port=port, ready_path="/stream2llm/info")
    with ExitStack() as running:
        running.enter_context(engine).start().wait_ready(60)
        redis = running.enter_context(redis_server()).start().wait_ready(20)
        shared = [] if row == ROWS[0] else ["--index", redis.url]
        fronts = [
            running.enter_context(gateway([engine.url], shared)).start() for _ in range(int(row[0]))
        ]
        for front in fronts:
            front.wait_ready(60)
        first, *others = sorted(os.sched_getaffinity(0))
        pin(fronts[0].pid, [first])
        for pid in (os.getpid(), engine.pid, redis.pid, *(f.pid for f in fronts[1:])):
            pin(pid, others or [first])
        figures: Figures = uvloop.run(run(row, fronts, redis, load, seed))
    return figures


async def run(row: str, fronts: list[Server], redis: Server, load: Load, seed: int) -> Figures:
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(500)]
    texts = [" ".join(rng.choices(words, k=CHUNK_WORDS)) for _ in range(TEXTS)]
    processes = [psutil.Process(front.pid) for front in fronts]
    store = psutil.Process(redis.pid)
    timeout, alternating = aiohttp.ClientTimeout(total=30), row == ROWS[3]
    async with Sessions(fronts, timeout) as https:
        ids = [(n % len(https), await open_stream(https[n % len(https)]))
               for n in range(load.streams)]  # fmt: skip
        for http, (_, stream) in zip(https, ids, strict=False):
            for text in texts:  # tokenized once, before the clock starts
                await post(http, stream, text)
        taken: list[tuple[float, float] | None] = []
        cpu_s, store_s = sum(map(busy_s, processes)), busy_s(store)
        begun_s = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - begun_s < load.seconds:
                home, stream = rng.choice(ids)
                http = rng.choice(https) if alternating else https[home]
                taken.append(await post(http, stream, rng.choice(texts)))

        await asyncio.gather(*(client() for _ in range(load.clients)))
        wall_s = time.perf_counter() - begun_s
        cpu_s = sum(map(busy_s, processes)) - cpu_s
        store_s = busy_s(store) - store_s
    good = [both for both in taken if both is not None]
    return Figures(
        row=row,
        chunks_per_s=round(len(good) / wall_s, 1),
        per_core=round(len(good) / cpu_s, 1),
        gateway_cpu_ms=round(1000 * cpu_s / len(good), 3),
        redis_cpu_ms=round(1000 * store_s / len(good), 3),
        seen=p50_p95_p99([outside for outside, _ in good]),
        errors=len(taken) - len(good),
    )


class Sessions:
    """One HTTP session for each gateway."""

    def __init__(self, fronts: list[Server], timeout: aiohttp.ClientTimeout) -> None:
        self._sessions = [
            aiohttp.ClientSession(f.url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
            for f in fronts
        ]

    async def __aenter__(self) -> list[aiohttp.ClientSession]:
        return self._sessions

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions))


def report(figures: list[Figures], options: argparse.Namespace) -> None:
    """Print medians and spread, and the JSON object as the last line."""
    print(f"{machine()}, aiohttp {version('aiohttp')}, redis-py {version('redis')}; seeds "
          f"{options.seed}..{options.seed + options.runs - 1}, {options.streams} streams, "
          f"{options.clients} clients, {options.seconds:g} s each; median (spread)")  # fmt: skip
    names = ("chunks/s", "chunks/s per core", "gateway ms", "redis ms", "P50/95/99, ms", "errors")
    print("".join([f"{'gateways, index':18}", *map(format, names, WIDTHS)]))
    for row in ROWS:
        mine = [f for f in figures if f.row == row]
        middle = sorted(mine, key=lambda f: f.chunks_per_s)[len(mine) // 2]
        cpu = statistics.median(f.gateway_cpu_ms for f in mine)
        store = statistics.median(f.redis_cpu_ms for f in mine)
        cells = (
            spread([f.chunks_per_s for f in mine]),
            spread([f.per_core for f in mine]),
            f"{cpu:.2f}",
            f"{store:.2f}",
            slashed(middle.seen, 1),
            str(sum(f.errors for f in mine)),
        )
        print("".join([f"{row:18}", *map(format, cells, WIDTHS)]))
    print(json.dumps({"benchmark": "replicas", "runs": [asdict(f) for f in figures]}))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} - {max(values):.0f})"


if __name__ == "__main__":
    sys.exit(main())
