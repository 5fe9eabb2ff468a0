"""Fetching a page that a stranger named: where from, how much and how long are limited.

FetchFailed
  AddressRefused (retrieval.addresses)   not to be fetched
  TooManyRedirects
  BodyRefused                            too large, a bomb, not decodable, not of a wanted type
  Unreachable                            no connection, too slow, broken off: may be tried again
"""

from __future__ import annotations

import asyncio
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from retrieval.addresses import AddressRefused, FetchFailed, FetchPolicy
from retrieval.transport import GuardedTransport, Resolve, system_resolve

USER_AGENT = "stream2llm/0.1"
_PIECE_BYTES = 64 << 10
_RATIO_FROM_BYTES = 256 << 10
_REDIRECTS = (301, 302, 303, 307, 308)


class TooManyRedirects(FetchFailed):
    """The page moves more often than the policy allows."""


class BodyRefused(FetchFailed):
    """There is a page, but not one to be read."""


class Unreachable(FetchFailed):
    """No answer, or not all of it in time."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """An answer. The body is read for status 200 only."""

    url: httpx.URL
    """Where it came from, after redirects."""
    status: int
    content_type: str
    retry_after: str
    body: bytes


async def anything(url: httpx.URL) -> None:
    """Follows every redirect that the policy allows."""


class Fetcher:
    """Fetches pages under a policy. Use as a context manager: closing it ends its connections."""

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolve: Resolve = system_resolve,
        connections: int = 16,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """
        Args:
            resolve: looks names up.
            connections: open at once, at most.
            tls: which certificates are trusted, if not those that come with httpx.
        """
        self.policy = policy
        # A transport and no client: no proxies, credentials or certificates from the environment,
        # no cookies from page to page, no redirect that is not looked at here.
        self._transport = GuardedTransport(
            policy, resolve=resolve, connections=connections, tls=tls
        )
        self._headers = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "gzip"}
        limits = httpx.Timeout(policy.idle_s, connect=policy.connect_s, pool=policy.total_s)
        self._extensions = {"timeout": limits.as_dict()}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._transport.aclose()

    async def fetch(
        self,
        url: str | httpx.URL,
        *,
        types: Collection[str] = (),
        before_redirect: Callable[[httpx.URL], Awaitable[None]] = anything,
    ) -> Fetched:
        """Fetch a page, following its redirects; each is judged as the first address was.

        Args:
            types: content types that are read, others are refused; empty: all.
            before_redirect: is asked before a redirect is followed, and raises to stop it. The
                time it takes is not the page's.

        Raises:
            FetchFailed: there is no such page to be had; its kinds are above.
        """
        target = self.policy.check_url(url)
        left_s = self.policy.total_s
        for _ in range(self.policy.max_redirects + 1):
            begun_s = time.monotonic()
            answer = await self._within(left_s, target, types)
            left_s -= time.monotonic() - begun_s
            if isinstance(answer, Fetched):
                return answer
            target = self.policy.check_url(answer)
            await before_redirect(target)
        raise TooManyRedirects(str(url), f"more than {self.policy.max_redirects} redirects")

    async def _within(
        self, seconds: float, url: httpx.URL, types: Collection[str]
    ) -> Fetched | httpx.URL:
        try:
            async with asyncio.timeout(seconds):
                return await self._get(url, types)
        except TimeoutError as error:
            raise Unreachable(str(url), f"not read in {self.policy.total_s:g} s") from error
        except (httpx.HTTPError, OSError) as error:
            raise Unreachable(str(url), f"{type(error).__name__} {error}") from error

    async def _get(self, url: httpx.URL, types: Collection[str]) -> Fetched | httpx.URL:
        """One answer; of a redirect, where it points."""
        async with self._answer(url) as response:
            headers = response.headers
            if response.status_code in _REDIRECTS and "Location" in headers:
                return _joined(url, headers["Location"])
            body = b""
            if response.status_code == 200:
                self._check_head(url, headers, types)
                body = await self._read(url, response)
            kind, retry = headers.get("Content-Type", ""), headers.get("Retry-After", "")
            return Fetched(url, response.status_code, kind, retry, body)

    @asynccontextmanager
    async def _answer(self, url: httpx.URL) -> AsyncIterator[httpx.Response]:
        request = httpx.Request("GET", url, headers=self._headers, extensions=self._extensions)
        response = await self._transport.handle_async_request(request)
        try:
            yield response
        finally:
            await response.aclose()

    def _check_head(self, url: httpx.URL, headers: httpx.Headers, types: Collection[str]) -> None:
        """Refuse by the headers alone what would be refused in the end."""
        kind = media_type(headers.get("Content-Type", ""))
        if types and kind and kind not in types:
            raise BodyRefused(str(url), f"content type {kind}")
        length = headers.get("Content-Length", "")
        if length.isdecimal() and int(length[:20]) > self.policy.max_body_bytes:
            raise BodyRefused(str(url), f"{length} bytes, more than {self.policy.max_body_bytes}")

    async def _read(self, asked: httpx.URL, response: httpx.Response) -> bytes:
        url, policy = str(asked), self.policy
        body, received = bytearray(), 0
        decoder = _decoder(url, response.headers.get("Content-Encoding", ""))
        async for part in response.aiter_raw():
            received += len(part)
            for piece in decoder.decode(part):
                body += piece
                if len(body) > policy.max_body_bytes:
                    raise BodyRefused(url, f"more than {policy.max_body_bytes} bytes")
                if len(body) > max(_RATIO_FROM_BYTES, received * policy.max_ratio):
                    raise BodyRefused(url, f"grows more than {policy.max_ratio:g} times")
        decoder.end()
        return bytes(body)


class _Plain:
    """A body that comes as it is."""

    def decode(self, data: bytes) -> Iterator[bytes]:
        yield data

    def end(self) -> None:
        pass


class _Gunzip:
    """A gzip body, in pieces, so that whoever takes them can stop before it has grown."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._empty = True

    def decode(self, data: bytes) -> Iterator[bytes]:
        more = True
        while more and not self._member.eof:
            try:
                piece = self._member.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                raise BodyRefused(self._url, f"not gzip ({error})") from error
            self._empty = False
            yield piece
            data = self._member.unconsumed_tail
            # what zlib has taken in may yet give more than one piece
            more = bool(data) or len(piece) == _PIECE_BYTES

    def end(self) -> None:
        if not (self._member.eof or self._empty):
            raise BodyRefused(self._url, "gzip that ends too early")


def _decoder(url: str, coding: str) -> _Plain | _Gunzip:
    match coding.strip().lower():
        case "" | "identity":
            return _Plain()
        case "gzip" | "x-gzip":
            return _Gunzip(url)
    raise BodyRefused(url, f"content encoding {coding[:40]!r}, which was not asked for")


def _joined(url: httpx.URL, location: str) -> httpx.URL:
    try:
        return url.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise AddressRefused(location, f"not a URL ({error})") from error


def media_type(content_type: str) -> str:
    """The type alone, in lower case: `text/html` of `text/HTML; charset=utf-8`."""
    return content_type.partition(";")[0].strip().lower()
