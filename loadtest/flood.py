"""A steady load of streams on gateways, as lean as it can be made: one process, one core.

Streams come at Poisson times; each posts its chunks at times of its own, asks, reads its answer,
and is gone, so that about the same number is open all the time. The load begins as it goes on:
the first streams are opened evenly within the ramp, with as many chunks as leave each its part of
them, from one to all, at the end of the ramp. Open loop: a chunk is posted when it is due, whether
or not the one before was acknowledged, and its acknowledgement counts from when it was due. Every
chunk's text is another, so each is tokenized.

What a gateway refuses or breaks is counted, and the load goes on with the next stream. Every
request has a deadline, and connections are bounded.

    python -m loadtest.flood --url http://127.0.0.1:8080 --model M --rate 500 --streams 1000

prints JSON objects, one a line: `{"at": "steady"}` when the load is what it is to be, then what
happened in each `--every` seconds; with `--answer-all` a last one when no stream is left.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvloop

from loadtest.report import p50_p95_p99
from loadtest.wire import Answer, Broken, Wire

Json = dict[str, Any]

_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or
had an they which one you were all her she there would their we him been has when who will
no more if out so up said what its about than into them can only other time new some could
these two may first then do any like my now over such our man me even most made after also
did many off before must well back through years where much your way down should because
long each just state those people too how little good world make very year still see own
work men day
"""
CONNECTIONS = 1024
"""To each gateway; most are used by answers and by what waits."""
ASK_S, ANSWER_S = 10.0, 60.0
"""Longest wait for the end of an ordinary answer, and for that of a stream's."""
SETTLE_S = 5.0
"""Behind the ramp, before anything is measured."""
GRACE_S = 1.0
"""Behind a window, for the acknowledgements of what was due in it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is offered."""

    rate: float
    """Chunks a second, in all."""
    streams: int
    """Open at once, about."""
    chunks: int
    """Of each stream."""
    words: int
    """Of each chunk."""
    answer_tokens: int
    model: str
    seed: int

    @property
    def life_s(self) -> float:
        """From a stream's opening to its question."""
        return self.streams * self.chunks / self.rate

    @property
    def streams_per_s(self) -> float:
        return self.rate / self.chunks


@dataclass(slots=True)
class Seen:
    """What was due in a window of time."""

    since_s: float = field(default_factory=time.perf_counter)
    ack_s: list[float] = field(default_factory=list)
    """Of each chunk that was taken, from when it was due, be its stream open by then or not."""
    opened: int = 0
    answered: int = 0
    due: int = 0
    """Chunks that were to be posted."""
    late_s: list[float] = field(default_factory=list)
    """By how much this process itself was late to post each of them, once its stream was open."""
    errors: Counter[str] = field(default_factory=Counter)

    def figures(self, seconds: float) -> Json:
        """All of it; latencies as P50, P95, P99 and the largest, in milliseconds."""
        return {
            "seconds": round(seconds, 3),
            "due": self.due,
            "chunks": len(self.ack_s),
            "chunks_per_s": round(len(self.ack_s) / seconds, 1),
            # One that was not taken in time counts as taken when the time was over.
            "ack_ms": _cuts_ms(self.ack_s + [GRACE_S] * (self.due - len(self.ack_s))),
            "late_ms": _cuts_ms(self.late_s),
            "opened": self.opened,
            "answered": self.answered,
            "errors": dict(self.errors),
        }


def _cuts_ms(values_s: Sequence[float]) -> list[float] | None:
    if not values_s:
        return None
    return [round(1000 * cut, 2) for cut in (*p50_p95_p99(values_s), max(values_s))]


class Refused(Exception):
    """The gateway said no, or broke off. Its text is the code of the error."""


class Flood:
    """The streams of one load."""

    def __init__(self, urls: Sequence[str], load: Load) -> None:
        self.seen = Seen()
        self.open = 0
        """Streams that were opened and have not had their whole answer."""
        self._load = load
        self._wires = [Wire(url, CONNECTIONS) for url in urls]
        self._rng = random.Random(load.seed)
        self._words = _WORDS.split()
        self._tasks: set[asyncio.Task[None]] = set()
        self._coming: asyncio.Task[None] | None = None
        create = {
            "model": load.model,
            "messages": [{"role": "user", "content": "What does it say?"}],
            "max_tokens": load.answer_tokens,
        }
        self._create = orjson.dumps(create)

    async def ramp(self, seconds: float) -> None:
        """Open the first streams, in the middle of their lives, and let more come from then on."""
        begun_s, load = time.perf_counter(), self._load
        for i in range(load.streams):
            at_s = seconds * i / load.streams
            await _until(begun_s + at_s)
            chunks = 1 + i % load.chunks + round(load.chunks * (seconds - at_s) / load.life_s)
            self._begin(chunks, begun_s + at_s)
        self._coming = asyncio.get_running_loop().create_task(self._come())

    def begin_windows(self) -> None:
        """What happened until now belongs to no window."""
        self.seen = Seen()

    async def window(self, seconds: float) -> Json:
        """What was due from the end of the window before on, for so many seconds."""
        seen = self.seen
        await _until(seen.since_s + seconds)
        lasted_s, self.seen = time.perf_counter() - seen.since_s, Seen()
        await asyncio.sleep(GRACE_S)
        return seen.figures(lasted_s) | {"open": self.open}

    async def end(self, within_s: float) -> int:
        """Let no more streams come; those that are there post what they have and are answered.

        Returns:
            How many were still open when the time was over.
        """
        if self._coming is not None:
            self._coming.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        left = self.open
        for wire in self._wires:
            wire.close()
        for task in self._tasks:
            task.cancel()
        return left

    async def _come(self) -> None:
        due_s = time.perf_counter()
        while True:
            due_s += self._rng.expovariate(self._load.streams_per_s)
            await _until(due_s)
            self._begin(self._load.chunks, due_s)

    def _begin(self, chunks: int, due_s: float) -> None:
        stream = self._stream(self._rng.choice(self._wires), chunks, due_s)
        task = asyncio.get_running_loop().create_task(stream)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stream(self, wire: Wire, chunks: int, due_s: float) -> None:
        """One stream, from its opening to the end of its answer.

        Args:
            due_s: when it was to be opened; a slow opening puts none of its chunks off.
        """
        try:
            created = _checked(await wire.ask("POST", "/v1/streams", self._create, ASK_S), 201)
            self.seen.opened += 1
            self.open += 1
            try:
                path = f"/v1/streams/{orjson.loads(created)['id']}"
                await self._feed(wire, path, chunks, due_s)
                answer = await wire.ask("POST", path + "/finish", b"{}", ANSWER_S)
                if b"[DONE]" not in _checked(answer, 200):
                    raise Refused("an answer broke off")
                self.seen.answered += 1
            finally:
                self.open -= 1
        except (Broken, Refused) as e:
            self.seen.errors[str(e)] += 1

    async def _feed(self, wire: Wire, path: str, chunks: int, due_s: float) -> None:
        """Post the chunks when they are due, and wait for all acknowledgements.

        Raises:
            Refused, Broken: a chunk was not taken.
        """
        path, rng, load = path + "/chunks", self._rng, self._load
        opened_s = time.perf_counter()
        posts = list[asyncio.Future[Answer]]()
        for _ in range(chunks):
            due_s += rng.uniform(0.5, 1.5) * load.life_s / load.chunks
            await _until(due_s)
            body = b'{"text":"%b"}' % " ".join(rng.choices(self._words, k=load.words)).encode()
            self.seen.due += 1
            self.seen.late_s.append(time.perf_counter() - max(due_s, opened_s))
            while posts and posts[0].done():
                _checked(posts.pop(0).result(), 202)
            post = wire.ask("POST", path, body, ASK_S)
            post.add_done_callback(_acknowledged(self.seen, due_s))
            posts.append(post)
        for post in posts:
            _checked(await post, 202)


def _acknowledged(seen: Seen, due_s: float) -> Callable[[asyncio.Future[Answer]], None]:
    """Notes when a chunk that was due then was taken."""

    def note(post: asyncio.Future[Answer]) -> None:
        if not post.cancelled() and post.exception() is None and post.result().status == 202:
            seen.ack_s.append(time.perf_counter() - due_s)

    return note


def _checked(answer: Answer, wanted: int) -> bytes:
    """The body of an answer that has the status that is wanted."""
    if answer.status != wanted:
        try:
            code = orjson.loads(answer.body)["error"]["code"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            code = "error"
        raise Refused(f"{answer.status} {code}")
    return answer.body


async def _until(due_s: float) -> None:
    await asyncio.sleep(max(due_s - time.perf_counter(), 0))


async def run(urls: Sequence[str], load: Load, options: argparse.Namespace) -> None:
    """Offer the load and say what happens."""
    flood = Flood(urls, load)
    await flood.ramp(options.ramp)
    await asyncio.sleep(SETTLE_S)
    _say({"at": "steady", "open": flood.open, "errors": dict(flood.seen.errors)})
    flood.begin_windows()
    left_s = options.seconds
    while left_s > 0:
        seconds = min(options.every, left_s)
        left_s -= seconds
        _say({"at": "window"} | await flood.window(seconds))
    if options.answer_all:
        left = await flood.end(load.life_s + ANSWER_S)
        _say({"at": "end", "open": left, "errors": dict(flood.seen.errors)})


def _say(what: Json) -> None:
    print(json.dumps(what), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", action="append", required=True, help="of a gateway; repeatable")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rate", type=float, required=True, help="chunks a second, in all")
    parser.add_argument("--streams", type=int, default=2000, help="open at once")
    parser.add_argument("--chunks", type=int, default=30, help="of each stream")
    parser.add_argument("--words", type=int, default=20, help="of each chunk")
    parser.add_argument("--answer-tokens", type=int, default=4)
    parser.add_argument("--ramp", type=float, default=10.0, help="seconds of the openings")
    parser.add_argument("--seconds", type=float, default=15.0, help="that are measured")
    parser.add_argument("--every", type=float, default=3600.0, help="seconds of one window")
    parser.add_argument("--answer-all", action="store_true", help="let all streams end")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    load = Load(
        rate=options.rate, streams=options.streams, chunks=options.chunks, words=options.words,
        answer_tokens=options.answer_tokens, model=options.model, seed=options.seed,
    )  # fmt: skip
    gc.freeze()
    gc.set_threshold(100_000)
    uvloop.run(run(options.url, load, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
