"""What a gateway passes through to an engine: plain requests of the OpenAI API, in small.

Without a tokenizer four bytes of text count as one token. Of the sampling values only the length
of the answer has an effect.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from aiohttp import web

from engine_adapter.errors import BadOperation, EngineError, PromptTooLong
from engine_adapter.messages import DoneEvent, ErrorEvent, Event, TokenEvent, decode
from engine_adapter.simulated.realtime import DEFAULTS, RealTimeEngine
from engine_adapter.simulated.routes import json_response, streamed

BYTES_PER_TOKEN = 4

Json = dict[str, Any]


class StreamOptions(msgspec.Struct):
    """Options of a streamed answer."""

    include_usage: bool = False


class Body(msgspec.Struct, kw_only=True):
    """What is read of a request; anything else in it is ignored."""

    model: str | None = None
    prompt: str | list[int] | None = None
    messages: list[Json] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    cache_salt: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """How the answer to one request is written down."""

    request_id: str
    model: str
    chat: bool
    streamed: bool
    created_s: int

    def part(self, text: str | None, finish_reason: str | None = None) -> Json:
        """A piece of the answer, or all of it."""
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        if not self.chat:
            return self.frame([choice | {"text": text or ""}])
        message: Json = {} if text is None else {"role": "assistant", "content": text}
        return self.frame([choice | {"delta" if self.streamed else "message": message}])

    def frame(self, choices: list[Json]) -> Json:
        """What is around the choices."""
        kind = "chat.completion" if self.chat else "text_completion"
        chunk = ".chunk" if self.chat and self.streamed else ""
        return {
            "id": self.request_id,
            "object": kind + chunk,
            "created": self.created_s,
            "model": self.model,
            "choices": choices,
        }


class PlainRequests:
    """The routes `/v1/models`, `/v1/completions` and `/v1/chat/completions`."""

    def __init__(self, engine: RealTimeEngine, model: str, max_model_len: int) -> None:
        self._engine = engine
        self._model = model
        self._max_model_len = max_model_len
        self._started_s = int(time.time())
        self._numbers = itertools.count()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self._models),
            web.post("/v1/completions", self._completions),
            web.post("/v1/chat/completions", self._chat),
        ]

    async def _models(self, request: web.Request) -> web.Response:
        model = {
            "id": self._model,
            "object": "model",
            "created": self._started_s,
            "owned_by": "stream2llm",
            "max_model_len": self._max_model_len,
        }
        return json_response({"object": "list", "data": [model]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = decode(Body, await request.read())
        if body.prompt is None:
            raise BadOperation("prompt is missing")
        tokens = tokens_of(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return await self._answered(request, body, tokens, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = decode(Body, await request.read())
        if body.messages is None:
            raise BadOperation("messages is missing")
        tokens = tokens_of(msgspec.json.encode(body.messages).decode())
        return await self._answered(request, body, tokens, chat=True)

    async def _answered(
        self, request: web.Request, body: Body, tokens: list[int], *, chat: bool
    ) -> web.StreamResponse:
        if body.model not in (None, self._model):
            error = {"message": f"the model {body.model!r} does not exist", "code": 404}
            return json_response({"error": error | {"type": "NotFoundError"}}, 404)
        most = self._most(body, tokens)
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{next(self._numbers)}"
        shape = Shape(request_id, self._model, chat, body.stream, int(time.time()))
        events = self._engine.generate(request_id, tokens, most, cache_salt=body.cache_salt)
        if body.stream:
            options = body.stream_options or StreamOptions()
            parts = _sse(shape, events, options.include_usage)
            return await streamed(request, parts, "text/event-stream")
        return await _whole(shape, events)

    def _most(self, body: Body, tokens: list[int]) -> int:
        """How many tokens the answer has."""
        room = self._max_model_len - len(tokens)
        if not tokens:
            raise BadOperation("the prompt is empty")
        if room < 1:
            raise PromptTooLong(f"the prompt has {len(tokens)} tokens", length=len(tokens))
        wanted = body.max_completion_tokens or body.max_tokens or DEFAULTS["max_tokens"]
        if wanted < 1:
            raise BadOperation("max_tokens must be at least 1")
        return min(wanted, room)


def tokens_of(text: str) -> list[int]:
    """Stand-ins for the tokens of a text: the same for the same text."""
    data = text.encode(errors="replace")
    begins = range(0, len(data), BYTES_PER_TOKEN)
    return [int.from_bytes(data[i : i + BYTES_PER_TOKEN], "little") for i in begins]


def _usage(done: DoneEvent) -> Json:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
    }


async def _sse(
    shape: Shape, events: AsyncGenerator[Event, None], include_usage: bool
) -> AsyncGenerator[bytes, None]:
    def event(body: Json) -> bytes:
        return b"data: " + orjson.dumps(body) + b"\n\n"

    async with aclosing(events):
        async for one in events:
            match one:
                case TokenEvent():
                    yield event(shape.part(one.text))
                case DoneEvent():
                    yield event(shape.part(None, one.finish_reason))
                    if include_usage:
                        yield event(shape.frame([]) | {"usage": _usage(one)})
                    yield b"data: [DONE]\n\n"
                case ErrorEvent():
                    yield event({"error": one.error})


async def _whole(shape: Shape, events: AsyncGenerator[Event, None]) -> web.Response:
    text = ""
    async with aclosing(events):
        async for one in events:
            match one:
                case TokenEvent():
                    text += one.text
                case DoneEvent():
                    return json_response(
                        shape.part(text, one.finish_reason) | {"usage": _usage(one)}
                    )
                case ErrorEvent():
                    raise EngineError.from_json(one.error)
    raise EngineError("the answer has no end")
