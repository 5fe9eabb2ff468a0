"""Traces as files: what is written is read again, in both formats."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtest.traces import Trace, TraceError, delayed, describe, main, read, write
from loadtest.workload import Document, Input, Query, ann, crawl

ENDINGS = (".parquet", ".jsonl")
both = pytest.mark.parametrize("ending", ENDINGS)

seconds = st.floats(0, 1e6)
counts = st.integers(0, 1 << 40)
texts = st.text(st.characters(codec="utf-8"), max_size=20)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    sizes = draw(st.lists(st.tuples(st.integers(1, 1 << 20), texts), min_size=1, max_size=6))
    documents = [Document(i, tokens, text) for i, (tokens, text) in enumerate(sizes)]
    lists = st.lists(st.sampled_from(documents), max_size=4).map(tuple)
    inputs = st.lists(st.builds(Input, seconds, lists), min_size=1, max_size=4).map(tuple)
    queries = st.lists(st.builds(Query, counts, seconds, st.booleans(), inputs, counts, texts))
    return Trace(tuple(draw(queries)), draw(st.dictionaries(texts, texts, max_size=3)))


@both
@given(trace=traces())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_what_is_written_is_read_again(tmp_path: Path, ending: str, trace: Trace) -> None:
    path = tmp_path / f"trace{ending}"
    write(path, trace)
    assert read(path) == trace


@pytest.mark.parametrize("generate", [crawl, ann])
def test_both_formats_hold_the_same_synthetic_trace(tmp_path: Path, generate: object) -> None:
    trace = Trace(tuple((crawl if generate is crawl else ann)(40, 2.0, 3)), {"seed": "3"})
    paths = [tmp_path / f"trace{ending}" for ending in ENDINGS]
    for path in paths:
        write(path, trace)
    assert [read(path) for path in paths] == [trace, trace]


def test_a_delay_factor_moves_inputs_and_not_arrivals() -> None:
    queries = crawl(20, 1.0, 1)
    slow = delayed(queries, 10.0)
    assert slow == crawl(20, 1.0, 1, delay_factor=10.0)
    with pytest.raises(ValueError, match="above 0"):
        delayed(queries, 0.0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trace.csv", b""),
        ("trace.jsonl", b""),
        ("trace.jsonl", b'{"format": "another 9", "about": {}}\n'),
        ("trace.jsonl", b'{"format": "stream2llm-trace 1", "about": {}}\n{"query_id": 1}\n'),
        ("trace.parquet", b"PAR1 and nothing behind it"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=name):
        read(path)


def test_a_description_says_how_many_and_how_long() -> None:
    text = describe(Trace(tuple(crawl(60, 2.0, 1)), {"seed": "1"}))
    assert "seed: 1" in text
    assert "60 queries in" in text
    assert "chunks per query" in text
    assert "chunks, retrieval time" in text
    assert describe(Trace(())) == "no queries"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["traces", *map(str, arguments)])
    return main()


def test_the_commands_make_convert_and_describe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, slow = tmp_path / "made.parquet", tmp_path / "slow.jsonl"
    assert run(monkeypatch, "make", "ann", made, "--queries", "12", "--seed", "4") == 0
    assert run(monkeypatch, "convert", made, slow, "--delay-factor", "30") == 0
    assert read(slow).queries == tuple(ann(12, 1.0, 4, delay_factor=30.0))
    assert run(monkeypatch, "describe", slow) == 0
    assert "delays multiplied by: 30.0" in capsys.readouterr().out
    assert run(monkeypatch, "describe", tmp_path / "missing.jsonl") == 1
    assert "missing.jsonl" in capsys.readouterr().err
