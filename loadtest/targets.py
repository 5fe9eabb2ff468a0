"""Ways to have an engine answer a query whose input arrives over time.

`Whole` waits for all of it, as without streaming. `Streamed` uses the plug-in's operations, and
`Warmed` the same ones on an engine without it, whose prefix cache is warmed.
`SessionOfParts` uses vLLM's own streaming input, through `loadtest.stock_streaming`.
`ThroughGateway` is a user of the gateway.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol

import aiohttp

from engine_adapter.client import EngineClient
from engine_adapter.errors import EngineError, UnknownPrompt, VersionConflict
from engine_adapter.messages import ErrorEvent, Extend, Finish, Open, Sampling, TokenEvent
from engine_adapter.operations import Operations
from engine_adapter.plain_client import PlainClient
from loadtest.front import Front, Json, Refused, brings_token
from loadtest.scripts import QUESTIONS, Script, common
from loadtest.texts import Texts
from loadtest.timeline import Moment
from loadtest.workload import Document, Input, Query

LEASE_S = 600.0
NOT_TOLD: Mapping[int, Sequence[Moment]] = {}
UNKNOWN_TOKEN = -1
"""Of an answer of which only the text is told."""


class Clock:
    """Seconds since the trace began."""

    def __init__(self) -> None:
        self._begun_s = time.perf_counter()

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._begun_s

    async def until(self, due_s: float) -> None:
        """Sleep until then; returns at once if that is past."""
        await asyncio.sleep(max(due_s - self.now_s, 0))


class Target(Protocol):
    """An engine and how it is spoken to."""

    @property
    def invalidated(self) -> Mapping[int, Sequence[Moment]]:
        """By query: when updates made computed tokens useless. Empty where nobody tells."""

    def answer(self, script: Script, clock: Clock) -> AsyncGenerator[list[int], None]:
        """Hand over a query's inputs when they are due; gives the tokens of its answer.

        Closing the generator leaves nothing of the query in the engine.

        Raises:
            EngineError, aiohttp.ClientError: the engine refuses, or breaks off.
        """

    async def close(self) -> None:
        """No more queries come."""


class Whole:
    """The prompt in one request, when the last input is there."""

    invalidated = NOT_TOLD

    def __init__(
        self, http: aiohttp.ClientSession, url: str, model: str, salt: str, answer_tokens: int
    ) -> None:
        self._http = http
        self._url = url + "/v1/completions"
        self._body: dict[str, Any] = {
            "model": model,
            "cache_salt": salt,
            "max_tokens": answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }

    async def answer(self, script: Script, clock: Clock) -> AsyncGenerator[list[int], None]:
        await clock.until(script.due_s[-1])
        body = self._body | {"prompt": script.prompt}
        async with self._http.post(self._url, json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[len("data: ") :]).get("choices", ()):
                        yield choice["token_ids"]

    async def close(self) -> None:
        """Nothing is held."""


class Streamed:
    """By the plug-in: opened with the first input, extended by the next, finished by the last.

    As the gateway does it: one operation is under way at most, what is due meanwhile goes into
    the next, and only the last input does not wait for it. With a single input there is nothing
    to stream; it is an ordinary request.
    """

    invalidated = NOT_TOLD
    client: Callable[[aiohttp.ClientSession, str], Operations] = EngineClient

    def __init__(
        self, http: aiohttp.ClientSession, url: str, model: str, salt: str, answer_tokens: int
    ) -> None:
        self._client = self.client(http, url)
        self._salt = salt
        self._sampling = Sampling(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
        self._whole = Whole(http, url, model, salt, answer_tokens)

    async def answer(self, script: Script, clock: Clock) -> AsyncGenerator[list[int], None]:
        if len(script.due_s) == 1:
            async for piece in self._whole.answer(script, clock):
                yield piece
            return
        prompt = _OpenPrompt(self._client, f"{self._salt}-{script.query_id}", self._salt)
        growing = asyncio.create_task(prompt.grow(script, clock))
        try:
            await clock.until(script.due_s[-1])
            prompt.closed = True
            while True:
                overtook = not growing.done()
                try:
                    async for piece in prompt.finish(script.prompt, self._sampling):
                        yield piece
                    return
                except (UnknownPrompt, VersionConflict):
                    if not overtook:
                        raise
                    await growing
        finally:
            growing.cancel()
            await asyncio.gather(growing, return_exceptions=True)
            with suppress(EngineError):
                await self._client.abort(prompt.prompt_id)

    async def close(self) -> None:
        await self._client.close()


class Warmed(Streamed):
    """By the same operations on an engine without the plug-in."""

    client = PlainClient


class _OpenPrompt:
    """What an engine has been sent of one prompt."""

    def __init__(self, client: Operations, prompt_id: str, salt: str) -> None:
        self.prompt_id = prompt_id
        self.closed = False
        self._client = client
        self._salt = salt
        self._version = -1
        self._sent: list[int] = []

    async def grow(self, script: Script, clock: Clock) -> None:
        """Send all inputs but the last, each when it is due or with the next."""
        earlier = script.due_s[:-1]
        taken = 0
        while taken < len(earlier):
            await clock.until(earlier[taken])
            if self.closed:
                return
            taken = max(bisect_right(earlier, clock.now_s), taken + 1)
            await self._send(script.contexts[taken - 1])

    async def _send(self, context: list[int]) -> None:
        version, keep, tokens = self._next(context)
        self._version, self._sent = version, context
        if version == 0:
            op = Open(tokens=tokens, cache_salt=self._salt, lease_s=LEASE_S)
            await self._client.open(self.prompt_id, op)
        else:
            await self._client.extend(
                self.prompt_id, Extend(version=version, keep=keep, tokens=tokens)
            )

    async def finish(
        self, prompt: list[int], sampling: Sampling
    ) -> AsyncGenerator[list[int], None]:
        version, keep, tokens = self._next(prompt)
        op = Finish(version=version, keep=keep, tokens=tokens, sampling=sampling)
        async with self._client.finish(self.prompt_id, op) as events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    yield event.token_ids
                elif isinstance(event, ErrorEvent):
                    raise EngineError.from_json(event.error)

    def _next(self, tokens: list[int]) -> tuple[int, int, list[int]]:
        """Version, tokens kept and tokens to send."""
        keep = common(self._sent, tokens)
        return self._version + 1, keep, tokens[keep:]


class SessionOfParts:
    """By vLLM's own streaming input, which can only append.

    When an input changes what was sent before, the session is given up and another is begun with
    the whole of it; the engine's prefix cache may still have what they share.
    """

    invalidated = NOT_TOLD

    def __init__(
        self, http: aiohttp.ClientSession, url: str, model: str, salt: str, answer_tokens: int
    ) -> None:
        self._http = http
        self._url = f"{url}/sessions/{salt}"
        self._answer_tokens = answer_tokens

    async def answer(self, script: Script, clock: Clock) -> AsyncGenerator[list[int], None]:
        socket: aiohttp.ClientWebSocketResponse | None = None
        sent: list[int] = []
        versions = (*script.contexts[:-1], script.prompt)
        try:
            for due_s, tokens in zip(script.due_s, versions, strict=True):
                await clock.until(due_s)
                if tokens == sent:
                    continue  # the same list again
                if socket is not None and common(sent, tokens) < len(sent):
                    await socket.close()
                    socket, sent = None, []
                if socket is None:
                    socket = await self._http.ws_connect(self._url)
                answer = self._answer_tokens if tokens is versions[-1] else 0
                await socket.send_json({"tokens": tokens[len(sent) :], "answer": answer})
                sent = tokens
            assert socket is not None
            async for message in socket:
                yield message.json()["token_ids"]
        finally:
            if socket is not None:
                await socket.close()

    async def close(self) -> None:
        """Each query has a connection of its own."""


class ThroughGateway:
    """By a gateway, as texts; the salt is its system message. Of an answer it learns the text."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        model: str,
        salt: str,
        answer_tokens: int,
        texts: Texts,
    ) -> None:
        sampling = {"max_tokens": answer_tokens, "temperature": 0, "ignore_eos": True}
        self._front = Front(http, url, model, sampling)
        self._salt = salt
        self._texts = texts
        self.invalidated: dict[int, list[Moment]] = defaultdict(list)

    async def answer(self, script: Script, clock: Clock) -> AsyncGenerator[list[int], None]:
        query = script.query
        assert query is not None
        await clock.until(script.due_s[0])
        stream = await self._front.open(messages(self._salt, self._question(query)))
        complete = False
        try:
            for seq, (due_s, given) in enumerate(zip(script.due_s, query.inputs, strict=True)):
                await clock.until(due_s)
                await self._hand_over(stream, seq, query, given, clock)
            async with aclosing(self._front.answer(stream)) as events:
                async for piece in _pieces(events):
                    yield piece
            complete = True
        finally:
            if not complete:
                with suppress(Refused):
                    await self._front.cancel(stream)

    async def close(self) -> None:
        """Nothing is held."""

    async def _hand_over(
        self, stream: str, seq: int, query: Query, given: Input, clock: Clock
    ) -> None:
        texts = [self._texts.of(document) for document in given.documents]
        if not query.update:
            await self._front.add(stream, seq, texts)
            return
        named = [
            {"id": str(document.doc_id), "text": text}
            for document, text in zip(given.documents, texts, strict=True)
        ]
        taken = await self._front.replace(stream, seq, named)
        if taken["invalidated"]:
            self.invalidated[query.query_id].append((clock.now_s, taken["invalidated"]))

    def _question(self, query: Query) -> str:
        return self._texts.of(Document(QUESTIONS + query.query_id, query.question_tokens))


def messages(system: str, question: str) -> list[Json]:
    """The conversation of a stream."""
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


async def _pieces(events: AsyncGenerator[Json, None]) -> AsyncGenerator[list[int], None]:
    """As many tokens as the usage says; an event that has several gives them at the end."""
    given = 0
    async for event in events:
        if brings_token(event):
            given += 1
            yield [UNKNOWN_TOKEN]
        if usage := event.get("usage"):
            yield [UNKNOWN_TOKEN] * (usage["completion_tokens"] - given)
