"""What a client has been told of an answer, and what is new to it in another engine's account.

An answer that moves to another engine is either *retold* there, from its first token on, or
*continued* behind the tokens that the client has. A retelling has to begin with these tokens;
then its text does too, however much of it an engine holds back until a character is complete or
until it can't be a stop string any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from engine_adapter.messages import Sampling, TokenEvent


class Differs(Exception):
    """An engine's account of an answer does not begin with what the client was told."""


@dataclass(slots=True)
class Told:
    """The part of an answer that the client has."""

    tokens: list[int] = field(default_factory=list)
    chars: int = 0
    """Of its text."""
    goes_on: bool = False
    """Whether the last token is certain not to be the answer's last one."""

    def add(self, event: TokenEvent) -> None:
        """The client is told this."""
        self.tokens += event.token_ids
        self.chars += len(event.text)
        if event.token_ids:  # a token that ends an answer gives no text
            self.goes_on = len(event.token_ids) == 1 and event.text != ""

    def can_be_continued(self, sampling: Sampling) -> bool:
        """Whether an engine that has the tokens as part of its prompt goes on as one that made
        them would. It does not know their text, of which some may be held back and some may be
        the beginning of a stop string; it does not count them as output; and behind the token
        that ends an answer it would begin another."""
        room = sampling.max_tokens is None or len(self.tokens) < sampling.max_tokens
        counting = sampling.presence_penalty or sampling.frequency_penalty
        return self.goes_on and room and not sampling.stop and not counting

    def rest(self, sampling: Sampling) -> Sampling:
        """How to sample what follows."""
        count = len(self.tokens)
        most, least = sampling.max_tokens, sampling.min_tokens
        return msgspec.structs.replace(
            sampling,
            max_tokens=None if most is None else most - count,
            min_tokens=None if least is None else max(least - count, 0),
        )


class Account:
    """One engine's account of an answer."""

    def __init__(self, told: Told, *, retold: bool) -> None:
        """
        Args:
            retold: it begins with the answer's first token, not behind those that were told.
        """
        self.hold_chars = 0
        """At the end of its text that are kept back: an engine that ends with its first token does
        not do it itself."""
        self._known = list(told.tokens) if retold else []
        self._skip_chars = told.chars if retold else 0
        self._held = ""

    def take(self, event: TokenEvent) -> TokenEvent | None:
        """What is new to the client.

        Raises:
            Differs
        """
        known, new = self._split(event.token_ids)
        skipped = min(self._skip_chars, len(event.text))
        self._skip_chars -= skipped
        text = self._held + event.text[skipped:]
        shown = max(len(text) - self.hold_chars, 0)
        self._held = text[shown:]
        if not new and not text[:shown]:
            return None
        logprobs = event.logprobs[known:] or None if event.logprobs else None
        return TokenEvent(token_ids=new, text=text[:shown], logprobs=logprobs)

    def _split(self, token_ids: list[int]) -> tuple[int, list[int]]:
        """How many of the tokens are known, and the others."""
        known = min(len(token_ids), len(self._known))
        if token_ids[:known] != self._known[:known]:
            raise Differs
        del self._known[:known]
        return known, token_ids[known:]

    def end(self) -> TokenEvent | None:
        """What was kept back, of an answer that has ended.

        Raises:
            Differs: it has ended before what the client was told.
        """
        if self._known:
            raise Differs
        return TokenEvent(token_ids=[], text=self._held) if self._held else None


def hold_chars(sampling: Sampling) -> int:
    """Characters at the end of an unfinished text that may be the beginning of a stop string."""
    return max((len(stop) for stop in sampling.stop or ()), default=1) - 1
