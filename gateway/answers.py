"""Answers in the shapes of OpenAI chat completions: server-sent events, or one body."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine_adapter.messages import DoneEvent, ErrorEvent, Event, TokenEvent, TokenLogprob
from gateway.errors import EngineFailed, GatewayError, InputClosed
from gateway.stream import Stream

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": waiting\n\n"

Json = dict[str, Any]


def sse(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


async def next_event(stream: Stream, timeout_s: float) -> Event | None:
    """The next event of the answer, or None if none comes in time."""
    event = await stream.next_event(timeout_s)
    if event is None and stream.ended:  # it was cancelled, or its time is over
        return await stream.next_event(0) or ErrorEvent(error={})
    return event


def why_broken(stream: Stream) -> GatewayError:
    """What a client is told of an answer that broke off."""
    if stream.state in ("cancelled", "expired"):
        return InputClosed(f"the stream is {stream.state}")
    return stream.error or EngineFailed("the answer broke off")


def usage(event: DoneEvent) -> Json:
    """`cached_tokens` were computed before the input was closed."""
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "total_tokens": event.prompt_tokens + event.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": event.cached_tokens},
    }


def retrieval(stream: Stream) -> Json:
    """How its retrieval went, as a field beside those of the OpenAI API; none without any."""
    return {} if stream.retrieval is None else {"retrieval": stream.retrieval.report()}


def _logprobs(found: list[TokenLogprob] | None) -> Json | None:
    if found is None:
        return None
    return {
        "content": [
            _logprob(token) | {"top_logprobs": [_logprob(t) for t in token.top]} for token in found
        ]
    }


def _logprob(token: TokenLogprob) -> Json:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.token.encode())}


@dataclass(slots=True)
class Chunks:
    """Makes the `chat.completion.chunk` events of one answer."""

    stream: Stream
    include_usage: bool

    def first(self) -> bytes:
        """The event that names the role."""
        return sse(self._frame([_choice({"role": "assistant", "content": ""})]))

    def of(self, event: Event) -> Iterator[bytes]:
        """What one engine event becomes."""
        match event:
            case TokenEvent():
                choice = _choice({"content": event.text}, logprobs=_logprobs(event.logprobs))
                yield sse(self._frame([choice]))
            case DoneEvent():
                choice = _choice({}, finish_reason=event.finish_reason)
                yield sse(self._frame([choice]) | retrieval(self.stream))
                if self.include_usage:
                    yield sse(self._frame([]) | {"usage": usage(event)})
                yield DONE
            case ErrorEvent():
                yield sse(why_broken(self.stream).to_json())

    def _frame(self, choices: list[Json]) -> Json:
        frame: Json = {
            "id": f"chatcmpl-{self.stream.id}",
            "object": "chat.completion.chunk",
            "created": int(self.stream.created_s),
            "model": self.stream.model,
            "choices": choices,
        }
        if self.include_usage:
            frame["usage"] = None
        return frame


def _choice(delta: Json, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


@dataclass(slots=True)
class Whole:
    """Collects an answer into one `chat.completion`."""

    stream: Stream
    _texts: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprob] | None = None

    def add(self, event: TokenEvent) -> None:
        self._texts.append(event.text)
        if event.logprobs is not None:
            self._logprobs = (self._logprobs or []) + event.logprobs

    def body(self, done: DoneEvent) -> Json:
        message = {"role": "assistant", "content": "".join(self._texts)}
        return {
            "id": f"chatcmpl-{self.stream.id}",
            "object": "chat.completion",
            "created": int(self.stream.created_s),
            "model": self.stream.model,
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": _logprobs(self._logprobs),
                    "finish_reason": done.finish_reason,
                }
            ],
            "usage": usage(done),
        } | retrieval(self.stream)
