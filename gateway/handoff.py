"""Whether an answer is decoded where its prompt was prefilled, or handed over to a decode engine.

Handing over keeps a prefill engine free of answers, whose every token would wait for the prompts
that are being read there. It costs the transfer of the KV and one token that is sampled twice, so
a short answer is not worth it, and nor is one that disturbs nobody.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

from engine_adapter.errors import KvLost
from engine_adapter.messages import Sampling
from gateway.engines import DecodeEngine, Engine
from gateway.routing import OPEN_TOKENS

Reason = Literal["engine_cannot", "short_answer", "no_decode_engine", "idle_engine", "busy_engine"]
"""`engine_cannot`: the prefill engine can't hand over. `idle_engine`, `busy_engine`: it has little,
or enough, to read for other prompts. The others are what they say."""


class Decoders(Protocol):
    """Finds decode engines for one model."""

    def choose(self, length: int, avoid: Collection[DecodeEngine]) -> DecodeEngine:
        """An engine for an answer. Choosing changes nothing.

        Args:
            length: tokens of the prompt and of the answer, as far as that is known.

        Raises:
            EngineFailed: there is none but those to avoid.
        """

    def failed(self, engine: DecodeEngine, error: KvLost) -> None:
        """A decode engine did not get KV that was there for it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When to hand over."""

    min_tokens: int
    """Answers of fewer tokens stay."""
    idle_tokens: int
    """Answers stay while no more is queued at the prefill engine; below 0 they never do."""
    timeout_s: float
    """Longest wait for the decode engine to have fetched the KV and sampled."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the decision depends on, in the moment of `finish`."""

    hands_over: bool
    """Whether the prefill engine can."""
    decode_engine: bool
    """Whether there is one."""
    answer_tokens: int | None
    """The most that the answer may have, if the client says."""
    queued_tokens: int
    """What the prefill engine has to read for others; see `queued`."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """What was decided about an answer, and what came of it."""

    decided: bool
    """To hand it over."""
    reason: Reason
    decode_engine: str | None = None
    """The engine that it was handed over to."""
    resumed: int = 0
    """How often the answer was gone on with after an engine broke off."""


def decide(rule: Rule, now: Situation) -> Handoff:
    """Whether to hand an answer over."""
    if not now.hands_over:
        return Handoff(False, "engine_cannot")
    if now.answer_tokens is not None and now.answer_tokens < rule.min_tokens:
        return Handoff(False, "short_answer")
    if not now.decode_engine:
        return Handoff(False, "no_decode_engine")
    if now.queued_tokens <= rule.idle_tokens:
        return Handoff(False, "idle_engine")
    return Handoff(True, "busy_engine")


def queued(engine: Engine, own: int) -> int:
    """Tokens that a prefill engine has to read for other prompts, each open one counted as the
    routing does: more of it is to come.

    Args:
        own: tokens among them of the prompt that is about to be finished there.
    """
    if engine.info is None:
        return 0
    seen = engine.candidate(0)
    others = max(seen.open_prompts - 1, 0)
    return max(seen.waiting_tokens - own, 0) + OPEN_TOKENS * others


def is_greedy(sampling: Sampling) -> bool:
    """Whether an engine samples the likeliest token each time. What is left to the engine's own
    default is not known."""
    return sampling.temperature == 0
