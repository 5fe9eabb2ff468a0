"""Collections on disk: created, filled, deleted; whole after a crash at any moment.

A collection is a folder. Each change writes a new state beside the old one and then, by renaming
one file, makes it the current one:

    NAME/current       which state is the current one, and what made its vectors
    NAME/state-.../    index and passages
    .lock              held by whoever changes something, in any process

Readers of any process see the old state or the new one. All methods block: call them in a thread.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final
from uuid import uuid4

import msgspec

from retrieval.collections import collection as states
from retrieval.collections.collection import Collection, Row
from retrieval.embedding import Embedder
from retrieval.source import Passage

NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class CollectionError(Exception):
    """A collection can't do what is asked."""


class BadName(CollectionError):
    """Names are 1 to 64 lower-case letters, digits, - and _, the first a letter or digit."""


class CollectionExists(CollectionError):
    """There is one of that name."""


class CollectionMissing(CollectionError):
    """There is none of that name."""


class CollectionUnreadable(CollectionError):
    """Its files are damaged, or were made with another embedder."""


class CollectionUnwritable(CollectionError):
    """What was asked can't be written, e.g. since the disk is full: nothing has changed."""


class _Current(msgspec.Struct, frozen=True):
    state: str
    embedder: str
    passages: int


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """What a collection holds."""

    name: str
    passages: int
    embedder: str


class Collections:
    """The collections in a folder, which is made when the first one is created."""

    def __init__(self, folder: Path, embedder: Embedder) -> None:
        self.embedder = embedder
        self._folder = folder
        self._opened: dict[str, tuple[str, Collection]] = {}
        self._opening = Lock()

    def list(self) -> list[CollectionInfo]:
        """All collections, by name."""
        names = sorted(path.parent.name for path in self._folder.glob("*/current"))
        currents = [(name, _current(self._folder / name)) for name in names]
        return [CollectionInfo(name, c.passages, c.embedder) for name, c in currents]

    def create(self, name: str) -> None:
        """Make an empty collection.

        Raises:
            BadName, CollectionExists, CollectionUnwritable: as they say.
        """
        folder = self._path(name)
        with self._locked():
            folder.mkdir(exist_ok=True)
            if (folder / "current").exists():
                raise CollectionExists(f"there is a collection {name}")
            self._commit(folder, states.empty(self.embedder.dimensions))

    def add(self, name: str, passages: Sequence[Passage]) -> int:
        """Embed passages and add them; one whose id is there replaces the older one.

        All are added or, if the process dies, none. Each call writes the whole collection, so add
        thousands at a time.

        Returns:
            How many passages the collection has then.

        Raises:
            BadName, CollectionMissing, CollectionUnreadable, CollectionUnwritable: as they say.
        """
        self.open(name)
        vectors = self.embedder.embed([passage.text for passage in passages])
        rows = [Row(p.id, p.text, p.title) for p in passages]
        with self._locked():
            grown = self.open(name).with_more(rows, vectors)
            self._commit(self._path(name), grown)
        return len(grown)

    def open(self, name: str) -> Collection:
        """A collection as it is now; read from disk if another process changed it.

        Raises:
            BadName, CollectionMissing, CollectionUnreadable: as they say.
        """
        folder = self._path(name)
        with self._opening:
            current = self._checked(folder)
            state, opened = self._opened.get(name, (None, None))
            while opened is None or state != current.state:
                state, opened = current.state, _load(folder, current.state)
                # another process may have removed that state while it was being read
                current = self._checked(folder)
                if opened is None and state == current.state:
                    raise CollectionUnreadable(f"the files of collection {name} are damaged")
                if opened is not None:
                    self._opened[name] = state, opened
            return opened

    def delete(self, name: str) -> None:
        """Remove a collection. Searches that have opened it end undisturbed.

        Raises:
            BadName, CollectionMissing: as they say.
        """
        folder = self._path(name)
        if not (folder / "current").exists():
            raise CollectionMissing(f"there is no collection {name}")
        with self._locked():
            (folder / "current").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        with self._opening:
            self._opened.pop(name, None)

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise BadName(f"not a name for a collection: {name!r}. {BadName.__doc__}")
        return self._folder / name

    def _checked(self, folder: Path) -> _Current:
        current = _current(folder)
        if current.embedder != self.embedder.name:
            raise CollectionUnreadable(
                f"collection {folder.name} was made with {current.embedder},"
                f" not with {self.embedder.name}"
            )
        return current

    def _commit(self, folder: Path, collection: Collection) -> None:
        """Write a state, make it the current one, and remove all others."""
        state = uuid4().hex
        written = folder / f"state-{state}"
        try:
            written.mkdir()
            collection.save(written)
            for path in (*written.iterdir(), written):
                _sync(path)
            current = _Current(state, self.embedder.name, len(collection))
            (folder / "next").write_bytes(msgspec.json.encode(current))
            _sync(folder / "next")
            os.replace(folder / "next", folder / "current")
        except BaseException:  # half of it would take the room that the disk lacks
            (folder / "next").unlink(missing_ok=True)
            shutil.rmtree(written, ignore_errors=True)
            raise
        _sync(folder)
        with self._opening:
            self._opened[folder.name] = state, collection
        for other in folder.glob("state-*"):
            if other != written:
                shutil.rmtree(other, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let nobody else change anything meanwhile.

        Raises:
            CollectionUnwritable: what was tried failed on the disk.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / ".lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as exc:
            raise CollectionUnwritable(f"it can't be written: {exc}") from exc


def _current(folder: Path) -> _Current:
    try:
        return msgspec.json.decode((folder / "current").read_bytes(), type=_Current)
    except FileNotFoundError:
        raise CollectionMissing(f"there is no collection {folder.name}") from None
    except msgspec.MsgspecError as exc:
        raise CollectionUnreadable(f"collection {folder.name} is damaged: {exc}") from exc


def _load(folder: Path, state: str) -> Collection | None:
    """A state, or None if its files are not whole."""
    try:
        return states.load(folder / f"state-{state}")
    except (OSError, RuntimeError, msgspec.MsgspecError):
        return None


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
