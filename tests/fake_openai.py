"""An OpenAI-compatible server without a model, as stock vLLM answers: for unit tests only.

It has a prefix cache of whole blocks, computes nothing, and does what a test tells it to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MODEL = "plain"
BLOCK_TOKENS = 16


@dataclass
class FakeOpenAI:
    """The server, and everything that it was asked."""

    started_s: float | None = 100.0
    """None: it says nothing of itself in metrics."""
    waiting: int = 0
    card: dict[str, Any] = field(default_factory=lambda: {"id": MODEL, "max_model_len": 4096})
    context_tokens: int | None = None
    """As llama.cpp's server tells it, apart from its list of models."""
    refuses: tuple[int, str] | None = None
    """Status and message of every completion."""
    finish_reason: str | None = "length"
    """None: answers end without one."""
    first_token: Callable[[list[int]], int] = sum
    """Of the answer to a prompt; each that follows is one more."""
    breaks_after: int | None = None
    """So many tokens of an answer its connection breaks."""
    fetch: Callable[[dict[str, Any]], bool] = lambda kv_transfer: True
    """Gets the KV that others have prefilled, if it is there."""
    no_metrics: int = 404
    """How it refuses to say anything of itself."""
    silent_s: float = 0.0
    """Before it says how it is."""
    gives_token_ids: bool = True
    counts_tokens: bool = True
    cached_details: bool = True
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Warmings wait for it."""
    answer_gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Answers wait for it before their first token."""
    more_gate: asyncio.Event = field(default_factory=asyncio.Event)
    """And before their second."""
    warmings: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    blocks: set[tuple[Any, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for gate in (self.gate, self.answer_gate, self.more_gate):
            gate.set()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.get("/version", self._version),
                web.get("/props", self._props),
                web.post("/v1/completions", self._completions),
            ]
        )
        return app

    async def _health(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.silent_s)
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"owned_by": "vllm", **self.card}]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0"})

    async def _props(self, request: web.Request) -> web.Response:
        if self.context_tokens is None:
            raise web.HTTPNotFound
        return web.json_response({"default_generation_settings": {"n_ctx": self.context_tokens}})

    async def _metrics(self, request: web.Request) -> web.Response:
        if self.started_s is None:
            return web.json_response({"error": {"message": "no"}}, status=self.no_metrics)
        labels = f'engine="0",model_name="{MODEL}"'
        return web.Response(
            text=f"# TYPE process_start_time_seconds gauge\n"
            f"process_start_time_seconds {self.started_s}\n"
            f"vllm:num_requests_running{{{labels}}} {float(self.at_once)}\n"
            f"vllm:num_requests_waiting{{{labels}}} {float(self.waiting)}\n"
            f'vllm:num_requests_waiting_by_reason{{{labels},reason="x"}} 7.0\n'
            f"vllm:kv_cache_usage_perc{{{labels}}} 0.25\n"
            f'vllm:cache_config_info{{block_size="{BLOCK_TOKENS}",'
            f'enable_prefix_caching="True",num_gpu_blocks="200"}} 1.0\n'
        )

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.refuses is not None:
            status, message = self.refuses
            return web.json_response({"error": {"message": message, "code": status}}, status=status)
        if body.get("stream"):
            return await self._answer(request, body)
        return await self._warm(body)

    async def _warm(self, body: dict[str, Any]) -> web.Response:
        probe = len(body["prompt"]) < BLOCK_TOKENS
        if not probe:
            self.warmings.append(body)
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            if not probe:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.aborted.append(body)
            raise
        finally:
            self.at_once -= not probe
        self._compute(body)
        usage = {"prompt_tokens": len(body["prompt"]) + (not self.counts_tokens)}
        return web.json_response({"choices": [{"text": "x"}], "usage": usage})

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.answers.append(body)
        cached = self._compute(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await self.answer_gate.wait()
            kv_transfer = body.get("kv_transfer_params")
            if kv_transfer is not None and not self.fetch(kv_transfer):
                await response.write(_event(choices=[{"finish_reason": "error"}]))
                return response
            for number in range(body["max_tokens"]):
                if number == self.breaks_after:
                    self.breaks_after = None
                    request.transport.abort()  # type: ignore[union-attr]
                token = self.first_token(body["prompt"]) + number
                ids = {"token_ids": [token]} if self.gives_token_ids else {}
                await response.write(_event(choices=[{"text": f" {token}"} | ids]))
                await self.more_gate.wait()
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.append(body)
            raise
        if self.finish_reason is not None:
            last = {"token_ids": [], "text": "", "finish_reason": self.finish_reason}
            await response.write(_event(choices=[last]))
            await response.write(_event(choices=[], usage=self._usage(body, cached)))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self, body: dict[str, Any], cached: int) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": body["max_tokens"],
        }
        if self.cached_details:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        return usage

    def _compute(self, body: dict[str, Any]) -> int:
        """Tokens that were cached; all whole blocks are, from now on."""
        salt, tokens = body.get("cache_salt"), body["prompt"]
        ends = range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        fronts = [(salt, *tokens[:end]) for end in ends]
        found = [front in self.blocks for front in fronts]
        self.blocks.update(fronts)
        return BLOCK_TOKENS * [*found, False].index(False)


def _event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"
