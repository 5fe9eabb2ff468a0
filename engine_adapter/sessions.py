"""The open prompts of one engine as its clients see them: versions, retries, leases, limits.

Lives in the engine's HTTP server. It decides whether an operation is valid before the
engine's loop hears of it, so nothing a client sends can disturb that loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from engine_adapter.errors import (
    BadOperation,
    EngineOverloaded,
    PromptExists,
    PromptFinished,
    PromptTooLong,
    UnknownPrompt,
    VersionConflict,
)
from engine_adapter.messages import Extend, Finish, Invalidate, Open, Progress, PromptState

Status = Mapping[str, int | str]

MAX_LEASE_S = 3600.0

DEFAULT_OPEN_PROMPTS = 1024


class Core(Protocol):
    """What the sessions need of an engine's loop. Calls take effect in the order made."""

    def open(self, prompt_id: str, tokens: list[int], cache_salt: str | None) -> Awaitable[Status]:
        """Begin a prompt."""

    def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> Awaitable[Status]:
        """Replace what is behind the first `keep` tokens."""

    def status(self, prompt_id: str) -> Awaitable[Status]:
        """State of a prompt."""

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
    finished: bool = False
    answer: asyncio.Task[Progress] | None = field(default=None, repr=False)


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
            if known.version == 0 and known.tokens == op.tokens and not known.finished:
                return await self._answered(known)
            raise PromptExists(f"prompt {prompt_id!r} is open already")
        if not 0 < op.lease_s <= MAX_LEASE_S:
            raise BadOperation(f"lease_s must be above 0 and at most {MAX_LEASE_S:g}")
        if sum(not s.finished for s in self._sessions.values()) >= self._limits.max_open_prompts:
            raise EngineOverloaded(f"{self._limits.max_open_prompts} prompts are open")
        self._check_tokens(op.tokens, len(op.tokens))
        session = Session(
            prompt_id, list(op.tokens), op.cache_salt, op.lease_s, time.monotonic() + op.lease_s
        )
        self._sessions[prompt_id] = session
        call = self._core.open(prompt_id, session.tokens, op.cache_salt)
        return await self._call(session, call, kept=0)

    async def extend(self, prompt_id: str, op: Extend) -> Progress:
        """Apply the next version.

        Raises:
            UnknownPrompt, PromptFinished, VersionConflict, PromptTooLong, BadOperation
        """
        session = self._live(prompt_id)
        if op.version == session.version:
            return await self._answered(session)
        tokens = self._next(session, op)
        session.version, session.tokens = op.version, tokens
        call = self._core.extend(prompt_id, op.keep, op.tokens)
        return await self._call(session, call, kept=op.keep)

    async def invalidate(self, prompt_id: str, op: Invalidate) -> Progress:
        """Apply the next version, which is the beginning of the one before.

        Raises:
            UnknownPrompt, PromptFinished, VersionConflict, BadOperation
        """
        return await self.extend(prompt_id, Extend(version=op.version, keep=op.keep, tokens=[]))

    def finish(self, prompt_id: str, op: Finish) -> Session:
        """Close the input of a prompt. The caller has the engine answer `session.tokens`.

        Raises:
            UnknownPrompt, PromptFinished, VersionConflict, PromptTooLong, BadOperation
        """
        session = self._live(prompt_id)
        tokens = self._next(session, op)
        session.version, session.tokens, session.finished = op.version, tokens, True
        return session

    async def abort(self, prompt_id: str) -> Progress:
        """Forget a prompt and free its memory.

        Raises:
            UnknownPrompt
        """
        session = self._get(prompt_id)
        last = session.tokens
        self.forget(session)
        if not session.finished:
            await self._core.close(prompt_id)
        return Progress(
            prompt_id=prompt_id,
            version=session.version,
            state="idle",
            length=len(last),
            computed=0,
        )

    async def status(self, prompt_id: str) -> Progress:
        """Where a prompt stands; renews its lease.

        Raises:
            UnknownPrompt
        """
        session = self._get(prompt_id)
        if session.finished:
            return self._progress(
                session, {"state": "finishing", "length": len(session.tokens), "computed": 0}
            )
        return self._progress(session, await self._core.status(prompt_id))

    def answered(self, session: Session) -> None:
        """The answer is complete. Until its lease ends the id is known as finished."""
        session.tokens = []

    def forget(self, session: Session) -> None:
        """Drop a session if it is still the one of its id."""
        if self._sessions.get(session.prompt_id) is session:
            del self._sessions[session.prompt_id]

    async def expire(self, now_s: float) -> list[str]:
        """Free the prompts whose lease has run out, and say which.

        Args:
            now_s: a `time.monotonic` value.
        """
        late = [s for s in self._sessions.values() if s.expires_s <= now_s]
        for session in late:
            self.forget(session)
        for session in late:
            if session.tokens:  # also if finished: where the answer never began it is still open
                await self._core.close(session.prompt_id)
        return [s.prompt_id for s in late]

    # Checks.

    def _get(self, prompt_id: str) -> Session:
        session = self._sessions.get(prompt_id)
        if session is None:
            raise UnknownPrompt(f"no prompt {prompt_id!r} is open here")
        session.expires_s = time.monotonic() + session.lease_s
        return session

    def _live(self, prompt_id: str) -> Session:
        session = self._get(prompt_id)
        if session.finished:
            raise PromptFinished(f"the input of prompt {prompt_id!r} is closed")
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
        session.answer = asyncio.create_task(answer())
        return await self._answered(session)

    async def _answered(self, session: Session) -> Progress:
        """The answer to the newest version. A caller that goes away does not disturb it."""
        assert session.answer is not None
        return await asyncio.shield(session.answer)

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
