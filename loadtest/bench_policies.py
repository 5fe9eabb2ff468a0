"""Policies on the real engine, beside stock vLLM, when memory is short.

One trace in two forms, appends (a crawl) and updates (a list that improves), scaled down to a small
model on a CPU: prompts divided, arrivals so dense that about 24 streams are open at once, and a KV
pool of a quarter of what 24 streams need. Every row plays the same trace at its own times (open
loop: a slow engine does not slow the load). Three engines, one after the other:

- vLLM with the plug-in, by each policy, switched while it runs;
- `stock, whole`: vLLM alone; a query is sent when its retrieval has ended;
- `stock, parts`: vLLM alone, with its own streaming input (`loadtest.stock_streaming`).

TTFT counts from when the last input was due. Greedy answers in float32 are compared with those of
`stock, whole`.

`make bench-policies`; the last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from deploy.local import EngineOptions, Server, engine
from engine_adapter.client import EngineClient
from engine_adapter.errors import EngineError
from engine_adapter.scheduling.policies import POLICIES
from loadtest import workload
from loadtest.report import Cuts, machine, p50_p95_p99, slashed, vllm_version
from loadtest.targets import Clock, SessionOfParts, Streamed, Target, Whole
from loadtest.trace import Script, most_at_once, scaled, script

MODEL = "smollm2-135m-instruct"
BLOCK_TOKENS = 32
STREAMS = 24
"""That many share a pool of a quarter of their tokens."""
ANSWER_TOKENS = 4
STEP_TOKENS = 128
ANN_GAP_FACTOR = 4.0
"""Lists improve within half a second on average: their gaps are stretched, and they come as much
more often, so that about as many are open at once as of the crawl."""
WHOLE, PARTS = "stock, whole", "stock, parts"
IDLE_WITHIN_S = 60.0

Targets = type[Streamed] | type[Whole] | type[SessionOfParts]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one query."""

    ttft_s: float | None
    """None: nothing came."""
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Counters:
    """An engine's own counts, in tokens but the preemptions; None where it has none."""

    preemptions: int
    invalidated: int | None = None
    computed: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One way to serve one trace."""

    name: str
    trace: str
    queries: int
    finished: int
    ttft_s: Cuts | None
    """Of those that finished; None if nobody did."""
    ends_s: float
    """When the last answer was complete, or given up."""
    preemptions: int
    invalidated_tokens: int | None
    beyond_need_tokens: int | None
    """Computed more often than once, or for a list that was replaced."""
    answers: dict[int, tuple[int, ...]]
    """Tokens of the finished ones, by query."""


async def played(target: Target, scripts: Sequence[Script], within_s: float) -> list[Outcome]:
    """Play a trace; what is not complete that long after the last input is given up."""
    clock = Clock()
    deadline_s = max(s.due_s[-1] for s in scripts) + within_s

    async def one(script: Script) -> Outcome:
        ttft_s, tokens, finished = None, [], False
        try:
            async with (
                asyncio.timeout(deadline_s - clock.now_s),
                aclosing(target.answer(script, clock)) as pieces,
            ):
                async for piece in pieces:
                    if ttft_s is None and piece:
                        ttft_s = clock.now_s - script.due_s[-1]
                    tokens += piece
            finished = len(tokens) == ANSWER_TOKENS
        except (TimeoutError, EngineError, aiohttp.ClientError) as e:
            print(f"query {script.query_id}: {e!r}", file=sys.stderr)
        return Outcome(ttft_s, tuple(tokens), finished)

    return await asyncio.gather(*map(one, scripts))


def needed_tokens(scripts: Sequence[Script], answers: Sequence[Outcome]) -> int:
    """What would be computed if every prompt were computed once; the last token never is."""
    return sum(
        len(script.prompt) + len(answer.tokens) - 1
        for script, answer in zip(scripts, answers, strict=True)
    )


class Engine(Protocol):
    """A running engine as the benchmark sees it."""

    async def counters(self) -> Counters:
        """What it has counted since its start."""

    async def idle(self) -> bool:
        """Whether it has nothing left to do, and holds nothing of anybody."""


class PluginEngine:
    """vLLM with the plug-in."""

    def __init__(self, http: aiohttp.ClientSession, server: Server) -> None:
        self.client = EngineClient(http, server.url)

    async def counters(self) -> Counters:
        info = await self.client.info()
        return Counters(info.preemptions, info.invalidated_tokens, info.computed_tokens)

    async def idle(self) -> bool:
        info = await self.client.info()
        return not (info.running or info.waiting or info.open_prompts)


class StockEngine:
    """vLLM alone. Of recomputed tokens it has no count."""

    def __init__(self, http: aiohttp.ClientSession, server: Server) -> None:
        self._http = http
        self._url = server.url + "/metrics"

    async def _metric(self, name: str) -> float:
        async with self._http.get(self._url) as response:
            families = text_string_to_metric_families(await response.text())
        return sum(s.value for family in families for s in family.samples if s.name == name)

    async def counters(self) -> Counters:
        return Counters(int(await self._metric("vllm:num_preemptions_total")), None, None)

    async def idle(self) -> bool:
        running = await self._metric("vllm:num_requests_running")
        return not running + await self._metric("vllm:num_requests_waiting")


def traces(options: argparse.Namespace) -> dict[str, list[Script]]:
    """Both forms of the load, as tokens."""
    crawl = workload.crawl(options.queries, options.qps, options.seed)
    ann = workload.ann(options.queries, ANN_GAP_FACTOR * options.qps, options.seed)
    return {
        "appends": [script(q) for q in scaled(crawl, options.mean_tokens, 1.0)],
        "updates": [script(q) for q in scaled(ann, options.mean_tokens, ANN_GAP_FACTOR)],
    }


class Bench:
    """All rows of one run."""

    def __init__(self, http: aiohttp.ClientSession, options: argparse.Namespace) -> None:
        self.http = http
        self.within_s: float = options.within
        self.traces = traces(options)
        longest = max(len(s.prompt) for t in self.traces.values() for s in t) + ANSWER_TOKENS
        quarter = STREAMS * options.mean_tokens // 4
        self.pool_blocks = -(-max(quarter, longest) // BLOCK_TOKENS)
        self.rows: list[Row] = []

    async def run(self) -> None:
        """Every engine in its turn."""
        with self.started(plugin=True) as server:
            by_plugin = PluginEngine(self.http, server)
            for trace in self.traces:
                for policy in POLICIES:
                    await by_plugin.client.set_policy(policy)
                    await self.play(trace, policy, by_plugin, server.url, Streamed)
        with self.started(plugin=False) as server:
            stock = StockEngine(self.http, server)
            for trace in self.traces:
                await self.play(trace, WHOLE, stock, server.url, Whole)
        with self.started(plugin=False, module="loadtest.stock_streaming") as server:
            stock = StockEngine(self.http, server)
            for trace in self.traces:
                await self.play(trace, PARTS, stock, server.url, SessionOfParts)

    @contextmanager
    def started(self, plugin: bool, module: str | None = None) -> Iterator[Server]:
        """An engine, ready."""
        options = EngineOptions(
            dtype="float32",
            max_model_len=self.pool_blocks * BLOCK_TOKENS,
            max_num_batched_tokens=STEP_TOKENS,
            kv_blocks=1 + self.pool_blocks,  # one is vLLM's null block
            plugin=plugin,
        )
        if module is not None:
            options = replace(options, module=module)
        with engine(options) as server:
            server.start().wait_ready(300)
            yield server

    async def play(
        self,
        trace: str,
        name: str,
        engine: Engine,
        url: str,
        make: type[Streamed | Whole | SessionOfParts],
    ) -> None:
        """One row; salted, so that it finds no other row's KV."""
        scripts = self.traces[trace]
        target = make(self.http, url, MODEL, f"{trace}-{name}", ANSWER_TOKENS)
        before, clock = await engine.counters(), Clock()
        outcomes = await played(target, scripts, self.within_s)
        ends_s = clock.now_s
        async with asyncio.timeout(IDLE_WITHIN_S):
            while not await engine.idle():
                await clock.until(clock.now_s + 0.1)
        row = row_of(name, trace, scripts, outcomes, before, await engine.counters(), ends_s)
        self.rows.append(row)
        print(f"{trace}, {name}: {row.finished} of {len(scripts)}, {ends_s:.0f} s", file=sys.stderr)


def row_of(
    name: str,
    trace: str,
    scripts: Sequence[Script],
    outcomes: Sequence[Outcome],
    before: Counters,
    after: Counters,
    ends_s: float,
) -> Row:
    """What came of one row."""
    done = [o for o in outcomes if o.finished and o.ttft_s is not None]
    ttfts_s = [o.ttft_s for o in done if o.ttft_s is not None]
    computed = None
    if before.computed is not None and after.computed is not None:
        computed = after.computed - before.computed - needed_tokens(scripts, outcomes)
    invalidated = None
    if before.invalidated is not None and after.invalidated is not None:
        invalidated = after.invalidated - before.invalidated
    return Row(
        name=name,
        trace=trace,
        queries=len(scripts),
        finished=len(done),
        ttft_s=p50_p95_p99(ttfts_s) if ttfts_s else None,
        ends_s=ends_s,
        preemptions=after.preemptions - before.preemptions,
        invalidated_tokens=invalidated,
        beyond_need_tokens=computed,
        answers={
            s.query_id: o.tokens for s, o in zip(scripts, outcomes, strict=True) if o.finished
        },
    )


def differing(row: Row, reference: Row) -> int:
    """Queries that both answered, with other tokens."""
    both = row.answers.keys() & reference.answers.keys()
    return sum(row.answers[query] != reference.answers[query] for query in both)


def report(bench: Bench, options: argparse.Namespace) -> None:
    """Print the tables, and the JSON object as the last line."""
    print(
        f"{machine()}, {vllm_version()}; seed {options.seed}; {MODEL} in float32, steps of "
        f"{STEP_TOKENS} tokens, KV pool of {bench.pool_blocks * BLOCK_TOKENS} tokens; "
        f"{options.queries} queries of {options.mean_tokens} tokens on average, {options.qps:g} a "
        f"second; given up {options.within:g} s after the last input"
    )
    for trace, scripts in bench.traces.items():
        spans = ((s.due_s[0], s.due_s[-1]) for s in scripts)
        tokens = sum(len(s.prompt) for s in scripts)
        print(
            f"\n{trace}: {tokens} tokens in all, retrieval of up to {most_at_once(spans)} at once\n"
            f"{'':15}{'TTFT P50 / P95 / P99, s':>25}{'finished':>10}{'ends, s':>9}{'preempt':>9}"
            f"{'inval.':>8}{'beyond need':>13}{'differ':>8}"
        )
        rows = [row for row in bench.rows if row.trace == trace]
        reference = next(row for row in rows if row.name == WHOLE)
        for row in rows:
            print(line(row, differing(row, reference)))
    print(LEGEND)
    result = [{k: v for k, v in asdict(row).items() if k != "answers"} for row in bench.rows]
    print(json.dumps({"benchmark": "policies", "rows": result}))


LEGEND = """
ends: when the last answer was complete, or given up. preempt: how often KV was taken from
somebody. inval.: computed tokens given back because their list changed. beyond need: tokens
computed more than once, or of a list that was replaced; vLLM alone counts neither. differ: answers
whose tokens are not those of `stock, whole`, of the queries that both finished."""


def line(row: Row, differ: int) -> str:
    """One row of a table."""

    def count(value: int | None) -> str:
        return "-" if value is None else str(value)

    return (
        f"{row.name:15}{slashed(row.ttft_s, 2) or '-':>25}{f'{row.finished} of {row.queries}':>10}"
        f"{row.ends_s:>9.0f}{row.preemptions:>9}{count(row.invalidated_tokens):>8}"
        f"{count(row.beyond_need_tokens):>13}{differ:>8}"
    )


async def run(options: argparse.Namespace) -> int:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        bench = Bench(http, options)
        await bench.run()
    report(bench, options)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=48)
    parser.add_argument("--mean-tokens", type=int, default=400)
    parser.add_argument("--qps", type=float, default=3.0)
    parser.add_argument("--within", type=float, default=60.0, help="seconds after the last input")
    parser.add_argument("--seed", type=int, default=1)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
