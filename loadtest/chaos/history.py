"""What a client of a chaos run did and was told: all that a checker has to go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
Kind = Literal["crawl", "ann", "simple", "one request", "delete", "leave", "silent"]
"""`crawl`, `ann`: append and replace, and try again until they have their answer. `simple`: with
the client of the project, and `one request`: try once. `delete`, `leave`, `silent`: want no answer
in the end; they say so, hang up, or say nothing any more."""

WANT_ANSWERS: Sequence[Kind] = ("crawl", "ann", "simple", "one request")
TRY_AGAIN: Sequence[Kind] = ("crawl", "ann")


@dataclass(frozen=True, slots=True)
class Request:
    """One that has ended, or was given up at its deadline."""

    what: str
    outcome: str
    """`ok`, the code of an error, `broken` (the connection), or `hung`."""
    took_s: float
    gateway: int
    """Its number."""
    ended_s: float
    """On the machine's monotonic clock."""


@dataclass(slots=True)
class Post:
    """Documents that were put behind the others, or in the place of all."""

    texts: tuple[str, ...]
    replaces: bool
    taken: Json | None = None
    """Its acknowledgement."""


@dataclass(slots=True)
class History:
    """One stream, from its client's side."""

    number: int
    kind: Kind
    question: str
    answer_tokens: int
    posts: list[Post] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    text: str = ""
    """What came of the answer, in its last telling."""
    complete: bool = False
    """The answer has come to its end."""
    gave_up: str | None = None
    """Why, if it did: the code of the last error."""
    lost_posts: int = 0
    """Acknowledged ones that the gateway has asked for again."""
    retellings: int = 0
    """How often the answer began again from its first token."""
    odd: list[str] = field(default_factory=list)
    """What the gateway must not have said."""

    @property
    def messages(self) -> list[Json]:
        """What it was opened with."""
        return [
            {"role": "system", "content": "Read {{documents}} with care."},
            {"role": "user", "content": self.question},
        ]
