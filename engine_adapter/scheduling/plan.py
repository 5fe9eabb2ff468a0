"""Who computes in the next step, and whose KV goes to make room.

Pure: no vLLM, no clock, no I/O. A scheduler describes its requests as `View`s, orders them
by a policy (`policies.py`), asks `plan` for a `Plan`, and carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class View:
    """One unfinished request as a policy and the planner see it."""

    request_id: str
    full: bool
    """Its input is complete; False while chunks may still come (a partial request)."""
    arrival_s: float
    """When its first input arrived. Any clock, the same for all views."""
    last_input_s: float
    """When its newest input arrived."""
    computed_tokens: int
    remaining_tokens: int
    """Tokens it could compute now."""
    held_blocks: int
    """KV blocks it holds, shared ones included."""
    needed_blocks: int
    """KV blocks it must hold before it may compute anything in this step."""
    decoding: bool = False
    """Its prompt is computed and it produces output."""
    running: bool = False
    """It occupies a slot of the running batch and keeps it, granted or not."""
    divisible: bool = False
    """Its tail blocks can be taken alone; otherwise a victim loses everything."""
    pinned: bool = False
    """Its blocks can't be taken (a transfer writes to them)."""
    priority: int = 0
    """The engine's own request priority: lower goes first."""
    step_tokens: int = 1
    """Tokens that the engine computes in one full step."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """Take blocks from a request: it keeps its first `keep_blocks`."""

    request_id: str
    keep_blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: how many tokens each request may compute, and who loses what first."""

    grants: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Tokens by request id; who is not in it waits."""
    evictions: Sequence[Eviction] = ()


def plan(
    order: Sequence[View],
    *,
    budget_tokens: int,
    free_blocks: int,
    slots: int,
    speculative_tokens: int | None = None,
    freeable_blocks: Callable[[View], int] = lambda view: view.held_blocks,
    may_take: Callable[[View, View], bool] = lambda taker, victim: taker.full,
) -> Plan:
    """Walk the requests in the order of the policy and grant while the step has room.

    A request may take blocks from requests behind it, from the back of the order on, as far
    as the policy allows. The walk stops at a full request that does not fit even so, so that
    nobody overtakes it; a partial one, which computes ahead of its need, is passed over.

    Args:
        order: all unfinished requests, the most urgent first.
        budget_tokens: tokens the step can compute.
        free_blocks: KV blocks nobody holds.
        slots: requests the running batch can have.
        speculative_tokens: how many of them partial requests may have; None for all.
        freeable_blocks: blocks that taking everything from a request would give back; fewer
            than it holds where it shares some. Asked only of victims.
        may_take: whether the first request may be given blocks of the second.
    """
    grants: dict[str, int] = {}
    evictions: dict[str, Eviction] = {}
    slots -= sum(view.running for view in order)
    speculative = budget_tokens if speculative_tokens is None else speculative_tokens
    behind = len(order)  # those from here on have nothing left to take
    for place, view in enumerate(order):
        if budget_tokens <= 0:
            break
        if view.request_id in evictions:  # has just lost its blocks
            continue
        grant = min(view.remaining_tokens, budget_tokens)
        if not view.full:
            grant = min(grant, speculative)
        if grant <= 0 or (slots <= 0 and not view.running):
            continue
        missing = view.needed_blocks - view.held_blocks
        found: list[Eviction] = []
        asked = behind
        while missing > free_blocks and asked - 1 > place:
            asked -= 1
            victim = order[asked]
            if victim.request_id in evictions or not may_take(view, victim):
                continue
            freed = 0 if victim.pinned or not victim.held_blocks else freeable_blocks(victim)
            if freed <= 0:
                continue
            taken = min(freed, missing - free_blocks) if victim.divisible else freed
            keep = victim.held_blocks - taken if victim.divisible else 0
            found.append(Eviction(victim.request_id, keep))
            missing -= taken
        if missing > free_blocks and not view.full:
            continue
        evictions.update((eviction.request_id, eviction) for eviction in found)
        if view.full:  # it has asked everybody behind it
            behind = asked
        if missing > free_blocks:
            break
        grants[view.request_id] = grant
        budget_tokens -= grant
        speculative -= 0 if view.full else grant
        free_blocks -= missing if missing > 0 or found else 0
        slots -= not view.running
    return Plan(grants, tuple(evictions.values()))
