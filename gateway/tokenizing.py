"""Text that becomes tokens, and how much of it may wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from gateway.errors import Overloaded
from gateway.prompt import Document, Message, Prompt, PromptBuilder

T = TypeVar("T")


class Tokenizing:
    """Counts the bytes whose tokens are not there yet.

    A thread that has begun with a text goes on when nobody waits for its tokens any more, so its
    bytes count until it is done: hanging up makes no room for more.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.waiting_bytes = 0
        self._under_way = set[asyncio.Task[Any]]()

    @property
    def busy(self) -> bool:
        """Whether what is open already needs the room that is left."""
        return self.waiting_bytes > self.max_bytes / 2

    async def frame(self, builder: PromptBuilder, messages: Sequence[Message]) -> Prompt:
        """The prompt of a conversation, without documents yet.

        Raises:
            BadRequest: the chat template refuses the messages.
            Overloaded: there is too much else.
        """
        size = _text_bytes(messages)
        self._must_have_room(size)
        return await self._counted(builder.frame(messages), size)

    async def documents(
        self, builder: PromptBuilder, pieces: Sequence[tuple[str, str | None]], salt: str | None
    ) -> list[Document]:
        """Texts with their names, as documents. All of them count from the beginning on.

        Raises:
            Overloaded: there is too much else.
        """
        sizes = [len(text.encode()) for text, _ in pieces]
        self._must_have_room(sum(sizes))
        left, documents = sum(sizes), []
        self.waiting_bytes += left
        try:
            for (text, name), size in zip(pieces, sizes, strict=True):
                left -= size
                self.waiting_bytes -= size
                document = builder.at_once(text, name, salt=salt)
                if document is None:
                    document = await self._counted(builder.document(text, name, salt=salt), size)
                elif len(pieces) > 1:
                    await asyncio.sleep(0)  # a post of many short texts holds nobody up
                documents.append(document)
        finally:
            self.waiting_bytes -= left
        return documents

    async def found(self, builder: PromptBuilder, salt: str | None, text: str) -> Document:
        """What retrieval has found, as a document. A stream that was let in is not refused it."""
        return await self._counted(builder.document(text, salt=salt), len(text.encode()))

    async def stop(self) -> None:
        """Wait for nothing more."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _must_have_room(self, size_bytes: int) -> None:
        """One text of any size may be tokenized, but not a heap of them."""
        waiting = self.waiting_bytes
        if waiting and waiting + size_bytes > self.max_bytes:
            raise Overloaded(f"{waiting} bytes wait to be tokenized")

    async def _counted(self, work: Coroutine[Any, Any, T], size_bytes: int) -> T:
        """The result of some work, which counts until it is done."""
        task = asyncio.create_task(work)

        def done(_: asyncio.Task[T]) -> None:
            self.waiting_bytes -= size_bytes
            self._under_way.discard(task)
            if not task.cancelled():
                task.exception()  # whoever waited for it may be gone

        self.waiting_bytes += size_bytes
        self._under_way.add(task)
        task.add_done_callback(done)
        return await asyncio.shield(task)


def _text_bytes(value: Any) -> int:
    """Of all texts in a JSON value."""
    match value:
        case str():
            return len(value.encode())
        case dict():
            return sum(map(_text_bytes, value.values()))
        case list():
            return sum(map(_text_bytes, value))
        case _:
            return 0
