"""What happened to single queries, and when: one line of a Gantt chart each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from loadtest.workload import Query

Moment = tuple[float, int]
"""When, in seconds from the start of the trace, and how many tokens it was about."""


@dataclass(slots=True)
class Line:
    """One query. Seconds from the start of the trace; None for what never came, or nobody saw."""

    query_id: int
    inputs_s: tuple[float, ...]
    """When each input was handed over; the last one closes the prompt."""
    first_token_s: float | None = None
    end_s: float | None = None
    computed: list[tuple[float, float]] = field(default_factory=list)
    """Spans in which it was being computed. Empty where an engine does not tell."""
    preempted: list[Moment] = field(default_factory=list)
    """When its KV was taken to make room."""
    invalidated: list[Moment] = field(default_factory=list)
    """When an update made KV useless."""


ComputedTokens = Callable[[str], int | None]
"""How much of a query's prompt an engine holds; None if it knows none by that name."""


class Recorder:
    """Watches some queries from step to step of a simulated engine."""

    def __init__(self, queries: Sequence[Query], computed_tokens: ComputedTokens) -> None:
        self._lines = {
            str(q.query_id): Line(q.query_id, tuple(q.arrival_s + g.at_s for g in q.inputs))
            for q in queries
        }
        self._open = set(self._lines)
        self._computed_tokens = computed_tokens
        self._before: dict[str, int] = {}

    def before(self) -> None:
        """A step begins."""
        self._before = self._counts()

    def after(self, begun_s: float, ended_s: float, finished: Iterable[str]) -> None:
        """It has ended. What has fewer tokens than before has lost them to others."""
        answered = self._open.intersection(finished)
        for name in answered:
            self._lines[name].first_token_s = self._lines[name].end_s = ended_s
        self._open -= answered
        now = self._counts()
        for name in answered | {n for n in now if now[n] > self._before.get(n, 0)}:
            self._extend(name, begun_s, ended_s)
        for name, count in self._before.items():
            if (lost := count - now.get(name, count)) > 0:
                self._lines[name].preempted.append((begun_s, lost))

    def invalidated(self, name: str, at_s: float, tokens: int) -> None:
        """An update took so many computed tokens."""
        if tokens and name in self._lines:
            self._lines[name].invalidated.append((at_s, tokens))

    def lines(self) -> tuple[Line, ...]:
        """All of them, in the order of arrival."""
        return tuple(self._lines.values())

    def _counts(self) -> dict[str, int]:
        counts = {name: self._computed_tokens(name) for name in self._open}
        return {name: count for name, count in counts.items() if count is not None}

    def _extend(self, name: str, begun_s: float, ended_s: float) -> None:
        """Steps one after the other are one span."""
        spans = self._lines[name].computed
        if spans and spans[-1][1] == begun_s:
            begun_s = spans.pop()[0]
        spans.append((begun_s, ended_s))
