"""What every source of context is: a search that improves while it runs.

A source yields *events*. In append-mode each is one more passage (`Found`); in update-mode each is
the whole list as it is now, best first (`Ranked`), and the last one is the result. Closing the
iterator (`contextlib.aclosing`) ends everything that the search has begun.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

Mode = Literal["append", "update"]


class SourceFailed(Exception):
    """A source can't go on. What it gave before is good."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text that was found."""

    id: str
    """The same for the same piece, within its source: an address, a row's id."""
    text: str
    title: str = ""
    score: float | None = None
    """Higher is better; comparable within one source only."""


@dataclass(frozen=True, slots=True)
class Found:
    """One more passage."""

    passage: Passage


@dataclass(frozen=True, slots=True)
class Ranked:
    """The whole list as it is now, best first."""

    passages: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for."""

    text: str
    deadline_s: float | None = None
    """A `time.monotonic` value by which the search ends with what it has; None: its own limits."""


class Source(Protocol):
    """Anything that can be searched. Ten lines make one."""

    @property
    def name(self) -> str:
        """What it is called in statuses and errors."""

    @property
    def mode(self) -> Mode:
        """Whether it yields `Found` or `Ranked`."""

    def search(self, query: Query) -> AsyncGenerator[Found | Ranked, None]:
        """Search, and yield what is known so far, again and again.

        Raises:
            SourceFailed: nothing more can be had.
        """
