"""What a simulated engine answers.

`words` mean nothing. A `chained` answer can be checked by whoever knows the prompt: each token is a
digest of all tokens before it, as that of a model which samples greedily depends on all of them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORDS = ("simulated", "words", "mean", "nothing")
"""What an answer in words says, over and over: one word to a token."""


@dataclass(frozen=True, slots=True)
class Answers:
    """How answers are made."""

    next_token: Callable[[Sequence[int]], int]
    """The token behind all these, from 0 to 2**31 - 1."""
    text: Callable[[int, Sequence[int]], str]
    """Of tokens that stand behind so many others in an answer."""


def _one(tokens: Sequence[int]) -> int:
    return 1


def _words(begin: int, token_ids: Sequence[int]) -> str:
    numbers = range(begin, begin + len(token_ids))
    return "".join(f" {WORDS[i % len(WORDS)]}" if i else WORDS[0] for i in numbers)


def chained(tokens: Sequence[int]) -> int:
    """The next token of a chained answer."""
    packed = array("I", tokens).tobytes()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=4).digest(), "little") >> 1


def _hexadecimal(begin: int, token_ids: Sequence[int]) -> str:
    return "".join(f"{token:08x}." for token in token_ids)


ANSWERS = {"words": Answers(_one, _words), "chained": Answers(chained, _hexadecimal)}


def chained_answer(prompt: Sequence[int], count: int) -> str:
    """The text of a chained answer with so many tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(chained(tokens))
    return _hexadecimal(0, tokens[len(prompt) :])
