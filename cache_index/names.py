"""Names of blocks of tokens: chained hashes, the same that vLLM computes for its prefix cache.

The hash of a whole block covers its tokens, the hash of the block before it, and, in the first
block, the tenant's salt. A block's *name* is the last bytes of its hash, which is how engines
publish it, so names computed here and names from KV events need no translation.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cbor2

from cache_index.index import NAME_BYTES

SEED = "vllm-none-hash"
"""What vLLM begins every chain with, unless PYTHONHASHSEED is set."""

PICKLE_PROTOCOL = 5
"""vLLM takes the highest there is; that has been this one since Python 3.8."""


def sha256(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, PICKLE_PROTOCOL)).digest()


def sha256_cbor(value: object) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


ALGORITHMS = {"sha256": sha256, "sha256_cbor": sha256_cbor}
"""By the names they have in vLLM's `--prefix-caching-hash-algo`."""


@dataclass(frozen=True, slots=True)
class Hashing:
    """One way of naming blocks. Engines that share it hold comparable blocks."""

    algorithm: str
    block_size: int
    root: bytes
    """Stands for the block before the first."""

    @classmethod
    def of(cls, algorithm: str, block_size: int, seed: str = SEED) -> Hashing:
        """As an engine with this algorithm, block size and PYTHONHASHSEED does it.

        Raises:
            ValueError: an algorithm whose hashes cannot be foretold.
        """
        if algorithm not in ALGORITHMS:
            raise ValueError(f"{algorithm!r} is none of {', '.join(ALGORITHMS)}")
        return cls(algorithm, block_size, ALGORITHMS[algorithm](seed))

    @property
    def family(self) -> str:
        """Names all engines whose block names mean the same."""
        return f"{self.algorithm}-{self.block_size}-{self.root[:4].hex()}"

    def chain(
        self, tokens: Sequence[int], parent: bytes | None = None, salt: str | None = None
    ) -> list[bytes]:
        """Hashes of the whole blocks of `tokens`; what is left at their end is not covered.

        Args:
            tokens: Python integers; others, like numpy's, would be hashed as something else.
            parent: hash of the block before the first of these; None at the prompt's beginning.
            salt: the tenant's; counts only at the prompt's beginning.
        """
        digest, size = ALGORITHMS[self.algorithm], self.block_size
        extra = (("cache_salt", salt),) if salt and parent is None else None
        before = self.root if parent is None else parent
        hashes = []
        for start in range(0, len(tokens) - size + 1, size):
            before = digest((before, tuple(tokens[start : start + size]), extra))
            hashes.append(before)
            extra = None
        return hashes


def name(block_hash: bytes | int) -> bytes:
    """The name of a block by its hash, or by what KV events call it."""
    if isinstance(block_hash, int):
        return block_hash.to_bytes(NAME_BYTES, "big")
    return block_hash[-NAME_BYTES:]


def packed(block_hashes: Iterable[bytes | int]) -> bytes:
    """The names of blocks, one behind the other."""
    return b"".join(map(name, block_hashes))
