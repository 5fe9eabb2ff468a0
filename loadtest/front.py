"""A gateway as its users see it: streams and plain chat over HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import aiohttp
import orjson

Json = dict[str, Any]


class Refused(Exception):
    """The gateway refused a request, or an answer broke off. Its text is the error's code."""


class Front:
    """One gateway. Raises `Refused` or `aiohttp.ClientError` wherever it is asked something."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, model: str, options: Mapping[str, Any]
    ) -> None:
        """
        Args:
            options: as of chat completions, for every stream and chat.
        """
        self._http = http
        self._url = url.rstrip("/")
        self._options: Json = {"model": model, **options}

    async def open(self, messages: Sequence[Json]) -> str:
        """Open a stream; its id."""
        body = self._options | {"messages": list(messages)}
        created = await self._asked("POST", "/v1/streams", body)
        return str(created["id"])

    async def add(self, stream: str, seq: int, texts: Sequence[str]) -> Json:
        """Add chunks; the acknowledgement."""
        body = {"seq": seq, "chunks": [{"text": text} for text in texts]}
        return await self._asked("POST", f"/v1/streams/{stream}/chunks", body)

    async def replace(self, stream: str, seq: int, documents: Sequence[Json]) -> Json:
        """Put a ranked list in place of all documents; the acknowledgement."""
        body = {"seq": seq, "documents": list(documents)}
        return await self._asked("PUT", f"/v1/streams/{stream}/documents", body)

    async def cancel(self, stream: str) -> None:
        """Stop a stream."""
        await self._asked("DELETE", f"/v1/streams/{stream}", None)

    def answer(self, stream: str) -> AsyncGenerator[Json, None]:
        """Close the input; the events of the answer as they come, without the opening one."""
        body = {"stream": True, "stream_options": {"include_usage": True}}
        return self._events(f"/v1/streams/{stream}/finish", body)

    def chat(self, messages: Sequence[Json]) -> AsyncGenerator[Json, None]:
        """A plain chat completion; its events."""
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        body = self._options | {"messages": list(messages)} | usage
        return self._events("/v1/chat/completions", body)

    async def _asked(self, method: str, path: str, body: Json | None) -> Json:
        data = None if body is None else orjson.dumps(body)
        async with self._http.request(
            method, self._url + path, data=data, headers={"Content-Type": "application/json"}
        ) as response:
            answer: Json = await _checked(response)
            return answer

    async def _events(self, path: str, body: Json) -> AsyncGenerator[Json, None]:
        async with self._http.post(
            self._url + path,
            data=orjson.dumps(body),
            headers={"Content-Type": "application/json"},
        ) as response:
            if response.status != 200:
                await _checked(response)
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event: Json = orjson.loads(line[len(b"data: ") :])
                    if "error" in event:
                        raise Refused(_code(event))
                    yield event
                elif line.startswith(b"data: [DONE]"):
                    return
        raise Refused("ended_early")


def brings_token(event: Json) -> bool:
    """Whether an event of an answer has a piece of it.

    The one that opens an answer names the role and has no text. A later one may have no text
    either, where a token is part of a character.
    """
    return any(_is_piece(choice["delta"]) for choice in event["choices"])


def _is_piece(delta: Json) -> bool:
    return bool(delta.get("content")) or ("content" in delta and "role" not in delta)


async def _checked(response: aiohttp.ClientResponse) -> Json:
    raw = await response.read()
    try:
        body = orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError:
        body = {}
    if response.status >= 400:
        raise Refused(_code(body) if body else f"status_{response.status}")
    return body if isinstance(body, dict) else {}


def _code(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "error")
    return "error"
