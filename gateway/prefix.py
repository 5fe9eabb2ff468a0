"""Token prefixes that share what they have in common, so that one that grows costs what is new."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A sequence of tokens that does not change: the first ones of a list that only grows.

    Whoever puts tokens behind it gets another one. If nobody did before, that has the same list;
    otherwise the list is copied.
    """

    _tokens: list[int]
    _length: int

    @classmethod
    def of(cls, tokens: Iterable[int] = ()) -> Self:
        """These tokens."""
        copied = list(tokens)
        return cls(copied, len(copied))

    def __len__(self) -> int:
        return self._length

    def behind(self, place: int) -> list[int]:
        """The tokens from this place on, in a list of their own."""
        return self._tokens[place : self._length]

    def all(self) -> list[int]:
        """Every token, in a list of their own."""
        return self.behind(0)

    def extended(self, tokens: Sequence[int]) -> Self:
        """These tokens put behind it."""
        whole = self._tokens if len(self._tokens) == self._length else self.all()
        whole += tokens
        return type(self)(whole, len(whole))

    def difference(self, wanted: Prefix) -> tuple[int, list[int]]:
        """How to get from these tokens, which an engine has, to those it should have.

        Returns:
            How many first tokens to keep (their longest common prefix), and what to put behind.
            An append is the case in which all are kept.
        """
        n = min(self._length, wanted._length)
        if self._tokens is not wanted._tokens:
            held, should = self._tokens, wanted._tokens
            if held[:n] != should[:n]:
                n = next(i for i in range(n) if held[i] != should[i])
        return n, wanted.behind(n)
