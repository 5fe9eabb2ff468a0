"""One stream: its states, its prompt, and how it gets to an engine.

    open --finish--> finishing --last token--> done
      |                  |
      +------------------+--> failed (no engine), cancelled (client), expired (silence),
                              moved (to another replica)

Chunks and ranked lists change the prompt at once; a task of the stream's own (the pump)
brings the engine to it over the stream's `Line`: at most one operation is under way, and what
arrives meanwhile goes into the next one. Before a post is acknowledged the index has it, unless the
index is away, so that another replica can go on with the stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Literal, NoReturn, ParamSpec, TypeVar
from weakref import WeakMethod

from engine_adapter.errors import EngineError
from engine_adapter.messages import DoneEvent, Event, Progress
from gateway.accounts import Account
from gateway.answering import Answering
from gateway.books import Books
from gateway.chores import Chores
from gateway.course import Course
from gateway.crowd import Crowd
from gateway.ending import ending_of
from gateway.engines import AnyEngine, Engine
from gateway.errors import (
    EngineFailed,
    GatewayError,
    IndexAway,
    InputClosed,
    SequenceGap,
    from_engine,
)
from gateway.handoff import Rule
from gateway.keeper import Keeper, Moved
from gateway.known import KnownDocuments
from gateway.line import Line, Placer, abort
from gateway.prompt import Document, Prompt
from gateway.record import ChunksTaken, Ledger, ListTaken, Taken
from gateway.requests import Options
from gateway.retrieving import Retrieval
from gateway.telemetry import Metrics
from gateway.tenants import Limits

logger = logging.getLogger(__name__)

State = Literal["open", "finishing", "done", "failed", "cancelled", "expired", "moved"]

ALIVE = ("open", "finishing")
"""The states that have not ended."""

Tokenized = Callable[[], Awaitable[list[Document]]]

P = ParamSpec("P")
T = TypeVar("T")


class Stream:
    """A stream and its tasks. Made by `Streams`, which ends it."""

    def __init__(
        self,
        stream_id: str,
        account: Account,
        model: str,
        prompt: Prompt,
        *,
        options: Options,
        lease_s: float,
        placer: Placer,
        keeper: Keeper | None,
        rule: Rule,
        metrics: Metrics,
        crowd: Crowd,
        ended: Callable[[Stream], None],
        moved: Callable[[Stream], None],
    ) -> None:
        """`keeper` is None for a stream that nobody can go on with elsewhere; `ended` and `moved`
        are called once each, when it has ended and when it is held elsewhere."""
        self.id, self.model = stream_id, model
        self.account, self.tenant = account, account.tenant
        self.asked = b""  # the digest of what was asked under an idempotency key
        self.prompt = prompt
        self.state: State = "open"
        self._error: GatewayError | None = None
        self.created_s = time.time()
        self.begun_s = self.touched_s = self.renewed_s = time.monotonic()
        self.known = KnownDocuments()
        self.options = options
        self.line = Line(
            stream_id, placer, lease_s=lease_s, tenant=self.tenant,
            contested=_still(self._contested), free=_still(self._free), metrics=metrics,
        )  # fmt: skip
        self.books = Books(self, keeper)
        self.taken: list[Taken] = []
        """The answer to each post, by its seq."""
        self.retrieval: Retrieval | None = None
        self.course: Course | None = None
        """Of its answer, once its input is closed."""
        self._answer_tokens = options.answer_tokens or 1
        self._placer = placer
        self._metrics, self._crowd = metrics, crowd
        self._ended, self._moved = ended, moved
        self._taking = asyncio.Lock()
        self._changed = asyncio.Event()
        self._changed.set()  # the head is there to be read
        self._chores = Chores()
        self._answering = self._unasked()
        self._rule = rule

    @property
    def error(self) -> GatewayError | None:
        """Why it failed, if it did: a copy, since one that was raised holds on to its stream."""
        return copy(self._error)

    @property
    def ended(self) -> bool:
        """Whether nothing follows, at this replica at least."""
        return self.state not in ALIVE

    @property
    def limits(self) -> Limits:
        """Its tenant's, as they are now."""
        return self.account.tenant

    @property
    def engine(self) -> Engine | None:
        """Where its prompt is, or was."""
        return self.line.engine or self.line.left

    def _unasked(self) -> Answering:
        return Answering(self._metrics, self._crowd, self.begun_s)

    @property
    def heard_of_s(self) -> float:
        """When its engine, and the index if that has it, last heard of it, which renews its leases
        there."""
        return min(self.line.heard_of_s, self.books.heard_of_s)

    async def begin(self) -> None:
        """Make the stream known to the other replicas and begin to read.

        Raises:
            Moved
        """
        self._start()
        await self.keep()

    # What clients do.

    async def add(self, documents: Tokenized, seq: int | None) -> tuple[int, Taken]:
        """Take in one post of chunks.

        Args:
            documents: gives the tokenized chunks of the post.
            seq: its number, or None for the next.

        Returns:
            Its number and its acknowledgement; a repeated number gives the first one.

        Raises:
            InputClosed, SequenceGap, ContextTooLong, EngineFailed
            Moved: another replica holds the stream; this post is not taken.
        """

        def take(new: list[Document]) -> Taken:
            self.take(new)
            return ChunksTaken(sum(len(d.tokens) for d in new), self.prompt.context_tokens)

        return await self._in_turn(documents, seq, take)

    async def replace(self, documents: Tokenized, seq: int | None) -> tuple[int, Taken]:
        """Put a ranked list in place of all documents; numbers and errors as of `add`.

        `documents` is called when it is this post's turn, so that `known` has what the posts before
        it brought."""
        return await self._in_turn(documents, seq, self._replace)

    async def _in_turn(
        self,
        documents: Tokenized,
        seq: int | None,
        take: Callable[[list[Document]], Taken],
    ) -> tuple[int, Taken]:
        """One post after the other: check its number, tokenize, change the prompt, write down."""
        async with self._taking:
            expected = len(self.taken)
            if seq is not None and 0 <= seq < expected:
                await self.keep()  # its first try may have been cut off while it was written
                return seq, self.taken[seq]
            await self._must_be_open()
            if seq is not None and seq != expected:
                await self._raise_gap(seq)
            self.touched_s = time.monotonic()
            new = await documents()
            await self._must_be_open()
            taken = take(new)
            self.taken.append(taken)
            # Not before the index has it: an engine that had a rewritten prompt would not have
            # the beginning of the one in the record any more.
            await self.keep()
            self._changed.set()
            return expected, taken

    async def rearrange(self, change: Callable[[tuple[Document, ...]], Sequence[Document]]) -> int:
        """Change the documents, in turn with the posts but without a number; errors as of `add`.

        Returns:
            How many tokens of the prompt were invalidated.
        """
        async with self._taking:
            await self._must_be_open()
            self.touched_s = time.monotonic()
            taken = self._replace(list(change(self.prompt.documents)))
            await self.keep()
            self._changed.set()
            return taken.invalidated

    def take(self, new: Sequence[Document]) -> None:
        """Put documents behind those in the prompt, without a number.

        Raises:
            ContextTooLong
        """
        prompt = self.prompt.with_documents(new)
        self.check_length(prompt)
        self.prompt = prompt
        self.books.appended(new)
        self.known.add(new)
        self._metrics.chunks.inc(len(new))
        self._took_in(sum(len(d.tokens) for d in new))
        self._changed.set()

    def _replace(self, documents: list[Document]) -> ListTaken:
        prompt = self.prompt.with_only(documents)
        self.check_length(prompt, param="documents")
        kept, added = self.prompt.open.difference(prompt.open)
        invalidated = len(self.prompt.open) - kept
        known, self.prompt = self.prompt.documents, prompt
        self.line.rewritten(kept)
        if prompt.documents[: len(known)] == known:
            self.books.appended(prompt.documents[len(known) :])
        else:
            self.books.rewritten(prompt.open, kept)
        self.known.replace(documents)
        self._metrics.lists.inc()
        self._took_in(len(added))
        self._metrics.invalidated_tokens.inc(invalidated)
        return ListTaken(prompt.context_tokens, kept, invalidated, len(added))

    def check_length(
        self, prompt: Prompt, answer_tokens: int | None = None, *, param: str = "text"
    ) -> None:
        """Raise ContextTooLong if a prompt is too long for its tenant, or for its answer's sake."""
        prompt.must_fit(
            self._placer.max_model_len, answer_tokens or self._answer_tokens,
            context_limit=self.limits.context_tokens, param=param,
        )  # fmt: skip

    def _took_in(self, tokens: int) -> None:
        self._metrics.context_tokens.inc(tokens)
        self.account.spend(tokens)

    async def _raise_gap(self, seq: int) -> NoReturn:
        """Refuse a number that is ahead of what was taken in, if that is all there is: another
        replica may hold the stream by now, and have more."""
        await self.keep(renew=True)
        expected = len(self.taken)
        raise SequenceGap(
            f"seq is {seq} where {expected} is next", param="seq", expected_seq=expected
        )

    async def finish(self, options: Options, seq: int | None = None) -> None:
        """Close the input and begin the answer; `next_event` gives it. Nobody waits for the index:
        whoever asked has yet to `keep` the stream.

        A caller that is cancelled here has closed nothing.

        Args:
            seq: number of the last post that is to be in the prompt, if the client says.

        Raises:
            InputClosed, ContextTooLong, EngineFailed
            SequenceGap: that post is not here. What was acknowledged while the index was away is
                lost with the replica that did.
            Moved: another replica holds the stream.
        """
        async with self._taking:  # chunks that are being tokenized belong to the input
            await self._must_be_open()
            if seq is not None and seq >= len(self.taken):
                await self._raise_gap(seq)
            self.check_length(self.prompt, options.answer_tokens)
            self.state = "finishing"
            self.touched_s = time.monotonic()
            self._answering.ask(options.sampling())
            self._start()

    async def next_event(self, timeout_s: float) -> Event | None:
        """The next event of the answer, or None if none comes in time. A `DoneEvent` or an
        `ErrorEvent` is the last; whoever stops reading before ends the stream with `cancel`."""
        return await self._answering.next_event(timeout_s)

    async def status(self) -> Progress | None:
        """What the engine says of the prompt now, or said last."""
        await self.look()
        return self.line.progress

    @property
    def waiting_tokens(self) -> int:
        """Tokens taken in that no operation has carried to an engine yet."""
        return 0 if self.ended else self.line.ahead(self.prompt.open)

    async def _must_be_open(self) -> None:
        """Refuse what comes too late, but not for a stream that goes on at another replica, of
        which this one may not have heard."""
        if self.state == "open":
            return
        await self.keep(renew=True)
        if self.state == "failed":
            raise self.error or EngineFailed("the stream failed")
        if self.state == "moved":
            raise Moved
        raise InputClosed(f"the stream is {self.state}")

    # What other replicas know of it.

    async def keep(self, *, renew: bool = False) -> None:
        """Bring its record to what it is now.

        Args:
            renew: its lease too, when there is nothing new.

        Raises:
            Moved: it has been taken over; this replica forgets it.
        """
        try:
            await self.books.write(renew=renew)
        except Moved:
            self.let_go()
            raise

    async def _contested(self) -> None:
        await self.keep(renew=True)

    async def look(self) -> None:
        """Ask the engine where the prompt stands, which renews its lease there."""
        if self.state == "open":
            with suppress(EngineError):
                if not await self.line.look():
                    self._changed.set()

    async def _keep_if_ours(self) -> None:
        with suppress(Moved):
            await self.keep()

    async def keep_again(self) -> None:
        """Write the whole record: the index may have lost it."""
        self.books.lost()
        await self._keep_if_ours()

    def resume(self, taken: Sequence[Taken], created_s: float, ledger: Ledger) -> None:
        """Be the stream that another replica held."""
        self.taken, self.created_s, self.books.ledger = list(taken), created_s, ledger
        self.known.add(self.prompt.documents)

    # How it ends.

    def fail(self, error: GatewayError) -> None:
        """No engine goes on with it. Whoever waits for the answer gets an error event."""
        if not self.ended:
            self._error = copy(error)
            self._end("failed")
            self._answering.break_off(error)

    def let_go(self) -> None:
        """Another replica holds it now: leave it alone, also at the engine."""
        if not self.ended:
            logger.warning("stream %s is held by another replica now", self.id)
            self._end("moved")
            self._moved(self)
            self._error = EngineFailed("another replica holds the stream")
            self._answering.break_off(self._error)
        elif self.state != "moved":  # it has ended here, but not there
            self.state = "moved"
            self._moved(self)

    @property
    def movable(self) -> bool:
        """Whether another replica can go on with it from here."""
        retrieving = self.retrieval is not None and self.retrieval.state == "running"
        return self.state == "open" and self.books.kept and not retrieving

    async def release(self) -> None:
        """Let whichever replica is asked for it next hold it, as far as the index can be told."""
        async with self._taking:
            if not self.movable:
                return
            with suppress(Moved, IndexAway):
                await self.keep(renew=True)
                await self.books.release()
                self.let_go()

    async def leave(self) -> None:
        """This replica ends: what another one needs to go on is in the index and at the engine."""
        if not self.books.kept:
            return await self.close()
        await self._keep_if_ours()
        await self._chores.all_done()

    async def take_back_finish(self) -> None:
        """Whoever passed the answer on is gone, and the client with it or about to ask again at
        another replica: be open again, so that it can."""
        if self.state != "finishing":
            return
        engine, prompt_id = self.line.engine, self.line.prompt_id
        await self._chores.stopped()
        if self.state != "finishing":
            return
        self._answering.stop_waiting()
        self.state, self._answering, self.course = "open", self._unasked(), None
        self.touched_s = time.monotonic()
        self.line.begin_anew()
        self._start()
        self._free(engine, prompt_id)
        with suppress(Moved):
            await self.keep()

    async def cut_off(self, reason: GatewayError, *, shared: bool) -> None:
        """This replica ends before the answer does. Whoever reads it is told so.

        Args:
            shared: there may be others, which can be asked for all of it.
        """
        reader = self._answering
        if shared and self.books.kept:
            await self.take_back_finish()
            await self.release()
            self._error = copy(reason)
        elif self.state == "finishing":
            engine, prompt_id = self.line.engine, self.line.prompt_id
            self.fail(reason)
            self._free(engine, prompt_id)
        reader.break_off(reason)
        await self._chores.all_done()

    async def cancel(self, state: State = "cancelled") -> None:
        """Stop everything and free the engine's memory. No error if it has ended.

        Raises:
            Moved: another replica holds the stream, and goes on with it.
        """
        if self.ended:
            return
        await self.keep(renew=True)
        if self.ended:
            return
        engine, prompt_id = self.line.engine, self.line.prompt_id
        self._end(state)
        await self._chores.stopped()
        await abort(engine, prompt_id)

    async def close(self) -> None:
        """Cancel, and wait for the tasks, however it ended."""
        with suppress(Moved):
            await self.cancel()
        await self._chores.all_done()

    def _end(self, state: State) -> None:
        self.state = state
        self.known.clear()
        self.touched_s = time.monotonic()
        self.line.disconnect()
        self._answering.stop_waiting()
        ending_of(self, self._answering).told(self._metrics)
        self._chores.stop(others=True)
        if self.books.keeps_end and state != "moved":
            self._chores.say(self._keep_if_ours())
        self._ended(self)

    # How the engine gets to it.

    def engine_lost(self, engine: AnyEngine) -> None:
        """An engine is gone. If it is this stream's, begin again on another."""
        if self.state == "finishing" and self.course is not None and self.course.begun:
            self.course.engine_lost(engine)
        elif not self.ended and self.line.engine is engine:
            self._chores.stop()
            self.line.give_up()
            self._start()

    def _start(self) -> None:
        """Read, or answer."""
        if self.state == "open":
            self._changed.set()
            self._chores.begin(self._pump())
        else:
            self._chores.begin(self._answer())

    async def _pump(self) -> None:
        """Bring the engine to the prompt, again and again, until the input is closed."""
        while self.state == "open":
            await self._changed.wait()
            self._changed.clear()
            if self.state != "open" or self._too_early():
                continue
            with self._failing():
                await self.line.bring(self.prompt.open)
                if self.books.behind:
                    await self.keep()

    def _too_early(self) -> bool:
        """Whether the choice of an engine has to wait for what comes in."""
        unplaced = self.line.engine is None and not self.prompt.documents
        return unplaced and self._placer.wants_documents

    async def _answer(self) -> None:
        """Close the prompt at the engine and pass its events on."""
        sampling = self._answering.sampling
        assert sampling is not None
        self._changed.set()  # a pump that waits for input sees that there is no more
        self.course = Course(
            self.line, self._placer, self._rule, self._metrics, prompt=self.prompt,
            sampling=sampling, tell=self._pass_on, free=self._free,
        )  # fmt: skip
        with self._failing():
            await self.course.run()

    def _free(self, engine: Engine | None, prompt_id: str) -> None:
        """Have an engine forget a prompt; `close` waits for it."""
        self._chores.say(abort(engine, prompt_id))

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What no engine could mend ends the stream, and leaves nothing behind at the engine."""
        try:
            yield
        except Moved:
            self.let_go()
        except (EngineError, GatewayError) as e:
            engine, prompt_id = self.line.engine, self.line.prompt_id
            self.fail(from_engine(e) if isinstance(e, EngineError) else e)
            self._free(engine, prompt_id)
        except Exception:  # a stream whose task has died would wait for ever
            logger.exception("stream %s failed", self.id)
            engine, prompt_id = self.line.engine, self.line.prompt_id
            self.fail(GatewayError("the gateway failed"))
            self._free(engine, prompt_id)

    def _pass_on(self, event: Event) -> None:
        self.touched_s = time.monotonic()
        self.account.spend(self._answering.put(event))
        if isinstance(event, DoneEvent):
            self._end("done")


def _still(method: Callable[P, T]) -> Callable[P, T | None]:
    """Calls a method of whoever is still there, without keeping it alive; None if nobody is."""
    found = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        bound = found()
        return None if bound is None else bound(*args, **kwargs)

    return call
