"""A stream as bytes in the index, and back: what another replica needs to go on with it.

The engine has the tokens of the prompt, so a record does not repeat them: its `tail` has those
behind the part that the engine has for certain. Once the input is closed the engine may drop the
prompt with the answer, so then the tail is the whole prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import orjson

from cache_index.index import Change, Splice, StreamRecord
from cache_index.names import Hashing, packed
from gateway.errors import StreamLost
from gateway.prompt import Document, Prompt, Tokens
from gateway.requests import Options
from gateway.tenants import EVERYBODY

_TOKEN = array("I").itemsize


class About(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """What rarely changes in a stream."""

    model: str
    prompt_id: str
    """Under which the engine has the prompt."""
    created_s: float
    head_tokens: int
    question: bytes
    """Tokens behind the documents, packed."""
    options: Options
    digest: bytes = b""
    """Of the tokens that only the engine has."""
    tenant: str = EVERYBODY.name
    """Whose it is."""
    asked: bytes = b""
    """Under an idempotency key."""


class ChunksTaken(msgspec.Struct, frozen=True, tag="chunks", array_like=True):
    """Acknowledges a post of chunks."""

    tokens: int
    tokens_received: int
    """Tokens of all documents in the prompt."""


class ListTaken(msgspec.Struct, frozen=True, tag="list", array_like=True):
    """Acknowledges a ranked list. Counts are tokens of the prompt up to its tail."""

    tokens_received: int
    kept: int
    """The longest common beginning of the prompt before and after."""
    invalidated: int
    added: int


Taken = ChunksTaken | ListTaken


@dataclass(frozen=True, slots=True)
class Kept:
    """A stream at one moment, as its record is to say it."""

    engine: str
    state: str
    about: About
    prompt: Prompt
    taken: Sequence[Taken]
    confirmed: int
    """Tokens at the front that the engine has for certain; 0 puts all into the record."""
    rewrites: int
    """How often the documents were replaced so far."""
    names: bytes
    """Of the prompt's whole blocks."""


@dataclass(slots=True)
class Ledger:
    """What the index has of one stream, so that a write carries no more than what is new."""

    epoch: int = 0
    version: int = -1
    written: Kept | None = None
    """None: nothing, or nobody knows."""
    heard_of_s: float = -float("inf")
    """When the last write that reached the index was begun."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One write after the other."""

    def whole(self, holder: str, now: Kept) -> StreamRecord:
        """The record of this moment."""
        prompt = now.prompt
        return StreamRecord(
            epoch=self.epoch,
            version=self.version,
            holder=holder,
            engine=now.engine,
            state=now.state,
            about=msgspec.msgpack.encode(now.about),
            posts=_lines(now.taken),
            documents=_documents(prompt.documents),
            tail=pack(prompt.open.behind(now.confirmed)),
            names=now.names,
        )

    def change(self, now: Kept) -> Change:
        """From what was written last to this moment."""
        before = self.written
        assert before is not None
        posts = Splice(add=_lines(now.taken[len(before.taken) :]))
        if now.rewrites == before.rewrites and now.confirmed >= before.confirmed:
            documents, tail = self._appended(before, now)
        else:
            documents = Splice(keep=0, add=_documents(now.prompt.documents))
            tail = Splice(keep=0, add=pack(now.prompt.open.behind(now.confirmed)))
        return Change(
            engine=now.engine if now.engine != before.engine else None,
            state=now.state if now.state != before.state else None,
            about=msgspec.msgpack.encode(now.about) if now.about != before.about else None,
            posts=posts,
            documents=documents,
            tail=tail,
            names=_renamed(before.names, now.names),
        )

    @staticmethod
    def _appended(before: Kept, now: Kept) -> tuple[Splice, Splice]:
        new = now.prompt.documents[len(before.prompt.documents) :]
        tokens = pack(token for document in new for token in document.tokens)
        # What was confirmed since may include some of what this very write would add.
        drop = (now.confirmed - before.confirmed) * _TOKEN
        held = (len(before.prompt.open) - before.confirmed) * _TOKEN
        tail = Splice(drop=min(drop, held), add=tokens[max(drop - held, 0) :])
        return Splice(add=_documents(new)), tail


def _renamed(before: bytes, now: bytes) -> Splice:
    if now.startswith(before):
        return Splice(add=now[len(before) :])
    return Splice(keep=0, add=now)


@dataclass(frozen=True, slots=True)
class Found:
    """A stream as its record says."""

    about: About
    taken: list[Taken]
    documents: list[tuple[int, str | None]]
    """Length in tokens, and name, of each."""
    tail: list[int]
    names: bytes

    @property
    def confirmed(self) -> int:
        """Tokens at the front that only the engine has."""
        lengths = (length for length, _ in self.documents)
        return self.about.head_tokens + sum(lengths) - len(self.tail)

    def prompt(
        self, engine_has: Sequence[int], hashing: Hashing | None, salt: str | None = None
    ) -> Prompt:
        """The prompt, with what the engine has of it.

        Args:
            hashing: how the names were made, if that is known; then they are compared.
            salt: of the stream's tenant.

        Raises:
            StreamLost: that is not enough, or not what it should be.
        """
        if len(engine_has) < self.confirmed:
            raise StreamLost("the engine no longer has the beginning of this stream's prompt")
        tokens = [*engine_has[: self.confirmed], *self.tail]
        if self.about.digest != digest(tokens[: self.confirmed]):
            raise StreamLost("the engine has another prompt than this stream's")
        if self.names and hashing is not None and _names(hashing, tokens, salt) != self.names:
            raise StreamLost("the engine has another prompt than this stream's")
        place = self.about.head_tokens
        documents = []
        for length, name in self.documents:
            documents.append(Document(tuple(tokens[place : place + length]), name))
            place += length
        empty = Prompt.framed(tuple(tokens[: self.about.head_tokens]), unpack(self.about.question))
        return empty.with_documents(documents)


def read(record: StreamRecord) -> Found:
    """What a record says."""
    return Found(
        about=msgspec.msgpack.decode(record.about, type=About),
        taken=[msgspec.convert(line, Taken) for line in _unlines(record.posts)],
        documents=[(length, name) for length, name in _unlines(record.documents)],
        tail=list(unpack(record.tail)),
        names=record.names,
    )


def _names(hashing: Hashing, tokens: Sequence[int], salt: str | None) -> bytes:
    return packed(hashing.chain(tokens, salt=salt))


class Digest:
    """Tells token sequences apart; made as they grow."""

    def __init__(self) -> None:
        self._hash, self._length = hashlib.blake2b(digest_size=8), 0

    def __len__(self) -> int:
        """Tokens so far."""
        return self._length

    def add(self, tokens: Sequence[int]) -> None:
        """Go on with these."""
        self._hash.update(pack(tokens))
        self._length += len(tokens)

    @property
    def value(self) -> bytes:
        """Of all tokens so far."""
        return self._hash.digest()


def digest(tokens: Sequence[int]) -> bytes:
    """Of a whole sequence."""
    made = Digest()
    made.add(tokens)
    return made.value


def pack(tokens: Iterable[int]) -> bytes:
    """Token ids, four bytes each, least significant first."""
    return array("I", tokens).tobytes()


def unpack(packed: bytes) -> Tokens:
    """The token ids that `pack` has packed."""
    tokens = array("I")
    tokens.frombytes(packed)
    return tuple(tokens)


def _documents(documents: Sequence[Document]) -> bytes:
    return b"".join(orjson.dumps([len(d.tokens), d.name]) + b"\n" for d in documents)


def _lines(taken: Sequence[Taken]) -> bytes:
    return b"".join(msgspec.json.encode(entry) + b"\n" for entry in taken)


def _unlines(lines: bytes) -> list[Any]:
    return [orjson.loads(line) for line in lines.splitlines()]
