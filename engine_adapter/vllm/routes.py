"""The engine operations as HTTP routes on vLLM's own server; see `messages.py` for the list."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import orjson
import vllm
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute

from engine_adapter.errors import BadOperation, EngineError
from engine_adapter.messages import (
    PREFIX,
    PROTOCOL_VERSION,
    EngineInfo,
    Event,
    Extend,
    Finish,
    Invalidate,
    Message,
    Open,
    Sampling,
    SetPolicy,
    decode,
    encode,
)
from engine_adapter.scheduling.policies import POLICIES, named
from engine_adapter.vllm.answers import Answer
from engine_adapter.vllm.engine import VllmEngine
from engine_adapter.vllm.sessions import Limits, Session, Sessions

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

MAX_OPEN_PROMPTS = "STREAM2LLM_MAX_OPEN_PROMPTS"
"""Environment: how many prompts may be open at once (default 1024)."""

OPERATIONS = ["open", "extend", "invalidate", "finish", "abort", "status", "info", "policy"]

LEASE_SWEEP_S = 0.5


class StreamingPrompts:
    """What the routes share: the engine, its open prompts, and the task that ends leases."""

    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self.engine = VllmEngine(llm)
        config = llm.vllm_config
        self._limits = Limits(
            max_model_len=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            max_open_prompts=int(os.environ.get(MAX_OPEN_PROMPTS, "1024")),
        )
        self._block_size = config.cache_config.block_size
        self._model_name = model_name
        self._instance_id = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._answers: dict[str, str] = {}  # prompt id -> vLLM request id, while answering
        self.sessions = Sessions(self.engine, self._limits)
        self._sweeper = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SWEEP_S)
            await self.sessions.expire(time.monotonic())

    async def info(self) -> EngineInfo:
        """Identity, limits and load of this engine."""
        load = dict(await self.engine.load())
        return EngineInfo(
            instance_id=self._instance_id,
            protocol_version=PROTOCOL_VERSION,
            plugin_version=version("stream2llm"),
            engine=f"vllm {vllm.__version__}",
            model=self._model_name,
            operations=OPERATIONS,
            max_model_len=self._limits.max_model_len,
            block_size=self._block_size,
            policy=str(load.pop("policy")),
            policies=list(POLICIES),
            **{name: int(value) for name, value in load.items()},
        )

    async def set_policy(self, op: SetPolicy) -> EngineInfo:
        """Order requests by another policy from the next step on.

        Raises:
            BadOperation: there is none of that name.
        """
        try:
            named(op.policy)
        except ValueError as e:
            raise BadOperation(str(e)) from e
        await self.engine.set_policy(op.policy)
        return await self.info()

    def finish(self, prompt_id: str, op: Finish) -> AsyncGenerator[bytes, None]:
        """Close a prompt's input; the events of its answer as lines of JSON.

        Whoever reads the lines closes them.

        Raises:
            EngineError: the operation is not valid; the prompt stays as it was.
        """
        self._params(prompt_id, op.version, op.keep + len(op.tokens), op.sampling)
        session, answer = self.sessions.finish(prompt_id, op)
        return self._lines(session, answer, op.sampling)

    async def _lines(
        self, session: Session, answer: Answer, sampling: Sampling
    ) -> AsyncGenerator[bytes, None]:
        def generate(version: int, tokens: list[int]) -> AsyncGenerator[Event, None]:
            params = self._params(session.prompt_id, version, len(tokens), sampling)
            request_id = f"{session.prompt_id}-answer-{next(self._numbers)}"
            self._answers[session.prompt_id] = request_id
            return self.engine.answer(tokens, session.cache_salt, params, request_id)

        try:
            async with aclosing(answer.events(generate)) as events:
                async for event in events:
                    yield _line(event)
        finally:
            self._answers.pop(session.prompt_id, None)
            self.sessions.answered(session, answer)
            # vLLM may not have taken the request in: then the prompt is still open there.
            await asyncio.shield(self.engine.close(session.prompt_id))

    def _params(
        self, prompt_id: str, version: int, length: int, sampling: Sampling
    ) -> SamplingParams:
        room = max(self._limits.max_model_len - length, 1)
        return self.engine.sampling_params(sampling, prompt_id, version, room)

    async def abort(self, prompt_id: str) -> Message:
        """Forget a prompt, also while it is being answered."""
        if (request_id := self._answers.get(prompt_id)) is not None:
            await self.engine.abort(request_id)
        return await self.sessions.abort(prompt_id)


def _line(event: Event) -> bytes:
    return encode(event) + b"\n"


def _json(message: Message, status: int = 200) -> Response:
    return Response(encode(message), status, media_type="application/json")


def _error(error: EngineError) -> Response:
    body = orjson.dumps({"error": error.to_json()})
    return Response(body, error.status, media_type="application/json")


def _prompts(request: Request) -> StreamingPrompts:
    prompts: StreamingPrompts = request.app.state.stream2llm
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


@router.put("/policy")
async def set_policy(request: Request) -> Response:
    return _json(await _prompts(request).set_policy(decode(SetPolicy, await request.body())))


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


@router.delete("/prompts/{prompt_id}")
async def abort_prompt(prompt_id: str, request: Request) -> Response:
    return _json(await _prompts(request).abort(prompt_id))
