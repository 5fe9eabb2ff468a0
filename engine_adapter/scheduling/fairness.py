"""Whose turn it is among tenants: who got least for its weight, then the policy's order.

As in the virtual token counter of Sheng et al. (Fairness in Serving LLMs, OSDI 2024), a token that
is computed counts for its tenant, divided by its weight. There, one who comes back after a rest
begins where the least served of those under way is. Here rest is saved up to a bound: a tenant that
keeps to its share goes before one that does not, and its TTFT hardly tells whether there is one.
A tenant is told by the cache salt of its requests. Pure: a scheduler asks for `turns`, and says
what came of them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from heapq import heapify, heappop, heappush

from engine_adapter.scheduling.order import Entry, Order
from engine_adapter.scheduling.view import View

CREDIT_TOKENS = 65_536
"""Over weight: what a tenant that rested can have before others that did not. Enough for the
longest prompts of ordinary streams; one that had more than its share pays back no more than this
either."""

FLOODED_STEP_TOKENS = 1024
"""What a flood may fill a step up to: others wait for the end of the step under way, and for all
that is in their own. Shorter steps are mostly what a step costs whatever is in it."""

FLOOD_TOKENS = 32_768
FLOOD_REQUESTS = 8
"""No less that waits is a flood: some long prompts are not."""

FLOOD_AHEAD = 0.25
"""Nor is a tenant that has had little more than others: by so much of the credit."""


class Turns:
    """The requests that could compute, as the tenants' turns come in one step."""

    def __init__(
        self,
        order: Order,
        served: Mapping[str, float],
        weights: Mapping[str, float],
        flood: str | None = None,
    ) -> None:
        self.served = dict(served)
        """Tokens over weights, with those of this step."""
        self._order = order
        self._weights = weights
        self._full_only = False
        self._flood = flood
        self._tokens = 0
        self.lent = False
        """Turns are over for this step: what is left of it goes by `lend`."""

    def __iter__(self) -> Iterator[Entry]:
        """Answers under way first, a token each; then by turns. Say `granted` before the next.

        Once turns are lent, requests that had theirs can come again.
        """
        queues: dict[str, list[Entry]] = {}
        for entry in self._order.ready:
            if self.lent:
                break
            if entry[2].decoding:
                yield entry
            else:
                queues.setdefault(entry[2].tenant, []).append(entry)
        heads = []
        for entries in queues.values():
            entries.reverse()
            heads.append(self._head(entries.pop()))
        heapify(heads)
        while heads and not self.lent:
            entry = heappop(heads)[2]
            tenant, full = entry[2].tenant, entry[2].full
            if self._full_only and not full:
                continue  # nor is anything behind it in its tenant's order
            if self.most_tokens(entry[2]) <= 0:
                continue
            yield entry
            if entries := queues[tenant]:
                heappush(heads, self._head(entries.pop()))
        if self.lent:
            yield from (e for e in self._order.ready if e[2].full and e[2].held_blocks)

    def _head(self, entry: Entry) -> tuple[bool, float, Entry]:
        """What tenants are compared by. Where steps are kept short for full requests, those of all
        come before partial ones, as they do for one tenant; those of a flood are no better than
        partial ones."""
        view = entry[2]
        last = not view.full or view.tenant == self._flood
        return last and self._order.policy.restrained, self.served[view.tenant], entry

    def lend(self) -> None:
        """A full request whose turn it is does not fit into memory. What is left of the step is for
        those that can give some back, in the policy's order: the first of them may take from all
        others, so that one gets on."""
        self.lent = True

    def granted(self, view: View, tokens: int) -> None:
        """The request computes so many tokens in this step."""
        tenant = view.tenant
        self.served[tenant] += tokens / self._weights.get(tenant, 1.0)
        self._tokens += tokens

    def most_tokens(self, view: View) -> int:
        """Tokens that a request may have in this step."""
        flooding = view.tenant == self._flood and not view.decoding
        return FLOODED_STEP_TOKENS - self._tokens if flooding else sys.maxsize

    def granted_all(self, grants: Mapping[str, int]) -> None:
        """These requests compute so many tokens in this step, which was not planned by turns."""
        for *_, view in self._order.ready:
            if tokens := grants.get(view.request_id):
                self.granted(view, tokens)

    def no_more_partial(self) -> None:
        """A step has all it may have of partial requests. Of use with policies that put a tenant's
        partial requests behind its full ones."""
        self._full_only = True


class Present:
    """Which tenants have requests or open prompts."""

    def __init__(self) -> None:
        self._tenants: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    @property
    def tenants(self) -> Collection[str]:
        """All that do."""
        return self._counts.keys()

    @property
    def compete(self) -> bool:
        """Whether several do."""
        return len(self._counts) > 1

    def put(self, request_id: str, tenant: str) -> None:
        """A request or a prompt has come."""
        self.discard(request_id)
        self._tenants[request_id] = tenant
        self._counts[tenant] += 1

    def discard(self, request_id: str) -> None:
        """It is over; an unknown one is no error."""
        if (tenant := self._tenants.pop(request_id, None)) is not None:
            self._counts[tenant] -= 1
            if not self._counts[tenant]:
                del self._counts[tenant]


class Shares:
    """What the tenants of one engine got of it, as far as they compete."""

    def __init__(self, credit_tokens: int = CREDIT_TOKENS) -> None:
        self._credit_tokens = credit_tokens
        self._weights: dict[str, float] = {}
        self._known: set[str] = set()
        self._served: dict[str, float] = {}

    def weigh(self, tenant: str, weight: float) -> bool:
        """A tenant with this weight gets so many times what one with the weight 1 gets.

        Returns:
            Whether it was unknown: from now on its requests are a tenant's.
        """
        new = tenant not in self._known
        self._known.add(tenant)
        if weight == 1.0:
            self._weights.pop(tenant, None)
        else:
            self._weights[tenant] = weight
        return new

    def tenant_of(self, cache_salt: str | None) -> str:
        """The tenant of a request with this salt. One that nobody has given a weight is no
        tenant's: salts have other uses too."""
        return cache_salt if cache_salt is not None and cache_salt in self._known else ""

    def turns(self, order: Order, present: Collection[str] = ()) -> Turns | None:
        """Those of the next step; None where nobody competes, so that the policy alone decides.

        Args:
            order: all unfinished requests.
            present: tenants that have requests or open prompts, computing or not.
        """
        tenants = order.tenants.keys() | present
        if len(tenants) < 2:
            self._served = {}
            return None
        # Counted from the most credit on, so that numbers stay small and rest is saved up to it.
        none = max(self._served.values(), default=0.0) - self._credit_tokens
        served = {t: s - none for t, s in self._served.items() if s > none}
        for tenant in tenants:
            served.setdefault(tenant, 0.0)
        flood = self._flood(order, served) if order.policy.restrained else None
        return Turns(order, served, self._weights, flood)

    def settle(self, turns: Turns) -> None:
        """The step was planned by these turns."""
        self._served = turns.served

    def _flood(self, order: Order, served: Mapping[str, float]) -> str | None:
        """A tenant of whom more waits than of all others together, and that has had much more than
        any other. It waits for its own, so shorter steps take little from it; where all have much
        to compute there is none."""
        waiting = {tenant: tokens for tenant, (_, tokens) in order.backlog.items()}
        if not waiting:
            return None
        most = max(waiting, key=waiting.__getitem__)
        rest = sum(waiting.values()) - waiting[most]
        if waiting[most] < max(FLOOD_TOKENS, rest) or order.backlog[most][0] < FLOOD_REQUESTS:
            return None
        others = max(tokens for tenant, tokens in served.items() if tenant != most)
        return most if served[most] - others >= FLOOD_AHEAD * self._credit_tokens else None
