"""Whose turn it is among tenants: who got least for its weight, then the policy's order.

As in the virtual token counter of Sheng et al. (arXiv 2401.00588), a token that is computed counts
for its tenant, divided by its weight, and one who comes back after a rest begins where the least
served of those under way is: what was not used is not saved up. A tenant is told by the cache salt
of its requests. Pure: a scheduler asks for `turns`, and says what came of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush

from engine_adapter.scheduling.order import Entry, Order
from engine_adapter.scheduling.view import View


class Turns:
    """The requests that could compute, as the tenants' turns come in one step."""

    def __init__(
        self,
        order: Order,
        served: Mapping[str, float],
        rested: frozenset[str],
        weights: Mapping[str, float],
    ) -> None:
        self.served = dict(served)
        """Tokens over weights, with those of this step."""
        self._order = order
        self._rested = rested
        self._weights = weights
        self._full_only = False
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
        for tenant, entries in queues.items():
            entries.reverse()
            heads.append((self.served[tenant], tenant not in self._rested, entries.pop()))
        heapify(heads)
        while heads and not self.lent:
            entry = heappop(heads)[2]
            tenant, full = entry[2].tenant, entry[2].full
            if self._full_only and not full:
                continue  # nor is anything behind it in its tenant's order
            yield entry
            if entries := queues[tenant]:
                heappush(heads, (self.served[tenant], True, entries.pop()))
        if self.lent:
            yield from (e for e in self._order.ready if e[2].full and e[2].held_blocks)

    def lend(self) -> None:
        """A full request whose turn it is does not fit into memory. What is left of the step is for
        those that can give some back, in the policy's order: the first of them may take from all
        others, so that one gets on."""
        self.lent = True

    def granted(self, view: View, tokens: int) -> None:
        """The request computes so many tokens in this step."""
        tenant = view.tenant
        self.served[tenant] += tokens / self._weights.get(tenant, 1.0)

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

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}
        self._known: set[str] = set()
        self._served: dict[str, float] = {}
        self._active: frozenset[str] = frozenset()

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

    def turns(self, order: Order) -> Turns | None:
        """Those of the next step; None where nobody competes, so that the policy alone decides."""
        ready = order.tenants
        if len(ready) < 2:
            if self._served:
                self._served = {}
            self._active = frozenset(ready)
            return None
        competed = [tenant for tenant in ready if tenant in self._active]
        least = min((self._served.get(tenant, 0.0) for tenant in competed), default=0.0)
        # Counted from the least served on, so that numbers stay small and rest is not saved up.
        owed = {tenant: max(s - least, 0.0) for tenant, s in self._served.items()}
        served = {t: s for t, s in owed.items() if s > 0} | {t: owed.get(t, 0.0) for t in ready}
        rested = frozenset(ready) - self._active
        self._active = frozenset(ready)
        return Turns(order, served, rested, self._weights)

    def settle(self, turns: Turns) -> None:
        """The step was planned by these turns."""
        self._served = turns.served
