"""What becomes of answers when an engine of a disaggregated pair fails, on real engines.

Two prefill engines and a decode engine behind a gateway. In each run a few streams are opened, post
their chunks and are answered, and a failure comes at a random moment of that:

- `kill prefill`, `kill decode`: `kill -9` of the engine, and a new one at the same address.
- `stop prefill`: the processes of a prefill engine stand still for a while, also while the other
  engine fetches KV from it: a transfer that fails.
- `stop decode`: those of the decode engine do, for longer than the lease of the KV that waits, so
  that it reads what is not there any more. That an engine stands still nobody can know before a
  poll has waited `POLL_TIMEOUT_S` for it.
- `leave`: the clients go away.

Each answer is to be what the same prompt gets without a failure, token for token where it is
greedy; one whose sampling can't be repeated may instead end with an error event, once it has begun,
within `ERROR_WITHIN_S` of when the gateway can know. `hung`: not ended within `--patience` seconds.
After each run no engine may hold KV.

`make bench-failures`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from deploy.local import EngineOptions, Server, gateway
from deploy.model import MODEL_NAME
from deploy.nursery import Nursery
from gateway.client import Client, StreamError
from loadtest.bench_pools import words
from loadtest.report import machine, p50_p95_p99, slashed, vllm_version

LEASE_S = 3
"""Of KV that waits for the decode engine."""
FETCH_S = 5
"""How long the gateway lets the decode engine wait for it."""
PREFILL_STOPPED_S, DECODE_STOPPED_S = 7.0, 4.0
"""Longer than a fetch may take; longer than the lease, and not so long."""
POLL_S, POLL_TIMEOUT_S = 0.5, 3.0
ERROR_WITHIN_S = 2.0
FREED_WITHIN_S = 20.0
KNOWN_S = 90.0
TAKEN = {"healthy", "half-open"}
"""An engine in these states is given streams."""
LEFT_WITHIN_S = 1.0
ANSWER_TOKENS = 24
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.8, "seed": 7}
FREE = {"temperature": 0.8}
REPEATED = ("greedy", "seeded")
"""Samplings whose answers can be had again, to be compared."""
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": GREEDY, "seeded": SEEDED, "free": FREE}


@dataclass(frozen=True, slots=True)
class Query:
    """A stream: what it posts, with the pauses before, and how it is answered."""

    chunks: tuple[str, ...]
    pauses_s: tuple[float, ...]
    sampling: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a stream ended."""

    query: Query
    text: str
    error: str | None
    hung: bool
    late_s: float
    """From the failure to the error event; 0 without one."""


@dataclass(frozen=True, slots=True)
class Run:
    """One failure."""

    failure: str
    seed: int
    at_s: float
    begun: int
    """Streams that had got a token when it came."""
    ended: dict[str, int]
    back_s: float
    """From the last answer until all KV was free again; -1 if it did not get free."""
    resumed: int
    """How often an answer was gone on with after an engine broke off or KV did not come."""


class Bed:
    """The servers."""

    def __init__(self, running: ExitStack) -> None:
        nursery = running.enter_context(Nursery())
        self.prefill = [
            running.enter_context(nursery.engine(handing_over(), core=0)) for _ in range(2)
        ]
        self.decode = running.enter_context(nursery.engine(taking_over(), core=1))
        for server in self.engines:
            server.start().wait_ready(120)
        urls = [server.url for server in self.prefill]
        self.front = running.enter_context(
            gateway(urls, ["--decode-engine", self.decode.url, "--handoff-min-tokens", "1",
                           "--handoff-idle-tokens", "-1", "--handoff-timeout-s", str(FETCH_S),
                           "--poll-s", str(POLL_S), "--poll-timeout-s", str(POLL_TIMEOUT_S)])
        )  # fmt: skip
        self.whole = running.enter_context(gateway(urls[:1]))
        for front in (self.front, self.whole):
            front.start().wait_ready(60)

    @property
    def engines(self) -> list[Server]:
        return [*self.prefill, self.decode]


def handing_over() -> EngineOptions:
    """A prefill engine."""
    return EngineOptions(dtype="float32", plugin=True, kv_role="kv_producer", kv_lease_s=LEASE_S)


def taking_over() -> EngineOptions:
    """A decode engine."""
    return EngineOptions(dtype="float32", plugin=False, kv_role="kv_consumer")


def queries(rng: random.Random, n: int) -> list[Query]:
    """Streams whose prompts have a few hundred tokens."""
    return [
        Query(
            tuple(words(rng, rng.randrange(20, 90)) for _ in range(rng.randrange(1, 5))),
            tuple(rng.uniform(0, 0.3) for _ in range(4)),
            rng.choice(["greedy", "greedy", "seeded", "free"]),
        )
        for _ in range(n)
    ]


async def play(client: Client, query: Query, got: list[str]) -> None:
    """Stream a query, and add what is answered to `got`."""
    messages = [{"role": "user", "content": "{{documents}}\nWhat was that?"}]
    sampling = SAMPLINGS[query.sampling]
    options = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True, **sampling}
    async with client.stream(MODEL_NAME, messages, **options) as stream:
        for chunk, pause_s in zip(query.chunks, query.pauses_s, strict=False):
            await asyncio.sleep(pause_s)
            await stream.send(chunk)
        async for piece in stream.answer():
            got.append(piece)  # noqa: PERF401 - it has to be there when the answer breaks off


class Failing:
    """The failures, each a coroutine that does it and undoes it."""

    def __init__(self, bed: Bed, rng: random.Random) -> None:
        self._bed = bed
        self._rng = rng

    async def kill_prefill(self) -> None:
        await self._killed(self._rng.choice(self._bed.prefill))

    async def kill_decode(self) -> None:
        await self._killed(self._bed.decode)

    async def stop_prefill(self) -> None:
        await self._stopped(self._rng.choice(self._bed.prefill), PREFILL_STOPPED_S)

    async def stop_decode(self) -> None:
        await self._stopped(self._bed.decode, DECODE_STOPPED_S)

    async def _killed(self, server: Server) -> None:
        await asyncio.to_thread(server.kill)
        await free(server.port)
        server.start()
        await asyncio.to_thread(server.wait_ready, 120)

    async def _stopped(self, server: Server, stopped_s: float) -> None:
        processes = family(server)
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(stopped_s)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)


async def free(port: int) -> None:
    """A port that a killed server had is one that another can listen on.

    Raises:
        TimeoutError: it is not.
    """
    async with asyncio.timeout(FREED_WITHIN_S):
        while True:
            with socket.socket() as probe, suppress(OSError):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
                return
            await asyncio.sleep(0.05)


def family(server: Server) -> list[int]:
    """The processes of a server."""
    leader = psutil.Process(server.pid)
    return [leader.pid, *(child.pid for child in leader.children(recursive=True))]


FAILURES: dict[str, Callable[[Failing], Coroutine[Any, Any, None]] | None] = {
    "kill prefill": Failing.kill_prefill,
    "kill decode": Failing.kill_decode,
    "stop prefill": Failing.stop_prefill,
    "stop decode": Failing.stop_decode,
    "leave": None,
}


async def run(
    bed: Bed, failure: str, seed: int, options: argparse.Namespace
) -> tuple[Run, list[Ending]]:
    """One failure, and how the streams ended."""
    rng = random.Random(f"{failure} {seed}")
    asked = queries(rng, options.streams)
    at_s = rng.uniform(0.2, options.last_s)
    resumed_before = await resumed(bed.front)
    async with Client(bed.front.url, timeout_s=options.patience) as client:
        got: list[list[str]] = [[] for _ in asked]
        ended_s: list[float] = [0.0] * len(asked)

        async def one(i: int) -> None:
            try:
                await play(client, asked[i], got[i])
            finally:
                ended_s[i] = time.monotonic()

        playing = [asyncio.create_task(one(i)) for i in range(len(asked))]
        await asyncio.sleep(at_s)
        begun = sum(map(bool, got))
        fail, failed_s = FAILURES[failure], time.monotonic()
        if fail is None:
            for task in playing:
                task.cancel()
        mending = asyncio.create_task(fail(Failing(bed, rng))) if fail else None
        await asyncio.wait(playing, timeout=options.patience)
        endings = [
            ending(query, task, "".join(pieces), last_s - failed_s)
            for query, task, pieces, last_s in zip(asked, playing, got, ended_s, strict=True)
        ]
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)
    ended_at_s = time.monotonic()
    if mending is not None:
        await mending
        ended_at_s = time.monotonic()
    back_s = await idle_after(bed, ended_at_s)
    counted = Counter(outcome(e) for e in endings) if fail else Counter(left=len(endings))
    gone_on = await resumed(bed.front) - resumed_before
    return Run(failure, seed, at_s, begun, dict(counted), back_s, gone_on), endings


def ending(query: Query, task: asyncio.Task[None], text: str, late_s: float) -> Ending:
    """How a stream ended, or that it did not."""
    if not task.done():
        return Ending(query, text, None, True, 0.0)
    broken = None if task.cancelled() else task.exception()
    if broken is None:
        return Ending(query, text, None, False, 0.0)
    code = broken.code if isinstance(broken, StreamError) else None
    return Ending(query, text, code or repr(broken), False, late_s)


def outcome(ended: Ending) -> str:
    """In a word."""
    if ended.hung:
        return "hung"
    return "answered" if ended.error is None else "broken"


def wrong(ended: Ending, whole: str, told_within_s: float) -> str | None:
    """What is wrong with an ending, if anything is.

    Args:
        whole: the answer to the same prompt where nothing fails.
        told_within_s: the latest that an error may come after the failure.
    """
    if ended.hung:
        return "hung"
    sampling = ended.query.sampling
    if ended.error is not None:
        if sampling != "free" or not ended.text:
            return f"{sampling} answer broke off: {ended.error}"
        return None if ended.late_s < told_within_s else f"told after {ended.late_s:.1f} s"
    if sampling in REPEATED and ended.text != whole:
        return f"another answer: {ended.text!r} for {whole!r}"
    return None


async def idle_after(bed: Bed, since_s: float) -> float:
    """Seconds until the engines hold nothing and the gateway has no stream; -1 if that does not
    come."""
    async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
        busy = bed.engines
        while (waited_s := time.monotonic() - since_s) < FREED_WITHIN_S:
            with suppress(httpx.TransportError):
                busy = [server for server in busy if not await idle(http, server)]
                if not busy:
                    return waited_s
            await asyncio.sleep(0.05)
        for server in busy:
            info = await http.get(server.url + "/stream2llm/info")
            print(f"  still busy: {server.url}: {await told(http, server)} {info.text}", flush=True)
    return -1.0


async def told(http: httpx.AsyncClient, server: Server) -> list[str]:
    """What an engine says of its load."""
    metrics = (await http.get(server.url + "/metrics")).text
    return [line for line in metrics.splitlines() if line.startswith(BUSY)]


def total(samples: Sequence[str]) -> float:
    """Of the values of metrics, one in each line."""
    return sum(float(sample.rsplit(" ", 1)[1]) for sample in samples)


async def idle(http: httpx.AsyncClient, server: Server) -> bool:
    """Whether an engine has no request, no open prompt and no KV that anybody holds."""
    used = total(await told(http, server))
    info = await http.get(server.url + "/stream2llm/info")
    return used == 0 and (info.status_code != 200 or info.json()["open_prompts"] == 0)


RESUMED = "stream2llm_answers_resumed_total{"
COUNTED = ("stream2llm_handoffs_total{", RESUMED)
"""What the gateway itself counts of all this."""
STANDINGS = re.compile(r'stream2llm_engine_standing\{engine="[^"]+",standing="([^"]+)"\} 1\.0')
BUSY = ("vllm:kv_cache_usage_perc{", "vllm:num_requests_running{", "vllm:num_requests_waiting{")


async def known(front: Server) -> None:
    """The gateway has seen that the engines which were failed are back, so that no run begins with
    fewer engines than there are.

    Raises:
        TimeoutError: it does not see that.
    """
    async with httpx.AsyncClient(timeout=5, trust_env=False) as http, asyncio.timeout(KNOWN_S):
        while True:
            metrics = (await http.get(front.url + "/metrics")).text
            if TAKEN.issuperset(STANDINGS.findall(metrics)):
                return
            await asyncio.sleep(0.05)


async def resumed(front: Server) -> int:
    """How often the gateway has gone on with an answer so far."""
    async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
        metrics = (await http.get(front.url + "/metrics")).text
    return round(total([line for line in metrics.splitlines() if line.startswith(RESUMED)]))


async def wholes(bed: Bed, endings: list[Ending]) -> list[str]:
    """The answers to the same prompts where nothing fails and nothing is handed over."""
    texts = []
    async with Client(bed.whole.url, timeout_s=60) as client:
        for ended in endings:
            got: list[str] = []
            if ended.query.sampling in REPEATED and ended.error is None:
                await play(client, ended.query, got)
            texts.append("".join(got))
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30, help="of each failure")
    parser.add_argument("--streams", type=int, default=3, help="in each run")
    parser.add_argument("--last-s", type=float, default=3.0, help="latest moment of a failure")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for an answer")
    parser.add_argument("--failures", default=",".join(FAILURES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every run's figures")
    options = parser.parse_args()
    print(
        f"{machine()}, {vllm_version()}, {MODEL_NAME}, float32; seeds {options.seed}.."
        f"{options.seed + options.runs - 1}, {options.streams} streams a run",
        flush=True,
    )
    with ExitStack() as running:
        bed = Bed(running)
        runs, troubles = asyncio.run(inject(bed, options))
        told = httpx.get(bed.front.url + "/metrics", trust_env=False).text
    print(f"not as it should be: {len(troubles)}")
    if options.json is not None:
        found = {"benchmark": "failures", "runs": list(map(asdict, runs)), "troubles": troubles}
        options.json.write_text(json.dumps(found))
    print("\n".join(line for line in told.splitlines() if line.startswith(COUNTED)))
    return 1 if troubles else 0


async def inject(bed: Bed, options: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """All runs; what was not as it should be."""
    runs: list[Run] = []
    troubles: list[str] = []
    print(HEADER)
    for failure in options.failures.split(","):
        before = len(runs)
        for seed in range(options.seed, options.seed + options.runs):
            await known(bed.front)
            done, endings = await run(bed, failure, seed, options)
            found = []
            if FAILURES[failure] is not None:
                await known(bed.whole)
                texts = await wholes(bed, endings)
                seen_s = POLL_S + POLL_TIMEOUT_S if failure.startswith("stop") else 0.0
                found = [
                    w
                    for e, text in zip(endings, texts, strict=True)
                    if (w := wrong(e, text, seen_s + ERROR_WITHIN_S))
                ]
            limit_s = FREED_WITHIN_S if FAILURES[failure] else LEFT_WITHIN_S
            if not 0 <= done.back_s < limit_s:
                found.append(f"KV back after {done.back_s:.1f} s")
            for trouble in found:
                print(f"  {failure}, seed {seed}, at {done.at_s:.2f} s: {trouble}", flush=True)
            runs.append(done)
            troubles += found
        print(row(failure, runs[before:]), flush=True)
    return runs, troubles


HEADER = (
    f"{'':14}{'runs':>6}{'streams':>9}{'begun':>7}{'answered':>10}{'resumed':>9}"
    f"{'broken':>8}{'hung':>6}"
    f"{'KV back P50/95/99, s':>24}"
)


def row(failure: str, runs: Sequence[Run]) -> str:
    """All runs of one failure."""
    ended: Counter[str] = Counter()
    for one in runs:
        ended.update(one.ended)
    back_s = slashed(p50_p95_p99([r.back_s for r in runs]), 2)
    return (
        f"{failure:14}{len(runs):>6}{ended.total():>9}{sum(r.begun for r in runs):>7}"
        f"{ended['answered']:>10}{sum(r.resumed for r in runs):>9}"
        f"{ended['broken']:>8}{ended['hung']:>6}{back_s:>24}"
    )


if __name__ == "__main__":
    sys.exit(main())
