"""What the gateways promise, held against what clients were told.

- Every request ends before its deadline.
- An answer is that to a prompt of the stream's own documents: of all that were acknowledged, in
  their order, once each. What came of an answer that broke off is the beginning of it.
- An acknowledgement counts what the stream has then.
- An error has a code that the documentation names, and one that is for the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from transformers import AutoTokenizer

from engine_adapter.simulated.answers import chained_answer
from loadtest.chaos.history import WANT_ANSWERS, History, Post

MARK = "{{documents}}"
CODES = frozenset(
    {
        "ok", "broken", "hung", "engine_unavailable", "index_unavailable", "overloaded", "draining",
        "stream_not_found", "stream_lost", "sequence_gap", "answer_gone", "idempotency_key_in_use",
        "unknown_document", "input_closed", "model_not_found", "conflict", "storage_full",
        "engine_timeout",
    }
)  # fmt: skip
"""How a request may end under faults. `broken`: the connection was, by a fault. `hung` is counted
by itself."""


class Tokens:
    """Prompts as the engine is to have them, made without the gateway."""

    def __init__(self, tokenizer: str) -> None:
        """
        Args:
            tokenizer: folder or name that transformers can load.
        """
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def of(self, history: History, texts: Sequence[str]) -> list[int]:
        """The prompt of a stream with these documents. None of the texts has control tokens."""
        rendered: str = self._tokenizer.apply_chat_template(
            history.messages, tokenize=False, add_generation_prompt=True
        )
        head, _, tail = rendered.partition(MARK)
        parts = [head, *(text + "\n" for text in texts), tail]
        return [token for part in parts for token in self._encoded(part)]

    def count(self, texts: Sequence[str]) -> int:
        """Tokens of documents."""
        return sum(len(self._encoded(text + "\n")) for text in texts)

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def check(histories: Sequence[History], tokens: Tokens) -> list[str]:
    """Every promise that was broken, in words."""
    return [
        f"stream {history.number} ({history.kind}): {wrong}"
        for history in histories
        for wrong in (
            *history.odd,
            *_requests(history),
            *_acknowledgements(history, tokens),
            *_answer(history, histories, tokens),
        )
    ]


def documents(posts: Sequence[Post]) -> list[str]:
    """What a stream has after these posts."""
    texts: list[str] = []
    for post in posts:
        texts = list(post.texts) if post.replaces else [*texts, *post.texts]
    return texts


def _requests(history: History) -> list[str]:
    return [
        f"{request.what}: {request.outcome} after {request.took_s:.1f} s"
        for request in history.requests
        if request.outcome not in CODES
    ]


def _acknowledgements(history: History, tokens: Tokens) -> list[str]:
    wrong = []
    states = accumulate(history.posts, lambda before, post: [*before, post], initial=list[Post]())
    for number, (post, upto) in enumerate(zip(history.posts, list(states)[1:], strict=True)):
        told = None if post.taken is None else post.taken.get("tokens_received")
        if told is not None and told != (counted := tokens.count(documents(upto))):
            wrong.append(f"post {number} was acknowledged with {told} tokens of {counted}")
    return wrong


def _answer(history: History, histories: Sequence[History], tokens: Tokens) -> list[str]:
    if not history.text:
        empty = history.complete and history.kind in WANT_ANSWERS
        return ["an answer without any text"] if empty else []
    posts = len(history.posts)
    right = _expected(history, posts, tokens)
    if _is(right, history):
        return []
    for fewer in range(1, posts + 1):
        if _is(_expected(history, posts - fewer, tokens), history):
            return [f"answered as if {fewer} of {posts} posts were not there"]
    for other in histories:
        upto = range(len(other.posts) + 1)
        if any(_is(_expected(other, count, tokens), history) for count in upto):
            return [f"has the answer of stream {other.number}"]
    end = "complete" if history.complete else "broken off"
    return [f"an answer ({end}) that is nobody's: {history.text[:60]!r}, not {right[:60]!r}"]


def _expected(history: History, count: int, tokens: Tokens) -> str:
    """The answer to so many of a stream's posts."""
    prompt = tokens.of(history, documents(history.posts[:count]))
    return chained_answer(prompt, history.answer_tokens)


def _is(answer: str, history: History) -> bool:
    """Whether it is what the client has, or may be the beginning of."""
    return answer == history.text or (not history.complete and answer.startswith(history.text))
