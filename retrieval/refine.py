"""Searching again and again with more effort, until that no longer changes the ranking."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from retrieval.deadlines import DeadlinePassed, in_time
from retrieval.source import Passage, Query, Ranked


@dataclass(frozen=True, slots=True)
class Rounds:
    """How a search is refined."""

    efforts: tuple[int, ...]
    """Candidates kept in each round (HNSW's ef)."""
    unchanged: int
    """The search ends early after so many rounds in a row that have changed nothing."""


DOUBLING: Final = Rounds((20, 40, 80, 160, 320, 640), unchanged=2)
"""All rounds together cost twice the last one; and fewer rounds change the ranking less often."""


async def refine(
    query: Query, search: Callable[[int], Awaitable[tuple[Passage, ...]]], rounds: Rounds
) -> AsyncGenerator[Ranked, None]:
    """Yield the ranking of each round, also when it is the same; end at the deadline.

    Args:
        search: gives the passages, best first, that a round of this effort finds.
    """
    before: tuple[Passage, ...] | None = None
    unchanged = 0
    for effort in rounds.efforts:
        try:
            found = await in_time(query, search(effort))
        except DeadlinePassed:
            return
        yield Ranked(found)
        unchanged = unchanged + 1 if found == before else 0
        if unchanged >= rounds.unchanged:
            return
        before = found
