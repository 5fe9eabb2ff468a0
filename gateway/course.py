"""The course of one answer over engines, from the closing of its prompt to its last token.

    close the prompt --whole answer--------------------------------------------------> done
        |
        +--first token, KV--> decode engine: the same answer, from its first token on --> done

Whatever breaks off behind the first token is gone on with: the answer is continued from the prompt
and the tokens that the client has, or, where that would not be the same answer (see `told.py`),
told again from its first token on and passed on from where the client is. An engine that reads
prompts does it, since one of these most likely has the KV; a decode engine where none is left. An
answer that is neither greedy nor seeded can't be gone on with once it is past the token that two
engines sample.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from engine_adapter.errors import EngineError, EngineUnavailable, KvLost
from engine_adapter.messages import DoneEvent, Event, Sampling, TokenEvent
from gateway.engines import AnyEngine, DecodeEngine, Engine
from gateway.errors import EngineFailed, ModelNotFound
from gateway.handoff import (
    Decoders,
    Handoff,
    Rule,
    Situation,
    decide,
    is_greedy,
    queued,
)
from gateway.line import Asked, Line
from gateway.prefix import Prefix
from gateway.prompt import Prompt
from gateway.telemetry import Metrics
from gateway.told import Account, Differs, Told, hold_chars

logger = logging.getLogger(__name__)

STALL_S = 120.0
"""Longest silence of an engine in an answer that has begun, however healthy it says it is."""
FIRST_S = 300.0
"""Longest wait for the first event of an answer: its engine may say that it is well, and compute
nothing. As long as for requests that are passed through."""
ASK_S = 1.0
"""Longest wait for word on KV that did not come."""
LAST_S = 1.0
"""Longest wait for the end of a connection on which everything was said."""
MAX_RESUMED = 4
"""How often one answer is gone on with."""

Events = AbstractAsyncContextManager[AsyncIterator[Event]]


class Course:
    """One answer's course, to be run once. Cancelling that ends the answer at every engine."""

    def __init__(
        self,
        line: Line,
        decoders: Decoders,
        rule: Rule,
        metrics: Metrics,
        *,
        prompt: Prompt,
        sampling: Sampling,
        tell: Callable[[Event], None],
        free: Callable[[Engine | None, str], None],
    ) -> None:
        """
        Args:
            tell: passes an event on to the client.
            free: has an engine forget a prompt, behind everybody's back.
        """
        self.handoff: Handoff | None = None
        """What was decided; None while no engine has been asked."""
        self._line, self._decoders = line, decoders
        self._rule, self._metrics = rule, metrics
        self._wanted, self._tail = prompt.open, prompt.tail
        self._sampling = sampling
        self._two_alike = is_greedy(sampling) or sampling.seed is not None
        # With a seed two engines draw the same tokens, also where the client gives none.
        self._seeded = (
            sampling
            if self._two_alike
            else msgspec.structs.replace(sampling, seed=secrets.randbits(31))
        )
        self._tell, self._free = tell, free
        self._told = Told()
        self._sampled_twice = 0  # tokens that were told before the decode engine began
        self._retold = False
        self._cached_tokens: int | None = None
        self._decoder: DecodeEngine | None = None  # that answers now; None: the line's engine does
        self._failed: set[DecodeEngine] = set()
        self._numbers = itertools.count(1)
        self._limit: asyncio.Timeout | None = None
        self._lost = False  # an engine without which the present part can't end
        self._silence_s = STALL_S

    @property
    def begun(self) -> bool:
        """Whether the client has something of it."""
        return bool(self._told.tokens or self._told.chars)

    async def run(self) -> None:
        """Tell the client the whole answer.

        Raises:
            EngineError, EngineFailed: no engine can, or none can go on with it.
            Moved: another replica has taken the stream over.
        """
        try:
            await self._run()
        finally:  # what a stream remembers of its answer does not keep the stream alive
            self._tell = self._free = _ignored

    async def _run(self) -> None:
        leg: Callable[[], Awaitable[DoneEvent]] = self._close
        resumed = 0
        while True:
            try:
                done = await leg()
            except (EngineError, Differs) as e:
                if isinstance(e, KvLost):
                    await self._blame(e)
                leg = self._going_on(e, resumed)
                resumed += 1
                continue
            if done.kv_transfer is None:
                return self._tell(done)
            leg = partial(self._hand_over, done.kv_transfer)

    def engine_lost(self, engine: AnyEngine) -> None:
        """An engine is gone, with all that it had. Without the line's engine an answer can't begin
        at the decode engine either: it has the KV."""
        if engine is self._line.engine:
            self._line.leave()
        elif engine is not self._decoder:
            return
        self._lost = True
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    # The usual course.

    async def _close(self) -> DoneEvent:
        """The whole answer from the engine that has the prompt, or its first token only."""
        account = Account(self._told, retold=False)

        def how(engine: Engine) -> Asked:
            self.handoff = self._decided(engine)
            over = self.handoff.decided
            account.hold_chars = hold_chars(self._sampling) if over else 0
            self._silence_s = self._rule.timeout_s if over else STALL_S
            return Asked(self._seeded if over else self._sampling, hand_over=over)

        events = self._at_line(self._wanted, self._tail, how)
        done = await self._followed(events, account, FIRST_S)
        self._cached_tokens = done.cached_tokens
        if done.kv_transfer is not None:
            self._told.goes_on, self._sampled_twice = True, len(self._told.tokens)
        return done

    def _decided(self, engine: Engine) -> Handoff:
        now = Situation(
            hands_over=engine.info is not None and engine.info.hands_over,
            decode_engine=self._chosen() is not None,
            answer_tokens=self._sampling.max_tokens,
            queued_tokens=queued(engine, self._line.unread(self._prompt_tokens)),
        )
        decision = decide(self._rule, now)
        if decision != self.handoff:  # otherwise the engine is asked again
            decoded = "elsewhere" if decision.decided else "here"
            self._metrics.handoffs.labels(decoded, decision.reason).inc()
        return decision

    async def _hand_over(self, kv_transfer: Mapping[str, Any]) -> DoneEvent:
        """The answer from a decode engine, which samples the first token again."""
        engine = self._chosen()
        if engine is None:
            raise EngineError("there is no decode engine any more")
        account = Account(self._told, retold=True)
        events = self._at_decoder(engine, self._prompt, self._seeded, kv_transfer)
        done = await self._followed(events, account, self._rule.timeout_s, fetching=True)
        return self._whole(done, 0)

    async def _check_fetched(self) -> None:
        """The decode engine has sampled: did it read the KV before that was given up?

        Raises:
            KvLost: it may have read what was written there since.
        """
        prefiller = self._line.engine
        if prefiller is None:
            raise KvLost("the engine that had the KV is gone")
        try:
            state = (await prefiller.client.status(self._line.prompt_id)).state
        except EngineError as e:
            raise KvLost(f"nobody says whether the KV was still there: {e}") from e
        if state != "fetched":
            raise KvLost(f"the KV was {state!r} when it was read")
        self._forget()

    # When it breaks off.

    async def _blame(self, error: KvLost) -> None:
        """Count a hand-over that failed against the decode engine, if the KV still waits for it:
        one that never gets any is well by its own word, and each answer would wait for it."""
        engine, prefiller = self._decoder, self._line.engine
        if engine is None or prefiller is None:
            return
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(ASK_S):
                state = (await prefiller.client.status(self._line.prompt_id)).state
            if state == "handed_over":
                self._failed.add(engine)
                self._decoders.failed(engine, error)

    def _going_on(
        self, error: EngineError | Differs, resumed: int
    ) -> Callable[[], Awaitable[DoneEvent]]:
        """What to do about an answer that broke off, or an error if there is nothing."""
        self._note_failed(error)
        told, retelling_failed = self._told, self._retold and isinstance(error, Differs)
        alike = self._two_alike or len(told.tokens) <= self._sampled_twice
        continuable = told.can_be_continued(self._sampling)
        # Text without its tokens, as some servers give it, can't be compared with another telling.
        comparable = bool(told.tokens) and alike
        possible = comparable and (continuable or not retelling_failed)
        if not possible or resumed == MAX_RESUMED:
            if isinstance(error, Differs):
                raise EngineUnavailable("engines disagree about the answer") from error
            raise error
        continued = continuable and (is_greedy(self._sampling) or retelling_failed)
        how = "continued" if continued else "retold"
        logger.warning("%s: its answer is %s: %r", self._line.prompt_id, how, error)
        self._metrics.resumed.labels(how).inc()
        if self.handoff is not None:
            self.handoff = replace(self.handoff, resumed=resumed + 1)
        return self._continue if continued else self._tell_again

    def _note_failed(self, error: EngineError | Differs) -> None:
        if isinstance(error, EngineUnavailable):  # others say nothing of the engine itself
            if self._decoder is not None:
                self._failed.add(self._decoder)
            else:
                self._line.leave()
        self._decoder = None

    def _forget(self) -> None:
        """Have the line's engine, should it live, give up what it has of the prompt."""
        if self._line.engine is not None:
            self._free(self._line.engine, self._line.prompt_id)

    async def _continue(self) -> DoneEvent:
        """The answer to the prompt and what was told of its answer."""
        before, last = self._told.tokens[:-1], self._told.tokens[-1]
        wanted = self._wanted.extended([*self._tail, *before])
        account = Account(self._told, retold=False)
        rest = self._told.rest(self._seeded)
        return self._whole(await self._elsewhere(wanted, [last], rest, account), len(before) + 1)

    async def _tell_again(self) -> DoneEvent:
        """The answer from its first token on."""
        self._retold = True
        account = Account(self._told, retold=True)
        done = await self._elsewhere(self._wanted, self._tail, self._seeded, account)
        return self._whole(done, 0)

    async def _elsewhere(
        self, wanted: Prefix, tail: Sequence[int], sampling: Sampling, account: Account
    ) -> DoneEvent:
        """A fresh prefill and its answer."""
        self._forget()
        self._line.begin_anew()
        events: Events = self._at_line(wanted, tail, lambda _: Asked(sampling))
        try:
            return await self._followed(events, account, STALL_S)
        except (EngineFailed, ModelNotFound):
            engine = self._chosen()
            if engine is None:
                raise
        events = self._at_decoder(engine, [*wanted.all(), *tail], sampling, None)
        return await self._followed(events, account, STALL_S)

    # One engine's part.

    def _at_line(
        self, wanted: Prefix, tail: Sequence[int], how: Callable[[Engine], Asked]
    ) -> Events:
        self._decoder = None
        return aclosing(self._line.answer(wanted, tail, how))

    @asynccontextmanager
    async def _at_decoder(
        self,
        engine: DecodeEngine,
        tokens: list[int],
        sampling: Sampling,
        kv_transfer: Mapping[str, Any] | None,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        assert self.handoff is not None
        self.handoff = replace(self.handoff, decode_engine=engine.url)
        self._decoder = engine
        request_id = f"{self._line.prompt_id}-decode-{next(self._numbers)}"
        salt = self._line.tenant.cache_salt
        if kv_transfer is not None:
            # Should it read what is not there any more, no other prompt may find that in its cache.
            salt = f"{salt or ''}:{request_id}"
        engine.streams += 1
        try:
            async with engine.client.answer(
                tokens,
                sampling,
                kv_transfer=kv_transfer,
                request_id=request_id,
                cache_salt=salt,
            ) as events:
                yield events
        finally:
            engine.streams -= 1

    async def _followed(
        self,
        source: Events,
        account: Account,
        first_s: float,
        *,
        fetching: bool = False,
    ) -> DoneEvent:
        """Pass on what is new to the client.

        Args:
            first_s: longest wait for the first event.
            fetching: the engine begins with KV that the line's engine has.

        Raises:
            EngineError, EngineFailed, Moved
            Differs: it is not the answer that the client was told the beginning of.
        """
        clock = asyncio.get_running_loop().time
        done: DoneEvent | None = None
        self._lost, self._silence_s = False, STALL_S
        try:
            async with asyncio.timeout(first_s) as self._limit, source as events:
                async for event in events:
                    if isinstance(event, DoneEvent):
                        done = event
                        self._limit.reschedule(clock() + LAST_S)
                        continue
                    if self._lost:
                        break
                    self._limit.reschedule(clock() + self._silence_s)
                    if not isinstance(event, TokenEvent):
                        raise EngineError.from_json(event.error)
                    if fetching:
                        await self._check_fetched()
                        fetching = False
                    if self._decoder is not None and self._line.engine is not None:
                        self._line.disconnect()
                    self._pass_on(account.take(event))
        except TimeoutError as e:
            if done is None:
                if fetching and not self._lost:
                    raise KvLost("the KV did not come in time") from e
                raise EngineUnavailable("the engine is gone or has stalled") from e
        finally:
            self._limit = None
        if done is None:
            raise EngineUnavailable("the engine broke off")
        if done.kv_transfer is None:
            self._pass_on(account.end())
        return done

    def _pass_on(self, event: TokenEvent | None) -> None:
        if event is not None:
            self._told.add(event)
            self._tell(event)

    def _whole(self, done: DoneEvent, before: int) -> DoneEvent:
        """The end of the whole answer.

        Args:
            done: the end of a part of it, behind this many tokens.
        """
        early = done.cached_tokens if self._cached_tokens is None else self._cached_tokens
        return DoneEvent(
            finish_reason=done.finish_reason,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=min(early, self._prompt_tokens),
            completion_tokens=before + done.completion_tokens,
        )

    def _chosen(self) -> DecodeEngine | None:
        """A decode engine; one that has failed is better than none."""
        length = self._prompt_tokens + (self._sampling.max_tokens or 1)
        for avoid in (self._failed, ()):
            try:
                return self._decoders.choose(length, avoid)
            except EngineFailed:
                continue
        return None

    @property
    def _prompt(self) -> list[int]:
        return [*self._wanted.all(), *self._tail]

    @property
    def _prompt_tokens(self) -> int:
        return len(self._wanted) + len(self._tail)


def _ignored(*_: object) -> None:
    """It is over."""
