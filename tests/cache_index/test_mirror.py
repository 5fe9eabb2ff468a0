"""What an index is told adds up to what an engine holds, however it is cut into pieces."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_index import mirror
from cache_index.event_stream import AllBlocksCleared, Batch, BlockRemoved, BlockStored, Event
from cache_index.mirror import Mirror, Snapshot, packed, unpacked

NAME = st.integers(0, 6)
BATCH = st.lists(st.tuples(st.sampled_from("ssssrrrrrc"), NAME), max_size=5)
TELL = st.sampled_from(["not", "told", "told late", "refused", "lost", "other is ahead"])


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


@settings(max_examples=300, deadline=None)
@given(
    began=st.lists(NAME, max_size=8),
    steps=st.lists(st.tuples(BATCH, TELL), max_size=12),
    most=st.integers(0, 12),
)
def test_what_the_index_is_told_adds_up(
    began: list[int], steps: list[tuple[list[tuple[str, int]], str]], most: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "MOST_UNTOLD", most)
        pool = Counter(began)
        follower = Mirror(Snapshot("i", 5, packed(pool.elements())))
        index: set[int] | None = None
        expected = 5
        for number, (acts, tell) in enumerate([*steps, ([], "told"), ([], "told")], start=5):
            later = Batch(number, events_of(pool, acts))
            if tell == "lost":
                follower.contradicted(None)
            if tell != "told late":
                follower.take(later)
            if tell.startswith("told"):
                if follower.told_whole:
                    assert index is not None
                    news = follower.news()
                    stored, removed = set(unpacked(news.stored)), set(unpacked(news.removed))
                    assert (news.first, stored & removed) == (expected, set())
                    index, expected = (index | stored) - removed, news.after
                else:
                    index, expected = set(unpacked(follower.names)), follower.next_batch
                if tell == "told late":  # it comes while the index is written
                    after = expected
                    follower.told(after) if not follower.told_whole else None
                    follower.take(later)
                    follower.told(after) if follower.told_whole else None
                else:
                    follower.told(expected)
            elif tell == "other is ahead" and follower.told_whole:
                index, expected = set(+pool), number + 1
                follower.contradicted(expected)
        assert index == set(+pool) == set(unpacked(follower.names))
        assert not follower.has_news


def test_a_removal_of_what_was_never_seen_is_no_error() -> None:
    follower = Mirror(Snapshot("i", 0))
    follower.take(Batch(0, [BlockRemoved([7])]))
    assert follower.names == b""


def test_an_index_that_is_ahead_is_told_nothing_until_it_is_reached() -> None:
    follower = Mirror(Snapshot("i", 0))
    follower.told(0)
    follower.contradicted(2)
    for number in range(3):
        follower.take(Batch(number, [BlockStored([number])]))
        news = follower.news()
        assert news.first == 2
        assert news.stored == (b"" if number < 2 else packed([2]))
