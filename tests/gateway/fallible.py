"""Engines in this process that answer as a model would, and fail when a test says so.

The model's next token depends on everything before it, and on its draws if it is seeded. Some of
its tokens are incomplete characters, whose text comes with the next token, as of real ones.
"""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from engine_adapter.errors import (
    EngineError,
    EngineUnavailable,
    KvLost,
    PromptFinished,
    UnknownPrompt,
)
from engine_adapter.messages import (
    DoneEvent,
    EngineInfo,
    ErrorEvent,
    Event,
    Extend,
    Finish,
    Open,
    Progress,
    Sampling,
    TokenEvent,
    TokenLogprob,
)
from gateway.engines import DecodeEngine, Engine
from gateway.errors import EngineFailed
from gateway.routing import Decision
from gateway.tenants import Tenant

MODEL = "fallible"
TENANT = Tenant(name="acme", secret="ab" * 32, weight=2.0)
"""Whose streams they are; every operation has to say so."""
END = 0
"""The token that ends an answer."""
WORDS = 40

Kind = Literal["refuses", "dies", "stalls", "errs", "differs", "loses_kv"]
"""`dies`: the process is gone, with all it had. `differs`: samples another token."""


@dataclass(frozen=True)
class Failure:
    """What happens to an answer at an engine, before the event of this number."""

    kind: Kind
    at: int = 0


class Text:
    """Turns tokens into text, piece by piece."""

    def __init__(self, before: Sequence[int]) -> None:
        self._held = ""
        for token in before:
            self.step(token)

    def step(self, token: int) -> str:
        if token == END:
            return ""
        text, self._held = f"{self._held}<{token}>", ""
        if token % 5 == 0:
            self._held, text = text, ""
        return text


def _next(context: Sequence[int], sampling: Sampling, drawn: int, unseeded: int) -> int:
    about: list[Any] = [list(context)]
    if sampling.temperature != 0:
        about += [sampling.seed if sampling.seed is not None else unseeded, drawn]
    if sampling.presence_penalty:
        about.append(drawn)
    number = zlib.crc32(repr(about).encode()) >> 4
    if number % 17 == 0 and drawn >= (sampling.min_tokens or 0):
        return END
    return 1 + number % WORDS


def answer(prompt: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, str, str | None]]:
    """Token, text and finish reason, once for each token of an answer."""
    unseeded = random.getrandbits(31)
    out: list[int] = []
    text, given, detokenizer = "", 0, Text(prompt)
    hold = max((len(stop) for stop in sampling.stop or ()), default=1) - 1
    while True:
        token = _next([*prompt, *out], sampling, len(out), unseeded)
        out.append(token)
        text += detokenizer.step(token)
        found = [text.index(stop) for stop in sampling.stop or () if stop in text]
        reason = "stop" if token == END or found else None
        if reason is None and len(out) >= (sampling.max_tokens or 1000):
            reason = "length"
        end = min(found) if found else len(text) if reason else max(len(text) - hold, given)
        piece, given = text[given:end], max(end, given)
        yield token, piece, reason
        if reason is not None:
            return


def events(
    prompt: Sequence[int], sampling: Sampling, burst: int
) -> Iterator[TokenEvent | DoneEvent]:
    """The events of an answer, several tokens in each."""
    whole = list(answer(prompt, sampling))
    for i in range(0, len(whole), burst):
        part = whole[i : i + burst]
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = [TokenLogprob(token=str(token), logprob=-1.0) for token, _, _ in part]
        yield TokenEvent(
            token_ids=[token for token, _, _ in part],
            text="".join(text for _, text, _ in part),
            logprobs=logprobs,
        )
    yield DoneEvent(
        finish_reason=whole[-1][2] or "",
        prompt_tokens=len(prompt),
        cached_tokens=len(prompt) // 2,
        completion_tokens=len(whole),
    )


@dataclass(eq=False)
class Fallible:
    """What the engines of both kinds have in common."""

    name: str
    failures: list[Failure] = field(default_factory=list)
    """Of its answers, one after the other; then they succeed."""
    burst: int = 1
    alive: bool = True
    under_way: int = 0
    """Answers being read."""
    asked: list[Sampling] = field(default_factory=list)
    refusal: EngineError = field(default_factory=lambda: EngineUnavailable("the connection broke"))
    """Of answers that it refuses."""
    pause: asyncio.Event = field(default_factory=asyncio.Event)
    """Answers wait for it before their second event."""

    def __post_init__(self) -> None:
        self.pause.set()

    @property
    def url(self) -> str:
        return f"http://{self.name}"

    def must_live(self) -> None:
        if not self.alive:
            raise EngineUnavailable(f"{self.name} is dead")

    def kill(self) -> None:
        self.alive = False

    async def told(
        self, prompt: Sequence[int], sampling: Sampling, found: Sequence[Event]
    ) -> AsyncGenerator[Event, None]:
        """These events, up to the failure that is due."""
        self.must_live()
        self.asked.append(sampling)
        failure = self.failures.pop(0) if self.failures else Failure("refuses", -1)
        self.under_way += 1
        try:
            for number, event in enumerate(found):
                await asyncio.sleep(0)
                due = number == min(failure.at, len(found) - 1)
                if due and (wrong := await self._fail(failure, event)) is not None:
                    yield wrong
                    return
                if number == 1:
                    await self.pause.wait()
                self.must_live()
                yield event
        finally:
            self.under_way -= 1

    async def _fail(self, failure: Failure, event: Event) -> Event | None:
        match failure.kind:
            case "dies":
                self.kill()
                raise EngineUnavailable("connection reset")
            case "stalls":
                await asyncio.sleep(3600)
            case "errs":
                return ErrorEvent(error=EngineError("something broke").to_json())
            case "differs" if isinstance(event, TokenEvent):
                return TokenEvent(token_ids=[WORDS + 1], text="?")
            case "loses_kv":
                raise EngineError("the KV can't be fetched")
        raise self.refusal


class Prefill(Fallible):
    """An engine that reads prompts."""

    hands_over = True
    kept = "fetched"
    """What it says of KV that does not wait any more."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.prompts: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.leased: dict[str, list[int]] = {}
        client: Any = self
        self.engine = Engine(url=self.url, role="engine", client=client, info=self.described())

    def described(self) -> EngineInfo:
        return EngineInfo(
            instance_id=self.name,
            protocol_version=1,
            plugin_version="0",
            engine="fallible 0",
            model=MODEL,
            operations=[],
            max_model_len=1000,
            block_size=16,
            kv_blocks_total=100,
            kv_blocks_free=100,
            running=0,
            waiting=0,
            open_prompts=0,
            hands_over=self.hands_over,
        )

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left of any prompt."""
        nothing = not self.prompts and not self.leased and not self.under_way
        return self.engine.streams == 0 and (nothing or not self.alive)

    def kill(self) -> None:
        super().kill()
        self.prompts.clear()
        self.leased.clear()

    async def open(self, prompt_id: str, op: Open) -> Progress:
        self.must_live()
        assert (op.cache_salt, op.weight) == (TENANT.cache_salt, TENANT.weight)
        assert prompt_id not in self.prompts
        self.prompts[prompt_id] = list(op.tokens)
        return self._progress(prompt_id)

    async def extend(self, prompt_id: str, op: Extend) -> Progress:
        tokens = self._get(prompt_id)
        self.prompts[prompt_id] = [*tokens[: op.keep], *op.tokens]
        return self._progress(prompt_id)

    async def status(self, prompt_id: str) -> Progress:
        self.must_live()
        if prompt_id in self.finished and prompt_id not in self.prompts:
            state: Any = "handed_over" if prompt_id in self.leased else self.kept
            return Progress(prompt_id=prompt_id, version=0, state=state, length=1, computed=0)
        self._get(prompt_id)
        return self._progress(prompt_id)

    async def abort(self, prompt_id: str) -> Progress:
        self.must_live()
        if prompt_id not in self.prompts and prompt_id not in self.leased:
            raise UnknownPrompt(prompt_id)
        self.prompts.pop(prompt_id, None)
        self.leased.pop(prompt_id, None)
        return Progress(prompt_id=prompt_id, version=0, state="idle", length=1, computed=0)

    def _get(self, prompt_id: str) -> list[int]:
        self.must_live()
        if prompt_id not in self.prompts:
            raise UnknownPrompt(prompt_id)
        return self.prompts[prompt_id]

    def _progress(self, prompt_id: str) -> Progress:
        length = len(self.prompts[prompt_id])
        return Progress(
            prompt_id=prompt_id, version=0, state="idle", length=length, computed=length
        )

    @asynccontextmanager
    async def finish(self, prompt_id: str, op: Finish) -> AsyncIterator[AsyncIterator[Event]]:
        prompt = [*self._get(prompt_id)[: op.keep], *op.tokens]
        if prompt_id in self.finished:
            raise PromptFinished(prompt_id)
        self.finished.add(prompt_id)
        self.prompts.pop(prompt_id)
        if op.hand_over:
            told = self._first(prompt_id, prompt, op.sampling)
        else:
            told = self.told(prompt, op.sampling, list(events(prompt, op.sampling, self.burst)))
        async with aclosing(told):
            yield told

    async def _first(
        self, prompt_id: str, prompt: list[int], sampling: Sampling
    ) -> AsyncGenerator[Event, None]:
        """The first token, and the KV unless the answer ends there."""
        first, done = events(prompt, msgspec.structs.replace(sampling, max_tokens=1), 1)
        assert isinstance(done, DoneEvent)
        goes_on = done.finish_reason == "length" and sampling.max_tokens != 1
        if goes_on:
            kv_transfer = {"engine": self, "prompt_id": prompt_id}
            done = msgspec.structs.replace(done, kv_transfer=kv_transfer)
        async with aclosing(self.told(prompt, sampling, [first, done])) as told:
            async for event in told:
                if goes_on and event is first:
                    self.leased[prompt_id] = prompt
                yield event

    async def close(self) -> None: ...


class Decode(Fallible):
    """An engine that decodes."""

    fetched = 0

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        client: Any = self
        self.engine = DecodeEngine(url=self.url, role="decode", client=client)

    @property
    def is_clean(self) -> bool:
        return self.engine.streams == 0 and self.under_way == 0

    @asynccontextmanager
    async def answer(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        kv_transfer: Mapping[str, Any] | None,
        request_id: str,
        cache_salt: str | None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        if kv_transfer is None:
            assert cache_salt == TENANT.cache_salt
        else:
            assert cache_salt is not None
            assert cache_salt.startswith(f"{TENANT.cache_salt}:")
        async with aclosing(self._answer(list(tokens), sampling, kv_transfer)) as told:
            yield told

    async def _answer(
        self, tokens: list[int], sampling: Sampling, kv_transfer: Mapping[str, Any] | None
    ) -> AsyncGenerator[Event, None]:
        found = list(events(tokens, sampling, self.burst))
        if kv_transfer is None:  # it has nothing to differ from
            self.failures = [f for f in self.failures if f.kind != "differs"]
        async with aclosing(self.told(tokens, sampling, found)) as told:
            async for event in told:
                if kv_transfer is not None:
                    source: Prefill = kv_transfer["engine"]
                    if source.leased.pop(kv_transfer["prompt_id"], None) != tokens:
                        raise EngineError("the KV is gone")
                    kv_transfer, self.fetched = None, self.fetched + 1
                yield event


class World:
    """Engines, as the gateway's consumers of them see them."""

    def __init__(self, prefill: Sequence[Prefill], decode: Sequence[Decode]) -> None:
        self.prefill, self.decode = prefill, decode
        self.max_model_len = 1000
        self.wants_documents = False
        self.blamed: list[DecodeEngine] = []

    async def place(self, tokens: list[int], avoid: set[Engine]) -> tuple[Engine, Decision]:
        fit = [p.engine for p in self.prefill if p.engine.info and p.engine not in avoid]
        if not fit:
            raise EngineFailed("there is no other engine")
        return fit[0], Decision("first", fit[0].url, len(tokens), {})

    def choose(self, length: int, avoid: Collection[DecodeEngine]) -> DecodeEngine:
        fit = [d.engine for d in self.decode if d.engine not in avoid]
        if not fit:
            raise EngineFailed("there is no decode engine")
        return fit[0]

    def failed(self, engine: DecodeEngine, error: KvLost) -> None:
        self.blamed.append(engine)

    @property
    def is_clean(self) -> bool:
        return all(engine.is_clean for engine in self.engines)

    @property
    def engines(self) -> list[Prefill | Decode]:
        return [*self.prefill, *self.decode]
