"""MergedSearch: every list is in order, without doubles and within the budget; it always ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.merge import Budget, Drop, MergedSearch, Part, Report
from retrieval.ordering import Documents
from retrieval.source import Found, Mode, Passage, Query, Ranked, SourceFailed

QUERY = Query("anything")
ROOMY = Budget(len, 10_000)


class Scripted:
    """Says what it is told to; then ends, fails or hangs."""

    def __init__(
        self,
        name: str,
        events: Sequence[Found | Ranked],
        *,
        fails: Exception | None = None,
        hangs: bool = False,
    ) -> None:
        self.name = name
        self.mode: Mode = "update" if events and isinstance(events[0], Ranked) else "append"
        self.closed = False
        self._events, self._fails, self._hangs = events, fails, hangs

    async def search(self, query: Query) -> AsyncGenerator[Found | Ranked, None]:
        try:
            for event in self._events:
                yield event
            if self._hangs:
                await asyncio.Event().wait()
            if self._fails is not None:
                raise self._fails
        finally:
            self.closed = True


def found(*texts: str) -> list[Found]:
    return [Found(Passage(text[:1], text)) for text in texts]


def ranked(*rankings: str) -> list[Ranked]:
    return [Ranked(tuple(Passage(t[:1], t) for t in ranking.split())) for ranking in rankings]


async def run(
    parts: Sequence[Part], budget: Budget = ROOMY, query: Query = QUERY
) -> tuple[list[Documents], Report]:
    search = MergedSearch(parts, budget)
    async with aclosing(search.documents(query)) as lists:
        return [each async for each in lists], search.report()


def texts(documents: Documents) -> list[str]:
    return [passage.text for passage in documents]


async def test_the_changing_part_stands_last() -> None:
    parts = [
        Part(Scripted("ann", ranked("x y z", "x y z", "x y z"))),
        Part(Scripted("web", found("a", "b"))),
    ]
    lists, report = await run(parts)
    assert texts(lists[-1]) == ["a", "b", "x", "y", "z"]
    assert [p.id for p in lists[-1]] == ["web/a", "web/b", "ann/x", "ann/y", "ann/z"]
    assert report.complete
    assert [(s.name, s.ended, s.passages) for s in report.sources] == [
        ("ann", "complete", 3),
        ("web", "complete", 2),
    ]


@pytest.mark.slow
async def test_what_comes_after_a_ranking_has_ended_stands_behind_it() -> None:
    parts = [
        Part(Scripted("ann", ranked("x y"))),
        Part(Scripted("web", found(*"abc"))),
        Part(Scripted("slow", ranked("p q"), hangs=True)),
    ]
    lists, _ = await run(parts, query=Query("q", time.monotonic() + 1))
    order = texts(lists[-1])
    assert order[0] == "a"
    assert order.index("y") == order.index("x") + 1 < order.index("c")
    assert order[-2:] == ["p", "q"]


async def test_one_text_or_one_address_stands_once() -> None:
    page = Passage("https://example.org/", "one text")
    parts = [
        Part(Scripted("web", [Found(page)])),
        Part(Scripted("a", ranked("same other"))),
        Part(
            Scripted("b", [Ranked((Passage("1", " same\n"), Passage(page.id, "another extract")))])
        ),
    ]
    lists, report = await run(parts)
    assert texts(lists[-1]) == ["one text", "same", "other"]
    assert report.duplicates == 2


@pytest.mark.parametrize(
    ("drop", "left"), [("ranked", ["aaa", "bbb", "xxx"]), ("latest", ["aaa", "xxx", "yyy"])]
)
async def test_the_budget_drops_the_last_places_or_the_latest(drop: Drop, left: list[str]) -> None:
    parts = [
        Part(Scripted("web", found("aaa", "bbb", "ccccccccccc"))),
        Part(Scripted("ann", ranked("xxx yyy", "xxx yyy"))),
    ]
    lists, report = await run(parts, Budget(len, 10, drop))
    assert texts(lists[-1]) == left
    assert report.dropped == 2


async def test_a_source_that_fails_costs_only_itself() -> None:
    parts = [
        Part(Scripted("gone", found("a"), fails=SourceFailed("no such index"))),
        Part(Scripted("buggy", [], fails=TimeoutError("of its own"))),
        Part(Scripted("good", found("b"))),
    ]
    lists, report = await run(parts)
    assert sorted(texts(lists[-1])) == ["a", "b"]
    assert [(s.ended, s.reason, s.passages) for s in report.sources] == [
        ("failed", "no such index", 1),
        ("failed", "TimeoutError: of its own", 0),
        ("complete", "", 1),
    ]
    assert not report.complete


@pytest.mark.slow
async def test_at_its_own_deadline_or_the_query_s_a_source_ends_with_what_it_gave() -> None:
    now = time.monotonic()
    parts = [
        Part(Scripted("early", found("a"), hangs=True), deadline_s=now + 1),
        Part(Scripted("late", ranked("x y"), hangs=True), deadline_s=now + 100),
        Part(Scripted("done", found("b"))),
    ]
    lists, report = await run(parts, query=Query("q", now + 2))
    assert 2 <= time.monotonic() - now < 20
    assert sorted(texts(lists[-1])) == ["a", "b", "x", "y"]
    assert [s.ended for s in report.sources] == ["deadline", "deadline", "complete"]


async def test_closing_ends_all_searches() -> None:
    sources = [Scripted("a", found("a"), hangs=True), Scripted("b", ranked("x"), hangs=True)]
    before = asyncio.all_tasks()
    async with aclosing(MergedSearch([Part(s) for s in sources], ROOMY).documents(QUERY)) as lists:
        await anext(lists)
    assert all(source.closed for source in sources)
    assert asyncio.all_tasks() == before


@pytest.mark.slow
async def test_a_source_without_end_leaves_room_for_others_and_for_a_slow_reader() -> None:
    class Endless(Scripted):
        async def search(self, query: Query) -> AsyncGenerator[Found | Ranked, None]:
            number = 0
            while True:
                number += 1
                yield Found(Passage(str(number), f"text {number}"))

    parts = [Part(Endless("endless", [])), Part(Scripted("ann", ranked("x")))]
    lists, report = await run(parts, Budget(len, 100, "latest"), Query("q", time.monotonic() + 1))
    assert sum(map(len, texts(lists[-1]))) <= 100
    assert "x" in texts(lists[-1])
    assert [s.ended for s in report.sources] == ["deadline", "complete"]


async def test_without_sources_there_is_no_list() -> None:
    assert await run([]) == ([], Report((), 0, 0))


words = st.sampled_from([c * n for c in "abcdefg" for n in (1, 2, 5)])
events = st.one_of(
    st.lists(words, max_size=6).map(lambda ws: found(*ws)),
    st.lists(st.lists(words, unique_by=lambda w: w[0], max_size=5), max_size=4).map(
        lambda rs: ranked(*map(" ".join, rs))
    ),
)


@given(
    scripts=st.lists(events, max_size=4),
    limit=st.integers(0, 20),
    drop=st.sampled_from(get_args(Drop)),
)
def test_every_list_keeps_the_budget_the_order_and_has_nothing_twice(
    scripts: list[list[Found | Ranked]], limit: int, drop: Drop
) -> None:
    parts = [Part(Scripted(str(n), script)) for n, script in enumerate(scripts)]
    lists, report = asyncio.run(run(parts, Budget(len, limit, drop)))
    appended = {p.source.name for p in parts if p.source.mode == "append"}
    came: list[str] = []
    for documents in lists:
        assert sum(map(len, texts(documents))) <= limit
        assert len(set(texts(documents))) == len({p.id for p in documents}) == len(documents)
        now = [p.id for p in documents if p.id.partition("/")[0] in appended]
        assert [n for n in now if n in came] == [n for n in came if n in now]
        came = now
    # nothing is missing but doubles and what was dropped
    given = sum(source.passages for source in report.sources)
    kept = len(lists[-1]) if lists else 0
    assert kept + report.duplicates + report.dropped == given
