"""Drives a gateway with the streams of a trace, open loop, and says what its users would see.

Every step of every stream has its own time from the trace, and latencies count from that time, not
from when the step could be sent: a slow gateway neither slows the load nor hides its queue. One
process; arrivals are Poisson (a synthetic trace) or those of a trace file.

    python -m loadtest.drive --url http://127.0.0.1:8000 --model M --workload crawl --qps 2
    python -m loadtest.drive --url ... --model M --trace trace.parquet --delay-factor 10

- `TTFT`: from when the last input is due to the first token. `between tokens`: from one event of an
  answer to the next. `chunk ack`: from when a chunk or list is due to its acknowledgement.
- `driver late`: from when a stream is due, or a step that waited for its time and not for the
  gateway, to when this process gets to it. Where this is not small, the figures are of the driver
  and not of the gateway.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from loadtest import workload
from loadtest.front import Front, Json, Refused, brings_token
from loadtest.published import RATES
from loadtest.report import machine, p50_p95_p99
from loadtest.scripts import QUESTIONS, scaled
from loadtest.targets import Clock
from loadtest.texts import ExactTexts, RealTexts, Texts
from loadtest.traces import TraceError, delayed, read
from loadtest.workload import Document, Input, Query

SILENCE_S = 300.0
"""A gateway that says nothing for so long has failed the request."""


@dataclass(slots=True)
class Seen:
    """What the driver has seen. Lists in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    chat_ttft_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)
    open_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    """Until the gateway said that it opens no stream now."""
    chunk_ack_s: list[float] = field(default_factory=list)
    driver_late_s: list[float] = field(default_factory=list)
    answered_at_s: list[float] = field(default_factory=list)
    """When answers were complete, from the start."""
    answered: int = 0
    cancelled: int = 0
    chunks: int = 0
    tokens_invalidated: int = 0
    answer_tokens: int = 0
    open_at_once: int = 0
    """Most streams that were open in the gateway at one time."""
    errors: Counter[str] = field(default_factory=Counter)
    lasted_s: float = 0.0
    _open: int = 0

    def opened(self) -> None:
        self._open += 1
        self.open_at_once = max(self.open_at_once, self._open)

    def ended(self) -> None:
        self._open -= 1

    def figures(self) -> Json:
        """All of it; lists as P50, P95, P99 and the largest, None where one is empty."""
        lists = {
            name: [round(cut, 6) for cut in (*p50_p95_p99(values), max(values))] if values else None
            for name in LATENCIES
            if (values := getattr(self, name)) is not None
        }
        counts = {name: getattr(self, name) for name in COUNTS}
        return lists | counts | {"errors": dict(self.errors), "lasted_s": round(self.lasted_s, 3)}


LATENCIES = {
    "ttft_s": "TTFT",
    "chat_ttft_s": "TTFT of plain chat",
    "between_tokens_s": "between tokens",
    "open_s": "opening a stream",
    "refused_s": "refusing a stream",
    "chunk_ack_s": "chunk ack",
    "driver_late_s": "driver late",
}
COUNTS = (
    "answered", "cancelled", "chunks", "tokens_invalidated", "answer_tokens", "open_at_once",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mix:
    """What becomes of the queries, by chance but the same for a seed."""

    cancel: float = 0.0
    """Share of streams that are given up: at one of their inputs, or within their answer."""
    chat: float = 0.0
    """Share of queries that are sent whole, as plain chat, when their last input is due."""
    seed: int = 0


async def drive(front: Front, queries: Sequence[Query], texts: Texts, mix: Mix) -> Seen:
    """Play queries against a gateway, each at its time."""
    seen, clock, rng = Seen(), Clock(), random.Random(mix.seed)
    playing = []
    for query in queries:
        chat, cancel = rng.random() < mix.chat, rng.random() < mix.cancel
        given_up = rng.randrange(len(query.inputs)) if cancel else None
        player = _Player(front, query, texts, clock, seen)
        playing.append(player.chat() if chat else player.stream(given_up))
    await asyncio.gather(*playing)
    seen.lasted_s = clock.now_s
    return seen


class _Player:
    """One query."""

    def __init__(self, front: Front, query: Query, texts: Texts, clock: Clock, seen: Seen) -> None:
        self._front = front
        self._query = query
        self._texts = texts
        self._clock = clock
        self._seen = seen
        self._known = set[int]()
        self._seq = 0

    async def stream(self, given_up: int | None) -> None:
        """Open, feed, finish; or give up at an input, at the last one within the answer."""
        try:
            await self._reach(self._query.arrival_s)
            stream = await self._open()
            self._seen.open_s.append(self._clock.now_s - self._query.arrival_s)
            self._seen.opened()
            try:
                await self._feed(stream, given_up)
            finally:
                self._seen.ended()
        except (Refused, aiohttp.ClientError, TimeoutError) as e:
            self._failed(e)

    async def _open(self) -> str:
        try:
            return await self._front.open([{"role": "user", "content": self._question()}])
        except Refused:
            self._seen.refused_s.append(self._clock.now_s - self._query.arrival_s)
            raise

    async def chat(self) -> None:
        """Ask for an answer to the whole prompt."""
        due_s = self._due_s(self._query.inputs[-1])
        try:
            await self._reach(due_s)
            inputs = self._query.inputs[-1:] if self._query.update else self._query.inputs
            documents = [self._texts.of(d) for given in inputs for d in given.documents]
            content = "\n".join([*documents, self._question()])
            events = self._front.chat([{"role": "user", "content": content}])
            await self._answer(events, due_s, self._seen.chat_ttft_s)
        except (Refused, aiohttp.ClientError, TimeoutError) as e:
            self._failed(e)

    async def _feed(self, stream: str, given_up: int | None) -> None:
        last = len(self._query.inputs) - 1
        for i, given in enumerate(self._query.inputs):
            due_s = self._due_s(given)
            if self._clock.now_s < due_s:  # else the step before took so long
                await self._reach(due_s)
            if i == given_up and i < last:
                await self._front.cancel(stream)
                self._seen.cancelled += 1
                return
            if given.documents:
                await self._hand_over(stream, given)
        due_s, events = self._due_s(self._query.inputs[-1]), self._front.answer(stream)
        await self._answer(events, due_s, self._seen.ttft_s, hang_up=given_up == last)

    async def _hand_over(self, stream: str, given: Input) -> None:
        if self._query.update:
            documents = [self._ranked(document) for document in given.documents]
            taken = await self._front.replace(stream, self._seq, documents)
            self._seen.tokens_invalidated += taken.get("invalidated", 0)
        else:
            await self._front.add(stream, self._seq, [self._texts.of(d) for d in given.documents])
        self._seen.chunk_ack_s.append(self._clock.now_s - self._due_s(given))
        self._seen.chunks += 1
        self._seq += 1

    def _ranked(self, document: Document) -> Json:
        """With its text once; after that its id says all."""
        name = str(document.doc_id)
        if document.doc_id in self._known:
            return {"id": name}
        self._known.add(document.doc_id)
        return {"id": name, "text": self._texts.of(document)}

    async def _answer(
        self,
        events: AsyncGenerator[Json, None],
        due_s: float,
        ttft_s: list[float],
        hang_up: bool = False,
    ) -> None:
        before_s: float | None = None
        async with aclosing(events):
            async for event in events:
                if usage := event.get("usage"):
                    self._seen.answer_tokens += usage["completion_tokens"]
                if not brings_token(event):
                    continue
                now_s = self._clock.now_s
                if before_s is None:
                    ttft_s.append(now_s - due_s)
                else:
                    self._seen.between_tokens_s.append(now_s - before_s)
                before_s = now_s
                if hang_up:
                    self._seen.cancelled += 1
                    return
        self._seen.answered += 1
        self._seen.answered_at_s.append(self._clock.now_s)

    async def _reach(self, due_s: float) -> None:
        await self._clock.until(due_s)
        self._seen.driver_late_s.append(self._clock.now_s - due_s)

    def _due_s(self, given: Input) -> float:
        return self._query.arrival_s + given.at_s

    def _question(self) -> str:
        query = self._query
        named = Document(QUESTIONS + query.query_id, query.question_tokens, query.question)
        return self._texts.of(named)

    def _failed(self, e: Exception) -> None:
        self._seen.errors[str(e) if isinstance(e, Refused) else type(e).__name__] += 1


def main() -> int:
    options = arguments()
    try:
        queries = queries_of(options)
    except (TraceError, OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 2
    seen = uvloop.run(run(options, queries))
    report(seen, options, queries)
    return 1 if seen.errors else 0


async def run(options: argparse.Namespace, queries: Sequence[Query]) -> Seen:
    """Connect and drive."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # an answer takes a socket
    texts: Texts = ExactTexts(options.tokenizer) if options.tokenizer else RealTexts()
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=SILENCE_S),
        headers=headers,
        read_bufsize=1 << 20,
    ) as http:
        sampling = {"max_tokens": options.answer_tokens, "temperature": 0}
        front = Front(http, options.url, options.model, sampling)
        mix = Mix(options.cancel, options.chat, options.seed)
        return await drive(front, queries, texts, mix)


def queries_of(options: argparse.Namespace) -> list[Query]:
    """The queries to play.

    Raises:
        TraceError, OSError: the trace can't be read.
        ValueError: a number makes no sense.
    """
    if options.trace is not None:
        queries = list(read(options.trace).queries)[: options.queries]
    else:
        make = workload.crawl if options.workload == "crawl" else workload.ann
        queries = make(options.queries or 100, options.qps, options.seed)
    if options.tokens is not None:
        return scaled(queries, options.tokens, options.delay_factor)
    return delayed(queries, options.delay_factor)


def report(seen: Seen, options: argparse.Namespace, queries: Sequence[Query]) -> None:
    """Print the table, and the JSON object as the last line."""
    figures = seen.figures()
    print(f"{machine()}; {len(queries)} queries, seed {options.seed}; {seen.lasted_s:.1f} s")
    print(f"{'milliseconds':20}{'P50':>10}{'P95':>10}{'P99':>10}{'max':>10}{'count':>9}")
    for name, title in LATENCIES.items():
        if figures[name] is not None:
            cells = "".join(f"{1000 * cut:>10.1f}" for cut in figures[name])
            print(f"{title:20}{cells}{len(getattr(seen, name)):>9}")
    print("; ".join(f"{name.replace('_', ' ')} {figures[name]}" for name in COUNTS))
    print("errors: " + (", ".join(f"{k} {n}" for k, n in seen.errors.most_common()) or "none"))
    settings: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "api_key"
    }
    print(json.dumps({"benchmark": "drive", "settings": settings, "figures": figures}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.drive", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the gateway")
    parser.add_argument("--model", required=True, help="the name that the gateway serves it by")
    parser.add_argument("--api-key", help="sent as a bearer token")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--workload", choices=tuple(RATES), default="crawl")
    source.add_argument("--trace", type=Path, help="file, instead of a synthetic workload")
    parser.add_argument("--queries", type=int, help="how many (default: 100, or all of the file)")
    parser.add_argument("--qps", type=float, default=1.0, help="of a synthetic workload")
    parser.add_argument("--delay-factor", type=float, default=1.0, help="of times within a query")
    parser.add_argument("--tokens", type=int, help="scale prompts to this many on average")
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--cancel", type=float, default=0.0, help="share of streams given up")
    parser.add_argument("--chat", type=float, default=0.0, help="share sent whole, as plain chat")
    parser.add_argument("--tokenizer", help="for texts of exact sizes, else 4 characters a token")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
