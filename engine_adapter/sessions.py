"""The open prompts of one engine as its clients see them: versions, retries, leases, limits.

Lives in the engine's HTTP server. It decides whether an operation is valid before the
engine's loop hears of it, so nothing a client sends can disturb that loop.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from engine_adapter.answers import Answer
from engine_adapter.errors import (
    BadOperation,
    EngineOverloaded,
    EngineUnavailable,
    PromptExists,
    PromptFinished,
    PromptTooLong,
    UnknownPrompt,
    VersionConflict,
)
from engine_adapter.messages import (
    Extend,
    Finish,
    Invalidate,
    Open,
    Progress,
    PromptState,
    PromptTokens,
)

Status = Mapping[str, int | str]

MAX_LEASE_S = 3600.0

DEFAULT_OPEN_PROMPTS = 1024

WORD_S = 0.2
"""Longest wait for the word that KV was fetched, which an idle engine hears in its next step."""


class Core(Protocol):
    """What the sessions need of an engine's loop. Calls take effect in the order made."""

    def open(
        self, prompt_id: str, tokens: list[int], cache_salt: str | None, weight: float | None
    ) -> Awaitable[Status]:
        """Begin a prompt."""

    def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> Awaitable[Status]:
        """Replace what is behind the first `keep` tokens."""

    def reopen(self, prompt_id: str, version: int, tokens: list[int]) -> Awaitable[Status]:
        """Replace a prompt whose input is closed, if its answer has no token yet.

        Raises:
            PromptFinished: it has, or it is over.
        """

    def status(self, prompt_id: str) -> Awaitable[Status]:
        """State of a prompt."""

    def handed_over(self, prompt_id: str, forget: bool) -> Awaitable[Status]:
        """The `state` of KV that another engine is to fetch; empty if nothing is known of it.

        Args:
            forget: nobody will ask again.
        """

    def close(self, prompt_id: str) -> Awaitable[Status]:
        """Forget a prompt."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine accepts."""

    max_model_len: int
    vocab_size: int
    max_open_prompts: int


@dataclass(slots=True, eq=False)
class Session:
    """One prompt: the tokens of its newest version and the answer to it."""

    prompt_id: str
    tokens: list[int]
    cache_salt: str | None
    lease_s: float
    expires_s: float
    version: int = 0
    read: array[int] | None = field(default=None, repr=False)
    """The tokens of a prompt whose answer nobody reads any more: the reader may have died, and
    another one may begin again."""
    answer: Answer | None = None
    """To the prompt, once its input is closed."""
    progress: asyncio.Task[Progress] | None = field(default=None, repr=False)
    """What the newest `open` or `extend` is answered with."""
    newest: Extend | None = field(default=None, repr=False)
    """The operation that made this version, if that was no `open` or `finish`."""
    handed_over: bool = False
    """Its answer goes on at another engine, which fetches the KV."""
    kv_waits: bool = False
    """That has not come to an end yet, as far as is known here."""

    @property
    def finished(self) -> bool:
        return self.answer is not None


class Sessions:
    """All prompts of one engine. Not thread-safe: for one event loop."""

    def __init__(self, core: Core, limits: Limits) -> None:
        self._core = core
        self._limits = limits
        self._sessions: dict[str, Session] = {}

    async def open(self, prompt_id: str, op: Open) -> Progress:
        """Begin a prompt. The same `open` again gives the first answer.

        Raises:
            PromptExists, PromptTooLong, BadOperation, EngineOverloaded
        """
        known = self._sessions.get(prompt_id)
        if known is not None:
            if _is_repeated(known, op):
                return await self._answered(known)
            raise PromptExists(f"prompt {prompt_id!r} is open already")
        if not 0 < op.lease_s <= MAX_LEASE_S:
            raise BadOperation(f"lease_s must be above 0 and at most {MAX_LEASE_S:g}")
        most = self._limits.max_open_prompts
        # They are counted only when there may be too many.
        if len(self._sessions) >= most and self._count_open() >= most:
            raise EngineOverloaded(f"{most} prompts are open")
        self._check_tokens(op.tokens, len(op.tokens))
        session = Session(
            prompt_id, list(op.tokens), op.cache_salt, op.lease_s, time.monotonic() + op.lease_s
        )
        self._sessions[prompt_id] = session
        call = self._core.open(prompt_id, session.tokens, op.cache_salt, op.weight)
        return await self._call(session, call, kept=0)

    def _count_open(self) -> int:
        return sum(not session.finished for session in self._sessions.values())

    async def extend(self, prompt_id: str, op: Extend) -> Progress:
        """Apply the next version, also to a finished prompt whose answer has not begun.

        Raises:
            UnknownPrompt, PromptFinished, VersionConflict, PromptTooLong, BadOperation
        """
        session = self._get(prompt_id)
        if op == session.newest:
            return await self._answered(session)
        if session.answer is not None and session.answer.begun:
            raise PromptFinished(f"the answer to prompt {prompt_id!r} has begun")
        tokens = self._next(session, op)
        before = session.newest
        session.version, session.tokens, session.newest = op.version, tokens, op
        if session.answer is None:
            call = self._core.extend(prompt_id, op.keep, op.tokens)
        else:
            call = self._reopen(session, session.answer, tokens, session.progress, before)
        return await self._call(session, call, kept=op.keep)

    async def _reopen(
        self,
        session: Session,
        answer: Answer,
        tokens: list[int],
        progress: asyncio.Task[Progress] | None,
        before: Extend | None,
    ) -> Status:
        """Ask the engine's loop for an update of a finished prompt, and follow its decision.

        Args:
            progress, before: of the version that is to be replaced, and stays if it can't be.
        """
        version = session.version
        try:
            status = await self._core.reopen(session.prompt_id, version, tokens)
        except PromptFinished:
            answer.begun = True
            session.version, session.tokens = answer.version, answer.tokens
            session.progress, session.newest = progress, before
            raise
        except Exception as e:  # nobody knows what has become of the prompt
            answer.break_off(EngineUnavailable(f"an update failed: {e}"))
            raise
        answer.update(version, tokens)
        return {**status, "state": "finishing"}

    async def invalidate(self, prompt_id: str, op: Invalidate) -> Progress:
        """Apply the next version, which is the beginning of the one before.

        Raises:
            UnknownPrompt, PromptFinished, VersionConflict, BadOperation
        """
        return await self.extend(prompt_id, Extend(version=op.version, keep=op.keep, tokens=[]))

    def finish(self, prompt_id: str, op: Finish) -> tuple[Session, Answer]:
        """Close the input of a prompt. The caller has the engine give the answer, and ends it.

        Raises:
            UnknownPrompt, PromptFinished, VersionConflict, PromptTooLong, BadOperation
        """
        session = self._get(prompt_id)
        if session.finished:
            raise PromptFinished(f"the input of prompt {prompt_id!r} is closed")
        tokens = self._next(session, op)
        session.version, session.tokens = op.version, tokens
        session.answer = Answer(op.version, tokens)
        session.progress = session.newest = None
        return session, session.answer

    async def abort(self, prompt_id: str) -> Progress:
        """Forget a prompt and free its memory.

        Raises:
            UnknownPrompt
        """
        session = self._get(prompt_id)
        self._forget(session)
        await self._close(session)
        return Progress(
            prompt_id=prompt_id,
            version=session.version,
            state="idle",
            length=len(session.tokens),
            computed=0,
        )

    async def status(self, prompt_id: str) -> Progress:
        """Where a prompt stands; renews its lease.

        Raises:
            UnknownPrompt
        """
        session = self._get(prompt_id)
        if session.handed_over:
            return self._progress(session, await self._fetched(session))
        if session.finished:
            return self._progress(
                session, {"state": "finishing", "length": len(session.tokens), "computed": 0}
            )
        return self._progress(session, await self._core.status(prompt_id))

    async def _fetched(self, session: Session) -> Status:
        """What has become of handed-over KV. The other engine's word may be on its way."""
        deadline_s = time.monotonic() + WORD_S
        while True:
            found = await self._core.handed_over(session.prompt_id, forget=False)
            state = found.get("state", "expired")
            session.kv_waits = state == "handed_over"
            if state != "handed_over" or time.monotonic() > deadline_s:
                return {"state": state, "length": len(session.read or ()), "computed": 0}
            await asyncio.sleep(WORD_S / 20)

    async def look_after_handed_over(self) -> None:
        """Let an idle engine hear whose KV was fetched, and give it back."""
        for session in [s for s in self._sessions.values() if s.kv_waits]:
            found = await self._core.handed_over(session.prompt_id, forget=False)
            session.kv_waits = found.get("state") == "handed_over"

    async def tokens(self, prompt_id: str) -> PromptTokens:
        """What the engine has of a prompt; renews its lease.

        Waits for the loop's decision about an update of a finished prompt.

        Raises:
            UnknownPrompt
        """
        session = self._get(prompt_id)
        if session.finished and session.progress is not None:
            await asyncio.wait((session.progress,))
        return PromptTokens(
            prompt_id=prompt_id,
            version=session.version,
            finished=session.finished,
            tokens=session.tokens if session.read is None else list(session.read),
        )

    def answered(self, session: Session, answer: Answer) -> None:
        """Nobody reads the answer any more. Until its lease ends the id is known as finished."""
        answer.end()
        session.read, session.tokens = array("I", session.tokens), []

    async def expire(self, now_s: float) -> list[str]:
        """Free the prompts whose lease has run out, and say which.

        While somebody reads its answer, a prompt stays.

        Args:
            now_s: a `time.monotonic` value.
        """
        late = [
            s
            for s in self._sessions.values()
            if s.expires_s <= now_s and not (s.answer is not None and s.answer.streaming)
        ]
        for session in late:
            self._forget(session)
        # KV that an answer has left for another engine has a lease of its own.
        left = (s for s in late if s.answer is None or not s.answer.over)
        await asyncio.gather(*(self._close(session) for session in left))
        over = (s.prompt_id for s in late if s.handed_over)
        await asyncio.gather(*(self._core.handed_over(i, forget=True) for i in over))
        return [s.prompt_id for s in late]

    def _forget(self, session: Session) -> None:
        if self._sessions.get(session.prompt_id) is session:
            del self._sessions[session.prompt_id]
        if session.answer is not None:
            session.answer.break_off(EngineUnavailable("the engine aborted the answer"))

    async def _close(self, session: Session) -> None:
        """Let the engine's loop forget what it may have of a prompt."""
        await asyncio.sleep(0)  # an operation taken in this very moment is called first
        await self._core.close(session.prompt_id)

    # Checks.

    def _get(self, prompt_id: str) -> Session:
        session = self._sessions.get(prompt_id)
        if session is None:
            raise UnknownPrompt(f"no prompt {prompt_id!r} is open here")
        session.expires_s = time.monotonic() + session.lease_s
        return session

    def _next(self, session: Session, op: Extend | Finish) -> list[int]:
        """The tokens of the next version, if the operation is valid."""
        expected = session.version + 1
        if op.version != expected:
            raise VersionConflict(
                f"version {op.version} where {expected} is next", expected_version=expected
            )
        if not 0 <= op.keep <= len(session.tokens):
            raise BadOperation(
                f"keep is {op.keep}, but the prompt has {len(session.tokens)} tokens",
                length=len(session.tokens),
            )
        self._check_tokens(op.tokens, op.keep + len(op.tokens))
        return session.tokens[: op.keep] + op.tokens

    def _check_tokens(self, tokens: list[int], length: int) -> None:
        if length < 1:
            raise BadOperation("a prompt has at least one token")
        if length >= self._limits.max_model_len:
            raise PromptTooLong(
                f"{length} tokens leave no room for an answer: prompt and answer together "
                f"have at most {self._limits.max_model_len}",
                length=length,
                max_model_len=self._limits.max_model_len,
            )
        if tokens and not (min(tokens) >= 0 and max(tokens) < self._limits.vocab_size):
            raise BadOperation(f"token ids must be in [0, {self._limits.vocab_size})")

    # Answers.

    async def _call(self, session: Session, call: Awaitable[Status], kept: int) -> Progress:
        async def answer() -> Progress:
            return self._progress(session, await call, version=version, kept=kept)

        version = session.version
        session.progress = asyncio.create_task(answer())
        return await self._answered(session)

    async def _answered(self, session: Session) -> Progress:
        """The answer to the newest version. A caller that goes away does not disturb it."""
        assert session.progress is not None
        return await asyncio.shield(session.progress)

    @staticmethod
    def _progress(
        session: Session, status: Status, *, version: int | None = None, kept: int = 0
    ) -> Progress:
        state: PromptState = str(status["state"])  # type: ignore[assignment]
        return Progress(
            prompt_id=session.prompt_id,
            version=session.version if version is None else version,
            state=state,
            length=int(status["length"]),
            computed=int(status["computed"]),
            kept=kept,
            invalidated=int(status.get("invalidated", 0)),
            freed_blocks=int(status.get("freed_blocks", 0)),
        )


def _is_repeated(session: Session, op: Open) -> bool:
    """Whether a session stands as this very operation has opened it."""
    opened = session.version == 0 and not session.finished
    return opened and session.tokens == op.tokens and session.cache_salt == op.cache_salt
