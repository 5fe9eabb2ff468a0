"""The engine operations as their users see them, however an engine carries them out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from engine_adapter.messages import (
    Blocks,
    EngineInfo,
    Event,
    Extend,
    Finish,
    Invalidate,
    Open,
    Progress,
    PromptTokens,
    Sampling,
)


class Operations(Protocol):
    """One engine. Every method raises an `EngineError`; `EngineUnavailable` if the engine can't be
    reached, breaks off, or lets a deadline pass. What it can do is in its info."""

    @property
    def url(self) -> str:
        """Where the engine's HTTP server is."""

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        """What the engine is and how busy it is."""

    async def set_policy(self, policy: str) -> EngineInfo:
        """Order requests by another policy from the next step on."""

    async def open(self, prompt_id: str, op: Open) -> Progress:
        """Begin an incremental prefill."""

    async def extend(self, prompt_id: str, op: Extend) -> Progress:
        """Apply the next version, also after `finish` while the answer has no token."""

    async def invalidate(self, prompt_id: str, op: Invalidate) -> Progress:
        """Cut the prompt and give back the KV behind the cut."""

    async def status(self, prompt_id: str) -> Progress:
        """Where a prompt stands; renews its lease."""

    async def tokens(self, prompt_id: str) -> PromptTokens:
        """What the engine has of a prompt; renews its lease."""

    async def blocks(self) -> Blocks:
        """What its prefix cache could find now."""

    async def abort(self, prompt_id: str) -> Progress:
        """Forget a prompt and free its memory."""

    def finish(
        self, prompt_id: str, op: Finish
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Close the input; gives the events of the answer. Leaving the block aborts it."""

    async def close(self) -> None:
        """End what the client itself runs. Nothing is asked of it after that."""


class Decoding(Protocol):
    """One engine that decodes prompts which others have prefilled. Errors as of `Operations`."""

    @property
    def url(self) -> str:
        """Where the engine's HTTP server is."""

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        """What the engine is and how busy it is."""

    def answer(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        kv_transfer: Mapping[str, Any] | None,
        request_id: str,
        cache_salt: str | None,
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The answer to a whole prompt, from its first token on. Leaving the block aborts it.

        Args:
            kv_transfer: where the KV of these very tokens is (`DoneEvent.kv_transfer`); None to
                prefill them here.
            cache_salt: as of `Open`.
        """

    async def close(self) -> None:
        """End what the client itself runs. Nothing is asked of it after that."""
