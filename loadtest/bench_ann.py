"""Progressive search of real passages: how good and how fast each ranking is, and what it wastes.

The passages are documentation of the Python packages that are installed; the questions are first
sentences of other passages, which are not in the collection. The first run embeds them, which takes
minutes, and keeps the collection; later runs search it.

`make bench-ann`; the last line is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.model import cache_dir
from loadtest.orderings import costs, synthetic
from loadtest.passages import installed, passages
from loadtest.report import machine, p50_p95_p99, slashed
from retrieval.ann import AnnSearch
from retrieval.collections.collection import Collection, empty
from retrieval.collections.store import CollectionExists, Collections
from retrieval.embedding import MiniLm
from retrieval.ordering import Documents
from retrieval.refine import DOUBLING, Rounds
from retrieval.source import Query

PLACES = 10
EFFORTS = DOUBLING.efforts
BATCH = 10_000
PASSAGES, QUESTIONS = "passages", "questions"
QUESTION_CHARS = 200


@dataclass(frozen=True, slots=True)
class Found:
    """One query's rankings, and when each came, in seconds after the query."""

    rankings: tuple[Documents, ...]
    at_s: tuple[float, ...]


def main() -> None:
    """Fill what is missing, search, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args()
    print(f"{machine()}, faiss-cpu {version('faiss-cpu')}, torch {version('torch')}")
    folder = cache_dir() / f"bench-ann-{options.passages}-{options.questions}"
    collections = Collections(folder, MiniLm())
    figures: dict[str, Any] = {
        "benchmark": "ann",
        "passages": options.passages,
        "questions": options.questions,
    }
    figures |= fill(collections, options.passages, options.questions)
    figures |= build(collections.open(PASSAGES))
    figures |= restart(collections, folder)
    texts = [question(row.text) for row in collections.open(QUESTIONS).rows]
    figures |= asyncio.run(search(collections, texts))
    print(json.dumps(figures))


def fill(collections: Collections, count: int, questions: int) -> dict[str, float]:
    """Embed and add what is not there from an earlier run."""
    for name in (PASSAGES, QUESTIONS):
        with suppress(CollectionExists):
            collections.create(name)
    there = len(collections.open(PASSAGES))
    if there == count and len(collections.open(QUESTIONS)) == questions:
        print(f"{count} passages are there from an earlier run")
        return {}
    found = passages(count + questions, installed())
    if len(found) < count + questions:
        sys.exit(f"there are only {len(found)} passages in the packages installed here")
    collections.embedder.embed(["loads the model"])
    began = time.monotonic()
    for start in range(there, count, BATCH):
        now = collections.add(PASSAGES, found[start : min(start + BATCH, count)])
        print(f"  {now} passages after {time.monotonic() - began:.0f} s", flush=True)
    rate = (count - there) / (time.monotonic() - began)
    collections.add(QUESTIONS, found[count:])
    print(f"embedded, indexed and written: {rate:.0f} passages/s")
    return {"fill_passages_per_s": rate}


def build(collection: Collection) -> dict[str, float]:
    """Make the index again from its vectors, all at once."""
    vectors = collection.index.reconstruct_n(0, len(collection.rows))
    memory_bytes = psutil.Process().memory_info().rss
    began = time.monotonic()
    built = empty(vectors.shape[1]).with_more(collection.rows, vectors)
    took_s = time.monotonic() - began
    grown_mb = (psutil.Process().memory_info().rss - memory_bytes) / 1e6
    print(f"index of {len(built)} vectors built in {took_s:.1f} s, {grown_mb:.0f} MB")
    return {"build_s": took_s, "index_mb": grown_mb}


def restart(collections: Collections, folder: Path) -> dict[str, float]:
    """Whether another process finds the same, and how long opening takes."""
    text = question(collections.open(QUESTIONS).rows[0].text)
    found = asyncio.run(rankings(AnnSearch(collections, PASSAGES, places=PLACES), text))
    command = [sys.executable, "-m", "retrieval.collections", "--folder", str(folder)]
    other = subprocess.run(
        [*command, "search", PASSAGES, text], check=True, capture_output=True, text=True
    )
    ids = [line.split("  ")[1] for line in other.stdout.splitlines()[-PLACES:]]
    if ids != [passage.id for passage in found.rankings[-1]]:
        sys.exit("another process finds something else")
    began = time.monotonic()
    Collections(folder, collections.embedder).open(PASSAGES)
    took_s = time.monotonic() - began
    print(f"another process finds the same; opening the collection takes {took_s:.2f} s")
    return {"open_s": took_s}


async def search(collections: Collections, texts: Sequence[str]) -> dict[str, Any]:
    """Ask all questions, with all rounds and as a user would, and compare with the truth."""
    nearest = exact(collections, texts)
    full = AnnSearch(collections, PASSAGES, places=PLACES, rounds=Rounds(EFFORTS, len(EFFORTS)))
    usual = AnnSearch(collections, PASSAGES, places=PLACES)
    rounds = [await rankings(full, text) for text in texts]
    found = [await rankings(usual, text) for text in texts]
    print(f"\n{len(texts)} questions, the best {PLACES}. Milliseconds: P50 / P95 / P99")
    print(f"{'effort':8}{'recall@10':>12}{'round, ms':>24}{'since the query, ms':>26}")
    table = []
    for number, effort in enumerate(EFFORTS):
        recall = statistics.mean(map(recall_of, [r.rankings[number] for r in rounds], nearest))
        at_ms = [1e3 * r.at_s[number] for r in rounds]
        # the first round's time has the embedding of the question in it
        took_ms = [1e3 * (r.at_s[number] - r.at_s[number - 1]) for r in rounds if number]
        took = p50_p95_p99(took_ms) if took_ms else None
        print(f"{effort:<8}{recall:>12.4f}{slashed(took, 2):>24}"
              f"{slashed(p50_p95_p99(at_ms), 1):>26}")  # fmt: skip
        table.append({"effort": effort, "recall": recall, "at_ms": p50_p95_p99(at_ms)})
    last = statistics.mean(map(recall_of, [f.rankings[-1] for f in found], nearest))
    count = statistics.mean(len(f.rankings) for f in found)
    print(f"ended after two rounds without a change: recall@10 of the last {last:.4f}, "
          f"{count:.1f} rankings, "
          f"{slashed(p50_p95_p99([1e3 * f.at_s[-1] for f in found]), 1)} ms")  # fmt: skip
    return {
        "rounds": table,
        "last_recall": last,
        "goal_last_recall": 0.99,
        "rankings": count,
        "orderings": ordered([f.rankings for f in found]),
    }


def ordered(real: Sequence[Sequence[Documents]]) -> dict[str, Any]:
    """The orderings on these rankings (characters) and on synthetic ones (tokens)."""
    traces = {"these rankings, characters": real} | {
        f"synthetic, {share:.0%} of a list stays, tokens": synthetic(len(real), share, seed=0)
        for share in (0.9, 0.7)
    }
    print(f"\n{'a query':12}{'after the first':>16}{'invalidated':>14}{'of rank':>10}"
          f"{'late':>10}{'late, P50':>11}{'end':>8}  same documents")  # fmt: skip
    figures = {}
    for trace, queries in traces.items():
        print(trace)
        costs_of = costs(queries, lambda passage: len(passage.text))
        for name, cost in costs_of.items():
            share = cost.invalidated / max(costs_of["rank"].invalidated, 1)
            print(f"  {name:10}{cost.first:>16.0f}{cost.invalidated:>14.0f}{share:>10.3f}"
                  f"{cost.late:>10.0f}{cost.late_p50:>11.0f}{cost.final:>8.0f}"
                  f"  {'yes' if cost.same_documents else 'NO'}")  # fmt: skip
        figures[trace] = {name: asdict(cost) for name, cost in costs_of.items()}
    return figures


async def rankings(source: AnnSearch, text: str) -> Found:
    """All rankings that a search yields."""
    began = time.monotonic()
    found, at_s = [], []
    async with aclosing(source.search(Query(text))) as events:
        async for event in events:
            found.append(event.passages)
            at_s.append(time.monotonic() - began)
    return Found(tuple(found), tuple(at_s))


def exact(collections: Collections, texts: Sequence[str]) -> list[set[str]]:
    """The ids of the true nearest for each text."""
    collection = collections.open(PASSAGES)
    # one by one, as a search does: what a text is padded to can move its vector a little
    vectors = np.concatenate([collections.embedder.embed([text]) for text in texts])
    return [set(ids) for ids in collection.nearest(vectors, PLACES)]


def recall_of(found: Documents, nearest: set[str]) -> float:
    """Share of the true nearest that was found."""
    return len({passage.id for passage in found} & nearest) / len(nearest)


def question(text: str) -> str:
    """The first sentence of a passage, without the name in front."""
    sentence = text.partition(": ")[2] or text
    return sentence.partition(". ")[0][:QUESTION_CHARS]


if __name__ == "__main__":
    main()
