"""Which engine a prompt goes to: pure functions from what is known of the engines.

Everything is counted in tokens that have to be computed before this prompt's first token can
come, so the weights need no tuning to one machine:

- `missing`: tokens of the prompt that the engine does not hold, times `MISSING_WEIGHT`: computing
  them delays this prompt and then whoever comes behind it.
- `queued`: tokens that others wait for there.
- `open`: prompts whose input is still open there, `OPEN_TOKENS` each: more of them is to come.
- `running`: answers under way, each of which takes a token of every step; `RUNNING_TOKENS` each.
- `memory`: `FULL_TOKENS` times the square of the share of KV blocks in use. Nearly nothing on an
  engine with room, and more than most prompts on a full one, where room has to be made first.

The sum is the score; the least wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MISSING_WEIGHT = 2
OPEN_TOKENS = 256
RUNNING_TOKENS = 32
FULL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine as the choice sees it."""

    url: str
    streams: int
    """Placed there by this gateway, not ended yet."""
    waiting_tokens: int
    """Still to be computed there, by its own word, and placed there since."""
    open_prompts: int
    """Whose input is not closed, by its own word, and as streams came and went since."""
    running: int
    kv_use: float
    """Share of its KV blocks that requests hold, 0 to 1."""
    held_tokens: int = 0
    """Tokens at the front of the prompt whose KV it has, as far as the index knows."""


@dataclass(frozen=True, slots=True)
class Score:
    """Why an engine was, or was not, chosen. All are tokens; see the module."""

    held: int
    missing: int
    """Before it is weighted."""
    queued: int
    open: int
    running: int
    memory: int
    total: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a prompt went, and why."""

    policy: str
    engine: str
    prompt_tokens: int
    """Of the prompt as it was known then."""
    scores: Mapping[str, Score]
    """By engine; empty where the policy has none."""


Policy = Callable[[Sequence[Candidate], int, int], tuple[Candidate, Mapping[str, Score]]]
"""From the candidates (one or more), the prompt's tokens, and how many prompts were placed
before, to the choice and its reasons."""


def prefix(
    candidates: Sequence[Candidate], prompt_tokens: int, placed: int
) -> tuple[Candidate, Mapping[str, Score]]:
    """The engine that will be soonest: what it holds weighed against what it has to do."""
    return _least(candidates, prompt_tokens, use_held=True)


def least_load(
    candidates: Sequence[Candidate], prompt_tokens: int, placed: int
) -> tuple[Candidate, Mapping[str, Score]]:
    """The same without regard to what the engines hold."""
    return _least(candidates, prompt_tokens, use_held=False)


def round_robin(
    candidates: Sequence[Candidate], prompt_tokens: int, placed: int
) -> tuple[Candidate, Mapping[str, Score]]:
    """One after the other."""
    return candidates[placed % len(candidates)], {}


POLICIES: Mapping[str, Policy] = {
    "prefix": prefix,
    "least-load": least_load,
    "round-robin": round_robin,
}


def score(candidate: Candidate, prompt_tokens: int, *, use_held: bool) -> Score:
    """What a prompt would wait for on one engine."""
    held = min(candidate.held_tokens, prompt_tokens) if use_held else 0
    missing = prompt_tokens - held
    load = (
        candidate.waiting_tokens,
        OPEN_TOKENS * candidate.open_prompts,
        RUNNING_TOKENS * candidate.running,
        round(FULL_TOKENS * candidate.kv_use**2),
    )
    return Score(held, missing, *load, MISSING_WEIGHT * missing + sum(load))


def _least(
    candidates: Sequence[Candidate], prompt_tokens: int, *, use_held: bool
) -> tuple[Candidate, Mapping[str, Score]]:
    scores = {c.url: score(c, prompt_tokens, use_held=use_held) for c in candidates}
    # Equal ones, as on engines that all are idle, share the streams.
    best = min(candidates, key=lambda c: (scores[c.url].total, c.streams))
    return best, scores
