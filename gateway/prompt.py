"""Prompts: the chat template split around the documents, and tokens.

Tokens, not text, go to the engines: a stream's prompt is exactly the concatenation of its
head's, its documents' and its tail's tokens, each tokenized on its own.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Self

from transformers import AutoTokenizer

from gateway.errors import BadRequest, ContextTooLong
from gateway.prefix import Prefix

DOCUMENTS = "{{documents}}"
"""Where a message's content has this, the documents go."""

_PLACE = "\ue000stream2llm documents\ue001"
"""Stands for the documents while the template is rendered; private-use characters."""

SHORT_CHARS = 256
"""Texts of up to so many characters are tokenized at once, longer ones in a thread."""

Message = dict[str, Any]
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of context. `name` is what the client calls it, if anything."""

    tokens: Tokens
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a stream wants its engine to read. A value: every change makes a new one."""

    head: Tokens
    tail: Tokens
    documents: tuple[Document, ...]
    open: Prefix = field(repr=False, compare=False)
    """What can be read before the input is closed: everything but the tail."""

    @classmethod
    def framed(cls, head: Tokens, tail: Tokens) -> Self:
        """One without documents."""
        return cls(head, tail, (), Prefix.of(head))

    def with_documents(self, documents: Sequence[Document]) -> Prompt:
        """The same prompt with more documents behind those it has."""
        new = [token for document in documents for token in document.tokens]
        return replace(self, documents=(*self.documents, *documents), open=self.open.extended(new))

    def with_only(self, documents: Sequence[Document]) -> Prompt:
        """The same prompt with these documents in place of those it has."""
        return self.framed(self.head, self.tail).with_documents(documents)

    @property
    def context_tokens(self) -> int:
        """Tokens of the documents."""
        return len(self.open) - len(self.head)

    @property
    def length(self) -> int:
        """Tokens of the whole prompt, tail included."""
        return len(self.open) + len(self.tail)

    def must_fit(
        self, limit: int | None, answer_tokens: int, *, context_limit: int | None, param: str
    ) -> None:
        """Refuse a prompt that is longer than its tenant takes, or leaves no room for its answer.

        Args:
            limit: tokens that the model takes; None if that is not known.
            context_limit: of the documents; None: any.
            param: what the client sent.

        Raises:
            ContextTooLong
        """
        if context_limit is not None and self.context_tokens > context_limit:
            raise ContextTooLong(
                f"the documents would have {self.context_tokens} tokens, but one stream may have "
                f"{context_limit}",
                param=param,
            )
        if limit is not None and self.length + answer_tokens > limit:
            raise ContextTooLong(
                f"the prompt would have {self.length} tokens and the answer up to {answer_tokens}, "
                f"but the model takes {limit}",
                param=param,
            )


def place_documents(messages: Sequence[Message]) -> list[Message]:
    """The messages with the documents' place marked: where `{{documents}}` stands in one of
    them, otherwise before the content of the last user message.

    Raises:
        BadRequest: no message can take the documents, or several claim them.
    """
    marked = [copy.copy(message) for message in messages]
    texts = [m.get("content") for m in marked]
    claims = sum(t.count(DOCUMENTS) for t in texts if isinstance(t, str))
    if claims > 1:
        raise BadRequest(f"{DOCUMENTS} may stand in one place only", param="messages")
    if claims == 1:
        for message, text in zip(marked, texts, strict=True):
            if isinstance(text, str):
                message["content"] = text.replace(DOCUMENTS, _PLACE)
        return marked
    for message in reversed(marked):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            message["content"] = _PLACE + message["content"]
            return marked
    raise BadRequest("no user message with text content to put the documents in", param="messages")


class PromptBuilder:
    """Makes prompts for one model. Tokenizing runs in an executor, once per content."""

    def __init__(self, tokenizer: str, executor: Executor, cache_size: int) -> None:
        """
        Args:
            tokenizer: folder or name that transformers can load; must have a chat template.
            cache_size: how many chunks' tokens are remembered.
        """
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        # Retrieved text is data: what looks like a control token in it is plain text.
        self._literal = copy.deepcopy(self._tokenizer.backend_tokenizer)
        self._literal.encode_special_tokens = True
        self._executor = executor
        self._cache: OrderedDict[bytes, asyncio.Future[Tokens]] = OrderedDict()
        self._cache_size = cache_size

    async def frame(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of a conversation, without documents yet.

        Raises:
            BadRequest: the chat template refuses the messages.
        """
        marked = place_documents(messages)
        prompt: Prompt = await self._run(self._render, marked)
        return prompt

    async def document(
        self, text: str, name: str | None = None, *, salt: str | None = None
    ) -> Document:
        """A document; a newline is put behind its text. Tokens are cached by content.

        Args:
            salt: of the tenant, up to 64 ASCII characters. Nobody with another one can find out, by
                how long it takes, that a text was there before.
        """
        return Document(await asyncio.shield(self._tokens(text, salt)), name)

    def at_once(
        self, text: str, name: str | None = None, *, salt: str | None = None
    ) -> Document | None:
        """As `document`, if nothing has to be waited for: the text is short, or known. None if a
        thread has to do it, which has begun then."""
        tokens = self._tokens(text, salt)
        return Document(tokens.result(), name) if tokens.done() else None

    def _tokens(self, text: str, salt: str | None) -> asyncio.Future[Tokens]:
        salting = (salt or "").encode()
        key = hashlib.blake2b(text.encode(), digest_size=16, key=salting).digest()
        cached = self._cache.get(key)
        if cached is None or cached.cancelled():
            cached = self._cache[key] = self._tokenized(text)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        else:
            self._cache.move_to_end(key)
        return cached

    def _tokenized(self, text: str) -> asyncio.Future[Tokens]:
        """A short text is done in about the time that it takes to have a thread do it."""
        if len(text) > SHORT_CHARS:
            return asyncio.ensure_future(self._run(self._encode_literally, text))
        tokens: asyncio.Future[Tokens] = asyncio.get_running_loop().create_future()
        tokens.set_result(self._encode_literally(text))
        return tokens

    async def _run(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def _encode_literally(self, text: str) -> Tokens:
        # The fast one leaves out where in the text each token is.
        (encoded,) = self._literal.encode_batch_fast([text + "\n"], add_special_tokens=False)
        return tuple(encoded.ids)

    def _render(self, marked: list[Message]) -> Prompt:
        try:
            text: str = self._tokenizer.apply_chat_template(
                marked, tokenize=False, add_generation_prompt=True
            )
        except Exception as e:  # templates raise what they like
            raise BadRequest(f"the chat template refuses: {e}", param="messages") from e
        head, place, tail = text.partition(_PLACE)
        if not place:
            raise BadRequest("the chat template drops the documents", param="messages")
        return Prompt.framed(self._encode(head), self._encode(tail))

    def _encode(self, text: str) -> Tokens:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))
