"""Connections that go to checked addresses only: httpx on httpcore, with its own look-up of names.

The name is resolved here, every address it has is checked, and the connection is made to one of
those; so there is no second look-up that could be answered differently. TLS and the Host header
keep the name.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from functools import cache

import httpcore
import httpx

from retrieval.addresses import FetchPolicy

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The IP addresses of a host, for a port. Raises OSError if it has none."""

_TRANSLATED = {
    httpcore.ConnectError: httpx.ConnectError,
    httpcore.NetworkError: httpx.NetworkError,
    httpcore.ProtocolError: httpx.ProtocolError,
    httpcore.TimeoutException: httpx.TimeoutException,
    httpcore.UnsupportedProtocol: httpx.UnsupportedProtocol,
}


async def system_resolve(host: str, port: int) -> list[str]:
    """As the operating system answers."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


@cache
def _public_tls() -> ssl.SSLContext:
    """The certificates that come with httpx; reading them takes too long to do it every time."""
    return httpx.create_ssl_context(trust_env=False)


class GuardedTransport(httpx.AsyncBaseTransport):
    """An httpx transport, HTTP/1.1 and HTTP/2, that obeys a `FetchPolicy` where it connects.

    Requests raise AddressRefused beside httpx's own errors.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolve: Resolve = system_resolve,
        connections: int = 16,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls or _public_tls(),
            max_connections=connections,
            keepalive_expiry=5.0,
            http2=True,
            network_backend=_GuardedBackend(policy, resolve),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        asked = httpcore.Request(
            request.method,
            url,
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _translated():
            answer = await self._pool.handle_async_request(asked)
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(answer),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translated():
            async for part in self._answer.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._answer.aclose()


class _GuardedBackend(httpcore.AsyncNetworkBackend):
    def __init__(self, policy: FetchPolicy, resolve: Resolve) -> None:
        self._policy = policy
        self._resolve = resolve
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore names it)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(await self._checked(host, port), port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"{host}: no connection in {timeout:g} s") from error

    async def _checked(self, host: str, port: int) -> list[str]:
        """Every address of the host. One that may not be connected to spoils all: a name that is
        both public and private is an attack or a mistake."""
        try:
            found = [_literal(host)] if _literal(host) else await self._resolve(host, port)
        except OSError as error:
            raise httpcore.ConnectError(f"{host}: no address ({error})") from error
        if not found:
            raise httpcore.ConnectError(f"{host}: no address")
        return [self._policy.check_address(host, address) for address in found]

    async def _connect(self, addresses: list[str], port: int) -> httpcore.AsyncNetworkStream:
        share_s = self._policy.connect_s / len(addresses)
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._network.connect_tcp(address, port, timeout=share_s)
        return await self._network.connect_tcp(addresses[-1], port)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _literal(host: str) -> str:
    """The address, if the host is one and not a name; else empty."""
    host = host.removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return ""


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """httpcore's errors as httpx's, so that whoever uses the transport knows one kind."""
    try:
        yield
    except tuple(_TRANSLATED) as error:
        kind = next(to for kind, to in _TRANSLATED.items() if isinstance(error, kind))
        raise kind(str(error) or type(error).__name__) from error
