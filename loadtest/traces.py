"""Traces as files: Parquet (`.parquet`) or JSON lines (`.jsonl`), by the ending of the name.

    python -m loadtest.traces make crawl trace.parquet --queries 500 --qps 2 --seed 1
    python -m loadtest.traces describe trace.parquet
    python -m loadtest.traces convert trace.parquet trace.jsonl --delay-factor 10
    python -m loadtest.traces from-logs log.jsonl trace.jsonl --tokenizer FOLDER

A file has one record per query: `query_id`, `arrival_s`, `update`, `question_tokens`, `question`,
and `inputs`, each with `at_s` (seconds after the arrival) and its `documents` with `doc_id`,
`tokens` and `text`. Append-mode (`update` false): an input's documents are new ones. Update-mode:
they are the whole list. A document's text stands where the document first comes; it is empty where
only the size is known. What the trace is of stands in `about`: the first line of JSON lines, the
metadata of Parquet.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from loadtest import workload
from loadtest.logs import LogError, read_logs
from loadtest.published import RATES
from loadtest.scripts import most_at_once
from loadtest.texts import counter
from loadtest.workload import Document, Input, Query, correlations_of, statistics_of

FORMAT: Final = "stream2llm-trace 1"

_DOCUMENT: Final = pa.struct(
    [("doc_id", pa.int64()), ("tokens", pa.int64()), ("text", pa.string())]
)
_INPUT: Final = pa.struct([("at_s", pa.float64()), ("documents", pa.list_(_DOCUMENT))])
SCHEMA: Final = pa.schema(
    [
        ("query_id", pa.int64()),
        ("arrival_s", pa.float64()),
        ("update", pa.bool_()),
        ("question_tokens", pa.int64()),
        ("question", pa.string()),
        ("inputs", pa.list_(_INPUT)),
    ]
)


class TraceError(Exception):
    """A file is no trace. Says which file and why."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Queries in the order of their arrival, and what they are of."""

    queries: tuple[Query, ...]
    about: Mapping[str, str] = field(default_factory=dict)


def write(path: Path, trace: Trace) -> None:
    """Write a file of the format that its name ends with.

    Raises:
        TraceError: the name has another ending.
    """
    _format(path)[0](path, trace)


def read(path: Path) -> Trace:
    """Read what `write` has written.

    Raises:
        TraceError: the file is not of its format, or its name has another ending.
        OSError: it can't be read.
    """
    try:
        return _format(path)[1](path)
    except (msgspec.MsgspecError, pa.ArrowException, KeyError, TypeError) as e:
        raise TraceError(f"{path} is no trace: {e}") from e


def delayed(queries: Iterable[Query], factor: float) -> list[Query]:
    """The same queries with every `at_s` multiplied; their arrivals stay.

    Raises:
        ValueError: the factor is not above 0.
    """
    if not factor > 0:
        raise ValueError("a delay factor must be above 0")
    return [
        replace(query, inputs=tuple(replace(i, at_s=factor * i.at_s) for i in query.inputs))
        for query in queries
    ]


def _write_parquet(path: Path, trace: Trace) -> None:
    metadata = {"format": FORMAT, "about": json.dumps(dict(trace.about))}
    table = pa.Table.from_pylist(_records(trace.queries), SCHEMA.with_metadata(metadata))
    pq.write_table(table, path, compression="zstd")


def _read_parquet(path: Path) -> Trace:
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    if metadata.get(b"format") != FORMAT.encode():
        raise TraceError(f"{path} is no trace: its metadata have no format {FORMAT!r}")
    records = msgspec.convert(table.to_pylist(), list[_Record])
    return Trace(_queries(records), json.loads(metadata[b"about"]))


def _write_lines(path: Path, trace: Trace) -> None:
    with path.open("w") as out:
        for line in ({"format": FORMAT, "about": dict(trace.about)}, *_records(trace.queries)):
            out.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read_lines(path: Path) -> Trace:
    with path.open("rb") as lines:
        head = msgspec.json.decode(next(lines, b"null"), type=_Head)
        if head.format != FORMAT:
            raise TraceError(f"{path} is no trace: its format is {head.format!r}, not {FORMAT!r}")
        decoder = msgspec.json.Decoder(_Record)
        return Trace(_queries(map(decoder.decode, lines)), head.about)


_FORMATS: Final = {
    ".parquet": (_write_parquet, _read_parquet),
    ".jsonl": (_write_lines, _read_lines),
}


def _format(path: Path) -> tuple[Callable[[Path, Trace], None], Callable[[Path], Trace]]:
    if path.suffix not in _FORMATS:
        raise TraceError(f"{path}: a trace's name ends with {' or '.join(_FORMATS)}")
    return _FORMATS[path.suffix]


class _Head(msgspec.Struct, frozen=True):
    format: str
    about: dict[str, str]


class _DocumentRecord(msgspec.Struct, frozen=True):
    doc_id: int
    tokens: int
    text: str = ""


class _InputRecord(msgspec.Struct, frozen=True):
    at_s: float
    documents: list[_DocumentRecord]


class _Record(msgspec.Struct, frozen=True):
    query_id: int
    arrival_s: float
    update: bool
    question_tokens: int
    inputs: list[_InputRecord]
    question: str = ""


def _records(queries: Iterable[Query]) -> list[dict[str, Any]]:
    seen = set[Document]()
    return [
        {
            "query_id": query.query_id,
            "arrival_s": query.arrival_s,
            "update": query.update,
            "question_tokens": query.question_tokens,
            "question": query.question,
            "inputs": [
                {"at_s": given.at_s, "documents": [_once(d, seen) for d in given.documents]}
                for given in query.inputs
            ],
        }
        for query in queries
    ]


def _once(document: Document, seen: set[Document]) -> dict[str, Any]:
    """A document with its text where it first comes."""
    text = "" if document in seen else document.text
    seen.add(document)
    return {"doc_id": document.doc_id, "tokens": document.tokens, "text": text}


def _queries(records: Iterable[_Record]) -> tuple[Query, ...]:
    texts: dict[int, str] = {}

    def document(record: _DocumentRecord) -> Document:
        text = record.text or texts.get(record.doc_id, "")
        if text:
            texts[record.doc_id] = text
        return Document(record.doc_id, record.tokens, text)

    return tuple(
        Query(
            query_id=record.query_id,
            arrival_s=record.arrival_s,
            update=record.update,
            inputs=tuple(
                Input(given.at_s, tuple(map(document, given.documents))) for given in record.inputs
            ),
            question_tokens=record.question_tokens,
            question=record.question,
        )
        for record in records
    )


def describe(trace: Trace) -> str:
    """What is in a trace, to be read by people."""
    queries = trace.queries
    lines = [f"{name}: {value}" for name, value in trace.about.items()]
    if not queries:
        return "\n".join([*lines, "no queries"])
    spans = [(q.arrival_s, q.arrival_s + q.inputs[-1].at_s) for q in queries]
    ends_s = max(end for _, end in spans)
    texts = sum(bool(d.text) for q in queries for given in q.inputs for d in given.documents)
    documents = sum(len(given.documents) for q in queries for given in q.inputs)
    updates = sum(q.update for q in queries)
    lines += [
        f"{len(queries)} queries in {ends_s:.1f} s, {_rate(queries):.3g} a second; "
        f"at most {most_at_once(spans)} open at once",
        f"{len(queries) - updates} append, {updates} replace lists; "
        f"{texts} of {documents} documents have their text",
    ]
    for row, cells in statistics_of(queries).items():
        lines.append(f"  {row:24}" + "  ".join(f"{k} {v:.6g}" for k, v in cells.items()))
    lines.append("  rank correlations:      ")
    lines += [f"  {pair:24}{value:.2f}" for pair, value in correlations_of(queries).items()]
    return "\n".join(lines)


def _rate(queries: Sequence[Query]) -> float:
    """Queries per second, by the time between the first and the last."""
    between_s = queries[-1].arrival_s - queries[0].arrival_s
    return (len(queries) - 1) / between_s if between_s else math.nan


def main() -> int:
    options = arguments()
    try:
        COMMANDS[options.command](options)
    except (TraceError, LogError, ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


def _make(options: argparse.Namespace) -> None:
    generate = workload.crawl if options.workload == "crawl" else workload.ann
    queries = generate(options.queries, options.qps, options.seed, options.delay_factor)
    given = ("workload", "queries", "qps", "seed", "delay_factor")
    about = {name: str(getattr(options, name)) for name in given}
    write(options.out, Trace(tuple(queries), {"made by": "loadtest.workload", **about}))


def _describe(options: argparse.Namespace) -> None:
    print(describe(read(options.file)))


def _convert(options: argparse.Namespace) -> None:
    trace = read(options.file)
    about = dict(trace.about)
    if options.delay_factor != 1:
        about["delays multiplied by"] = str(options.delay_factor)
    write(options.out, Trace(tuple(delayed(trace.queries, options.delay_factor)), about))


def _from_logs(options: argparse.Namespace) -> None:
    with options.file.open("rb") as lines:
        queries, unfinished = read_logs(lines, counter(options.tokenizer))
    about = {"made from": options.file.name, "tokens counted by": str(options.tokenizer or "guess")}
    write(options.out, Trace(tuple(queries), about))
    print(f"{len(queries)} streams; {unfinished} without a finish were left out")


COMMANDS: Final = {
    "make": _make,
    "describe": _describe,
    "convert": _convert,
    "from-logs": _from_logs,
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="a synthetic trace with the published statistics")
    make.add_argument("workload", choices=tuple(RATES))
    make.add_argument("out", type=Path)
    make.add_argument("--queries", type=int, default=500)
    make.add_argument("--qps", type=float, default=1.0)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--delay-factor", type=float, default=1.0)
    commands.add_parser("describe", help="what is in a file").add_argument("file", type=Path)
    convert = commands.add_parser("convert", help="to the other format, or to other delays")
    convert.add_argument("file", type=Path)
    convert.add_argument("out", type=Path)
    convert.add_argument("--delay-factor", type=float, default=1.0)
    logs = commands.add_parser("from-logs", help="from your own logs; see docs/loadtest.md")
    logs.add_argument("file", type=Path)
    logs.add_argument("out", type=Path)
    logs.add_argument("--tokenizer", help="folder or name; else a token is taken for 4 characters")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
