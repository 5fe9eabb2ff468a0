"""Who computes in the next step, and whose KV goes to make room.

Pure: no vLLM, no clock, no I/O. A scheduler keeps its requests, as `View`s, in an `Order`; asks
`plan` for a `Plan`, and carries it out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from engine_adapter.scheduling.fairness import Turns
from engine_adapter.scheduling.order import Entry, Order
from engine_adapter.scheduling.view import View


@dataclass(frozen=True, slots=True)
class Eviction:
    """Take blocks from a request: it keeps its first `keep_blocks`."""

    request_id: str
    keep_blocks: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: how many tokens each request may compute, and who loses what first."""

    grants: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Tokens by request id, the most urgent first; who is not in it waits."""
    evictions: Sequence[Eviction] = ()


def plan(
    order: Order,
    *,
    budget_tokens: int,
    free_blocks: int,
    slots: int,
    watermark_blocks: int = 0,
    freeable_blocks: Callable[[View], int] = lambda view: view.held_blocks,
    restore_s: Callable[[View, int], float] = lambda view, keep_blocks: (
        view.held_blocks - keep_blocks
    ),
    turns: Turns | None = None,
) -> Plan:
    """Walk the requests in the order of the policy and grant while the step has room.

    A request may take blocks from requests behind it, from the back of the order on, as far
    as the policy allows. The walk stops at a full request that does not fit even so, so that
    nobody overtakes it; a partial one, which computes ahead of its need, is passed over.

    Among tenants such a request takes nothing yet, and its turn is lent to full requests that hold
    memory: they give it back when they end, while one that holds none would only take more. Where
    that lets nobody go on, the step is planned as if all were one tenant's.

    Args:
        order: all unfinished requests.
        budget_tokens: tokens the step can compute.
        free_blocks: KV blocks nobody holds.
        slots: requests the running batch can have besides the full ones that are in it: those
            keep their slots, granted or not.
        watermark_blocks: KV blocks that must stay free when a request joins the batch.
        freeable_blocks: blocks that taking everything from a request would give back now; fewer
            than it holds where it shares some. Asked only of victims.
        restore_s: what it would cost to give a request back what it holds behind its first blocks,
            whose number is the second argument.
        turns: of tenants that compete, in place of the order alone; told what is granted. They
            decide who computes; whose memory goes is a matter of the order as ever.
    """
    policy = order.policy
    speculative: int | None = None  # known at the first partial request
    prefill_tokens = 0
    grants: dict[str, int] = {}
    purse = _Purse(order, free_blocks, freeable_blocks, restore_s, grants)
    evicted = purse.evictions
    for entry in order.ready if turns is None else turns:
        view = entry[2]
        if view.request_id in evicted:  # has just lost its blocks
            continue
        if view.request_id in grants:  # had its turn before turns were lent
            continue
        full, running = view.full, view.running
        most = budget_tokens
        if not full:
            if speculative is None:
                speculative = policy.speculative_tokens(prefill_tokens, order.partial_tokens)
            if speculative <= 0:
                if turns is None:
                    break
                turns.no_more_partial()
                continue
            if speculative < most:
                most = speculative
        if turns is not None:
            most = min(most, turns.most_tokens(view))
        if view.remaining_tokens <= most:
            grant = view.remaining_tokens
        elif full and not view.decoding:
            grant = min(most, policy.unfinished_tokens(prefill_tokens))
            if grant <= 0:
                if turns is None:
                    break
                continue  # another tenant's may be short enough to share the step
        else:
            grant = most
        stays = running and full
        if slots <= 0 and not stays:
            continue
        missing = max(view.needed_blocks - view.held_blocks, 0)
        wanted = missing if running else missing + watermark_blocks
        in_front = full and (turns is None or turns.lent)
        if wanted > purse.free_blocks and not purse.fill(entry, wanted, in_front):
            if in_front:
                break
            if full and turns is not None:
                turns.lend()
            continue
        purse.free_blocks -= missing
        grants[view.request_id] = grant
        if turns is not None:
            turns.granted(view, grant)
        budget_tokens -= grant
        if budget_tokens <= 0:
            break
        if speculative is not None and not full:
            speculative -= grant
        elif not view.decoding:
            prefill_tokens += grant
        if not stays:
            slots -= 1
    if not grants and budget_tokens > 0:
        if turns is not None:
            decided = plan(
                order,
                budget_tokens=budget_tokens,
                free_blocks=free_blocks,
                slots=slots,
                watermark_blocks=watermark_blocks,
                freeable_blocks=freeable_blocks,
                restore_s=restore_s,
            )
            turns.granted_all(decided.grants)
            return decided
        grants = _rescue(order, purse, budget_tokens, slots, watermark_blocks)
    return Plan(grants, tuple(evicted.values()))


def _rescue(
    order: Order, purse: _Purse, budget_tokens: int, slots: int, watermark_blocks: int
) -> dict[str, int]:
    """Where nobody can go on, the first full request takes from partial ones of any rank.

    By `default`, prompts that are idle can rank before all that have something to compute.
    """
    view = next((entry[2] for entry in order.ready if entry[2].full), None)
    if view is None or view.request_id in purse.evictions or not (slots > 0 or view.running):
        return {}
    missing = max(view.needed_blocks - view.held_blocks, 0)
    wanted = missing if view.running else missing + watermark_blocks
    if not purse.take_from_partial(wanted):
        return {}
    return {view.request_id: min(view.remaining_tokens, budget_tokens)}


WINDOW = 8
"""Victims that are compared by cost at a time, from the back of the order: far enough to find a
cheap one, near enough that rank still decides."""


class _Purse:
    """The blocks of a step: those that are free, and those that can be taken."""

    def __init__(
        self,
        order: Order,
        free_blocks: int,
        freeable_blocks: Callable[[View], int],
        restore_s: Callable[[View, int], float],
        grants: Mapping[str, int],
    ) -> None:
        self.free_blocks = free_blocks
        self.evictions: dict[str, Eviction] = {}
        self._partial_takes = order.policy.partial_takes
        self._holders = order.holders
        self._freeable_blocks = freeable_blocks
        self._restore_s = restore_s
        self._grants = grants
        self._asked = len(order.holders)  # by full requests: from here on there is nothing to take
        self._reach: float = math.inf
        """Blocks that the last partial request found, in vain; those after it find no more."""

    def fill(self, taker: Entry, wanted: int, in_front: bool) -> bool:
        """Evict until `wanted` blocks are free, from the back on; False if they never are.

        Args:
            in_front: a full request that waits in front of all others: what is found is freed for
                it even if it does not fit yet. Others take all that they need, or nothing.
        """
        full = taker[2].full
        lacking = wanted - self.free_blocks
        if not full and (not self._partial_takes or lacking > self._reach):
            return False
        found: list[Eviction] = []
        freed = 0
        at = self._asked
        while freed < lacking and at > 0:
            asked = at
            at, offers = self._look(taker, at)
            freed += self._choose(offers, lacking - freed, found)
        fits = freed >= lacking
        if not fits and not in_front:
            if not full:
                self._reach = freed
            return False
        self._evict(found, freed)
        if full:  # what is left of the last window may be asked again
            self._asked = asked if fits else at
        return fits

    def take_from_partial(self, wanted: int) -> bool:
        """Evict partial requests of any rank until `wanted` blocks are free; all or nobody."""
        offers = [e[2] for e in reversed(self._holders) if not e[2].full]
        offers = [view for view in offers if view.request_id not in self.evictions]
        found: list[Eviction] = []
        lacking = wanted - self.free_blocks
        freed = self._choose(offers, lacking, found)
        if freed < lacking:
            return False
        self._evict(found, freed)
        return True

    def _choose(self, offers: list[View], lacking: int, found: list[Eviction]) -> int:
        """Add the cheapest of some victims to those found; returns the blocks they free."""
        freed = 0
        for victim in self._cheapest_first(offers, lacking):
            if freed >= lacking:
                break
            freeable = self._freeable_blocks(victim)
            if freeable <= 0:
                continue
            taken = min(freeable, lacking - freed) if victim.divisible else freeable
            keep = victim.held_blocks - taken if victim.divisible else 0
            found.append(Eviction(victim.request_id, keep))
            freed += taken
        return freed

    def _evict(self, found: list[Eviction], freed: int) -> None:
        self.evictions.update((eviction.request_id, eviction) for eviction in found)
        self.free_blocks += freed

    def _look(self, taker: Entry, at: int) -> tuple[int, list[View]]:
        """The next victims from the back on, and where they begin; 0 for the end."""
        offers: list[View] = []
        full, rank = taker[2].full, taker[0][1]
        while at > 0 and len(offers) < WINDOW:
            entry = self._holders[at - 1]
            if entry <= taker:
                return 0, offers
            at -= 1
            (classes, victim_rank), _, victim = entry
            if not full and victim_rank <= rank:  # so are all before it in its class
                at = bisect_left(self._holders, ((classes,),), 0, at)
            elif (full or not victim.full) and self._may_lose(victim.request_id):
                offers.append(victim)
        return at, offers

    def _may_lose(self, request_id: str) -> bool:
        """Not who has lost, nor who computes in this step: by turns, one that ranks behind may."""
        return request_id not in self.evictions and request_id not in self._grants

    def _cheapest_first(self, offers: list[View], lacking: int) -> list[View]:
        """Victims by what a block of theirs costs to restore."""
        if len(offers) < 2:
            return offers

        def seconds_per_block(victim: View) -> float:
            taken = min(victim.held_blocks, lacking) if victim.divisible else victim.held_blocks
            return self._restore_s(victim, victim.held_blocks - taken) / taken

        return sorted(offers, key=seconds_per_block)
