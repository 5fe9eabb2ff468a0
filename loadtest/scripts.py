"""Traces as tokens: what an engine gets of each query, and traces scaled down to a small one."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import eq

from loadtest.workload import Document, Input, Query, prompt_tokens

TokensOf = Callable[[Document], list[int]]

QUESTIONS = 1 << 40
"""Added to a query's id: the `doc_id` of its question, which no document has."""

VOCABULARY = range(100, 40_000)
"""Ordinary tokens, below them are the special ones: valid for the models used here."""


def consecutive(document: Document) -> list[int]:
    """Token ids of a document, different from those of any other. For simulated engines."""
    first = document.doc_id << 18
    return list(range(first, first + document.tokens))


def drawn(document: Document) -> list[int]:
    """Random tokens of a real vocabulary, the same for the same document."""
    return random.Random(document.doc_id).choices(VOCABULARY, k=document.tokens)


def joined(documents: Iterable[Document], tokens_of: TokensOf) -> list[int]:
    """The tokens of documents, one after the other."""
    return [token for document in documents for token in tokens_of(document)]


def contexts(query: Query, tokens_of: TokensOf) -> list[list[int]]:
    """The tokens of a query's context after each of its inputs."""
    if query.update:
        return [joined(given.documents, tokens_of) for given in query.inputs]
    whole = joined((d for given in query.inputs for d in given.documents), tokens_of)
    lengths = itertools.accumulate(sum(d.tokens for d in given.documents) for given in query.inputs)
    return [whole[:length] for length in lengths]


def question(query: Query, tokens_of: TokensOf) -> list[int]:
    """The tokens behind a query's context."""
    return tokens_of(Document(QUESTIONS + query.query_id, query.question_tokens))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(bool, map(eq, a, b)))


@dataclass(frozen=True, slots=True)
class Script:
    """What is to be handed over of one query, and when."""

    query_id: int
    due_s: tuple[float, ...]
    """When each input is due, in seconds from the start of the trace."""
    contexts: tuple[list[int], ...]
    """Tokens of the context after each input."""
    question: list[int]
    """Handed over together with the last input."""
    query: Query | None = None
    """What it is the script of, for targets that are told texts."""

    @property
    def prompt(self) -> list[int]:
        """All tokens, as they are sent whole."""
        return self.contexts[-1] + self.question


def script(query: Query, tokens_of: TokensOf = drawn, head: Sequence[int] = ()) -> Script:
    """What is to be handed over of a query.

    Args:
        head: tokens before the context, the same for all queries.
    """
    due_s = tuple(query.arrival_s + given.at_s for given in query.inputs)
    read = tuple([*head, *context] for context in contexts(query, tokens_of))
    return Script(query.query_id, due_s, read, question(query, tokens_of), query)


def scaled(trace: Sequence[Query], mean_prompt_tokens: int, gap_factor: float) -> list[Query]:
    """A trace with its prompts divided and its gaps multiplied.

    Every size is divided by one number, so that the mean prompt has about `mean_prompt_tokens`; a
    document keeps at least one. The time before a query's first input, of which an engine hears
    nothing, is left out: a query arrives with its first input, the first query at 0.
    """
    divisor = statistics.fmean(map(prompt_tokens, trace)) / mean_prompt_tokens

    def size(tokens: int) -> int:
        return max(1, round(tokens / divisor))

    def shrunk(query: Query, given: Input) -> Input:
        at_s = gap_factor * (given.at_s - query.inputs[0].at_s)
        return Input(at_s, tuple(replace(d, tokens=size(d.tokens)) for d in given.documents))

    return [
        replace(
            query,
            arrival_s=query.arrival_s - trace[0].arrival_s,
            inputs=tuple(shrunk(query, given) for given in query.inputs),
            question_tokens=size(query.question_tokens),
        )
        for query in trace
    ]


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """How many of the spans (from, to) overlap at most."""
    events = sorted(e for start, end in spans for e in ((start, 1), (end, -1)))
    return max(itertools.accumulate(change for _, change in events), default=0)
