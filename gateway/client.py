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

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import httpx
import orjson

Json = dict[str, Any]


class StreamError(Exception):
    """The gateway refused a request, or an answer broke off."""

    def __init__(self, error: Json, status: int | None = None) -> None:
        super().__init__(str(error.get("message", error)))
        self.code: str | None = error.get("code")
        self.status = status
        """HTTP status, or None for an answer that broke off."""
        self.error = error


class Client:
    """A gateway."""

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        """
        Args:
            timeout_s: longest silence on a connection; a waiting answer is never silent that
                long, since the gateway sends heartbeats.
        """
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout_s, trust_env=False)

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
        stream = Stream(self._http, await _post(self._http, "/v1/streams", body))
        try:
            yield stream
        finally:
            await stream.cancel()


class Stream:
    """One open stream; see `Client.stream`."""

    def __init__(self, http: httpx.AsyncClient, created: Json) -> None:
        self._http = http
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
        acknowledged = await _post(self._http, self._path + "/chunks", body)
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
        taken = _checked(await self._http.put(self._path + "/documents", json=body))
        self._seq += 1
        return taken

    async def status(self) -> Json:
        """State and token counts."""
        return _checked(await self._http.get(self._path))

    async def answer(self, **options: Any) -> AsyncIterator[str]:
        """Close the input and give the pieces of the answer as they come.

        Args:
            options: override those the stream was opened with.

        Raises:
            StreamError: refused, or the answer broke off.
        """
        body = {"stream": True, "stream_options": {"include_usage": True}, **options}
        async with self._http.stream("POST", self._path + "/finish", json=body) as response:
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
            self._complete = True
            raise StreamError(event["error"])
        self.usage = event.get("usage") or self.usage
        self.retrieval = event.get("retrieval") or self.retrieval
        if not event["choices"]:
            return ""
        choice = event["choices"][0]
        self.finish_reason = choice["finish_reason"] or self.finish_reason
        return choice["delta"].get("content") or ""

    async def finish(self, **options: Any) -> Json:
        """Close the input and give the whole answer, a `chat.completion` object."""
        body = await _post(self._http, self._path + "/finish", {"stream": False, **options})
        self._complete = True
        self.usage, self.retrieval = body["usage"], body.get("retrieval")
        return body

    async def cancel(self) -> None:
        """Free the stream's memory, unless its answer is complete."""
        if not self._complete:
            self._complete = True
            await self._http.delete(self._path)


async def _post(http: httpx.AsyncClient, path: str, body: Json) -> Json:
    return _checked(await http.post(path, json=body))


def _checked(response: httpx.Response) -> Json:
    try:
        body: Json = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        body = {"error": {"message": response.text[:200]}}
    if response.status_code >= 400:
        raise StreamError(body.get("error", body), response.status_code)
    return body
