"""The block names of one stream's prompt, kept up to date as the prompt changes."""

from __future__ import annotations

from collections.abc import Sequence

from cache_index.index import NAME_BYTES
from cache_index.names import Hashing, name


class BlockChain:
    """Hashes of the whole blocks of a prompt; each covers all tokens before it."""

    def __init__(self, hashing: Hashing, tokens: Sequence[int], salt: str | None = None) -> None:
        self.hashing = hashing
        self._salt = salt
        self._hashes: list[bytes] = []
        self._names = bytearray()
        self._rest: list[int] = []  # tokens behind the last whole block
        self.append(tokens)

    @property
    def names(self) -> bytes:
        """Packed."""
        return bytes(self._names)

    def append(self, tokens: Sequence[int]) -> None:
        """The prompt goes on with these."""
        self._rest += tokens
        parent = self._hashes[-1] if self._hashes else None
        new = self.hashing.chain(self._rest, parent, self._salt)
        self._hashes += new
        self._names += b"".join(map(name, new))
        del self._rest[: len(new) * self.hashing.block_size]

    def rewrite(self, tokens: Sequence[int], kept: int) -> None:
        """The prompt is these now, of which the first `kept` are as before."""
        blocks = min(kept // self.hashing.block_size, len(self._hashes))
        del self._hashes[blocks:], self._names[blocks * NAME_BYTES :]
        self._rest = []
        self.append(tokens[blocks * self.hashing.block_size :])
