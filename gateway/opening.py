"""Streams that are opened over HTTP, and the documents that posts bring them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from aiohttp import web

from gateway.builders import builder_for
from gateway.errors import UnknownDocument
from gateway.identity import tenant_of
from gateway.keys import ENGINES, LOAD, RETRIEVALS, STREAMS
from gateway.limits import account_of
from gateway.placement import ModelPlacer
from gateway.prompt import Document
from gateway.requests import Chunk, Create, Options, Ranked, merged
from gateway.retrieving import ANSWER_TOKENS
from gateway.stream import Stream, Tokenized


async def open_stream(
    request: web.Request,
    body: Create,
    *,
    kept: bool,
    stream_id: str | None = None,
    asked: bytes = b"",
) -> Stream:
    """A stream with the documents it begins with, and its retrieval.

    Args:
        kept: other replicas can go on with it.
        stream_id, asked: of one that is made under an idempotency key.

    Raises:
        BadRequest, ContextTooLong, ModelNotFound, EngineFailed, Overloaded, RetrievalRefused
        Moved: another replica has made it, under the same key.
    """
    app, tenant = request.app, tenant_of(request)
    app[ENGINES].admit(body.model, app[STREAMS].alive(body.model))
    app[LOAD].check(app[ENGINES].serving(body.model))
    app[STREAMS].check_crowd(body.model, account_of(request))
    wanted = body.wanted
    plan = None if wanted is None else app[RETRIEVALS].plan(wanted, body.messages)
    builder = await builder_for(app, body.model)
    prompt = await app[LOAD].tokenizing.frame(builder, body.messages)
    placer = ModelPlacer(app[ENGINES], body.model, tenant.cache_salt)
    options = merged(Options(), body)
    app[ENGINES].admit(body.model, app[STREAMS].alive(body.model))  # others may have come since
    stream = app[STREAMS].create(
        tenant, body.model, prompt, placer, options, kept=kept, stream_id=stream_id
    )
    stream.asked = asked
    try:
        stream.check_length(prompt)
        if body.documents:
            stream.take(await tokenized(app, stream, body.documents)())
        await stream.begin()
        if plan is not None:
            tokenize = partial(app[LOAD].tokenizing.found, builder, tenant.cache_salt)
            room = _room(stream, placer.max_model_len)
            stream.retrieval = app[RETRIEVALS].start(stream, plan, tokenize, room)
    except BaseException:
        await (stream.cancel() if stream_id is None else app[STREAMS].unmake(stream))
        raise
    return stream


def _room(stream: Stream, max_model_len: int | None) -> int | None:
    """Tokens that the documents of a stream may have together; None: nobody knows."""
    allowed = stream.limits.context_tokens
    if max_model_len is None:
        return allowed
    frame = stream.prompt.length - stream.prompt.context_tokens
    room = max_model_len - frame - (stream.options.answer_tokens or ANSWER_TOKENS)
    return room if allowed is None else min(room, allowed)


def tokenized(app: web.Application, stream: Stream, chunks: Sequence[Chunk]) -> Tokenized:
    """The documents of a post of chunks, when they are called for."""

    async def documents() -> list[Document]:
        return await _texts(app, stream, [(chunk.text, chunk.id) for chunk in chunks])

    return documents


def known_or_tokenized(app: web.Application, stream: Stream, ranked: Sequence[Ranked]) -> Tokenized:
    """A ranked list; an id that stands alone means what the stream knows by it.

    Raises, when called:
        BadRequest: the stream does not know an id; nothing has been tokenized then.
    """

    async def documents() -> list[Document]:
        known: dict[str | None, Document] = {
            r.id: _known(stream, r.id) for r in ranked if r.text is None and r.id is not None
        }
        new = iter(await _texts(app, stream, [(r.text, r.id) for r in ranked if r.text]))
        return [known[r.id] if r.text is None else next(new) for r in ranked]

    return documents


async def _texts(
    app: web.Application, stream: Stream, pieces: Sequence[tuple[str, str | None]]
) -> list[Document]:
    builder = await builder_for(app, stream.model)
    return await app[LOAD].tokenizing.documents(builder, pieces, stream.tenant.cache_salt)


def _known(stream: Stream, name: str) -> Document:
    document = stream.known.get(name)
    if document is None:
        raise UnknownDocument(
            f"document {name!r} has no text and is not known here", param="documents"
        )
    return document
