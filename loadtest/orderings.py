"""What the orderings of a changing ranking cost, by the documents they put into a prompt."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loadtest import workload
from retrieval.ordering import ORDERINGS, Documents, OrderingName
from retrieval.source import Passage

Size = Callable[[Passage], int]
Rankings = Sequence[Documents]


@dataclass(frozen=True, slots=True)
class Cost:
    """Means over queries, in the unit of the documents' sizes."""

    first: float
    """In the prompt after the first ranking."""
    invalidated: float
    """Computed and thrown away: behind the first document that a change leaves in place."""
    late: float
    """To be computed from the last ranking on: what the first token may wait for."""
    late_p50: float
    final: float
    """In the prompt at the end."""
    same_documents: bool
    """Whether every query ended with exactly the documents of its last ranking."""


def cost(name: OrderingName, queries: Sequence[Rankings], size: Size) -> Cost:
    """Feed each query's rankings to an ordering. Each query has at least one ranking."""
    runs = [_lists(name, rankings) for rankings in queries]
    late = [_computed(lists[-3:], size) for lists in runs]
    return Cost(
        first=statistics.mean(_total(lists[1], size) for lists in runs),
        invalidated=statistics.mean(_invalidated(lists, size) for lists in runs),
        late=statistics.mean(late),
        late_p50=statistics.median(late),
        final=statistics.mean(_total(lists[-1], size) for lists in runs),
        same_documents=all(
            {p.id for p in lists[-1]} == {p.id for p in rankings[-1]}
            for lists, rankings in zip(runs, queries, strict=True)
        ),
    )


def costs(queries: Sequence[Rankings], size: Size) -> dict[OrderingName, Cost]:
    """Of all orderings."""
    return {name: cost(name, queries, size) for name in ORDERINGS}


def synthetic(queries: int, stable_share: float, seed: int) -> list[Rankings]:
    """Rankings of the ANN workload; a passage's text is as many characters as it has tokens."""
    return [
        [tuple(map(_passage, each.documents)) for each in query.inputs]
        for query in workload.ann(queries, 1.0, seed, stable_share=stable_share)
    ]


def _lists(name: OrderingName, rankings: Rankings) -> list[Documents]:
    """Nothing, the documents after each ranking, and the final ones."""
    ordering = ORDERINGS[name]()
    return [(), *(ordering.update(ranked) for ranked in rankings), ordering.final()]


def _invalidated(lists: Sequence[Documents], size: Size) -> int:
    return sum(_total(a[_common(a, b) :], size) for a, b in pairwise(lists))


def _computed(lists: Sequence[Documents], size: Size) -> int:
    return sum(_total(b[_common(a, b) :], size) for a, b in pairwise(lists))


def _common(before: Documents, after: Documents) -> int:
    """How many documents from the front are the same."""
    pairs = enumerate(zip(before, after, strict=False))
    return next((i for i, (a, b) in pairs if a.id != b.id), min(len(before), len(after)))


def _total(documents: Documents, size: Size) -> int:
    return sum(map(size, documents))


def _passage(document: workload.Document) -> Passage:
    return Passage(str(document.doc_id), "x" * document.tokens)
