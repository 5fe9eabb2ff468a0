"""The engine operations as HTTP routes on vLLM's own server; see `messages.py` for the list."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import orjson
import vllm
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute

from engine_adapter.errors import EngineError
from engine_adapter.messages import (
    PREFIX,
    Batch,
    Extend,
    Finish,
    Invalidate,
    Message,
    Open,
    SetPolicy,
    decode,
    encode,
)
from engine_adapter.prompts import StreamingPrompts
from engine_adapter.sessions import DEFAULT_OPEN_PROMPTS, Limits
from engine_adapter.vllm.engine import VllmEngine

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_OPEN_PROMPTS = "STREAM2LLM_MAX_OPEN_PROMPTS"
"""Environment: how many prompts may be open at once."""


def streaming_prompts(llm: AsyncLLM, model_name: str) -> StreamingPrompts[SamplingParams]:
    """The operations on a running engine, begun."""
    config = llm.vllm_config
    limits = Limits(
        max_model_len=config.model_config.max_model_len,
        vocab_size=config.model_config.get_vocab_size(),
        max_open_prompts=int(os.environ.get(MAX_OPEN_PROMPTS, DEFAULT_OPEN_PROMPTS)),
    )
    prompts = StreamingPrompts(
        VllmEngine(llm),
        limits,
        name=f"vllm {vllm.__version__}",
        model=model_name,
        block_size=config.cache_config.block_size,
    )
    prompts.start()
    return prompts


def _json(message: Message, status: int = 200) -> Response:
    return Response(encode(message), status, media_type="application/json")


def _error(error: EngineError) -> Response:
    body = orjson.dumps({"error": error.to_json()})
    return Response(body, error.status, media_type="application/json")


def _prompts(request: Request) -> StreamingPrompts[SamplingParams]:
    prompts: StreamingPrompts[SamplingParams] = request.app.state.stream2llm
    return prompts


class _Route(APIRoute):
    """A route that answers an EngineError with its status and its body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except EngineError as e:
                return _error(e)

        return handle


class _LinesResponse(StreamingResponse):
    """Closes its lines when the client goes away, whatever they wait for just then."""

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(lines, media_type="application/x-ndjson")
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._lines.aclose()


router = APIRouter(prefix=PREFIX, route_class=_Route)


@router.get("/info")
async def info(request: Request) -> Response:
    return _json(await _prompts(request).info())


@router.get("/blocks")
async def blocks(request: Request) -> Response:
    return _json(await _prompts(request).blocks())


@router.put("/policy")
async def set_policy(request: Request) -> Response:
    return _json(await _prompts(request).set_policy(decode(SetPolicy, await request.body())))


@router.post("/operations")
async def batch(request: Request) -> Response:
    return _json(await _prompts(request).batch(decode(Batch, await request.body())))


@router.post("/prompts/{prompt_id}")
async def open_prompt(prompt_id: str, request: Request) -> Response:
    op = decode(Open, await request.body())
    return _json(await _prompts(request).sessions.open(prompt_id, op))


@router.post("/prompts/{prompt_id}/extend")
async def extend_prompt(prompt_id: str, request: Request) -> Response:
    op = decode(Extend, await request.body())
    return _json(await _prompts(request).sessions.extend(prompt_id, op))


@router.post("/prompts/{prompt_id}/invalidate")
async def invalidate_prompt(prompt_id: str, request: Request) -> Response:
    op = decode(Invalidate, await request.body())
    return _json(await _prompts(request).sessions.invalidate(prompt_id, op))


@router.post("/prompts/{prompt_id}/finish")
async def finish_prompt(prompt_id: str, request: Request) -> Response:
    op = decode(Finish, await request.body())
    return _LinesResponse(_prompts(request).finish(prompt_id, op))


@router.get("/prompts/{prompt_id}")
async def prompt_status(prompt_id: str, request: Request) -> Response:
    return _json(await _prompts(request).sessions.status(prompt_id))


@router.get("/prompts/{prompt_id}/tokens")
async def prompt_tokens(prompt_id: str, request: Request) -> Response:
    return _json(await _prompts(request).sessions.tokens(prompt_id))


@router.delete("/prompts/{prompt_id}")
async def abort_prompt(prompt_id: str, request: Request) -> Response:
    return _json(await _prompts(request).abort(prompt_id))
