"""What the gateway itself costs per chunk, with 200 open streams, on one core.

The engine is one that computes nothing, and every chunk's text is one the gateway has
tokenized before, so neither prefill nor tokenizing is in the figures. Three views of a chunk:

- `outside`: from when it was due to the end of its answer, loopback HTTP and the load generator's
  own work included: an upper bound.
- `inside`: what the gateway says in its Server-Timing header: from the head of the request to
  the acknowledgement, the waiting for other work on its event loop in between included.
- `gateway_cpu`: processor time of the gateway's process per chunk, everything included, also its
  operations to the engine and its answers' HTTP.

Arrivals are open loop (Poisson): a slow answer does not slow the load. The gateway has one core;
the engine and the load generator have another.

`make bench-gateway`; the last line is a JSON object with the figures.
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
from dataclasses import asdict, dataclass
from importlib.metadata import version

import aiohttp
import psutil
import uvloop

from deploy.local import Server, free_port, gateway
from loadtest.report import machine

MODEL = "fake"
TEXTS = 64
CHUNK_WORDS = 120


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. Times in milliseconds."""

    streams: int
    chunks_per_s: float
    chunks: int
    outside_p50_ms: float
    outside_p99_ms: float
    outside_max_ms: float
    inside_p50_ms: float
    inside_p99_ms: float
    inside_max_ms: float
    gateway_cpu_ms_per_chunk: float
    gateway_core_share: float
    errors: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rate", type=float, default=150.0, help="chunks per second, in all")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "tests.fake_engine", "--port", str(port)]
    engine = Server("fake-engine", command, port=port, ready_path="/stream2llm/info")
    with engine, gateway([engine.url]) as front:
        engine.start().wait_ready(60)
        front.start().wait_ready(60)
        cores = sorted(os.sched_getaffinity(0))
        pin(front.pid, cores[:1])
        pin(engine.pid, cores[-1:])
        pin(os.getpid(), cores[-1:])
        runs = [
            uvloop.run(run(front, options.streams, options.rate, options.seconds, seed))
            for seed in range(options.seed, options.seed + options.runs)
        ]
    report(runs, options)
    return 0


def pin(pid: int, cores: list[int]) -> None:
    """Keep a process and all its threads on these cores."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, cores)


async def run(front: Server, streams: int, rate: float, seconds: float, seed: int) -> Figures:
    """Open the streams, post chunks for some seconds, cancel the streams."""
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(500)]
    texts = [" ".join(rng.choices(words, k=CHUNK_WORDS)) for _ in range(TEXTS)]
    process = psutil.Process(front.pid)
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(
        front.url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout
    ) as http:
        ids = await asyncio.gather(*(open_stream(http) for _ in range(streams)))
        for text in texts:  # tokenized once, before the clock starts
            await post(http, ids[0], text)
        await asyncio.sleep(0.5)
        cpu_s, begun_s = busy_s(process), time.perf_counter()
        taken = await offer(http, ids, texts, rng, rate, seconds)
        wall_s = time.perf_counter() - begun_s
        cpu_s = busy_s(process) - cpu_s
        await asyncio.gather(*(http.delete(f"/v1/streams/{stream}") for stream in ids))
    good = [both for both in taken if both is not None]
    outside, inside = percentiles([o for o, _ in good]), percentiles([i for _, i in good])
    return Figures(
        streams=streams,
        chunks_per_s=round(len(good) / wall_s, 1),
        chunks=len(good),
        outside_p50_ms=outside[50],
        outside_p99_ms=outside[99],
        outside_max_ms=outside[100],
        inside_p50_ms=inside[50],
        inside_p99_ms=inside[99],
        inside_max_ms=inside[100],
        gateway_cpu_ms_per_chunk=round(1000 * cpu_s / len(good), 3),
        gateway_core_share=round(cpu_s / wall_s, 3),
        errors=len(taken) - len(good),
    )


def percentiles(values: list[float]) -> dict[int, float]:
    """The median, the 99th percentile, and the largest."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {50: round(cuts[49], 3), 99: round(cuts[98], 3), 100: round(max(values), 3)}


def busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def open_stream(http: aiohttp.ClientSession) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}]}
    async with http.post("/v1/streams", json=body) as response:
        response.raise_for_status()
        stream: str = (await response.json())["id"]
        return stream


async def offer(
    http: aiohttp.ClientSession,
    ids: list[str],
    texts: list[str],
    rng: random.Random,
    rate: float,
    seconds: float,
) -> list[tuple[float, float] | None]:
    """Post chunks at Poisson times; what `post` says of each."""
    posts: list[asyncio.Task[tuple[float, float] | None]] = []
    begun_s, due_s = time.perf_counter(), 0.0
    while (due_s := due_s + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(max(begun_s + due_s - time.perf_counter(), 0))
        stream, text = rng.choice(ids), rng.choice(texts)
        posts.append(asyncio.create_task(post(http, stream, text, begun_s + due_s)))
    return await asyncio.gather(*posts)


async def post(
    http: aiohttp.ClientSession, stream: str, text: str, due_s: float | None = None
) -> tuple[float, float] | None:
    """Milliseconds of one chunk, seen from outside and from inside; None if it is refused."""
    from_s = time.perf_counter() if due_s is None else due_s
    async with http.post(f"/v1/streams/{stream}/chunks", json={"text": text}) as response:
        await response.read()
        if response.status != 202:
            return None
        inside_ms = float(response.headers["Server-Timing"].rpartition("=")[2])
    return 1000 * (time.perf_counter() - from_s), inside_ms


def report(runs: list[Figures], options: argparse.Namespace) -> None:
    """Print the table, and the JSON object as the last line."""
    names = list(asdict(runs[0]))
    print(f"{machine()}, aiohttp {version('aiohttp')}, "
          f"uvloop {version('uvloop')}; seeds {options.seed}.."
          f"{options.seed + options.runs - 1}, {options.seconds:g} s each")  # fmt: skip
    median = {name: statistics.median(getattr(r, name) for r in runs) for name in names}
    columns = [*(f"run {i + 1}" for i in range(len(runs))), "median"]
    print(f"{'':28}" + "".join(f"{column:>10}" for column in columns))
    for name in names:
        values = [*(getattr(r, name) for r in runs), median[name]]
        print(f"{name:28}" + "".join(f"{value:>10}" for value in values))
    goal = {"goal_p50_ms": 2.0, "goal_p99_ms": 10.0}
    print(json.dumps({"benchmark": "gateway", "median": median, **goal,
                      "runs": [asdict(r) for r in runs]}))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
