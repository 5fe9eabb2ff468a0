"""What an index is told adds up to what an engine holds, however it is cut into pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_index import mirror
from cache_index.event_stream import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event
from cache_index.mirror import Mirror, Snapshot, unpacked
from cache_index.names import packed

NAME = st.integers(0, 6)
BATCH = st.lists(st.tuples(st.sampled_from("ssssrrrrrc"), NAME), max_size=5)
WRITE = st.sampled_from(["none", "begins", "ends", "fails", "forgotten", "by another"])
"""What becomes of a write to the index beside a batch."""


def events_of(pool: Counter[int], acts: list[tuple[str, int]]) -> list[Event]:
    """What an engine does to its pool, of which a block that is not there can't be removed."""
    events: list[Event] = []
    for act, name in acts:
        if act == "s":
            pool[name] += 1
            events.append(BlockStored([name]))
        elif act == "r" and pool[name]:
            pool[name] -= 1
            events.append(BlockRemoved([name]))
        elif act == "c":
            pool.clear()
            events.append(AllBlocksCleared())
    return events


class Told:
    """What an index was told, by the rules of `BlockIndex`; None: it has forgotten."""

    def __init__(self) -> None:
        self.names: set[int] | None = None
        self.expected = 0

    def tell(self, follower: Mirror, meanwhile: Callable[[], None], lost: bool = False) -> None:
        """One write, during which the engine may go on."""
        if follower.told_whole:
            news = follower.news()
            meanwhile()
            stored, removed = set(unpacked(news.stored)), set(unpacked(news.removed))
            assert not stored & removed
            if self.names is None or news.first != self.expected:
                follower.contradicted(None if self.names is None else self.expected)
            elif not lost:
                self.names, self.expected = (self.names | stored) - removed, news.after
                follower.told(news.after)
        else:
            after, names = follower.tell_all()
            meanwhile()
            if lost:
                follower.tell_whole()
            else:
                self.names, self.expected = set(unpacked(names)), after


@settings(max_examples=300, deadline=None)
@given(
    began=st.lists(NAME, max_size=8),
    steps=st.lists(st.tuples(BATCH, WRITE), max_size=12),
    most=st.integers(0, 12),
)
def test_what_an_index_is_told_adds_up(
    began: list[int], steps: list[tuple[list[tuple[str, int]], str]], most: int
) -> None:
    pool, index = Counter(began), Told()
    follower = Mirror(Snapshot("i", 5, packed(pool.elements())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "MOST_UNTOLD", most)
        for number, (acts, write) in enumerate(steps, start=5):
            take = partial(follower.take, Batch(number, events_of(pool, acts)))
            if write in ("begins", "fails"):
                index.tell(follower, meanwhile=take, lost=write == "fails")
                continue
            take()
            if write == "ends":
                index.tell(follower, meanwhile=lambda: None)
            elif write == "forgotten":
                index.names = None
            elif write == "by another":
                index.names, index.expected = set(+pool), number + 1
        for _ in range(3):
            index.tell(follower, meanwhile=lambda: None)
    assert index.names == set(+pool)
    assert not follower.has_news


def test_a_removal_of_what_was_never_seen_is_no_error() -> None:
    follower = Mirror(Snapshot("i", 0))
    follower.take(Batch(0, [BlockRemoved([7])]))
    assert follower.tell_all() == (1, b"")


def test_an_index_that_is_ahead_is_told_nothing_until_it_is_reached() -> None:
    follower = Mirror(Snapshot("i", 0))
    follower.tell_all()
    follower.contradicted(2)
    for number in range(3):
        follower.take(Batch(number, [BlockStored([number])]))
        news = follower.news()
        assert news.first == 2
        assert news.stored == (b"" if number < 2 else packed([2]))
