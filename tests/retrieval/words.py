"""An embedder that needs no model: texts are alike when they share words."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from zlib import crc32

import numpy as np

from retrieval.embedding import Vectors


class Words:
    """Each word is a direction of its own, nearly."""

    dimensions = 32

    def __init__(self, name: str = "words") -> None:
        self.name = name

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.array([self._vector(text) for text in texts], np.float32).reshape(-1, 32)

    def _vector(self, text: str) -> Vectors:
        words = [np.random.default_rng(crc32(w.encode())).normal(size=32) for w in text.split()]
        total = np.sum(words, axis=0)
        return np.asarray(total / np.linalg.norm(total), np.float32)


@contextmanager
def files_no_longer_than(size_bytes: int) -> Iterator[None]:
    """As if the disk had no more room, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
