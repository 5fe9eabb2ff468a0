"""Traces from a user's own logs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest import logs
from loadtest.logs import LogError, read_logs
from loadtest.workload import Document, Input, Query


def log(*events: dict[str, Any]) -> list[bytes]:
    return [json.dumps(event).encode() for event in events]


def event(stream: str, time: float | str, kind: str, **more: Any) -> dict[str, Any]:
    return {"stream": stream, "time": time, "kind": kind, **more}


def words(text: str) -> int:
    return len(text.split())


def read(*events: dict[str, Any]) -> list[Query]:
    return read_logs(log(*events), words)[0]


def test_the_example_of_the_format_is_a_log() -> None:
    assert logs.__doc__ is not None
    lines = [line.strip().encode() for line in logs.__doc__.splitlines() if '{"' in line]
    (query,), unfinished = read_logs(lines, words)
    assert [given.at_s for given in query.inputs] == pytest.approx([0.8, 2.1])
    assert query.question == "What does the page say?"
    assert unfinished == 1


def test_chunks_append_and_a_finish_at_once_belongs_to_the_last() -> None:
    assert read(
        event("a", 5.0, "chunk", text="one two"),
        event("b", 6.0, "chunk", tokens=9),
        event("a", 7.5, "chunk", text="three"),
        event("a", 7.5, "finish", text="why so"),
        event("b", 8.0, "finish", tokens=4),
    ) == [
        Query(
            0,
            0.0,
            False,
            (Input(0.0, (Document(0, 2, "one two"),)), Input(2.5, (Document(2, 1, "three"),))),
            2,
            "why so",
        ),
        Query(1, 1.0, False, (Input(0.0, (Document(1, 9),)), Input(2.0, ())), 4, ""),
    ]


def test_lists_replace_and_an_id_stands_for_what_came_before() -> None:
    first = [{"id": "x", "text": "a b"}, {"id": "y", "tokens": 3}]
    (query,) = read(
        event("s", "2026-11-24T10:00:00+00:00", "open"),
        event("s", "2026-11-24T10:00:01+00:00", "list", documents=first),
        event("s", "2026-11-24T10:00:02+00:00", "list", documents=[{"id": "y"}, {"id": "x"}]),
        event("s", "2026-11-24T10:00:03+00:00", "finish", tokens=2),
    )
    x, y = Document(0, 2, "a b"), Document(1, 3)
    assert query.update
    assert query.inputs == (Input(1.0, (x, y)), Input(2.0, (y, x)), Input(3.0, (y, x)))


def test_streams_share_the_documents_they_share() -> None:
    page = {"text": "the same page"}
    one, other = read(
        event("1", 0, "chunk", **page), event("1", 0, "finish", tokens=1),
        event("2", 1, "chunk", **page), event("2", 1, "finish", tokens=1),
    )  # fmt: skip
    assert one.inputs == other.inputs


def test_without_a_finish_or_an_input_a_stream_is_left_out() -> None:
    queries, left_out = read_logs(
        log(event("a", 0, "chunk", tokens=1), event("b", 0, "finish", tokens=1)), words
    )
    assert (queries, left_out) == ([], 2)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([event("a", 0, "crawl", text="x")], "kind"),
        ([event("a", 0, "chunk")], "neither a text nor tokens"),
        ([event("a", 0, "chunk", tokens=-1)], "below 0"),
        ([event("a", "noon", "chunk", tokens=1)], "isoformat"),
        ([event("a", 1, "chunk", tokens=1), event("a", 0, "chunk", tokens=1)], "back in time"),
        ([event("a", 0, "finish", tokens=1), event("a", 1, "chunk", tokens=1)], "is finished"),
        ([event("a", 0, "chunk", tokens=1), event("a", 1, "list", documents=[])], "not both"),
        ([event("a", 0, "chunk", tokens=1), event("a", 0, "open")], "is open"),
    ],
)
def test_a_line_that_does_not_fit_is_named(events: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(LogError, match=f"^line {len(events)}: .*{why}"):
        read(*events)


steps = st.lists(st.tuples(st.floats(0, 60), st.integers(1, 5000)), min_size=1, max_size=6)


@given(st.lists(steps, min_size=1, max_size=5))
@settings(deadline=None)
def test_every_size_and_gap_of_a_log_is_in_its_trace(
    streams: list[list[tuple[float, int]]],
) -> None:
    events = list[dict[str, Any]]()
    for name, gaps in enumerate(streams):
        at_s = 0.0
        for gap_s, tokens in gaps:
            at_s += gap_s
            events.append(event(str(name), at_s, "chunk", tokens=tokens))
        events.append(event(str(name), at_s, "finish", tokens=7))
    queries = read(*sorted(events, key=lambda each: float(each["time"])))
    sizes = sorted([d.tokens for given in q.inputs for d in given.documents] for q in queries)
    assert sizes == sorted([tokens for _, tokens in gaps] for gaps in streams)
    spans = sorted(q.inputs[-1].at_s for q in queries)
    assert spans == pytest.approx(sorted(sum(g for g, _ in gaps[1:]) for gaps in streams))
