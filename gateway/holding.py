"""Requests for a stream, wherever it is held: here, at another replica, or at one that is gone.

    here                     the handler answers
    another replica, alive   the request is sent on, and its answer back
    another replica, gone    this replica takes the stream over, and the handler answers

A replica is gone if it refuses connections, or if it has not renewed its lease when it does not
answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from urllib.parse import quote

import aiohttp
from aiohttp import web

from cache_index.index import StreamRecord
from engine_adapter.errors import EngineError, UnknownPrompt
from engine_adapter.messages import PromptTokens
from gateway import record as records
from gateway.bodies import read_body
from gateway.errors import (
    AnswerGone,
    EngineFailed,
    IndexAway,
    NotHeld,
    StreamLost,
    StreamNotFound,
    from_engine,
)
from gateway.idempotency import HEADER
from gateway.identity import is_forwarded, sent_on, tenant_of
from gateway.keeper import NOBODY, Keeper, Moved
from gateway.keys import (
    ENGINES,
    KEEPER,
    LIFECYCLE,
    METRICS,
    SESSION,
    SETTINGS,
    STREAMS,
    TAKING_OVER,
    TELLING,
    TENANTS,
)
from gateway.line import abort
from gateway.logs import bind
from gateway.placement import Engine, ModelPlacer
from gateway.record import Ledger
from gateway.relay import end_to_end, relay
from gateway.stream import ALIVE, Stream
from gateway.tasks import begin

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5
ASKING_S = 2.0
"""How long another replica may take to say whether it has a stream."""
PAUSE_S = 0.02
UNKNOWN_S = 30.0
"""How long such a replica is waited for when the index can't say whether it is alive."""
SSE = "text/event-stream"
ANSWERS = ("/finish", "/answer")
WATCH_S = 0.5
"""How often a replica that does not answer is looked up."""

Handler = Callable[[web.Request, Stream, bytes], Awaitable[web.StreamResponse]]
Route = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HolderGone(Exception):
    """The replica that holds a stream does not answer."""

    def __init__(self, *, heard: bool) -> None:
        """
        Args:
            heard: it may have acted on the request.
        """
        super().__init__("the holder is gone")
        self.heard = heard


def on_stream(
    limit: Callable[[web.Request], int], *, repeatable: Callable[[bytes], bool] = lambda body: True
) -> Callable[[Handler], Route]:
    """A handler of requests for one stream, called where the stream is.

    Args:
        limit: the largest body, in bytes.
        repeatable: whether a request with this body does no harm when it is carried out twice.
    """

    def decorate(handler: Handler) -> Route:
        async def route(request: web.Request) -> web.StreamResponse:
            body = await read_body(request, limit(request))
            for attempt in range(MAX_ATTEMPTS):
                await asyncio.sleep(PAUSE_S * attempt)
                with suppress(Moved):
                    found = await _find(request)
                    if isinstance(found, Stream):
                        bind(stream_id=found.id)
                        return await handler(request, found, body)
                    holder = found if isinstance(found, str) else found.holder
                    try:
                        again = repeatable(body)
                        return await _send_on(request, body, holder, repeatable=again)
                    except HolderGone as gone:
                        if isinstance(found, str) or (gone.heard and not again):
                            raise EngineFailed("the replica that held the stream died") from gone
                        _must_be_alive(request, found)
                        await _take_over(request.app, request.match_info["id"], found)
            raise IndexAway("the stream moves between replicas")

        return route

    return decorate


async def _find(request: web.Request) -> Stream | StreamRecord | str:
    """The stream, if it is held here; otherwise its record, or the replica that has it.

    Raises:
        StreamNotFound, IndexAway, NotHeld
        Moved: look again.
    """
    app, stream_id = request.app, request.match_info["id"]
    stream = app[STREAMS].find(stream_id)
    if stream is not None:
        _must_own(request, stream.tenant.name)
        return stream
    record = await app[KEEPER].find(stream_id)
    if record is None:
        return await _asked_around(request)
    _must_own(request, records.read(record).about.tenant)
    if record.holder == NOBODY and app[LIFECYCLE].draining and not is_forwarded(request):
        for other in await app[KEEPER].others():
            return other
    if record.holder in (NOBODY, app[KEEPER].replica):  # released, or from before a new start
        _must_be_alive(request, record)
        await _take_over(app, stream_id, record)
        raise Moved
    if is_forwarded(request):
        raise NotHeld(f"{stream_id!r} is held by another replica")
    return record


def _must_own(request: web.Request, tenant: str) -> None:
    """To others it looks as if there were no such stream."""
    if tenant != tenant_of(request).name:
        raise StreamNotFound(f"no stream {request.match_info['id']!r}")


def _must_be_alive(request: web.Request, record: StreamRecord) -> None:
    """Refuse what is asked of a stream that has ended, where nobody has more than its record.

    Raises:
        AnswerGone: its answer is asked for.
        StreamNotFound
    """
    if record.state not in ALIVE:
        if request.path.endswith(ANSWERS):
            raise AnswerGone(f"the stream is {record.state}, and its answer is not kept any more")
        raise StreamNotFound(f"no stream {request.match_info['id']!r}")


async def _asked_around(request: web.Request) -> str:
    """The replica that holds a stream of which the index knows nothing. A replica that could not
    reach the index has streams that are not in it.

    Raises:
        StreamNotFound, IndexAway
    """
    app, stream_id = request.app, request.match_info["id"]
    if not is_forwarded(request):
        others = sorted(await app[KEEPER].others())
        has = await asyncio.gather(*(_has(request, replica) for replica in others))
        for replica, yes in zip(others, has, strict=True):
            if yes:
                return replica
    raise StreamNotFound(f"no stream {stream_id!r}")


async def _has(request: web.Request, replica: str) -> bool:
    url = f"{replica}/v1/streams/{quote(request.match_info['id'], safe='')}"
    headers, timeout = sent_on(request), aiohttp.ClientTimeout(total=ASKING_S)
    with suppress(aiohttp.ClientError, TimeoutError):
        async with request.app[SESSION].get(url, headers=headers, timeout=timeout) as answer:
            return answer.status == 200
    return False


# Sending on.


async def _send_on(
    request: web.Request, body: bytes, holder: str, *, repeatable: bool
) -> web.StreamResponse:
    """Have the holder answer.

    Raises:
        HolderGone
        Moved: it does not hold the stream any more.
    """
    app = request.app
    app[METRICS].forwarded.inc()
    headers = end_to_end(request.headers)
    headers.update(sent_on(request))
    sent = app[SESSION].request(
        request.method,
        holder + request.path_qs,
        data=body or None,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, connect=2.0),
        allow_redirects=False,
    )
    try:
        async with app[LIFECYCLE].until_the_end():
            answer = await _watched(asyncio.ensure_future(sent), app[KEEPER], holder)
    except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorDNSError) as e:
        raise EngineFailed("the replica that holds the stream can't be reached") from e
    except aiohttp.ClientConnectorError as e:  # refused: nobody listens there any more
        raise HolderGone(heard=False) from e
    except (aiohttp.ClientError, TimeoutError) as e:
        if not repeatable:
            raise EngineFailed("the connection to the replica that holds the stream broke") from e
        raise Moved from e  # if that one is dead, the next connection is refused
    except asyncio.CancelledError:
        _hung_up(app, request, holder)
        raise
    async with answer:
        if answer.status == NotHeld.status:
            raise Moved
        silence_s = 3 * app[SETTINGS].now.heartbeat_s if answer.content_type == SSE else None
        try:
            return await relay(request, answer, silence_s)
        except (asyncio.CancelledError, ConnectionError):
            _hung_up(app, request, holder)
            raise


def _hung_up(app: web.Application, request: web.Request, holder: str) -> None:
    """The client is gone. The holder sees a connection break, and can't tell whether that was the
    client or only this replica, so it is told."""
    if not request.path.endswith("/finish") or HEADER in request.headers:
        return  # an answer with an idempotency key waits for its client to come back
    if app[LIFECYCLE].ending:
        return  # not the client's doing

    async def told() -> None:
        url = holder + request.path.removesuffix("/finish")
        headers, timeout = sent_on(request), aiohttp.ClientTimeout(total=ASKING_S)
        with suppress(aiohttp.ClientError, TimeoutError):
            await app[SESSION].delete(url, headers=headers, timeout=timeout)

    task = begin(told(), "telling a replica that a client is gone")
    app[TELLING].add(task)
    task.add_done_callback(app[TELLING].discard)


async def _watched(
    sending: asyncio.Future[aiohttp.ClientResponse], keeper: Keeper, holder: str
) -> aiohttp.ClientResponse:
    """The holder's answer; or HolderGone, when its lease has run out before it answers."""
    try:
        known_s = time.monotonic()
        while True:
            await asyncio.wait([sending], timeout=WATCH_S)
            if sending.done():
                return sending.result()
            with suppress(IndexAway):
                if holder not in await keeper.others():
                    raise HolderGone(heard=True)
                known_s = time.monotonic()
            if time.monotonic() > known_s + UNKNOWN_S:
                raise EngineFailed("the replica that holds the stream does not answer")
    finally:
        sending.cancel()


# Taking over.


async def _take_over(app: web.Application, stream_id: str, record: StreamRecord) -> None:
    """Hold a stream from now on. Of several requests that come to this, one does it.

    Raises:
        Moved: another replica was quicker.
        EngineFailed: its engine does not say what it has of the prompt.
        StreamLost: nobody has the whole prompt any more.
        StreamNotFound: it had ended.
    """
    under_way = app[TAKING_OVER]
    if stream_id not in under_way:
        task = asyncio.create_task(_taken_over(app, stream_id, record))
        under_way[stream_id] = task
        task.add_done_callback(lambda _: under_way.pop(stream_id))
    await asyncio.shield(under_way[stream_id])


async def _taken_over(app: web.Application, stream_id: str, record: StreamRecord) -> None:
    record = await app[KEEPER].claim(stream_id, record.epoch)
    logger.warning("stream %s is taken over", stream_id)
    app[METRICS].taken_over.inc()
    if record.state not in ALIVE:
        raise StreamNotFound(f"no stream {stream_id!r}")
    found = records.read(record)
    tenant = app[TENANTS].named(found.about.tenant)
    if tenant is None:
        raise StreamNotFound(f"no stream {stream_id!r}")
    engine = app[ENGINES].by_url(record.engine)
    has = await _what_is_there(engine, found.about.prompt_id)
    ledger = Ledger(record.epoch, record.version)
    try:
        prompt = found.prompt(
            [] if has is None else has.tokens,
            None if engine is None else engine.hashing,
            tenant.cache_salt,
        )
    except StreamLost as e:  # its record goes too, or whoever is asked next would try the same
        logger.error("stream %s is lost: %s", stream_id, e)
        app[METRICS].streams.labels("lost").inc()
        await app[KEEPER].forget(stream_id, ledger)
        await abort(engine, found.about.prompt_id)
        raise
    resumable = has is not None and not has.finished
    if not resumable:
        await abort(engine, found.about.prompt_id)
    placer = ModelPlacer(app[ENGINES], found.about.model, tenant.cache_salt)
    stream = app[STREAMS].adopt(stream_id, tenant, found, prompt, placer, ledger)
    # From here to its beginning nothing is waited for: requests find it at once.
    if resumable and engine is not None and has is not None:
        stream.line.connect(engine)
        stream.line.resume(found.about.prompt_id, has.version, has.tokens, found.confirmed)
    else:
        stream.line.begin_anew()
    await stream.begin()


async def _what_is_there(engine: Engine | None, prompt_id: str) -> PromptTokens | None:
    """What an engine has of a prompt."""
    if engine is None:
        return None
    try:
        return await engine.client.tokens(prompt_id)
    except UnknownPrompt:
        return None
    except EngineError as e:
        raise from_engine(e) from e
