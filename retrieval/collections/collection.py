"""Passages and an index over their vectors: a value that is searched, and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import msgspec
import numpy as np

from retrieval.embedding import Vectors
from retrieval.source import Passage

NEIGHBOURS: Final = 16
"""Links of each vector in the graph (HNSW's M)."""
BUILD_EFFORT: Final = 100
"""Candidates looked at for each link while building (HNSW's efConstruction)."""

INDEX_FILE: Final = "index.faiss"
PASSAGES_FILE: Final = "passages.jsonl"


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A passage as a line of JSON."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Collection:
    """One state of a collection. Safe to search from many threads."""

    rows: tuple[Row, ...]
    """One for each vector of the index, in its order. Of rows with one id the last one counts."""
    index: Any
    replaced: frozenset[int]
    """Rows that do not count any more."""
    selector: Any
    """For the index: the rows that count; None: all."""

    def __len__(self) -> int:
        return len(self.rows) - len(self.replaced)

    def search(self, vector: Vectors, places: int, effort: int) -> tuple[Passage, ...]:
        """The passages nearest to a vector, best first; fewer if there are fewer.

        Blocks, for a millisecond or so. More `effort` (HNSW's ef: how many candidates are kept)
        finds more of the true nearest and takes longer.
        """
        parameters = faiss.SearchParametersHNSW(  # type: ignore[attr-defined]
            efSearch=max(effort, places), sel=self.selector
        )
        scores, rows = self.index.search(vector.reshape(1, -1), places, params=parameters)
        return tuple(
            self._passage(int(row), float(score))
            for row, score in zip(rows[0], scores[0], strict=True)
            if row >= 0
        )

    def nearest(self, vectors: Vectors, places: int) -> list[list[str]]:
        """The ids of the true nearest for each vector, best first, by comparing with all: slow."""
        keep = np.setdiff1d(np.arange(len(self.rows)), sorted(self.replaced))
        scores = vectors @ self.index.reconstruct_batch(keep).T
        best = np.argsort(-scores, axis=1)[:, :places]
        return [[self.rows[row].id for row in keep[each]] for each in best]

    def with_more(self, rows: Sequence[Row], vectors: Vectors) -> Collection:
        """Another collection: this one's rows, replaced where an id is the same, and these."""
        index = faiss.clone_index(self.index)
        index.add(vectors)
        grown = _collection((*self.rows, *rows), index)
        return grown._rebuilt() if 2 * len(grown.replaced) > len(grown.rows) else grown

    def save(self, folder: Path) -> None:
        """Write it into a folder that exists.

        Raises:
            OSError: there is no room.
        """
        # Not by faiss.write_index, to which a disk that is full at the end is no error.
        (folder / INDEX_FILE).write_bytes(faiss.serialize_index(self.index).data)
        encode = msgspec.json.Encoder().encode
        with (folder / PASSAGES_FILE).open("wb") as file:
            file.writelines(encode(row) + b"\n" for row in self.rows)

    def _passage(self, row: int, score: float) -> Passage:
        found = self.rows[row]
        return Passage(found.id, found.text, found.title, score)

    def _rebuilt(self) -> Collection:
        """The same without the rows that do not count."""
        keep = [row for row in range(len(self.rows)) if row not in self.replaced]
        fresh = empty(self.index.d)
        return fresh.with_more(
            [self.rows[row] for row in keep], self.index.reconstruct_batch(np.array(keep))
        )


def empty(dimensions: int) -> Collection:
    """A collection without passages, for vectors of so many dimensions."""
    index = faiss.IndexHNSWFlat(dimensions, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_EFFORT
    return _collection((), index)


def load(folder: Path) -> Collection:
    """What `Collection.save` has written.

    Raises:
        OSError, RuntimeError, msgspec.MsgspecError: the files are not there or not whole.
    """
    decode = msgspec.json.Decoder(Row).decode
    with (folder / PASSAGES_FILE).open("rb") as file:
        rows = tuple(map(decode, file))
    return _collection(rows, faiss.read_index(str(folder / INDEX_FILE)))


def _collection(rows: tuple[Row, ...], index: Any) -> Collection:
    last = {row.id: number for number, row in enumerate(rows)}
    replaced = frozenset(range(len(rows))) - frozenset(last.values())
    selector = None
    if replaced:
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.array(sorted(replaced))))
    return Collection(rows, index, replaced, selector)
