"""Traces scaled down, and the tokens that are handed over of them."""

from __future__ import annotations

import itertools
import statistics

import pytest

from loadtest.scripts import (
    VOCABULARY,
    TokensOf,
    common,
    consecutive,
    contexts,
    drawn,
    most_at_once,
    question,
    scaled,
    script,
)
from loadtest.workload import Document, Input, Query, ann, crawl, prompt_tokens

TRACES = {"crawl": crawl(60, 2.0, 4), "ann": ann(60, 2.0, 4)}
both = pytest.mark.parametrize("name", TRACES)


@both
def test_scaling_divides_every_size_by_one_number(name: str) -> None:
    small = scaled(TRACES[name], 900, 2.0)
    assert statistics.fmean(map(prompt_tokens, small)) == pytest.approx(900, rel=0.02)
    divisor = statistics.fmean(map(prompt_tokens, TRACES[name])) / 900
    for large, little in zip(TRACES[name], small, strict=True):
        for a, b in zip(large.inputs, little.inputs, strict=True):
            for one, other in zip(a.documents, b.documents, strict=True):
                assert other.doc_id == one.doc_id
                assert abs(other.tokens - one.tokens / divisor) <= 1


@both
def test_nothing_becomes_empty_however_small(name: str) -> None:
    for query in scaled(TRACES[name], 20, 1.0):
        assert query.question_tokens >= 1
        assert all(d.tokens >= 1 for given in query.inputs for d in given.documents)


@both
def test_gaps_are_multiplied_and_the_wait_for_the_first_input_is_left_out(name: str) -> None:
    small = scaled(TRACES[name], 900, 2.0)
    assert small[0].arrival_s == 0
    for large, little in zip(TRACES[name], small, strict=True):
        assert little.arrival_s == large.arrival_s - TRACES[name][0].arrival_s
        assert little.inputs[0].at_s == 0
        before = [b.at_s - a.at_s for a, b in itertools.pairwise(large.inputs)]
        after = [b.at_s - a.at_s for a, b in itertools.pairwise(little.inputs)]
        assert after == pytest.approx([2.0 * gap_s for gap_s in before])


def test_a_script_says_what_is_due_when() -> None:
    documents = Document(7, 3), Document(8, 2), Document(9, 4)
    query = Query(5, 10.0, False, (Input(0.0, documents[:2]), Input(1.5, documents[2:])), 6)
    played = script(query)
    assert played.due_s == (10.0, 11.5)
    assert [len(context) for context in played.contexts] == [5, 9]
    assert common(*played.contexts) == 5
    assert played.prompt == played.contexts[-1] + drawn(Document((1 << 40) + 5, 6))


def test_an_update_replaces_the_context() -> None:
    a, b, c = Document(1, 3), Document(2, 3), Document(3, 3)
    query = Query(0, 0.0, True, (Input(0.0, (a, b)), Input(1.0, (a, c, b))), 2)
    first, second = contexts(query, consecutive)
    assert first == consecutive(a) + consecutive(b)
    assert second == consecutive(a) + consecutive(c) + consecutive(b)
    assert common(first, second) == 3


@pytest.mark.parametrize("tokens_of", [consecutive, drawn])
def test_a_document_has_its_own_tokens_and_keeps_them(tokens_of: TokensOf) -> None:
    assert tokens_of(Document(4, 50)) == tokens_of(Document(4, 50))
    assert common(tokens_of(Document(4, 50)), tokens_of(Document(5, 50))) == 0
    assert question(Query(4, 0.0, False, (), 50), tokens_of) != tokens_of(Document(4, 50))


def test_drawn_tokens_are_ordinary_ones() -> None:
    assert set(drawn(Document(3, 5000))) <= set(VOCABULARY)


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1)],
)
def test_the_common_prefix(a: list[int], b: list[int], length: int) -> None:
    assert common(a, b) == common(b, a) == length


def test_how_many_spans_overlap() -> None:
    assert most_at_once([]) == 0
    assert most_at_once([(0, 1), (1, 2)]) == 1  # one ends where the other begins
    assert most_at_once([(0, 9), (1, 3), (2, 4), (5, 6)]) == 3
