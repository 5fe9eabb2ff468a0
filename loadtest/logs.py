"""Traces from a user's own logs.

A log is JSON lines in the order of time, one event a line:

    {"stream": "s1", "time": 12.0, "kind": "open"}
    {"stream": "s1", "time": 12.8, "kind": "chunk", "text": "A page."}
    {"stream": "s2", "time": 13.0, "kind": "list", "documents": [{"id": "d7", "text": "..."}]}
    {"stream": "s1", "time": 14.1, "kind": "finish", "text": "What does the page say?"}

`stream` is any name. `time` is in seconds, from whenever, or ISO 8601. `chunk` adds one document,
`list` replaces all; a stream has only one of the two kinds. `finish` closes the input with the
question. `open` is optional: without it a query arrives with its first input. Whatever has a `text`
may have `tokens` instead, a count: logs can be kept without what users wrote. Equal texts are the
same document, and so are equal `id`s; an id stands alone where its text or count came before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

import msgspec

from loadtest.workload import Document, Input, Query

CountTokens = Callable[[str], int]
SAME_MOMENT_S = 0.001
"""A finish that follows the last input sooner is handed over with it."""


class LogError(Exception):
    """A line of a log can't be used. Says which line, and why."""


class _Piece(msgspec.Struct, frozen=True):
    """A text or a count, perhaps with a name."""

    text: str | None = None
    tokens: int | None = None
    id: str | None = None


class _Event(msgspec.Struct, frozen=True):
    stream: str
    time: float | str
    kind: Literal["open", "chunk", "list", "finish"]
    text: str | None = None
    tokens: int | None = None
    id: str | None = None
    documents: list[_Piece] | None = None


@dataclass(slots=True)
class _Stream:
    arrival_s: float
    update: bool | None = None
    inputs: list[tuple[float, tuple[Document, ...]]] = field(default_factory=list)
    finish: tuple[float, Document] | None = None


def read_logs(lines: Iterable[bytes], count_tokens: CountTokens) -> tuple[list[Query], int]:
    """The finished streams as queries, the first of which arrives at 0.

    Returns:
        The queries in the order of arrival, and how many streams were left out because they
        have no `finish`, or no input before it.

    Raises:
        LogError
    """
    reader = _Reader(count_tokens)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                reader.take(msgspec.json.decode(line, type=_Event))
            except (msgspec.MsgspecError, ValueError) as e:
                raise LogError(f"line {number}: {e}") from e
    return reader.queries()


class _Reader:
    def __init__(self, count_tokens: CountTokens) -> None:
        self._count_tokens = count_tokens
        self._streams: dict[str, _Stream] = {}
        self._documents: dict[tuple[str, str], Document] = {}
        self._doc_ids = 0

    def take(self, event: _Event) -> None:
        """Raises ValueError for an event that does not fit those before it."""
        at_s = _seconds(event.time)
        stream = self._streams.setdefault(event.stream, _Stream(at_s))
        if stream.finish is not None:
            raise ValueError(f"stream {event.stream!r} is finished")
        last_s = stream.inputs[-1][0] if stream.inputs else stream.arrival_s
        if at_s < last_s:
            raise ValueError(f"stream {event.stream!r} goes back in time")
        piece = _Piece(event.text, event.tokens, event.id)
        match event.kind:
            case "open":
                if stream.inputs or at_s > stream.arrival_s:
                    raise ValueError(f"stream {event.stream!r} is open")
            case "chunk":
                self._grow(stream, at_s, False, (self._document(piece),))
            case "list":
                pieces = event.documents or ()
                self._grow(stream, at_s, True, tuple(map(self._document, pieces)))
            case "finish":
                stream.finish = at_s, self._document(piece)

    def queries(self) -> tuple[list[Query], int]:
        """See `read_logs`."""
        whole = [s for s in self._streams.values() if s.finish is not None and s.inputs]
        whole.sort(key=lambda stream: stream.arrival_s)
        first_s = whole[0].arrival_s if whole else 0.0
        queries = [
            replace(_query(stream), query_id=i, arrival_s=stream.arrival_s - first_s)
            for i, stream in enumerate(whole)
        ]
        return queries, len(self._streams) - len(whole)

    def _grow(
        self, stream: _Stream, at_s: float, update: bool, documents: tuple[Document, ...]
    ) -> None:
        if stream.update not in (None, update):
            raise ValueError("a stream has chunks or lists, not both")
        stream.update = update
        stream.inputs.append((at_s, documents))

    def _document(self, piece: _Piece) -> Document:
        """The document of this id or text; of a mere count, a new one."""
        key = ("id", piece.id) if piece.id is not None else ("text", piece.text or "")
        if piece.text is None and piece.tokens is None:
            if key not in self._documents:
                raise ValueError("there is neither a text nor tokens")
            return self._documents[key]
        tokens = self._tokens(piece)
        known = self._documents.get(key) if key[1] else None
        if known is not None and (known.text, known.tokens) == (piece.text or "", tokens):
            return known
        self._doc_ids += 1
        document = self._documents[key] = Document(self._doc_ids - 1, tokens, piece.text or "")
        return document

    def _tokens(self, piece: _Piece) -> int:
        counted = piece.tokens
        if counted is None:
            counted = self._count_tokens(piece.text or "")
        if counted < 0:
            raise ValueError("tokens can't be below 0")
        return max(1, counted)


def _query(stream: _Stream) -> Query:
    """Its id and arrival are still to be set."""
    assert stream.finish is not None
    closed_s, question = stream.finish
    inputs = [Input(at_s - stream.arrival_s, documents) for at_s, documents in stream.inputs]
    if closed_s - stream.inputs[-1][0] >= SAME_MOMENT_S:  # closed later, with nothing new
        last = stream.inputs[-1][1] if stream.update else ()
        inputs.append(Input(closed_s - stream.arrival_s, last))
    return Query(0, 0.0, bool(stream.update), tuple(inputs), question.tokens, question.text)


def _seconds(time: float | str) -> float:
    return time if isinstance(time, float) else datetime.fromisoformat(time).timestamp()
