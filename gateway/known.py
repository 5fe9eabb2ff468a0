"""Documents of one stream by the id its client gave, so that no text has to be sent twice."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.prompt import Document

MAX_DROPPED_TOKENS = 131_072
"""Of documents that left the prompt; about as much as one long prompt."""


class KnownDocuments:
    """Those with an id in the prompt, all of them, and the last that left it.

    The dropped ones have at most `max_dropped` tokens together, characters of their ids
    included; beyond that, those dropped longest ago are forgotten.
    """

    def __init__(self, max_dropped: int = MAX_DROPPED_TOKENS) -> None:
        self._max_dropped = max_dropped
        self._current: dict[str, Document] = {}
        self._dropped: dict[str, Document] = {}  # in the order in which they were dropped
        self._dropped_size = 0

    def get(self, name: str) -> Document | None:
        """What was last sent under this id, or None if it is unknown or forgotten."""
        return self._current.get(name) or self._dropped.get(name)

    def add(self, documents: Sequence[Document]) -> None:
        """Documents were put behind those in the prompt."""
        for document in documents:
            if document.name is not None:
                self._undrop(document.name)
                self._current[document.name] = document

    def replace(self, documents: Sequence[Document]) -> None:
        """Documents were put in place of those in the prompt."""
        before, self._current = self._current, {}
        self.add(documents)
        for name, document in before.items():
            if name not in self._current:
                self._dropped[name] = document
                self._dropped_size += _size(document)
        while self._dropped_size > self._max_dropped:
            self._undrop(next(iter(self._dropped)))

    def clear(self) -> None:
        """Nobody will ask any more."""
        self._current, self._dropped, self._dropped_size = {}, {}, 0

    def _undrop(self, name: str) -> None:
        if (document := self._dropped.pop(name, None)) is not None:
            self._dropped_size -= _size(document)


def _size(document: Document) -> int:
    return len(document.tokens) + len(document.name or "")
