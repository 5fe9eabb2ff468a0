"""Orders of unfinished requests.

A policy ranks requests; lower goes first. Most also put classes before the rank. The policies
named after those of Stream2LLM (arXiv 2604.16395) order exactly as defined there.

| policy    | classes                        | rank within a class                           |
|-----------|--------------------------------|-----------------------------------------------|
| `default` | none                           | who holds KV, then by arrival (vLLM's FCFS)   |
| `fcfs`    | full, partial, idle            | by arrival                                    |
| `lcas`    | full, partial, idle            | by the arrival of the newest input            |
| `mcps`    | all but idle, idle             | most computed tokens first, then by arrival   |
| `srpf`    | answering, full, partial, idle | full: shortest remaining prefill, with ageing |
|           |                                | partial: by arrival                           |

*idle* is a partial request with nothing to compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engine_adapter.scheduling.view import View

Key = Callable[[View], Any]

AGEING_STEPS_PER_S = 0.1
"""`srpf`: by how many full steps of prefill a second of waiting outweighs a shorter rival."""

SHORTEST_STEP_TOKENS = 512
"""`srpf`: a step shorter than this saves little time, since the weights are read for any step."""

SPECULATIVE_SHARE = 0.05
"""`srpf`: the part of all that partial requests could compute which one step may hold."""


@dataclass(frozen=True, slots=True)
class Policy:
    """An order, and whether a partial request may take memory for it."""

    name: str
    classes: Key
    rank: Key
    partial_takes: bool
    """A partial request may take KV from partial ones with a higher rank. Not from everybody
    behind it, as in the paper: an idle prompt is behind all others, and two that do not fit
    together would take each other's KV in turn for ever; so would a partial and a full one
    by `mcps`."""
    restrained: bool = False
    """A step holds no more of partial requests than `speculative_tokens` says, and no more of a
    full one that it does not finish than `unfinished_tokens`. A request whose input closes while
    a step is under way waits for its end, and for that of the next one, its own: what else is in
    the two is what its TTFT is made of."""

    def speculative_tokens(self, full_tokens: int, partial_tokens: int) -> int:
        """Tokens of a step that partial requests may have.

        Where full requests prefill, only what makes a short step worth its fixed cost. Elsewhere
        more, the more there is to read: many short steps would cost too much of a busy engine.

        Args:
            full_tokens: what full requests prefill in this step.
            partial_tokens: what all partial requests together could compute now.
        """
        if not self.restrained:
            return sys.maxsize
        if full_tokens:
            return self.unfinished_tokens(full_tokens)
        return max(2 * SHORTEST_STEP_TOKENS, int(SPECULATIVE_SHARE * partial_tokens))

    def unfinished_tokens(self, full_tokens: int) -> int:
        """Tokens of a step for a full request whose prefill does not end with it.

        Behind others, whose answers would wait for it, only what makes a short step worth its cost.

        Args:
            full_tokens: what other full requests prefill in this step.
        """
        if not self.restrained or not full_tokens:
            return sys.maxsize
        return max(SHORTEST_STEP_TOKENS - full_tokens, 0)

    def key(self, view: View) -> tuple[Any, Any]:
        """Sort key: classes first."""
        return self.classes(view), self.rank(view)


def _idle(view: View) -> bool:
    return not view.full and view.remaining_tokens == 0


def _arrival(view: View) -> tuple[int, float]:
    return view.priority, view.arrival_s


def _input_classes(view: View) -> tuple[bool, bool]:
    return not view.full, _idle(view)


def _last_input(view: View) -> tuple[int, float]:
    return view.priority, view.last_input_s


def _most_computed(view: View) -> tuple[int, int, float]:
    return view.priority, -view.computed_tokens, view.arrival_s


def _shortest_aged(view: View) -> tuple[int, float]:
    """Linear ageing needs no clock: all wait at the same pace, so only the beginnings count."""
    if not view.full:
        return view.priority, view.arrival_s
    steps = view.remaining_tokens / view.step_tokens
    return view.priority, steps + AGEING_STEPS_PER_S * view.last_input_s


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy("default", lambda v: (), lambda v: (not v.held_blocks, *_arrival(v)), True),
            Policy("fcfs", _input_classes, _arrival, True),
            Policy("lcas", _input_classes, _last_input, True),
            Policy("mcps", _idle, _most_computed, True),
            Policy(
                "srpf", lambda v: (not v.decoding, *_input_classes(v)), _shortest_aged, False, True
            ),
        )
    }
)

DEFAULT_POLICY = "srpf"


def named(name: str) -> Policy:
    """The policy of a name.

    Raises:
        ValueError: there is none; says which there are.
    """
    try:
        return POLICIES[name]
    except KeyError:
        raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}") from None
