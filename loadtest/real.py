"""The report's rows of a real engine: the scaled traces by each way to hand them over.

Every target starts servers of its own, one after the other, with one trace for all of them. The
prompts are real words. In front of the context stands what a chat template puts there, on engines
that are spoken to directly as many other tokens.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from deploy.local import engine, gateway
from deploy.model import model_dir
from loadtest.results import REAL, Result
from loadtest.scripts import Script, drawn, script
from loadtest.targets import SessionOfParts, ThroughGateway, Warmed, Whole, messages
from loadtest.texts import ExactTexts
from loadtest.timeline import Line
from loadtest.trial import (
    POLICIES,
    SESSIONS,
    WARMING,
    WHOLE,
    Load,
    Outcome,
    Row,
    Side,
    load_of,
    measure,
    pool_blocks,
    stock,
)
from loadtest.workload import Document, Query

HEAD = 1 << 50
"""The `doc_id` of what stands before the context."""


def waiting(blocks: int, options: argparse.Namespace) -> Side:
    """Stock vLLM; each prompt is sent whole when its retrieval ends."""
    return Side((WHOLE,), Whole, stock(blocks, options.step_tokens))


def warming(blocks: int, options: argparse.Namespace) -> Side:
    """Stock vLLM; its prefix cache is warmed."""
    return Side((WARMING,), Warmed, stock(blocks, options.step_tokens))


def sessions(blocks: int, options: argparse.Namespace) -> Side:
    """Stock vLLM's own streaming."""
    plain = stock(blocks, options.step_tokens)
    return Side((SESSIONS,), SessionOfParts, replace(plain, module="loadtest.stock_streaming"))


def through_gateway(blocks: int, options: argparse.Namespace) -> Side:
    """The plug-in behind a gateway, by every policy."""
    target = partial(ThroughGateway, texts=ExactTexts(str(model_dir())))
    return Side(POLICIES, target, replace(stock(blocks, options.step_tokens), plugin=True))


SIDES: dict[str, Callable[[int, argparse.Namespace], Side]] = {
    "waiting": waiting,
    "warming": warming,
    "sessions": sessions,
    "gateway": through_gateway,
}
FRONTED = {"gateway"}
"""Those with a gateway in front of the engine."""


def played(target: str, options: argparse.Namespace) -> Iterator[Result]:
    """The rows of one target: both workloads, at every rate."""
    loads = loads_of(options)
    side = SIDES[target](pool_blocks(loads, options.memory_share), options)
    with ExitStack() as running:
        server = running.enter_context(engine(side.options))
        server.start().wait_ready(300)
        front = None
        if target in FRONTED:
            front = running.enter_context(gateway([server.url])).start().wait_ready(60)
        found = asyncio.run(measure(side, server, loads, options, front))
    by_name = {(load.name, load.qps): load for load in loads}
    for row, outcomes in found:
        label = f"gateway {row.name}" if target in FRONTED else row.name
        yield result_of(by_name[row.workload, row.qps], row, outcomes, label, options)


def loads_of(options: argparse.Namespace) -> list[Load]:
    """The traces, scaled; the same for a seed."""
    scripted = _scripted(ExactTexts(str(model_dir())))
    return [
        load_of(name, options.queries, options.tokens[name], options.seed, scripted, qps)
        for name in options.workloads
        for qps in options.real_qps.get(name, (None,))
    ]


def _scripted(texts: ExactTexts) -> Callable[[Query], Script]:
    head = drawn(Document(HEAD, texts.frame_tokens(messages("a row", ""))))
    return partial(script, tokens_of=texts.tokens_of, head=head)


def result_of(
    load: Load, row: Row, outcomes: Sequence[Outcome], target: str, options: argparse.Namespace
) -> Result:
    """A row of the report."""
    computed = row.recomputed_tokens
    answered = [o for o in outcomes if not o.error and o.ttft_s is not None]
    return Result(
        engine=REAL,
        workload=load.name,
        qps=load.qps,
        delay_factor=1.0,
        target=target,
        queries=row.queries,
        errors=row.errors,
        ttft_s=tuple(o.ttft_s for o in answered if o.ttft_s is not None),
        completion_s=row.completion_s,
        computed_tokens=None
        if computed is None
        else computed + load.needed_tokens(options.answer_tokens),
        invalidated_tokens=row.invalidated_tokens,
        preemptions=row.preemptions,
        lines=tuple(_line(load, outcome) for outcome in answered),
    )


def _line(load: Load, outcome: Outcome) -> Line:
    played = next(s for s in load.scripts if s.query_id == outcome.query_id)
    first_s = None if outcome.ttft_s is None else played.due_s[-1] + outcome.ttft_s
    return Line(
        query_id=outcome.query_id,
        inputs_s=played.due_s,
        first_token_s=first_s,
        end_s=outcome.span_s[1],
        invalidated=list(outcome.invalidated),
    )
