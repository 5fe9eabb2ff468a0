"""Refusals, before anything is done for a request: by quota (429) and by load (503)."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from gateway.accounts import Account
from gateway.engines import Engine
from gateway.errors import Overloaded
from gateway.identity import TENANT, tenant_of
from gateway.keys import ACCOUNTS, ENGINES, LOAD, SETTINGS, STREAMS
from gateway.settings import Settings
from gateway.tokenizing import Tokenizing


class Load:
    """What the gateway has taken on and not done yet."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.tokenizing = Tokenizing(settings.max_tokenizing_bytes)

    def use(self, settings: Settings) -> None:
        """Go by these settings from now on."""
        self._settings = settings
        self.tokenizing.max_bytes = settings.max_tokenizing_bytes

    def check(self, engines: Sequence[Engine]) -> None:
        """Whether engines, one or more, are fit for one more stream. Those that are open are served
        further: a stream that was let in has been promised its answer.

        Raises:
            Overloaded
        """
        queued_tokens = sum(engine.queued_tokens for engine in engines)
        if queued_tokens > self._settings.max_queued_tokens * len(engines):
            raise Overloaded(f"{queued_tokens} tokens wait to be computed")
        if self.tokenizing.busy:
            raise Overloaded(f"{self.tokenizing.waiting_bytes} bytes wait to be tokenized")


def account_of(request: web.Request) -> Account:
    """The account of the tenant that sends a request."""
    return request.app[ACCOUNTS].of(tenant_of(request))


def admit(request: web.Request, *, stream: bool) -> None:
    """Refuse a request for a stream or an answer before it is read. No replica sends one on, so
    each is counted once.

    Args:
        stream: it opens a stream.

    Raises:
        RateLimited, Overloaded, EngineFailed
    """
    account_of(request).ask()
    check_room(request, stream=stream)


def check_room(request: web.Request, *, stream: bool) -> None:
    """The part of `admit` that does not concern a request whose stream is there already.

    Raises:
        RateLimited, Overloaded, EngineFailed
    """
    if stream:
        account_of(request).check_streams()
        request.app[STREAMS].check_room()
    if ready := request.app[ENGINES].ready:
        request.app[LOAD].check(ready)


def chunk_limit(request: web.Request) -> int:
    """Bytes of a chunk post."""
    limit = request.app[SETTINGS].now.max_chunk_bytes
    return min(limit, tenant_of(request).chunk_bytes or limit)


def body_limit(request: web.Request) -> int:
    """Bytes of any other body."""
    limit = request.app[SETTINGS].now.max_body_bytes
    return min(limit, tenant_of(request).body_bytes or limit)


async def tell_limits(request: web.Request, response: web.StreamResponse) -> None:
    """Every response says what is left; one that was sent on, what is left where it comes from."""
    if TENANT in request:
        for name, value in account_of(request).headers():
            response.headers.setdefault(name, value)
