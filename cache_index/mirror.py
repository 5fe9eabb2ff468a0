"""What one engine holds, as far as its events have told, and what the index was told of it."""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from cache_index.event_stream import AllBlocksCleared, Batch, BlockRemoved, BlockStored, name_of
from cache_index.names import packed

MOST_UNTOLD = 100_000
"""Changes to remember for the index; beyond them everything is told anew."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an engine holds before a batch of its events."""

    instance: str
    next_batch: int
    names: bytes = b""
    """Packed; a name that two blocks have is there twice."""


@dataclass(frozen=True, slots=True)
class News:
    """The net effect of the batches from `first` up to but not including `after`."""

    first: int
    after: int
    stored: bytes
    removed: bytes


class Mirror:
    """Follows an engine batch by batch from a snapshot on.

    Names are counted: of equal blocks that were computed beside each other each has its events,
    and the name is held until the last is gone.
    """

    def __init__(self, begin: Snapshot) -> None:
        self.instance = begin.instance
        self.next_batch = begin.next_batch
        self.told_whole = False
        """The index has been told of all that is held, and wants only what changes."""
        self._copies = Counter(unpacked(begin.names))
        self._told = begin.next_batch  # the index has all batches before this one
        self._untold: deque[tuple[int, dict[int, bool]]] = deque()
        self._untold_names = 0

    def take(self, batch: Batch) -> None:
        """Take in the next batch."""
        assert batch.number == self.next_batch, "batches are taken one after another"
        self.next_batch += 1
        changes: dict[int, bool] = {}
        for event in batch.events:
            match event:
                case BlockStored() if event.counts:
                    self._store(map(name_of, event.block_hashes), changes)
                case BlockRemoved() if event.counts:
                    self._remove(map(name_of, event.block_hashes), changes)
                case AllBlocksCleared():
                    changes.update(dict.fromkeys(self._copies, False))
                    self._copies.clear()
        if changes and self.told_whole and batch.number >= self._told:
            self._remember(batch.number, changes)

    def _store(self, names: Iterable[int], changes: dict[int, bool]) -> None:
        for name in names:
            self._copies[name] += 1
            changes[name] = True

    def _remove(self, names: Iterable[int], changes: dict[int, bool]) -> None:
        for name in names:
            copies = self._copies.get(name, 0)  # 0 where the beginning was not seen
            if copies > 1:
                self._copies[name] = copies - 1
            else:
                self._copies.pop(name, None)
                changes[name] = False

    def _remember(self, number: int, changes: dict[int, bool]) -> None:
        self._untold.append((number, changes))
        self._untold_names += len(changes)
        if self._untold_names > MOST_UNTOLD:
            self.tell_whole()

    # What the index does not know.

    @property
    def has_news(self) -> bool:
        """There is something to tell."""
        return not self.told_whole or self._told < self.next_batch

    def news(self) -> News:
        """What has changed since what the index was told; empty if it is ahead."""
        last: dict[int, bool] = {}
        for _, changes in self._untold:
            last.update(changes)
        stored = packed(name for name, held in last.items() if held)
        removed = packed(name for name, held in last.items() if not held)
        return News(self._told, max(self._told, self.next_batch), stored, removed)

    def told(self, after: int) -> None:
        """The index has all batches before this one, from us or from another."""
        if not self.told_whole:
            return  # too much was to be told meanwhile
        self._told = after
        while self._untold and self._untold[0][0] < after:
            self._untold_names -= len(self._untold.popleft()[1])

    def tell_all(self) -> tuple[int, bytes]:
        """The batch that is next and all names, which the index is being told now.

        What comes from now on is news. If it does not get there: `tell_whole`.
        """
        self.told_whole, self._told = True, self.next_batch
        return self._told, packed(self._copies)

    def tell_whole(self) -> None:
        """The index must be told anew of all that is held."""
        self.told_whole = False
        self._untold.clear()
        self._untold_names = 0

    def contradicted(self, expected: int | None) -> None:
        """The index has not what it was told of; it expects another batch, or none."""
        if expected is None or expected < self._told:
            self.tell_whole()
        else:
            self.told(expected)


def unpacked(names: bytes) -> Iterable[int]:
    """Of packed names each."""
    return (name for (name,) in struct.iter_unpack(">Q", names))
