"""Seeded traces with the published statistics of the two workloads of arXiv 2604.16395.

`crawl` is append-mode (chunks accumulate), `ann` is update-mode (each input replaces the list).
The paper prints percentiles, not traces, so the traces here are synthetic. A quantity is drawn
from a monotone inverse CDF through its published percentiles, log-linear in between. Samples are
stratified, one draw per 1/n of probability, so a few hundred queries already show the published
tails. A Gaussian copula correlates quantities: only the *order* of a quantity's values over the
queries depends on its scores, never the values themselves.

The knots below hold published percentiles and, marked as such, points that the paper does not
give: the lower tails, and upper tails placed so that the mean comes out as published.

The retrieval time of a query is when its last chunk comes: the time to the first chunk plus the
gaps. The paper gives the distribution of gaps and of retrieval times, not of the time to the first
chunk; here both given ones hold and the third is what remains (see `_retrieval_s`).
"""

import argparse
import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loadtest.report import rank_correlation

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Table = dict[str, dict[str, float]]

CHUNKS: Final = "chunks per query"
GAP_MS: Final = "gap between chunks, ms"
TOKENS: Final = "tokens per query"
RETRIEVAL_S: Final = "retrieval time, s"

PUBLISHED: Final[dict[str, Table]] = {
    "crawl": {
        CHUNKS: {"mean": 7.86, "P50": 8, "min": 1, "max": 17},
        GAP_MS: {
            "P5": 82, "P25": 387, "P50": 701, "P75": 1340, "P95": 3078, "P99": 5293, "max": 34947,
        },
        TOKENS: {"mean": 8889, "P50": 5749, "P75": 11167, "P95": 28372},
        RETRIEVAL_S: {"mean": 9.2, "P50": 8.7, "P75": 11.1, "P95": 16.4},
    },
    "ann": {
        CHUNKS: {"mean": 4.42, "P50": 4, "min": 1, "max": 26},
        GAP_MS: {
            "P5": 1.4, "P25": 11.3, "P50": 36.7, "P75": 124, "P95": 699, "P99": 2079, "max": 8917,
        },
        TOKENS: {"mean": 13006, "P50": 10126, "P75": 14615, "P95": 30618},
        RETRIEVAL_S: {"mean": 4.5, "P50": 3.9, "P75": 5.3, "P95": 8.5},
    },
}  # fmt: skip
PUBLISHED_QUERIES: Final = {"crawl": 4322, "ann": 500}

HEAD_TOKENS: Final = 30
"""Tokens of the prompt's template, counted in `Query.question_tokens`."""

MIN_FIRST_S: Final = 0.05
"""The least time from a query's arrival to its first chunk, before the delay factor."""

DOCUMENT_SIGMA: Final = 1.0
"""Spread (log) of the sizes of one query's documents. Not published; inferred: at the lowest rate,
where nobody waits, the published TTFT of a streamed crawl is the prefill of the last document, and
this spread gives its P50, P95 and P99 best."""

REPLACED: Final = 0.5
"""Chance that a document behind the stable prefix was another, worse one a snapshot earlier."""


@dataclass(frozen=True, slots=True)
class Document:
    """A retrieved document; `doc_id` is unique over the trace, `tokens` at least 1."""

    doc_id: int
    tokens: int
    text: str = ""
    """Empty where only its size is known."""


@dataclass(frozen=True, slots=True)
class Input:
    """What retrieval hands over `at_s` seconds after the query's arrival.

    Append-mode: the new documents. Update-mode: the whole list, best document first.
    """

    at_s: float
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """One query; `arrival_s` counts from the start of the trace, `inputs` are in order of time.

    `question_tokens` covers the question and the template around the documents.
    """

    query_id: int
    arrival_s: float
    update: bool
    inputs: tuple[Input, ...]
    question_tokens: int
    question: str = ""
    """Empty where only its size is known."""


@dataclass(frozen=True, slots=True)
class _Marginal:
    """An inverse CDF: log-linear between (quantile, value) knots, flat outside them."""

    knots: tuple[tuple[float, float], ...]

    def at(self, quantiles: Floats) -> Floats:
        points, values = zip(*self.knots, strict=True)
        values_at: Floats = np.exp(np.interp(quantiles, points, np.log(values)))
        return values_at


@dataclass(frozen=True, slots=True)
class _Model:
    """The marginals of one workload and the correlations (of normal scores) between them."""

    chunks: _Marginal
    gap_ms: _Marginal
    tokens: _Marginal
    retrieval_s: _Marginal
    first_median_s: float  # what a query asks for; it gets what its retrieval time leaves
    first_sigma: float
    chunks_to_tokens: float
    # Of two gaps of one query (a slow retrieval is slow throughout), and of the query's pace with
    # its chunks. The latter is inferred for the crawl: at this pace, and with gaps as long whatever
    # the number of chunks, their sums alone would exceed the published P95 of the retrieval time.
    pace: float
    chunks_to_pace: float


# In each row below the knots without a published counterpart are, unless said otherwise: the
# first (lower bound), P25 where the table has none, and those above the last published one.
_CRAWL: Final = _Model(
    chunks=_Marginal(
        ((0, 1), (0.05, 3), (0.25, 5.9), (0.5, 8), (0.75, 9.8), (0.95, 12.8), (1, 17))
    ),
    # The published maximum is one of about 29650 gaps.
    gap_ms=_Marginal(
        (
            (0, 10), (0.05, 82), (0.25, 387), (0.5, 701), (0.75, 1340), (0.95, 3078),
            (0.99, 5293), (0.999, 12000), (1 - 1 / 29650, 34947),
        )
    ),
    tokens=_Marginal(
        ((0, 300), (0.25, 2700), (0.5, 5749), (0.75, 11167), (0.95, 28372), (1, 49000))
    ),
    retrieval_s=_Marginal(
        ((0, 2), (0.25, 6.5), (0.5, 8.7), (0.75, 11.1), (0.95, 16.4), (0.99, 24), (1, 50))
    ),
    first_median_s=1.4,
    first_sigma=0.6,
    chunks_to_tokens=0.5,
    pace=0.1,
    chunks_to_pace=-0.7,
)  # fmt: skip
_ANN: Final = _Model(
    # One query of 500 has the published maximum.
    chunks=_Marginal(
        ((0, 1), (0.2, 2), (0.5, 4), (0.75, 5.4), (0.95, 8.3), (0.998, 26))
    ),
    # The published maximum is one of about 1710 gaps.
    gap_ms=_Marginal(
        (
            (0, 0.2), (0.05, 1.4), (0.25, 11.3), (0.5, 36.7), (0.75, 124), (0.95, 699),
            (0.99, 2079), (1 - 1 / 1710, 8917),
        )
    ),
    tokens=_Marginal(
        ((0, 3000), (0.25, 7500), (0.5, 10126), (0.75, 14615), (0.95, 30618), (1, 62000))
    ),
    retrieval_s=_Marginal(((0, 1.1), (0.25, 3), (0.5, 3.9), (0.75, 5.3), (0.95, 8.5), (1, 20))),
    first_median_s=3.5,
    first_sigma=0.4,
    chunks_to_tokens=0.0,
    pace=0.2,
    chunks_to_pace=0.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """A query before its documents: when its inputs come and how long its prompt is."""

    arrival_s: float
    times_s: tuple[float, ...]
    tokens: int
    question_tokens: int


def crawl(queries: int, qps: float, seed: int, delay_factor: float = 1.0) -> list[Query]:
    """Append-mode queries: one document per chunk, Poisson arrivals at `qps`.

    `delay_factor` multiplies every `at_s`. One seed gives the same queries whatever the `qps`,
    only their arrivals move. Raises ValueError for counts, rates or factors that are not positive.
    """
    rng, skeletons = _skeletons(_CRAWL, queries, qps, seed, delay_factor)
    doc_ids = itertools.count()
    return [
        Query(i, s.arrival_s, False, _appended(s, rng, doc_ids), s.question_tokens)
        for i, s in enumerate(skeletons)
    ]


def ann(
    queries: int,
    qps: float,
    seed: int,
    delay_factor: float = 1.0,
    stable_share: float = 0.9,
    list_size: int = 10,
) -> list[Query]:
    """Update-mode queries: each input is a ranked list that improves towards the final one.

    `stable_share` is the mean share of a list's tokens, from the front, that the list before it
    had as the same prefix. The paper does not publish this number; it decides how much KV an
    update can keep, so it is a parameter and results should be reported with it. The default is
    inferred from the published TTFT at the lowest rate, where nobody waits. Behind the prefix
    documents change places, and some come in for worse ones that never return. A document that
    persists keeps its id and size. The table's tokens per query are those of the final list.

    The rest is as for `crawl`. Raises ValueError also for a share outside 0..1.
    """
    if not 0 <= stable_share <= 1 or list_size < 1:
        raise ValueError("stable_share must be in 0..1 and list_size at least 1")
    rng, skeletons = _skeletons(_ANN, queries, qps, seed, delay_factor)
    doc_ids = itertools.count()
    return [
        Query(
            i,
            s.arrival_s,
            True,
            _refined(s, stable_share, list_size, rng, doc_ids),
            s.question_tokens,
        )
        for i, s in enumerate(skeletons)
    ]


def statistics_of(queries: Sequence[Query]) -> Table:
    """The published table's rows for a trace; the rows of gaps are empty without any gap."""
    gaps_ms = [
        1e3 * (b.at_s - a.at_s) for query in queries for a, b in itertools.pairwise(query.inputs)
    ]
    columns = {
        CHUNKS: [len(query.inputs) for query in queries],
        GAP_MS: gaps_ms,
        TOKENS: [prompt_tokens(query) for query in queries],
        RETRIEVAL_S: [query.inputs[-1].at_s for query in queries],
    }
    return {name: _summary(np.asarray(values, float)) for name, values in columns.items()}


def prompt_tokens(query: Query) -> int:
    """Tokens of the query's complete prompt."""
    inputs = query.inputs[-1:] if query.update else query.inputs
    documents = (document for each in inputs for document in each.documents)
    return query.question_tokens + sum(document.tokens for document in documents)


def correlations_of(queries: Sequence[Query]) -> dict[str, float]:
    """Spearman's rank correlations between a trace's quantities; nan where one never varies.

    The paper publishes none. For the crawl they are inferred: its retrieval times follow from
    chunks and gaps, and pages make up the tokens. An ANN list has as many documents whatever the
    number of its versions, so tokens go with nothing there.
    """
    chunks = [len(query.inputs) for query in queries]
    tokens = [prompt_tokens(query) for query in queries]
    retrieval_s = [query.inputs[-1].at_s for query in queries]
    return {
        "chunks, retrieval time": rank_correlation(chunks, retrieval_s),
        "chunks, tokens": rank_correlation(chunks, tokens),
        "tokens, retrieval time": rank_correlation(tokens, retrieval_s),
    }


def main() -> None:
    """Prints the table of generated traces beside the published one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--queries", type=int, help="of each (default: as many as published)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, make in (("crawl", crawl), ("ann", ann)):
        trace = make(options.queries or PUBLISHED_QUERIES[name], 1.0, options.seed)
        print(f"{name}: {len(trace)} queries, seed {options.seed}")
        _print_table(statistics_of(trace), PUBLISHED[name])
        print("  rank correlations (not published, inferred):")
        for pair, value in correlations_of(trace).items():
            print(f"  {pair:30}{value:12.2f}")


def _print_table(generated: Table, published: Table) -> None:
    print(f"  {'':24}{'':6}{'generated':>12}{'published':>12}{'off':>8}")
    off: list[float] = []
    for row, cells in published.items():
        for cell, wanted in cells.items():
            value = generated[row][cell]
            off.append(value / wanted - 1)
            print(f"  {row:24}{cell:6}{value:12.2f}{wanted:12.2f}{off[-1]:>+8.1%}")
    print(f"  farthest off: {max(off, key=abs):+.1%}")


def _summary(values: Floats) -> dict[str, float]:
    if not values.size:
        return {}
    percentiles = {f"P{p}": float(np.percentile(values, p)) for p in (5, 25, 50, 75, 95, 99)}
    bounds = {"min": float(values.min()), "max": float(values.max())}
    return {"mean": float(values.mean())} | percentiles | bounds


def _skeletons(
    model: _Model, queries: int, qps: float, seed: int, delay_factor: float
) -> tuple[np.random.Generator, list[_Skeleton]]:
    """The queries without documents, and the generator to draw those from."""
    if queries < 1 or qps <= 0 or delay_factor <= 0:
        raise ValueError("queries, qps and delay_factor must be positive")
    arrivals, quantities, documents = np.random.default_rng(seed).spawn(3)
    arrival_s = np.cumsum(arrivals.exponential(size=queries)) / qps
    times_s, tokens = _timed(model, queries, quantities)
    questions = _question_tokens(queries, quantities)
    return documents, [
        _Skeleton(
            float(arrival_s[i]),
            tuple((delay_factor * times_s[i]).tolist()),
            int(tokens[i]),
            int(questions[i]),
        )
        for i in range(queries)
    ]


def _timed(model: _Model, queries: int, rng: np.random.Generator) -> tuple[list[Floats], Ints]:
    """When each query's inputs come (s after its arrival), and the tokens of its prompt."""
    size_scores = rng.standard_normal(queries)
    chunks = np.rint(_drawn(model.chunks, size_scores, rng)).astype(int)
    token_scores = _correlated(size_scores, model.chunks_to_tokens, rng)
    tokens = np.rint(_drawn(model.tokens, token_scores, rng)).astype(int)
    pace = np.repeat(_correlated(size_scores, model.chunks_to_pace, rng), chunks - 1)
    gap_scores = _correlated(pace, math.sqrt(model.pace), rng)
    gaps_s = np.split(_drawn(model.gap_ms, gap_scores, rng) / 1e3, np.cumsum(chunks - 1)[:-1])
    spans_s = np.array([gaps.sum() for gaps in gaps_s])
    first_s = _retrieval_s(model, spans_s, rng) - spans_s
    times = [
        first + np.concatenate(([0.0], np.cumsum(gaps)))
        for first, gaps in zip(first_s, gaps_s, strict=True)
    ]
    return times, tokens


def _retrieval_s(model: _Model, spans_s: Floats, rng: np.random.Generator) -> Floats:
    """Deals retrieval times to queries whose first and last chunk are `spans_s` apart.

    Each query asks for its span plus a lognormal time to the first chunk; the retrieval times go to
    the asked ones in order of size. Where a span does not fit, the query takes the nearest time
    left in which it does. The longest spans choose first: what fits them fits all later ones, so
    none runs short while a solution exists. A span that fits nowhere (possible in short traces)
    lengthens the retrieval time that it gets.
    """
    left = np.sort(_drawn(model.retrieval_s, rng.standard_normal(spans_s.size), rng)).tolist()
    first_s = model.first_median_s * rng.lognormal(sigma=model.first_sigma, size=spans_s.size)
    wanted = np.empty(spans_s.size)
    wanted[np.argsort(spans_s + first_s, kind="stable")] = left
    dealt = np.empty(spans_s.size)
    for i in np.argsort(-spans_s, kind="stable"):
        least_s = spans_s[i] + MIN_FIRST_S
        time_s = left.pop(_nearest(left, least_s, wanted[i]))
        dealt[i] = max(time_s, least_s)
    return dealt


def _nearest(ordered: list[float], least: float, wanted: float) -> int:
    """Index of the value nearest to `wanted` among those from `least` on; else the last one."""
    start = bisect.bisect_left(ordered, least)
    above = bisect.bisect_left(ordered, wanted)
    if above > start and (
        above == len(ordered) or wanted - ordered[above - 1] < ordered[above] - wanted
    ):
        return above - 1
    return min(max(above, start), len(ordered) - 1)


def _drawn(marginal: _Marginal, scores: Floats, rng: np.random.Generator) -> Floats:
    """A stratified sample of the marginal, in the order of the scores."""
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    return marginal.at((ranks + rng.random(scores.size)) / max(scores.size, 1))


def _correlated(scores: Floats, rho: float, rng: np.random.Generator) -> Floats:
    """Normal scores correlated by `rho` with those given."""
    return rho * scores + math.sqrt(1 - rho * rho) * rng.standard_normal(scores.size)


def _question_tokens(queries: int, rng: np.random.Generator) -> Ints:
    question = np.clip(np.rint(rng.lognormal(math.log(10), 0.4, queries)), 4, 40)
    return HEAD_TOKENS + question.astype(int)


def _split(tokens: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`tokens` in lognormal shares, each at least 1; their sum is exact if tokens >= parts."""
    shares = np.cumsum(rng.lognormal(sigma=DOCUMENT_SIGMA, size=parts))
    ends = np.rint(shares / shares[-1] * max(tokens - parts, 0)).astype(int)
    sizes: list[int] = (np.diff(ends, prepend=0) + 1).tolist()
    return sizes


def _documents(
    skeleton: _Skeleton, count: int, rng: np.random.Generator, doc_ids: Iterator[int]
) -> list[Document]:
    sizes = _split(skeleton.tokens - skeleton.question_tokens, count, rng)
    return [Document(next(doc_ids), size) for size in sizes]


def _appended(
    skeleton: _Skeleton, rng: np.random.Generator, doc_ids: Iterator[int]
) -> tuple[Input, ...]:
    documents = _documents(skeleton, len(skeleton.times_s), rng, doc_ids)
    return tuple(
        Input(at_s, (document,)) for at_s, document in zip(skeleton.times_s, documents, strict=True)
    )


def _refined(
    skeleton: _Skeleton,
    stable_share: float,
    list_size: int,
    rng: np.random.Generator,
    doc_ids: Iterator[int],
) -> tuple[Input, ...]:
    """The snapshots of one query, made from the final list backwards."""
    final = _documents(skeleton, list_size, rng, doc_ids)
    snapshots = [final]
    for _ in skeleton.times_s[1:]:
        kept = _prefix(snapshots[-1], _share(stable_share, rng), rng)
        snapshots.append(_earlier(snapshots[-1], kept, final, rng, doc_ids))
    return tuple(
        Input(at_s, tuple(snapshot))
        for at_s, snapshot in zip(skeleton.times_s, reversed(snapshots), strict=True)
    )


def _share(mean: float, rng: np.random.Generator) -> float:
    return float(rng.beta(4 * mean, 4 * (1 - mean))) if 0 < mean < 1 else mean


def _prefix(documents: list[Document], share: float, rng: np.random.Generator) -> int:
    """How many documents from the front hold `share` of the tokens, on average."""
    wanted = share * sum(document.tokens for document in documents)
    for kept, document in enumerate(documents):
        if wanted < document.tokens:
            return kept + int(rng.random() < wanted / document.tokens)
        wanted -= document.tokens
    return len(documents)


def _earlier(
    later: list[Document],
    kept: int,
    final: list[Document],
    rng: np.random.Generator,
    doc_ids: Iterator[int],
) -> list[Document]:
    """The list before `later`: the same first `kept` documents, then another one at once."""
    tail = [
        _worse(final, rng, doc_ids) if rng.random() < REPLACED else document
        for document in later[kept:]
    ]
    tail = [tail[i] for i in rng.permutation(len(tail))]
    if tail and tail[0] == later[kept]:
        tail[0] = _worse(final, rng, doc_ids)
    return later[:kept] + tail


def _worse(final: list[Document], rng: np.random.Generator, doc_ids: Iterator[int]) -> Document:
    """A document that is not in the final list, of about the size of one that is."""
    size = final[int(rng.integers(len(final)))].tokens * rng.lognormal(-0.02, 0.2)
    return Document(next(doc_ids), max(1, round(size)))


if __name__ == "__main__":
    main()
