"""Three times what engines can do: what becomes of the streams that are let in, and of the others.

In one run, one after the other, with arrivals open loop (Poisson) and a gateway that begins with no
knowledge of its engine:

1. capacity: arrivals whose rate rises slowly to more than the engine can do; the answers per second
   in the second half of that.
2. 80% of that, then 3 times that, `--minutes` each.

A stream retrieves for three seconds, four chunks. TTFT counts from when the last input was due, a
refusal from when the stream was. The engine is the simulated one in real time, slowed down so that
it and not this machine is what is full; `--real` takes vLLM on this CPU with the small model.

`make bench-overload`, OPTIONS="--minutes 1" for less; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import resource
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import aiohttp
import psutil
import uvloop

from deploy.local import EngineOptions, Server, engine, free_port, gateway
from deploy.model import MODEL_NAME, model_dir
from loadtest.drive import Mix, Seen, drive
from loadtest.front import Front, Json
from loadtest.report import machine, p50_p95_p99, vllm_version
from loadtest.texts import ExactTexts
from loadtest.workload import Document, Input, Query

CHUNKS, RETRIEVAL_S, QUESTION_TOKENS = 4, 3.0, 20
BUSY, FLOOD = 0.8, 3.0
GOAL_RATIO, GOAL_REFUSAL_MS = 2.0, 50.0
MEMORY_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class Engine:
    """What streams are answered by, and what they are like."""

    server: Server
    model: str
    chunk_tokens: int
    answer_tokens: int
    first_rate: float
    """Streams per second that it surely can do."""
    last_rate: float
    """And that it surely can't."""


def simulated(speed: float) -> Engine:
    """The simulated engine: two H100 with Llama-3.1-8B, slowed down."""
    port = free_port()
    command = [
        sys.executable, "-m", "engine_adapter.simulated", "--port", str(port),
        "--model-name", "simulated", "--speed", str(speed),
    ]  # fmt: skip
    server = Server("simulated", command, port=port, ready_path="/stream2llm/info")
    return Engine(server, "simulated", 400, 24, first_rate=12 * speed, last_rate=160 * speed)


def real() -> Engine:
    """vLLM on this CPU."""
    options = EngineOptions(max_model_len=2048, kv_blocks=1000)
    return Engine(engine(options), MODEL_NAME, 60, 8, first_rate=0.5, last_rate=8.0)


class Load:
    """Plays streams at a gateway and watches its memory."""

    def __init__(self, http: aiohttp.ClientSession, front: Server, target: Engine) -> None:
        sampling = {"max_tokens": target.answer_tokens, "temperature": 0}
        self._front = Front(http, front.url, target.model, sampling)
        self._texts = ExactTexts(str(model_dir()))
        self._process = psutil.Process(front.pid)
        self._target = target
        self._number = 0
        self.memory: list[tuple[float, float]] = []
        """Seconds, MiB."""

    async def play(self, rate: Callable[[float], float], seconds: float, seed: int) -> Seen:
        """Arrivals at a rate that depends on the time, until all are answered."""
        return await drive(self._front, self._queries(rate, seconds, seed), self._texts, Mix())

    def _queries(self, rate: Callable[[float], float], seconds: float, seed: int) -> list[Query]:
        rng, at_s, queries = random.Random(seed), 0.0, list[Query]()
        while (at_s := at_s + rng.expovariate(rate(at_s))) < seconds:
            self._number += 1
            inputs = tuple(
                Input(
                    RETRIEVAL_S * (i + 1) / CHUNKS,
                    (Document(self._number * CHUNKS + i, self._target.chunk_tokens),),
                )
                for i in range(CHUNKS)
            )
            queries.append(Query(self._number, at_s, False, inputs, QUESTION_TOKENS))
        return queries

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """While the memory is watched."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()

    async def _watch(self) -> None:
        begun_s = time.monotonic()
        while True:
            mib = self._process.memory_info().rss / 2**20
            self.memory.append((time.monotonic() - begun_s, mib))
            await asyncio.sleep(MEMORY_EVERY_S)


async def run(target: Engine, front: Server, options: argparse.Namespace) -> Json:
    """All parts, as figures."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    ) as http:
        await _ready(http, front)
        load = Load(http, front, target)
        growth = math.log(target.last_rate / target.first_rate) / options.ramp_s
        ramp = await load.play(
            lambda at_s: target.first_rate * math.exp(growth * at_s), options.ramp_s, options.seed
        )
        capacity = rate_in(ramp.answered_at_s, options.ramp_s / 2, options.ramp_s)
        print(f"capacity {capacity:.2f} streams/s; while it was sought: {_told(ramp)}", flush=True)
        rows = dict[str, Json]()
        seconds = 60 * options.minutes
        for name, times in (("80%", BUSY), ("3x", FLOOD)):
            part = Load(http, front, target)
            part._number = 1_000_000 * (len(rows) + 1)
            async with part.watching():
                rate = times * capacity
                seen = await part.play(partial(_steady, rate), seconds, options.seed)
            rows[name] = figures(seen, part.memory) | {"rate": round(rate, 2)}
            print(f"{name:4}{rate:7.2f}/s: {_told(seen)}; MiB {_memory(part.memory)}", flush=True)
    return {"capacity": round(capacity, 3), "ramp": figures(ramp, []), **rows}


async def _ready(http: aiohttp.ClientSession, front: Server) -> None:
    """Wait until streams can be opened."""
    async with asyncio.timeout(120):
        while True:
            async with http.get(front.url + "/ready") as answer:
                if answer.status == 200:
                    return
            await asyncio.sleep(0.1)


def _steady(rate: float, at_s: float) -> float:
    return rate


def rate_in(at_s: list[float], begin_s: float, end_s: float) -> float:
    """Events per second in a part of the time. That of the fullest seconds would be a lucky one: of
    an engine that is never idle it lies above what it can do for long."""
    return sum(begin_s <= s < end_s for s in at_s) / (end_s - begin_s)


def figures(seen: Seen, memory: list[tuple[float, float]]) -> Json:
    """What was seen in one part, in milliseconds; None where there was nothing."""
    return {
        "ttft_ms": _cuts(seen.ttft_s),
        "refusal_ms": _cuts(seen.refused_s),
        "driver_late_ms": _cuts(seen.driver_late_s),
        "answered": seen.answered,
        "refused": len(seen.refused_s),
        "errors": dict(seen.errors),
        "open_at_once": seen.open_at_once,
        "mib": [[round(at_s), round(mib, 1)] for at_s, mib in memory],
    }


def _cuts(values: list[float]) -> list[float] | None:
    """P50, P95, P99 and the largest, in milliseconds."""
    if not values:
        return None
    return [round(1000 * value, 1) for value in (*p50_p95_p99(values), max(values))]


def _told(seen: Seen) -> str:
    refused = _cuts(seen.refused_s)
    errors = {code: n for code, n in seen.errors.items() if code != "overloaded"}
    return (
        f"{seen.answered} answered, TTFT P50 / P95 / P99 / max {_shown(_cuts(seen.ttft_s))} ms; "
        f"{len(seen.refused_s)} refused in {_shown(refused)} ms; other errors {errors or 'none'}; "
        f"driver late P99 {_shown(_cuts(seen.driver_late_s), 2)} ms"
    )


def _shown(cuts: list[float] | None, only: int | None = None) -> str:
    if cuts is None:
        return "-"
    return " / ".join(f"{cut:.0f}" for cut in (cuts if only is None else [cuts[only]]))


def _memory(memory: list[tuple[float, float]]) -> str:
    """At its quarters."""
    at = [round(i * (len(memory) - 1) / 4) for i in range(5)]
    return ", ".join(f"{memory[i][1]:.0f}" for i in at)


def report(found: Json, target: Engine, options: argparse.Namespace) -> bool:
    """Print the goals, and the JSON object as the last line. Whether they were reached."""
    busy, flood = found["80%"], found["3x"]
    ratio = flood["ttft_ms"][2] / busy["ttft_ms"][2]
    refusal_ms = flood["refusal_ms"][2] if flood["refusal_ms"] else 0.0
    print(f"{machine()}, {vllm_version()}; engine {target.model}; seed {options.seed}")
    print(f"TTFT P99 of accepted streams at 3x over that at 80%: {ratio:.2f} (goal {GOAL_RATIO:g})")
    print(f"refusals P99: {refusal_ms:.1f} ms (goal {GOAL_REFUSAL_MS:g})")
    print(json.dumps({"benchmark": "overload", "settings": vars(options), "ratio": ratio, **found}))
    return ratio <= GOAL_RATIO and refusal_ms <= GOAL_REFUSAL_MS


def main() -> int:
    options = arguments()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    target = real() if options.real else simulated(options.speed)
    with target.server, gateway([target.server.url]) as front:
        target.server.start().wait_ready(300)
        front.start().wait_ready(120)
        found = uvloop.run(run(target, front, options))
    return 0 if report(found, target, options) else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="at 80%% and at 3 times each")
    parser.add_argument("--ramp-s", type=float, default=80.0, help="in which capacity is sought")
    parser.add_argument("--speed", type=float, default=0.25, help="of the simulated engine")
    parser.add_argument("--real", action="store_true", help="vLLM on this CPU")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
