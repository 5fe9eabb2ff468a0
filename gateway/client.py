"""A small asynchronous client.

    async with Client("http://127.0.0.1:8000") as client:
        async with client.stream(model, messages, max_tokens=64) as stream:
            async for page in pages:
                await stream.send(page.text, id=page.url)
            async for piece in stream.answer():
                print(piece, end="")

Leaving the `async with` of a stream before its answer is complete cancels it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

Json = dict[str, Any]

ELSEWHERE = ("draining", "index_unavailable")
"""Codes of errors with which a replica sends clients to another one."""
PATIENCE_S = 20.0
"""How long one request is asked of one replica after the other."""
PAUSE_S = 0.1


class StreamError(Exception):
    """The gateway refused a request, or an answer broke off."""

    def __init__(self, error: Json, status: int | None = None) -> None:
        super().__init__(str(error.get("message", error)))
        self.code: str | None = error.get("code")
        self.status = status
        """HTTP status, or None for an answer that broke off."""
        self.error = error


class Client:
    """A gateway, or several that share an index."""

    def __init__(self, url: str, *others: str, timeout_s: float = 60.0) -> None:
        """
        Args:
            others: URLs of further replicas: one that is not there, or about to end, has its
                requests asked of the next.
            timeout_s: longest silence on a connection; a waiting answer is never silent that
                long, since the gateway sends heartbeats.
        """
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout_s, trust_env=False)
        self._replicas = _Replicas(self._http, (url, *others))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._http.aclose()

    @asynccontextmanager
    async def stream(
        self, model: str, messages: Sequence[Json], **options: Any
    ) -> AsyncIterator[Stream]:
        """Open a stream.

        Args:
            options: as of chat completions, e.g. `max_tokens`; `documents` to begin with some;
                `retrieval` for what the gateway is to find itself.

        Raises:
            StreamError: the gateway refuses it.
        """
        body = {"model": model, "messages": list(messages), **options}
        created = _checked(await self._replicas.whole("POST", "/v1/streams", body))
        stream = Stream(self._replicas, created)
        try:
            yield stream
        finally:
            await stream.cancel()


class Stream:
    """One open stream; see `Client.stream`."""

    def __init__(self, replicas: _Replicas, created: Json) -> None:
        self._replicas = replicas
        self._path = f"/v1/streams/{created['id']}"
        self._seq = 0
        self._complete = False
        self.id: str = created["id"]
        self.usage: Json | None = None
        """Token counts, once the answer is complete."""
        self.finish_reason: str | None = None
        self.retrieval: Json | None = None
        """How the gateway's own retrieval went, once the answer is complete; None without any."""

    async def send(self, text: str, *, id: str | None = None) -> int:
        """Add a piece of context; returns its tokens.

        Raises:
            StreamError: refused, e.g. with code `context_length_exceeded`.
        """
        body: Json = {"text": text, "seq": self._seq}
        if id is not None:
            body["id"] = id
        acknowledged = _checked(
            await self._replicas.whole("POST", self._path + "/chunks", body, repeatable=True)
        )
        self._seq += 1
        return int(acknowledged["tokens"])

    async def replace(self, documents: Sequence[Json]) -> Json:
        """Put a ranked list in place of all context sent so far.

        Args:
            documents: `{"id": ..., "text": ...}`; one sent before may be `{"id": ...}` alone.

        Returns:
            Token counts: `tokens_received`, `kept`, `invalidated`, `added`.

        Raises:
            StreamError: refused, e.g. an id alone that the stream does not know.
        """
        body: Json = {"documents": list(documents), "seq": self._seq}
        taken = _checked(
            await self._replicas.whole("PUT", self._path + "/documents", body, repeatable=True)
        )
        self._seq += 1
        return taken

    async def status(self) -> Json:
        """State and token counts."""
        return _checked(await self._replicas.whole("GET", self._path, repeatable=True))

    async def answer(self, **options: Any) -> AsyncIterator[str]:
        """Close the input and give the pieces of the answer as they come.

        Args:
            options: override those the stream was opened with.

        Raises:
            StreamError: refused, or the answer broke off.
        """
        body = self._last_post | {
            "stream": True, "stream_options": {"include_usage": True}, **options,
        }  # fmt: skip
        response = await self._replicas.asked("POST", self._path + "/finish", body)
        async with aclosing(response):
            if response.status_code != 200:
                await response.aread()
                _checked(response)
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    self._complete = True
                    return
                if line.startswith("data: ") and (piece := self._piece(orjson.loads(line[6:]))):
                    yield piece
        raise StreamError({"message": "the answer ended before it was complete"})

    def _piece(self, event: Json) -> str:
        if "error" in event:
            error = StreamError(event["error"])
            self._complete = error.code not in ELSEWHERE  # else another replica has the stream
            raise error
        self.usage = event.get("usage") or self.usage
        self.retrieval = event.get("retrieval") or self.retrieval
        if not event["choices"]:
            return ""
        choice = event["choices"][0]
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        return choice["delta"].get("content") or ""

    async def finish(self, **options: Any) -> Json:
        """Close the input and give the whole answer, a `chat.completion` object."""
        asked = self._last_post | {"stream": False, **options}
        body = _checked(await self._replicas.whole("POST", self._path + "/finish", asked))
        self._complete = True
        self.usage, self.retrieval = body["usage"], body.get("retrieval")
        return body

    @property
    def _last_post(self) -> Json:
        """What `finish` says of the posts before it: none that was acknowledged may be missing."""
        return {"seq": self._seq - 1} if self._seq else {}

    async def cancel(self) -> None:
        """Free the stream's memory, unless its answer is complete."""
        if not self._complete:
            self._complete = True
            await self._replicas.whole("DELETE", self._path, repeatable=True)


class _Replicas:
    """Asks the replica that answered last, and the next one where that can't answer. Where there is
    one only, everything is asked once."""

    def __init__(self, http: httpx.AsyncClient, urls: Sequence[str]) -> None:
        self._http = http
        self._urls = [url.rstrip("/") for url in urls]
        self._at = 0

    async def whole(
        self, method: str, path: str, body: Json | None = None, *, repeatable: bool = False
    ) -> httpx.Response:
        """As `asked`, with its body."""
        response = await self.asked(method, path, body, repeatable=repeatable)
        async with aclosing(response):
            await response.aread()
        return response

    async def asked(
        self, method: str, path: str, body: Json | None = None, *, repeatable: bool = False
    ) -> httpx.Response:
        """The beginning of an answer, for the caller to read and close.

        Args:
            repeatable: it does no harm to carry it out twice, so it is asked again also where
                nobody knows whether it was.

        Raises:
            httpx.TransportError: no replica can be reached, or a connection broke.
        """
        until_s = time.monotonic() + PATIENCE_S
        again = httpx.TransportError if repeatable else httpx.ConnectError
        while True:
            url = self._urls[self._at] + path
            last = len(self._urls) == 1 or time.monotonic() > until_s
            try:
                request = self._http.build_request(method, url, json=body)
                response = await self._http.send(request, stream=True)
                if last or not await _sends_away(response):
                    return response
            except again:
                if last:
                    raise
            self._at = (self._at + 1) % len(self._urls)
            await asyncio.sleep(PAUSE_S)


async def _sends_away(response: httpx.Response) -> bool:
    """Whether another replica is to be asked instead; nothing was carried out then."""
    if response.status_code != 503:
        return False
    await response.aread()
    try:
        _checked(response)
    except StreamError as e:
        return e.code in ELSEWHERE
    return False


def _checked(response: httpx.Response) -> Json:
    try:
        body: Json = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = {"error": {"message": response.text[:200]}}
    if response.status_code >= 400:
        raise StreamError(body.get("error", body), response.status_code)
    return body
