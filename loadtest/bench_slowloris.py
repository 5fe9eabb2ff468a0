"""2,000 slow connections at a gateway while 50 honest streams run: what the honest ones notice.

In one run, one after the other: honest streams alone, the same among slow clients (`loadtest.slow`,
a process of its own, from when all are connected), and alone again. The engine computes nothing,
so TTFT is the gateway's own. Arrivals are open loop.

`make bench-slowloris`; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import psutil
import uvloop

from deploy.local import Server, free_port, gateway
from loadtest.drive import Mix, Seen, drive
from loadtest.front import Front, Json
from loadtest.report import machine, p50_p95_p99
from loadtest.workload import Document, Input, Query

MODEL = "fake"
CHUNKS, CHUNK_TOKENS, QUESTION_TOKENS = 5, 60, 10
STREAM_S = 5.0
CONNECTED_SHARE = 0.95
CONNECTED_S = 60.0
"""The longest that slow clients are waited for."""
GAUGE = re.compile(r"^(stream2llm_\w+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)


class Words:
    """As many words as tokens, the same few texts again and again: tokenizing is not measured."""

    def of(self, document: Document) -> str:
        return document.text or f"word{document.doc_id % 50} " * document.tokens


def honest(streams: int, seconds: float, seed: int) -> list[Query]:
    """Streams at Poisson times, so many at once on average."""
    rng, at_s, queries = random.Random(seed), 0.0, list[Query]()
    while (at_s := at_s + rng.expovariate(streams / STREAM_S)) < seconds:
        first = len(queries) * CHUNKS
        inputs = tuple(
            Input(STREAM_S * (i + 1) / CHUNKS, (Document(first + i, CHUNK_TOKENS),))
            for i in range(CHUNKS)
        )
        queries.append(Query(len(queries), at_s, False, inputs, QUESTION_TOKENS))
    return queries


async def run(front: Server, options: argparse.Namespace) -> list[Json]:
    """The three parts, as rows."""
    rows = list[Json]()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=60)
    ) as http:
        gate = Front(http, front.url, MODEL, {"max_tokens": 8})
        queries = honest(options.streams, options.seconds, options.seed)
        await drive(gate, queries[: options.streams], Words(), Mix())  # everything is warm now
        rows.append(_row("alone", await drive(gate, queries, Words(), Mix()), front))
        before = await figures(http, front)
        async with slow_clients(front.port, options):
            connected = await _connected(http, front, options.connections)
            seen = await drive(gate, queries, Words(), Mix())
            after = await figures(http, front)
            row = _row(f"among {connected} slow connections", seen, front)
            rows.append(row | {"connections": connected} | _told(before, after))
        rows.append(_row("alone again", await drive(gate, queries, Words(), Mix()), front))
    return rows


@asynccontextmanager
async def slow_clients(port: int, options: argparse.Namespace) -> AsyncIterator[None]:
    """While they are there."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.slow", "--port", str(port), "--model", MODEL,
        "--connections", str(options.connections), "--every-s", str(options.every_s),
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def _connected(http: aiohttp.ClientSession, front: Server, wanted: int) -> int:
    """How many there are, once nearly all have come."""
    deadline_s = time.monotonic() + CONNECTED_S
    while True:
        now = int((await figures(http, front))["stream2llm_connections"])
        if now >= CONNECTED_SHARE * wanted:
            return now
        if time.monotonic() > deadline_s:
            raise SystemExit(f"only {now} of {wanted} slow clients could connect")
        await asyncio.sleep(0.5)


async def figures(http: aiohttp.ClientSession, front: Server) -> dict[str, float]:
    """What the gateway counts."""
    async with http.get(front.url + "/metrics") as response:
        return {name: float(value) for name, value in GAUGE.findall(await response.text())}


def _told(before: dict[str, float], after: dict[str, float]) -> Json:
    """What became of slow clients meanwhile."""
    names = {
        "timed_out": 'stream2llm_errors_total{code="request_timeout"}',
        "readers_cut": "stream2llm_cut_readers_total",
    }
    return {k: int(after.get(name, 0) - before.get(name, 0)) for k, name in names.items()}


def _row(name: str, seen: Seen, front: Server) -> Json:
    memory = psutil.Process(front.pid).memory_info().rss
    p50, p95, p99 = (round(1000 * cut, 2) for cut in p50_p95_p99(seen.ttft_s))
    return {
        "name": name,
        "streams": seen.answered,
        "errors": dict(seen.errors),
        "ttft_ms": [p50, p95, p99, round(1000 * max(seen.ttft_s), 2)],
        "chunk_ack_p99_ms": round(1000 * p50_p95_p99(seen.chunk_ack_s)[2], 2),
        "driver_late_p99_ms": round(1000 * p50_p95_p99(seen.driver_late_s)[2], 2),
        "gateway_mib": round(memory / 2**20, 1),
    }


def main() -> int:
    options = arguments()
    port = free_port()
    command = [sys.executable, "-m", "tests.fake_engine", "--port", str(port), "--long-answers"]
    engine = Server("fake-engine", command, port=port, ready_path="/stream2llm/info")
    with engine, gateway([engine.url]) as front:
        engine.start().wait_ready(60)
        front.start().wait_ready(60)
        rows = uvloop.run(run(front, options))
    report(rows, options)
    return 1 if any(row["errors"] for row in rows) else 0


def report(rows: list[Json], options: argparse.Namespace) -> None:
    """Print the table, and the JSON object as the last line."""
    print(f"{machine()}; {options.streams} honest streams at once for {options.seconds:g} s, "
          f"seed {options.seed}; slow: a byte every {options.every_s:g} s")  # fmt: skip
    print(f"{'':34}{'TTFT P50':>10}{'P95':>9}{'P99':>9}{'max':>9}{'ack P99':>9}{'late P99':>10}"
          f"{'MiB':>8}  streams, errors")  # fmt: skip
    for row in rows:
        cells = f"{row['ttft_ms'][0]:>10.1f}" + "".join(f"{x:>9.1f}" for x in row["ttft_ms"][1:])
        errors = ", ".join(f"{k} {n}" for k, n in row["errors"].items()) or "no errors"
        print(f"{row['name']:34}{cells}{row['chunk_ack_p99_ms']:>9.1f}"
              f"{row['driver_late_p99_ms']:>10.1f}{row['gateway_mib']:>8.1f}"
              f"  {row['streams']}, {errors}")  # fmt: skip
        if "timed_out" in row:
            print(f"    of the slow: {row['timed_out']} answered 408, "
                  f"{row['readers_cut']} readers cut off")  # fmt: skip
    print(json.dumps({"benchmark": "slowloris", "settings": vars(options), "rows": rows}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=2000, help="slow ones")
    parser.add_argument("--streams", type=int, default=50, help="honest ones at once")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each part")
    parser.add_argument("--every-s", type=float, default=1.0, help="from one slow byte to the next")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
