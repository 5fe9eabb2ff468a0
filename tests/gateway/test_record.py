"""What the index is told of a stream, write by write, is what the stream is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_index.index import StreamRecord
from cache_index.memory import MemoryIndex
from cache_index.names import Hashing, packed
from gateway.chain import BlockChain
from gateway.errors import StreamLost
from gateway.prompt import Document, Prompt
from gateway.record import About, ChunksTaken, Kept, Ledger, ListTaken, Taken, digest, pack, read
from gateway.requests import Options

HASHING = Hashing.of("sha256", 4)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=9).map(tuple)
documents = st.builds(Document, tokens, st.none() | st.text(max_size=5))
step = st.one_of(
    st.tuples(st.just("append"), st.lists(documents, max_size=3)),
    st.tuples(st.just("replace"), st.lists(documents, max_size=4)),
    st.tuples(st.just("confirm"), st.just([])),
    st.tuples(st.just("write"), st.just([])),
)


@dataclass
class History:
    """A stream as the gateway would lead it, without tasks."""

    prompt: Prompt
    taken: tuple[Taken, ...] = ()
    confirmed: int = 0
    rewrites: int = 0

    def __post_init__(self) -> None:
        self.chain = BlockChain(HASHING, self.prompt.open.all())

    def append(self, new: list[Document]) -> None:
        self.prompt = self.prompt.with_documents(new)
        self.taken += (ChunksTaken(1, self.prompt.context_tokens),)
        self.chain.append([t for d in new for t in d.tokens])

    def replace(self, new: list[Document]) -> None:
        prompt = self.prompt.with_only(new)
        kept, added = self.prompt.open.difference(prompt.open)
        self.prompt, self.confirmed = prompt, min(self.confirmed, kept)
        self.taken += (ListTaken(prompt.context_tokens, kept, 0, len(added)),)
        self.rewrites += 1
        self.chain.rewrite(prompt.open.all(), kept)

    def kept(self) -> Kept:
        about = About(
            model="m",
            prompt_id="p",
            created_s=1.0,
            head_tokens=len(self.prompt.head),
            question=pack(self.prompt.tail),
            options=Options(seed=1),
            digest=digest(self.prompt.open.all()[: self.confirmed]),
        )
        return Kept(
            engine="e",
            state="open",
            about=about,
            prompt=self.prompt,
            taken=self.taken,
            confirmed=self.confirmed,
            rewrites=self.rewrites,
            names=self.chain.names,
        )


@given(head=tokens, question=tokens, steps=st.lists(step, max_size=12), salt=st.integers())
async def test_a_record_that_is_changed_step_by_step_gives_the_stream_back(
    head: tuple[int, ...],
    question: tuple[int, ...],
    steps: list[tuple[str, list[Document]]],
    salt: int,
) -> None:
    index, ledger = MemoryIndex(), Ledger()
    history = History(Prompt.framed(head, question))
    engine_has: list[int] = []
    for action, new in [("write", []), *steps, ("write", [])]:
        if action == "append":
            history.append(new)
        elif action == "replace":
            history.replace(new)
        elif action == "confirm":  # the engine has the prompt as it is now
            engine_has = history.prompt.open.all()
            history.confirmed = len(engine_has)
        elif action == "write":
            await write(index, ledger, history.kept())
            found = read(await the_record(index))
            assert found.prompt(engine_has, HASHING) == history.prompt
            if engine_has and found.confirmed:  # another prompt of that length is found out
                with pytest.raises(StreamLost):
                    found.prompt([engine_has[0] ^ 1, *engine_has[1:]], None)
            assert found.taken == list(history.taken)
            assert found.about.options == Options(seed=1)
    # The whole record says what all its changes have made of it.
    record = await the_record(index)
    ledger.version = record.version
    assert ledger.whole("h", history.kept()) == record
    assert history.chain.names == packed(HASHING.chain(history.prompt.open.all()))


async def write(index: MemoryIndex, ledger: Ledger, now: Kept) -> None:
    if ledger.written is None:
        ledger.version += 1
        await index.put("s", ledger.whole("h", now), 60)
    else:
        await index.change("s", ledger.epoch, ledger.version, ledger.change(now), 60)
        ledger.version += 1
    ledger.written = replace(now)


async def the_record(index: MemoryIndex) -> StreamRecord:
    record = await index.get("s")
    assert record is not None
    return record
