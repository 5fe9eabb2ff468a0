"""In which order, and from when on, documents of a changing ranking stand in the prompt.

An engine keeps what it has computed up to the first document that differs, so each order is a trade
between the place that a document deserves and the work that its arrival throws away. An ordering is
fed one ranking after the other; it answers each with the documents that the prompt should have now.
All end with exactly the documents of the last ranking.

A ranking changes at its end: a better document found anywhere pushes the last one out. How many
places are at risk shows in how many documents came new; see `_safe_places`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol

from retrieval.source import Passage

OrderingName = Literal["rank", "stable", "settled"]
Documents = tuple[Passage, ...]

FIRST_AT_RISK: Final = 0.5
"""Share of the first ranking's places, from the back, whose documents do not enter at once."""
AT_RISK_PER_NEW: Final = 3
"""Places at risk for each document that was not in the ranking before."""


class Ordering(Protocol):
    """Turns rankings into the documents of a prompt; one for each stream."""

    def update(self, ranked: Sequence[Passage]) -> Documents:
        """The documents to have in the prompt after this ranking, best first, came."""

    def final(self) -> Documents:
        """The documents to end with: those of the last ranking. None if there was no ranking."""


class Rank:
    """Always the latest ranking: the prompt that a pipeline which waits would have built."""

    def __init__(self) -> None:
        self._ranked: Documents = ()

    def update(self, ranked: Sequence[Passage]) -> Documents:
        """As of `Ordering`."""
        self._ranked = _distinct(ranked)
        return self._ranked

    def final(self) -> Documents:
        """As of `Ordering`, best first."""
        return self._ranked


class Settled:
    """The latest ranking without the documents that may soon be gone again."""

    def __init__(self) -> None:
        self._ranked: Documents = ()
        self._entered = frozenset[_Key]()

    def update(self, ranked: Sequence[Passage]) -> Documents:
        """As of `Ordering`, best first."""
        before, self._ranked = self._ranked, _distinct(ranked)
        safe = _keys(self._ranked[: _safe_places(before, self._ranked)])
        self._entered = safe | (self._entered & _keys(self._ranked))
        return tuple(passage for passage in self._ranked if _key(passage) in self._entered)

    def final(self) -> Documents:
        """As of `Ordering`, best first."""
        return self._ranked


class Stable:
    """Documents keep their place while they are in the ranking, and new ones go behind.

    A document that dropped out is removed at once. What stood behind it has to be computed again
    anyway, so it is put into the order of the ranking: the worst, most at risk, stands last.
    """

    def __init__(self) -> None:
        self._ranked: Documents = ()
        self._placed: Documents = ()

    def update(self, ranked: Sequence[Passage]) -> Documents:
        """As of `Ordering`; the order is that of entering."""
        before, self._ranked = self._ranked, _distinct(ranked)
        return self._place(_safe_places(before, self._ranked))

    def final(self) -> Documents:
        """As of `Ordering`; those that had not entered are last."""
        return self._place(len(self._ranked))

    def _place(self, safe_places: int) -> Documents:
        """Remove what dropped out; let those on the first `safe_places` of the ranking enter."""
        kept = _untouched(self._placed, self._ranked)
        standing, behind = _keys(kept), _keys(self._placed) - _keys(kept)
        entering = _keys(self._ranked[:safe_places]) - standing
        self._placed = (*kept, *(p for p in self._ranked if _key(p) in behind | entering))
        return self._placed


ORDERINGS: Final[dict[OrderingName, Callable[[], Ordering]]] = {
    "rank": Rank,
    "stable": Stable,
    "settled": Settled,
}

_Key = tuple[str, str, str]


def _key(passage: Passage) -> _Key:
    """What the prompt shows of a passage, and its id: a changed text is another document."""
    return passage.id, passage.title, passage.text


def _keys(passages: Sequence[Passage]) -> frozenset[_Key]:
    return frozenset(map(_key, passages))


def _distinct(ranked: Sequence[Passage]) -> Documents:
    """Each id once, in its best place."""
    best: dict[str, Passage] = {}
    for passage in ranked:
        best.setdefault(passage.id, passage)
    return tuple(best.values())


def _safe_places(before: Documents, ranked: Documents) -> int:
    """How many places from the front hold documents that are likely to stay.

    Each document that will still be found costs the last one its place. A search that improves
    finds fewer from ranking to ranking, so three times as many as it has just found is cautious;
    and when it found nothing new, nothing is at risk.
    """
    if not before:
        return len(ranked) - int(len(ranked) * FIRST_AT_RISK)
    new = len(_keys(ranked) - _keys(before))
    return max(len(ranked) - AT_RISK_PER_NEW * new, 0)


def _untouched(placed: Documents, ranked: Documents) -> Documents:
    """The documents in front of the first one that is no longer in the ranking."""
    staying = _keys(ranked)
    for place, passage in enumerate(placed):
        if _key(passage) not in staying:
            return placed[:place]
    return placed
