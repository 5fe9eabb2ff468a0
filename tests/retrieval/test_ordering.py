"""Orderings: each ends with the documents of the last ranking; they differ in what they waste."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log2
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.ordering import ORDERINGS, OrderingName, Rank, Settled, Stable
from retrieval.source import Passage

Ranking = tuple[Passage, ...]

NAMES: list[OrderingName] = list(ORDERINGS)


def ranking(ids: Sequence[object]) -> Ranking:
    return tuple(Passage(str(i), f"text of {i}") for i in ids)


passages = st.builds(Passage, st.sampled_from("abcdef"), st.sampled_from(["old", "new"]))
anything = st.lists(st.lists(passages, max_size=8), min_size=1, max_size=8)


@st.composite
def refinements(draw: st.DrawFn) -> list[Ranking]:
    """What a search shows that finds more and more: the best k of what was found so far."""
    places = draw(st.integers(1, 10))
    finds = draw(st.permutations(range(draw(st.integers(places, 25)))))
    ends = sorted(draw(st.sets(st.integers(places, len(finds)), min_size=1, max_size=8)))
    return [ranking(sorted(finds[:end])[:places]) for end in ends]


def run(name: OrderingName, rankings: Sequence[Sequence[Passage]]) -> list[Ranking]:
    """The documents after each ranking, and the final ones."""
    ordering = ORDERINGS[name]()
    return [*(ordering.update(ranked) for ranked in rankings), ordering.final()]


def invalidated(lists: Sequence[Ranking]) -> int:
    """How many documents stood behind the first that differs, over all changes."""
    return sum(len(before) - common(before, after) for before, after in pairwise(lists))


def common(before: Ranking, after: Ranking) -> int:
    pairs = zip(before, after, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))


@pytest.mark.parametrize("name", NAMES)
@given(rankings=anything)
def test_every_list_is_of_the_latest_ranking_and_the_final_one_is_all_of_it(
    name: OrderingName, rankings: list[list[Passage]]
) -> None:
    lists = run(name, rankings)
    for documents, ranked in zip(lists, [*rankings, rankings[-1]], strict=True):
        assert len({d.id for d in documents}) == len(documents)
        # where an id comes twice in a ranking, the first counts
        assert set(documents) <= set(Rank().update(ranked))
    assert set(lists[-1]) == set(Rank().update(rankings[-1]))


def search(random: Random, places: int = 10) -> list[Ranking]:
    """The best of what is found when each round finds half of what the ones before have missed."""
    found_in = [1 + int(-log2(1 - 0.9 * random.random())) for _ in range(3 * places)]
    rounds = range(1, max(found_in) + 3)
    found = [[n for n, first in enumerate(found_in) if first <= end] for end in rounds]
    return [ranking(each[:places]) for each in found]


def test_of_many_searches_stable_throws_away_a_tenth_of_what_rank_does() -> None:
    """Not of each: a document that enters behind one that later drops out is computed twice."""
    searches = [search(Random(seed)) for seed in range(300)]
    stable, rank = (sum(invalidated(run(n, s)) for s in searches) for n in ("stable", "rank"))
    assert stable <= 0.1 * rank


@given(rankings=refinements())
def test_settled_leaves_documents_out_of_the_ranking_but_never_moves_one(
    rankings: list[Ranking],
) -> None:
    for documents, ranked in zip(run("settled", rankings), rankings, strict=False):
        assert documents == tuple(d for d in ranked if d in documents)


@given(rankings=anything)
def test_stable_throws_away_only_what_stands_behind_a_document_that_dropped_out(
    rankings: list[list[Passage]],
) -> None:
    for before, after in pairwise(run("stable", rankings)):
        kept = common(before, after)
        assert kept == len(before) or before[kept] not in after


@given(rankings=refinements())
def test_settled_and_rank_end_with_the_same_prompt(rankings: list[Ranking]) -> None:
    assert run("settled", rankings)[-1] == run("rank", rankings)[-1] == rankings[-1]


def test_the_last_places_of_the_first_ranking_wait() -> None:
    assert Stable().update(ranking(range(10))) == ranking(range(5))
    assert Settled().update(ranking(range(10))) == ranking(range(5))


def test_all_enter_when_a_ranking_brings_nothing_new() -> None:
    for ordering in (Stable(), Settled()):
        ordering.update(ranking(range(10)))
        assert ordering.update(ranking(range(10))) == ranking(range(10))


def test_a_change_near_the_top_costs_stable_nothing() -> None:
    stable = Stable()
    stable.update(ranking("abcdefgh"))
    assert stable.update(ranking("xabcdefg")) == ranking("abcdx")


def test_a_changed_text_is_another_document() -> None:
    stable = Stable()
    stable.update([Passage("a", "old"), Passage("b", "same")])
    stable.update([Passage("a", "old"), Passage("b", "same")])
    assert stable.update([Passage("a", "new"), Passage("b", "same")]) == (Passage("b", "same"),)
    assert stable.final() == (Passage("b", "same"), Passage("a", "new"))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_ranking_there_are_no_documents(name: OrderingName) -> None:
    assert ORDERINGS[name]().final() == ()
