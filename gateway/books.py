"""What one stream's record in the index has to say, from write to write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import ref

from gateway.chain import BlockChain
from gateway.keeper import Keeper
from gateway.prefix import Prefix
from gateway.prompt import Document, Prompt
from gateway.record import About, Digest, Kept, Ledger, pack

if TYPE_CHECKING:
    from gateway.stream import Stream


class Books:
    """Follows a stream's prompt, so that a write costs what has changed."""

    def __init__(self, stream: Stream, keeper: Keeper | None) -> None:
        """
        Args:
            keeper: None for a stream of which nobody else is to know.
        """
        self.ledger = Ledger()
        self._of = ref(stream)
        self._keeper = keeper
        self._shared = keeper is not None and keeper.shared
        self._rewrites = 0
        self._chain: BlockChain | None = None
        self._digested = Digest()

    @property
    def _stream(self) -> Stream:
        stream = self._of()
        assert stream is not None, "only the stream itself asks for its books"
        return stream

    @property
    def kept(self) -> bool:
        """Whether other replicas can go on with the stream."""
        return self._shared

    @property
    def keeps_end(self) -> bool:
        """Whether it is known for a while how the stream has ended."""
        return self._keeper is not None

    @property
    def heard_of_s(self) -> float:
        """When the index last heard of the stream; infinite if it is not to hear of it."""
        return self.ledger.heard_of_s if self._shared else float("inf")

    async def write(self, *, renew: bool) -> None:
        """Bring the record to what the stream is now. Where no other replica could read it, only
        its end is written.

        Args:
            renew: its lease too, when there is nothing new.

        Raises:
            Moved: another replica has taken the stream over.
        """
        if self._keeper is not None and (self._shared or self._stream.ended):
            await self._keeper.keep(self._stream.id, self.ledger, self.now, renew=renew)

    async def release(self) -> None:
        """Nobody holds the stream from now on.

        Raises:
            Moved: another replica does.
            IndexAway: it could not be told.
        """
        if self._keeper is not None:
            await self._keeper.release(self._stream.id, self.ledger)

    def lost(self) -> None:
        """Nobody knows what the index has of it."""
        self.ledger.written = None

    def appended(self, new: Sequence[Document]) -> None:
        """Documents were put behind those in the prompt."""
        if self._chain is not None:
            self._chain.append([token for document in new for token in document.tokens])

    def rewritten(self, prefix: Prefix, kept: int) -> None:
        """The prompt begins with these tokens now, of which the first `kept` are as before."""
        self._rewrites += 1
        self._digested = Digest()
        if self._chain is not None:
            self._chain.rewrite(prefix.all(), kept)

    @property
    def behind(self) -> bool:
        """Whether the record does not say yet which engine has the prompt, and under which id."""
        written, line = self.ledger.written, self._stream.line
        if written is None or line.engine is None:
            return False
        return (written.engine, written.about.prompt_id) != (line.engine.url, line.prompt_id)

    def now(self) -> Kept:
        """The stream at this moment."""
        stream, line = self._stream, self._stream.line
        # An engine may drop a closed prompt with its answer: then the record needs it all.
        # One without the plug-in has no tokens to give to another replica.
        kept_there = line.engine is not None and line.engine.keeps_prompts
        confirmed = line.confirmed if stream.state == "open" and kept_there else 0
        about = About(
            model=stream.model,
            prompt_id=line.prompt_id,
            created_s=stream.created_s,
            head_tokens=len(stream.prompt.head),
            question=pack(stream.prompt.tail),
            options=stream.options,
            digest=self._digest(confirmed),
            tenant=stream.tenant.name,
            asked=stream.asked,
        )
        return Kept(
            engine="" if stream.engine is None else stream.engine.url,
            state=stream.state,
            about=about,
            prompt=Prompt.framed((), ()) if stream.ended else stream.prompt,
            taken=tuple(stream.taken),
            confirmed=confirmed,
            rewrites=self._rewrites + stream.ended,
            names=b"" if stream.ended else self._block_names(),
        )

    def _digest(self, confirmed: int) -> bytes:
        """Of the first tokens; what was digested before is not digested again."""
        if confirmed < len(self._digested):
            self._digested = Digest()
        begun = len(self._digested)
        self._digested.add(self._stream.prompt.open.behind(begun)[: confirmed - begun])
        return self._digested.value

    def _block_names(self) -> bytes:
        """Of the prompt's whole blocks, as its engine names them; none before it has one."""
        engine = self._stream.line.engine
        hashing = None if engine is None else engine.hashing
        if hashing is None:
            return b""
        if self._chain is None or self._chain.hashing != hashing:
            salt = self._stream.tenant.cache_salt
            self._chain = BlockChain(hashing, self._stream.prompt.open.all(), salt)
        return self._chain.names
