"""What the gateways know together: their streams, and which engine holds which KV blocks.

One interface, two implementations: `cache_index.memory` for a single gateway, and
`cache_index.redis` for many. The index is a hint, never the truth: an entry that is wrong or
missing costs time, not a wrong answer.

**Streams.** One replica of the gateway *holds* a stream: only it writes the stream's record and
sends operations to the engine. A record has an *epoch*, which rises when another replica takes the
stream over, and a *version*, which rises with every write of its holder. A write names both, so
whoever lost a stream without knowing it finds out at its next write, before it promises anything.

**Blocks.** Engines name a whole block of tokens by a hash that covers everything before it
(`cache_index.names`). The index keeps, for each engine, the names of the blocks it holds, as the
engine's KV events tell. An engine's events are numbered; a batch is taken only if it is the
next one, so several replicas may follow one engine.

Everything expires.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

EXACT_NAMES = 1 + 4 + 16
"""How many names at the front of a prompt `BlockIndex.longest` looks up one by one."""
NAME_BYTES = 8
"""Length of a block's name: the last bytes of its hash, as engines publish it."""


class IndexUnavailable(Exception):
    """The index does not answer, or not in time."""


class Stale(Exception):
    """A write named an epoch or a version that is not the stream's."""

    def __init__(self, epoch: int, version: int, holder: str) -> None:
        super().__init__(f"the record is at epoch {epoch}, version {version}, held by {holder!r}")
        self.epoch = epoch
        self.version = version
        self.holder = holder


class OutOfOrder(Exception):
    """A batch of block changes is not the next one; `expected` is, or None: begin anew."""

    def __init__(self, expected: int | None) -> None:
        super().__init__(f"expected batch {expected}")
        self.expected = expected


class StreamRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What another replica needs to go on with a stream. The bytes are the holder's business."""

    epoch: int
    version: int
    holder: str
    """URL of the replica that holds it."""
    engine: str
    """URL of the engine that has its prompt; empty before it has one."""
    state: str
    about: bytes = b""
    """What rarely changes."""
    posts: bytes = b""
    """The acknowledgements given so far."""
    documents: bytes = b""
    """The documents in the prompt."""
    tail: bytes = b""
    """Tokens that the engine may not have yet."""
    names: bytes = b""
    """Of the prompt's whole blocks, `NAME_BYTES` each."""


@dataclass(frozen=True, slots=True)
class Splice:
    """How a string of bytes changes: `old[drop : drop + keep] + add`; by default not at all."""

    drop: int = 0
    keep: int | None = None
    """None: all that is left."""
    add: bytes = b""

    def of(self, old: bytes) -> bytes:
        kept = old[self.drop :] if self.keep is None else old[self.drop : self.drop + self.keep]
        return kept + self.add


@dataclass(frozen=True, slots=True)
class Change:
    """What one write changes in a record; what it does not name stays."""

    engine: str | None = None
    state: str | None = None
    about: bytes | None = None
    posts: Splice = field(default_factory=Splice)
    documents: Splice = field(default_factory=Splice)
    tail: Splice = field(default_factory=Splice)
    names: Splice = field(default_factory=Splice)


class StreamIndex(Protocol):
    """The records of all streams. Every method may raise `IndexUnavailable`."""

    async def get(self, stream_id: str) -> StreamRecord | None:
        """The record, or None if there is none or it has expired."""

    async def put(self, stream_id: str, record: StreamRecord, lease_s: float) -> None:
        """Write a whole record: a new stream's, or again after the index was away.

        Taken if there is none, or it has a lower epoch, or the same epoch and a lower version.

        Raises:
            Stale
        """

    async def change(
        self, stream_id: str, epoch: int, version: int, change: Change, lease_s: float
    ) -> None:
        """Change the record from this version to the next. One round trip.

        Raises:
            Stale: it is at another epoch or version, or there is none (epoch -1).
        """

    async def claim(self, stream_id: str, epoch: int, holder: str, lease_s: float) -> StreamRecord:
        """Take a stream over from the holder of this epoch. Epoch and version rise by one.

        Returns:
            The record as it is now.

        Raises:
            Stale: it is at another epoch, or there is none (epoch -1).
        """

    async def delete(self, stream_id: str, epoch: int) -> None:
        """Forget a stream, if it is at this epoch."""


class ReplicaIndex(Protocol):
    """Which replicas of the gateway are alive."""

    async def beat(self, replica: str, lease_s: float) -> bool:
        """Say that a replica will be alive for so long.

        Returns:
            Whether it was known to be alive: if not, the index may have forgotten more.
        """

    async def replicas(self) -> set[str]:
        """Those that are."""


class BlockIndex(Protocol):
    """Which engine holds which blocks. Every method may raise `IndexUnavailable`.

    `family` names engines whose block names mean the same: one way of hashing, one block size.
    Names are packed, `NAME_BYTES` each. `instance` changes when an engine is started anew.
    """

    async def longest(self, family: str, names: bytes, engines: Sequence[str]) -> Mapping[str, int]:
        """How many of these names, from the first without a gap, each engine holds.

        One round trip, whatever the number of engines and blocks. Behind the first `EXACT_NAMES`
        the end is found by halving, so a gap there, with names held behind it, may be overlooked:
        engines hardly ever have one, since they give up the end of a prompt before its beginning.

        Returns:
            A count for every engine asked about, 0 if nothing is known of it.
        """

    async def apply(
        self,
        family: str,
        engine: str,
        instance: str,
        first: int,
        after: int,
        stored: bytes,
        removed: bytes,
        lease_s: float,
    ) -> None:
        """Batches `first` up to but not including `after` of an engine's events, as their net
        effect. Renews the lease of all it holds; without batches that is all it does.

        Args:
            stored, removed: names; none is in both.

        Raises:
            OutOfOrder: `first` is not next for this instance; nothing was changed.
        """

    async def rebuild(
        self, family: str, engine: str, instance: str, after: int, names: bytes, lease_s: float
    ) -> None:
        """Forget what an engine held; it holds these now, and batch `after` is next."""

    async def drop(self, family: str, engine: str) -> None:
        """Forget what an engine held."""
