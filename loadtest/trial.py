"""Playing a scaled trace on a real engine, and what is seen of it.

A trace is scaled down to what a small model on a CPU can do (`Load`); every row of a comparison
plays the same one, and an engine's log, metrics and info say what it has computed meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import aiohttp

from deploy.local import EngineOptions, Server
from engine_adapter.client import EngineClient
from engine_adapter.errors import EngineError
from loadtest import workload
from loadtest.front import Refused
from loadtest.report import Cuts, p50_p95_p99
from loadtest.scripts import Script, most_at_once, scaled, script
from loadtest.targets import Clock, Target
from loadtest.timeline import Moment
from loadtest.workload import Query

POLICIES = ("default", "fcfs", "lcas", "mcps", "srpf")
WHOLE = "non-streaming"
SESSIONS = "StreamingInput"
WARMING = "cache warming"
GAP_FACTORS = {"crawl": 1.2, "ann": 8.0}
STABLE_SHARE = 0.9
"""Of an ANN list: what an update leaves in place at its start, on average."""
STREAMS = 24
MEMORY_SHARE = 4
BLOCK_TOKENS = 32
ITERATION = re.compile(r"(\d+) context tokens, \d+ generation requests, (\d+) generation tokens")
PREEMPTIONS = re.compile(r"^vllm:num_preemptions_total\S* (\S+)$", re.MULTILINE)
POLL_S = 0.5
SETTLED_S = 1.5
DEADLINE_S = 180.0
"""The longest that a row goes on after its last input."""


@dataclass(frozen=True, slots=True)
class Load:
    """A trace, ready to be played."""

    name: str
    scripts: tuple[Script, ...]
    qps: float
    open_at_once: int
    """Prompts open at once at most, if answering took no time."""

    @property
    def ends_s(self) -> float:
        """When the last input of all is due."""
        return max(script.due_s[-1] for script in self.scripts)

    def needed_tokens(self, answer_tokens: int) -> int:
        """Tokens to compute when each is computed once. The last one of an answer is not."""
        return sum(len(script.prompt) + answer_tokens - 1 for script in self.scripts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one query."""

    query_id: int
    token_ids: tuple[int, ...]
    ttft_s: float | None
    """None if no token came."""
    span_s: tuple[float, float]
    """From its first input to its end."""
    error: str = ""
    invalidated: tuple[Moment, ...] = ()
    """When updates made computed tokens useless, as far as the target is told."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine has done since its start."""

    computed_tokens: int
    preemptions: int
    invalidated_tokens: int | None
    """None where nothing can be invalidated."""


@dataclass(frozen=True, slots=True)
class Row:
    """One trace on one engine. Seconds and tokens; None where the figure would say nothing."""

    workload: str
    qps: float
    name: str
    queries: int
    answered: int
    errors: int
    ttft_s: Cuts | None
    preemptions: int
    invalidated_tokens: int | None
    recomputed_tokens: int | None
    completion_s: float | None
    open_at_once: int
    """Prompts between their first input and the end of their answer, at most."""
    differing: int = 0


def load_of(
    name: str,
    queries: int,
    mean_tokens: int,
    seed: int,
    scripted: Callable[[Query], Script] = script,
    qps: float | None = None,
) -> Load:
    """A scaled trace.

    Args:
        qps: None for the rate at which `STREAMS` prompts are open on average.
    """
    ann = partial(workload.ann, stable_share=STABLE_SHARE)
    make = workload.crawl if name == "crawl" else ann
    open_s = statistics.fmean(
        query.inputs[-1].at_s for query in scaled(make(queries, 1.0, seed), 1, GAP_FACTORS[name])
    )
    qps = qps or STREAMS / open_s
    trace: list[Query] = scaled(make(queries, qps, seed), mean_tokens, GAP_FACTORS[name])
    scripts = tuple(map(scripted, trace))
    at_once = most_at_once((s.due_s[0], s.due_s[-1]) for s in scripts)
    return Load(name, scripts, qps, at_once)


def pool_blocks(loads: Sequence[Load], memory_share: int = MEMORY_SHARE) -> int:
    """Blocks for a share of the tokens of `STREAMS` mean prompts.

    Args:
        memory_share: 1 for room for all, 4 for a quarter of it.

    Raises:
        ValueError: a prompt would not fit.
    """
    lengths = [len(script.prompt) for load in loads for script in load.scripts]
    blocks = round(STREAMS * statistics.fmean(lengths) / memory_share / BLOCK_TOKENS)
    if blocks * BLOCK_TOKENS < max(lengths) + BLOCK_TOKENS:
        raise ValueError(f"a prompt of {max(lengths)} tokens does not fit; take another seed")
    return blocks


async def play(target: Target, script: Script, clock: Clock, answer_tokens: int) -> Outcome:
    """Have one query answered."""
    token_ids: list[int] = []
    first_s, error = None, ""
    try:
        async with aclosing(target.answer(script, clock)) as pieces:
            async for piece in pieces:
                if piece and first_s is None:
                    first_s = clock.now_s
                token_ids += piece
    except (EngineError, Refused, aiohttp.ClientError) as e:
        error = str(e) or type(e).__name__
    if not error and len(token_ids) != answer_tokens:
        error = f"the answer broke off after {len(token_ids)} tokens"
    return Outcome(
        query_id=script.query_id,
        token_ids=tuple(token_ids),
        ttft_s=None if first_s is None else first_s - script.due_s[-1],
        span_s=(script.due_s[0], clock.now_s),
        error=error,
        invalidated=tuple(target.invalidated.get(script.query_id, ())),
    )


class Meter:
    """Reads what an engine does from outside: its log, its metrics, the plug-in's info."""

    def __init__(self, server: Server, http: aiohttp.ClientSession, plugin: bool) -> None:
        self._server = server
        self._http = http
        self._client = EngineClient(http, server.url) if plugin else None

    def computed_tokens(self) -> int:
        """Tokens of all steps, by vLLM's own log of them."""
        steps = ITERATION.findall(self._server.log_path.read_text(errors="replace"))
        return sum(int(prefill) + int(decode) for prefill, decode in steps)

    async def counters(self) -> Counters:
        """All counts, when the engine has nothing left to do."""
        computed = await self._settled()
        if self._client is not None:
            info = await self._client.info()
            return Counters(computed, info.preemptions, info.invalidated_tokens)
        async with self._http.get(self._server.url + "/metrics") as response:
            values = PREEMPTIONS.findall(await response.text())
        return Counters(computed, sum(int(float(value)) for value in values), None)

    async def _settled(self) -> int:
        computed = self.computed_tokens()
        while True:
            await asyncio.sleep(SETTLED_S)
            before, computed = computed, self.computed_tokens()
            if computed == before:
                return computed


async def play_all(
    target: Target, load: Load, meter: Meter, options: argparse.Namespace
) -> list[Outcome]:
    """Play a trace to its end, or until the engine is stuck; the outcomes there are."""
    clock = Clock()
    tasks = [
        asyncio.create_task(play(target, script, clock, options.answer_tokens))
        for script in load.scripts
    ]
    pending: set[asyncio.Task[Outcome]] = set(tasks)
    computed, moved_s = -1, 0.0
    while pending:
        _, pending = await asyncio.wait(pending, timeout=POLL_S)
        before, computed = computed, meter.computed_tokens()
        if computed != before or clock.now_s < load.ends_s:
            moved_s = clock.now_s
        stuck = clock.now_s - moved_s > options.patience
        if stuck or clock.now_s > load.ends_s + DEADLINE_S:
            break
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    return [task.result() for task in tasks if not task.cancelled()]


def row_of(
    load: Load, name: str, outcomes: Sequence[Outcome], before: Counters, after: Counters,
    answer_tokens: int,
) -> Row:  # fmt: skip
    """The figures of one trace played."""
    answered = [o for o in outcomes if not o.error]
    ttft_s = [o.ttft_s for o in answered if o.ttft_s is not None]
    complete = len(answered) == len(load.scripts)
    computed = after.computed_tokens - before.computed_tokens
    invalidated = None
    if before.invalidated_tokens is not None and after.invalidated_tokens is not None:
        invalidated = after.invalidated_tokens - before.invalidated_tokens
    ended_s = {o.query_id: o.span_s[1] for o in outcomes}
    return Row(
        workload=load.name,
        qps=load.qps,
        name=name,
        queries=len(load.scripts),
        answered=len(answered),
        errors=len(outcomes) - len(answered),
        ttft_s=p50_p95_p99(ttft_s) if ttft_s else None,
        preemptions=after.preemptions - before.preemptions,
        invalidated_tokens=invalidated,
        recomputed_tokens=computed - load.needed_tokens(answer_tokens) if complete else None,
        completion_s=max(ended_s.values()) if complete else None,
        open_at_once=most_at_once(
            (s.due_s[0], ended_s.get(s.query_id, float("inf"))) for s in load.scripts
        ),
    )


def differing(outcomes: Sequence[Outcome], reference: Sequence[Outcome]) -> int:
    """How many answers have other tokens than the reference's to the same query."""
    wanted = {o.query_id: o.token_ids for o in reference if not o.error}
    return sum(
        o.token_ids != wanted[o.query_id] for o in outcomes if not o.error and o.query_id in wanted
    )


def compared(found: Sequence[tuple[Row, list[Outcome]]]) -> list[Row]:
    """The rows, each with how many of its answers differ from those of the whole prompts."""
    reference = {row.workload: outcomes for row, outcomes in found if row.name == WHOLE}
    return [
        replace(row, differing=differing(outcomes, reference[row.workload]))
        for row, outcomes in found
    ]


@asynccontextmanager
async def closed(target: Target) -> AsyncIterator[Target]:
    """A target that is closed in the end."""
    try:
        yield target
    finally:
        await target.close()


def _at_once(script: Script) -> Script:
    """A script with all there is in its only input."""
    query = script.query
    if query is not None:
        query = replace(query, inputs=query.inputs[-1:])
    return replace(script, due_s=(0.0,), contexts=script.contexts[-1:], query=query)


NewTarget = Callable[[aiohttp.ClientSession, str, str, str, int], Target]
"""From a session, a server's URL, the model's name, a salt, and tokens of an answer."""


@dataclass(frozen=True, slots=True)
class Side:
    """An engine, and the rows it is played for."""

    rows: tuple[str, ...]
    target: NewTarget
    options: EngineOptions

    @property
    def plugin(self) -> bool:
        return self.options.plugin


def stock(blocks: int, step_tokens: int) -> EngineOptions:
    """vLLM without the plug-in, with so much KV, that logs every step."""
    return EngineOptions(
        dtype="float32",
        max_model_len=blocks * BLOCK_TOKENS,
        kv_blocks=blocks + 1,  # one is vLLM's null block
        max_num_batched_tokens=step_tokens,
        plugin=False,
        extra_args=("--enable-logging-iteration-details", "--max-num-seqs", "64"),
    )


async def measure(
    side: Side,
    server: Server,
    loads: Sequence[Load],
    options: argparse.Namespace,
    front: Server | None = None,
) -> list[tuple[Row, list[Outcome]]]:
    """All rows of one engine.

    Args:
        front: what the targets speak to, if that is not the engine itself.
    """
    found = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:

        def target(salt: str) -> Target:
            name = side.options.served_name
            return side.target(http, (front or server).url, name, salt, options.answer_tokens)

        async with closed(target("warm")) as warming:
            await play(warming, _at_once(loads[0].scripts[0]), Clock(), options.answer_tokens)
        meter = Meter(server, http, side.plugin)
        for load in loads:
            for name in side.rows:
                if side.plugin:
                    await EngineClient(http, server.url).set_policy(name)
                before = await meter.counters()
                async with closed(target(f"{load.name}-{load.qps:.3g}-{name}")) as played:
                    outcomes = await play_all(played, load, meter, options)
                after = await meter.counters()
                row = row_of(load, name, outcomes, before, after, options.answer_tokens)
                print(f"  {load.name} {name}: {row.answered} of {row.queries} answered", flush=True)
                for error in {o.error for o in outcomes if o.error}:
                    print(f"    {error}", flush=True)
                found.append((row, outcomes))
    return found
