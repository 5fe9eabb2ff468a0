"""Texts for documents of which only the size is known: real ones, or exact ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from loadtest.passages import installed, passages
from loadtest.workload import Document

CHARS_PER_TOKEN = 4
"""Of English text, roughly, for the tokenizers of today."""
PASSAGES = 2000
WORDS = 2000
MIN_WORD = 3


class Texts(Protocol):
    """The text of a document, always the same for the same one."""

    def of(self, document: Document) -> str:
        """Its own text if it has one."""


class RealTexts:
    """Documentation of the packages that are installed here, about as long as asked for."""

    def __init__(self) -> None:
        self._passages = [passage.text for passage in passages(PASSAGES, installed())]

    def of(self, document: Document) -> str:
        if document.text:
            return document.text
        rng, wanted = random.Random(document.doc_id), CHARS_PER_TOKEN * document.tokens
        pieces, length = list[str](), 0
        while length < wanted:
            pieces.append(rng.choice(self._passages))
            length += len(pieces[-1]) + 1
        return "\n".join(pieces)[:wanted]


class ExactTexts:
    """Words that are one token each: as many tokens as asked for, a newline behind included.

    The newline is what a gateway puts behind each document. A document of one token gets two.
    """

    def __init__(self, tokenizer: str) -> None:
        """
        Args:
            tokenizer: folder or name that transformers can load.
        """
        self._tokenizer = loaded(tokenizer)
        self._words = _single_tokens(self._tokenizer)

    def of(self, document: Document) -> str:
        if document.text:
            return document.text
        rng = random.Random(document.doc_id)
        return "".join(rng.choices(self._words, k=max(1, document.tokens - 1)))

    def tokens_of(self, document: Document) -> list[int]:
        """The tokens of a document with the newline behind it."""
        ids: list[int] = self._tokenizer.encode(self.of(document) + "\n", add_special_tokens=False)
        return ids

    def frame_tokens(self, messages: list[dict[str, str]]) -> int:
        """Tokens of a conversation without documents, the template's included."""
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def counter(tokenizer: str | None) -> Callable[[str], int]:
    """Counts the tokens of texts; without a tokenizer, by their characters."""
    if tokenizer is None:
        return lambda text: -(-len(text) // CHARS_PER_TOKEN)
    chosen = loaded(tokenizer)
    return lambda text: len(chosen.encode(text, add_special_tokens=False))


@cache
def loaded(tokenizer: str) -> Any:
    """A tokenizer by its folder or name."""
    from transformers import AutoTokenizer  # takes seconds to import

    return AutoTokenizer.from_pretrained(tokenizer)


def _single_tokens(tokenizer: Any) -> list[str]:
    """Words with a blank before them that are one token, wherever they stand."""
    words = []
    for token_id in range(tokenizer.vocab_size):
        word = tokenizer.decode([token_id])
        if len(word) > MIN_WORD and word[0] == " " and word[1:].isascii() and word[1:].isalpha():
            words.append(word)
        if len(words) == WORDS:
            break
    joined = tokenizer.encode("".join(words) + "\n", add_special_tokens=False)
    if len(joined) != len(words) + 1:
        raise ValueError("this tokenizer does not keep words with a blank before them apart")
    return words
