"""What happened to single queries, and when: one line of a Gantt chart each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

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


class Request(Protocol):
    """What is read of an engine's request."""

    num_computed_tokens: int


class Recorder:
    """Watches some queries from step to step of a simulated engine."""

    def __init__(self, queries: Sequence[Query]) -> None:
        self._lines = {
            str(q.query_id): Line(q.query_id, tuple(q.arrival_s + g.at_s for g in q.inputs))
            for q in queries
        }
        self._computed: dict[str, int] = {}

    def before(self, requests: Mapping[str, Request]) -> None:
        """A step begins."""
        self._computed = self._counts(requests)

    def after(
        self, requests: Mapping[str, Request], begun_s: float, ended_s: float, finished: list[str]
    ) -> None:
        """It has ended. What has fewer tokens than before has lost them to others."""
        now = self._counts(requests)
        for name, count in self._computed.items():
            if now.get(name, count) < count:
                self._lines[name].preempted.append((begun_s, count - now[name]))
        for name, count in now.items():
            if count > self._computed.get(name, 0):
                self._extend(name, begun_s, ended_s)
        for name in finished:
            if (line := self._lines.get(name)) is not None:
                self._extend(name, begun_s, ended_s)
                line.first_token_s = line.end_s = ended_s

    def invalidated(self, name: str, at_s: float, tokens: int) -> None:
        """An update took so many computed tokens."""
        if tokens and name in self._lines:
            self._lines[name].invalidated.append((at_s, tokens))

    def lines(self) -> tuple[Line, ...]:
        """All of them, in the order of arrival."""
        return tuple(self._lines.values())

    def _counts(self, requests: Mapping[str, Request]) -> dict[str, int]:
        return {
            name: requests[name].num_computed_tokens for name in self._lines if name in requests
        }

    def _extend(self, name: str, begun_s: float, ended_s: float) -> None:
        """Steps one after the other are one span."""
        spans = self._lines[name].computed
        if spans and spans[-1][1] == begun_s:
            begun_s = spans.pop()[0]
        spans.append((begun_s, ended_s))
