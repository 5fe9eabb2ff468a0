"""All unfinished requests in the order of a policy, kept sorted as they change.

Between two steps few requests change: those that computed, and those that got input. Sorting
all of them anew at every step would cost more than all the rest of deciding.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Any

from engine_adapter.scheduling.policies import Policy
from engine_adapter.scheduling.view import View

Entry = tuple[Any, int, View]
"""A key of the policy, a number that is unique, and the request: entries compare as requests rank
and never by their views."""


class Order:
    """Requests by urgency, the most urgent first; ties keep the order they came in.

    `ready` are those that could compute something now, `holders` those that hold KV. Both are
    sorted; the caller must not change them. `put` and `discard` cost a binary search and the
    move of pointers.
    """

    def __init__(self, policy: Policy, views: Iterable[View] = ()) -> None:
        self.policy = policy
        self.ready: list[Entry] = []
        self.holders: list[Entry] = []
        self.partial_tokens = 0
        """What all partial requests together could compute now."""
        self.tenants: dict[str, int] = {}
        """Whose requests could compute something now, and how many."""
        self.backlog: dict[str, tuple[int, int]] = {}
        """By tenant: how many requests that are not decoding could compute something now, and how
        many tokens."""
        self._entries: dict[str, Entry] = {}
        self._numbers = itertools.count()
        for view in views:
            self.put(view)

    def __iter__(self) -> Iterator[View]:
        """All requests, the most urgent first."""
        return (entry[2] for entry in sorted(self._entries.values()))

    def waiting_tokens(self) -> int:
        """What all requests that are not decoding could compute now."""
        return sum(view.remaining_tokens for *_, view in self.ready if not view.decoding)

    def put(self, view: View) -> None:
        """Add a request, or say what has become of it."""
        old = self._entries.get(view.request_id)
        if old is None:
            number = next(self._numbers)
        elif old[2] == view:
            return
        else:
            number = old[1]
            self._remove(old)
        entry = (self.policy.key(view), number, view)
        self._entries[view.request_id] = entry
        if view.remaining_tokens > 0:
            insort(self.ready, entry)
            self.tenants[view.tenant] = self.tenants.get(view.tenant, 0) + 1
            self._count(view, 1)
            if not view.full:
                self.partial_tokens += view.remaining_tokens
        if view.held_blocks > 0:
            insort(self.holders, entry)

    def discard(self, request_id: str) -> None:
        """Forget a request; an unknown one is no error."""
        if (entry := self._entries.pop(request_id, None)) is not None:
            self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        view = entry[2]
        if view.remaining_tokens > 0:
            del self.ready[bisect_left(self.ready, entry)]
            if self.tenants[view.tenant] == 1:
                del self.tenants[view.tenant]
            else:
                self.tenants[view.tenant] -= 1
            self._count(view, -1)
            if not view.full:
                self.partial_tokens -= view.remaining_tokens
        if view.held_blocks > 0:
            del self.holders[bisect_left(self.holders, entry)]

    def _count(self, view: View, sign: int) -> None:
        if view.decoding:
            return
        requests, tokens = self.backlog.get(view.tenant, (0, 0))
        if requests + sign:
            counted = requests + sign, tokens + sign * view.remaining_tokens
            self.backlog[view.tenant] = counted
        else:
            del self.backlog[view.tenant]

    def views(self) -> list[View]:
        """All requests, in the order they came in."""
        return [entry[2] for entry in sorted(self._entries.values(), key=lambda entry: entry[1])]
