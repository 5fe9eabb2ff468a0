"""The synthetic traces against the published statistics, and what their readers rely on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.workload import (
    CHUNKS,
    GAP_MS,
    MIN_FIRST_S,
    PUBLISHED,
    PUBLISHED_QUERIES,
    Input,
    Query,
    ann,
    correlations_of,
    crawl,
    main,
    prompt_tokens,
    statistics_of,
)

pytestmark = pytest.mark.slow

GENERATORS: dict[str, Callable[..., list[Query]]] = {"crawl": crawl, "ann": ann}
both = pytest.mark.parametrize("name", GENERATORS)


def shared_tokens(old: Input, new: Input) -> int:
    """Tokens of the longest common prefix of two lists."""
    pairs = zip(old.documents, new.documents, strict=True)
    return sum(b.tokens for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def list_tokens(each: Input) -> int:
    return sum(document.tokens for document in each.documents)


@both
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_published_table_within_ten_percent(name: str, seed: int) -> None:
    table = statistics_of(GENERATORS[name](PUBLISHED_QUERIES[name], 2.0, seed))
    for row, cells in PUBLISHED[name].items():
        for cell, wanted in cells.items():
            assert table[row][cell] == pytest.approx(wanted, rel=0.1), (row, cell)
    assert table[CHUNKS]["min"] == PUBLISHED[name][CHUNKS]["min"]
    assert table[CHUNKS]["max"] == PUBLISHED[name][CHUNKS]["max"]


@both
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=8, deadline=None)
def test_a_few_hundred_queries_have_all_of_it_but_the_longest_gap(name: str, seed: int) -> None:
    """That gap is one of 29,650: shorter traces seldom have one as long."""
    table = statistics_of(GENERATORS[name](300, 1.0, seed))
    for row, cells in PUBLISHED[name].items():
        for cell, wanted in cells.items():
            if (row, cell) != (GAP_MS, "max"):
                assert table[row][cell] == pytest.approx(wanted, rel=0.1), (row, cell)


def test_long_retrievals_have_more_chunks() -> None:
    crawled, ranked = (correlations_of(make(2000, 1.0, 1)) for make in (crawl, ann))
    assert crawled["chunks, retrieval time"] > 0.4
    assert ranked["chunks, retrieval time"] > 0.15
    assert crawled["chunks, tokens"] > 0.4
    assert correlations_of(crawl(5, 1.0, 1)).keys() == crawled.keys()


@both
def test_a_few_dozen_queries_have_the_same_bulk_and_bounds(name: str) -> None:
    table = statistics_of(GENERATORS[name](60, 1.0, 3))
    for row, cells in PUBLISHED[name].items():
        for cell in ("P25", "P50", "P75"):
            if cell in cells:
                assert table[row][cell] == pytest.approx(cells[cell], rel=0.25), (row, cell)
        if "max" in cells:
            assert table[row]["max"] <= cells["max"] * 1.0001


@both
def test_a_seed_gives_one_trace_and_the_rate_moves_only_arrivals(name: str) -> None:
    generate = GENERATORS[name]
    trace = generate(100, 1.0, 5)
    assert trace == generate(100, 1.0, 5)
    assert trace != generate(100, 1.0, 6)
    faster = generate(100, 4.0, 5)
    assert [replace(q, arrival_s=4 * q.arrival_s) for q in faster] == trace


@both
def test_the_delay_factor_multiplies_every_time_and_nothing_else(name: str) -> None:
    plain, slow = GENERATORS[name](50, 1.0, 5), GENERATORS[name](50, 1.0, 5, delay_factor=10)
    for a, b in zip(plain, slow, strict=True):
        assert [i.at_s for i in b.inputs] == pytest.approx([10 * i.at_s for i in a.inputs])
        assert [i.documents for i in b.inputs] == [i.documents for i in a.inputs]
        assert replace(b, inputs=()) == replace(a, inputs=())


@both
def test_inputs_and_arrivals_come_in_order(name: str) -> None:
    trace = GENERATORS[name](500, 1.0, 2)
    assert [q.query_id for q in trace] == list(range(500))
    assert all(a.arrival_s < b.arrival_s for a, b in itertools.pairwise(trace))
    for query in trace:
        times = [each.at_s for each in query.inputs]
        assert times[0] >= MIN_FIRST_S * 0.999
        assert all(a < b for a, b in itertools.pairwise(times))


@both
def test_arrivals_are_poisson(name: str) -> None:
    gaps_s = np.diff([q.arrival_s for q in GENERATORS[name](2000, 2.0, 4)])
    assert gaps_s.mean() == pytest.approx(0.5, rel=0.1)
    assert gaps_s.std() == pytest.approx(0.5, rel=0.1)


@both
def test_a_document_has_one_size_and_one_query(name: str) -> None:
    owners: dict[int, tuple[int, int]] = {}
    for query in GENERATORS[name](200, 1.0, 1):
        assert query.update == (name == "ann")
        assert 30 < query.question_tokens <= 70
        for each in query.inputs:
            ids = [document.doc_id for document in each.documents]
            assert len(set(ids)) == len(ids)
            for document in each.documents:
                assert document.tokens >= 1
                owner = (query.query_id, document.tokens)
                assert owners.setdefault(document.doc_id, owner) == owner


def test_crawl_chunks_are_single_new_documents() -> None:
    trace = crawl(200, 1.0, 1)
    documents = [d for query in trace for each in query.inputs for d in each.documents]
    assert len(documents) == sum(len(query.inputs) for query in trace)
    assert len({d.doc_id for d in documents}) == len(documents)


def test_crawl_correlations() -> None:
    trace = crawl(2000, 1.0, 1)
    chunks = [len(q.inputs) for q in trace]
    tokens = [prompt_tokens(q) for q in trace]
    retrieval_s = [q.inputs[-1].at_s for q in trace]
    mean_gap_s = [(q.inputs[-1].at_s - q.inputs[0].at_s) / max(1, len(q.inputs) - 1) for q in trace]
    assert np.corrcoef(chunks, tokens)[0, 1] > 0.25
    assert np.corrcoef(chunks, retrieval_s)[0, 1] > 0.25
    assert np.corrcoef(mean_gap_s, retrieval_s)[0, 1] > 0.25


def test_lists_converge() -> None:
    """No document of the final list leaves again; one that has left does not return."""
    for query in ann(200, 1.0, 1):
        final = set(query.inputs[-1].documents)
        hits = [set(each.documents) & final for each in query.inputs]
        assert all(a <= b for a, b in itertools.pairwise(hits))
        gone: set[int] = set()
        for old, new in itertools.pairwise(query.inputs):
            before, after = ({d.doc_id for d in each.documents} for each in (old, new))
            assert not after & gone
            gone |= before - after


@pytest.mark.parametrize("stable_share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_the_stable_share_is_the_mean_common_prefix(stable_share: float) -> None:
    trace = ann(500, 1.0, 1, stable_share=stable_share)
    shares = [
        shared_tokens(old, new) / list_tokens(new)
        for query in trace
        for old, new in itertools.pairwise(query.inputs)
    ]
    assert np.mean(shares) == pytest.approx(stable_share, abs=0.03)


def test_snapshots_are_about_as_long_as_the_final_list() -> None:
    trace = ann(500, 1.0, 1)
    firsts = [list_tokens(q.inputs[0]) / list_tokens(q.inputs[-1]) for q in trace]
    assert np.mean(firsts) == pytest.approx(1.0, abs=0.1)
    assert {len(each.documents) for q in trace for each in q.inputs} == {10}


@pytest.mark.parametrize("bad", [{"queries": 0}, {"qps": 0.0}, {"delay_factor": -1.0}])
@both
def test_wrong_arguments_are_refused(name: str, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        GENERATORS[name](**({"queries": 3, "qps": 1.0, "seed": 0} | bad))


@both
def test_a_single_query_is_a_trace(name: str) -> None:
    for seed in range(20):
        (query,) = GENERATORS[name](1, 1.0, seed)
        assert statistics_of([query])[CHUNKS]["mean"] == len(query.inputs)


def test_the_table_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["workload", "--seed", "3", "--queries", "4322"])
    main()
    printed = capsys.readouterr().out
    assert "crawl: 4322 queries, seed 3" in printed
    assert "34947.00" in printed
    assert printed.count("farthest off: ") == 2
    assert "chunks, retrieval time" in printed
