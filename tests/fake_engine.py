"""An engine without a model that speaks the real protocol: for unit tests and for measuring
the gateway alone. It keeps every prompt's tokens and computes nothing.

`python -m tests.fake_engine --port N` serves one.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import uvloop
from aiohttp import web

from engine_adapter.errors import EngineError, PromptFinished
from engine_adapter.messages import (
    PREFIX,
    PROTOCOL_VERSION,
    DoneEvent,
    EngineInfo,
    Extend,
    Finish,
    Invalidate,
    Open,
    Progress,
    TokenEvent,
    decode,
    encode,
)
from engine_adapter.vllm.sessions import Limits, Sessions, Status

MODEL = "fake"


@dataclass
class FakeCore:
    """The loop of an engine that has computed everything the moment it hears of it."""

    delay_s: Callable[[], float] = lambda: 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    operations: list[str] = field(default_factory=list)

    async def open(self, prompt_id: str, tokens: list[int], cache_salt: str | None) -> Status:
        self.tokens[prompt_id] = list(tokens)
        return await self._done("open", prompt_id)

    async def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> Status:
        self.tokens[prompt_id] = self.tokens[prompt_id][:keep] + tokens
        return await self._done("extend", prompt_id)

    async def reopen(self, prompt_id: str, version: int, tokens: list[int]) -> Status:
        if prompt_id not in self.tokens:
            raise PromptFinished("the answer has begun")
        self.tokens[prompt_id] = list(tokens)
        return await self._done("reopen", prompt_id)

    async def status(self, prompt_id: str) -> Status:
        length = len(self.tokens[prompt_id])
        return {"state": "idle", "length": length, "computed": length}

    async def close(self, prompt_id: str) -> Status:
        self.tokens.pop(prompt_id, None)
        self.operations.append("close")
        return {}

    async def _done(self, operation: str, prompt_id: str) -> Status:
        self.operations.append(operation)
        status = await self.status(prompt_id)
        await asyncio.sleep(self.delay_s())
        return status


class FakeEngine:
    """The HTTP side. `finished` has the whole prompt of every answered id."""

    def __init__(self, max_model_len: int = 100_000) -> None:
        self.core = FakeCore()
        self.sessions = Sessions(self.core, Limits(max_model_len, 1_000_000, 100_000))
        self.max_model_len = max_model_len
        self.finished: dict[str, list[int]] = {}
        self.instance_id = uuid.uuid4().hex

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20, middlewares=[self._errors])
        prompt = PREFIX + "/prompts/{id}"
        app.add_routes(
            [
                web.get(PREFIX + "/info", self._info),
                web.post(prompt, self._open),
                web.post(prompt + "/extend", self._extend),
                web.post(prompt + "/invalidate", self._invalidate),
                web.post(prompt + "/finish", self._finish),
                web.get(prompt, self._status),
                web.delete(prompt, self._abort),
            ]
        )
        return app

    @staticmethod
    @web.middleware
    async def _errors(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            return await handler(request)
        except EngineError as e:
            return web.json_response({"error": e.to_json()}, status=e.status)

    async def _info(self, request: web.Request) -> web.Response:
        return _json(
            EngineInfo(
                instance_id=self.instance_id,
                protocol_version=PROTOCOL_VERSION,
                plugin_version="0",
                engine="fake",
                model=MODEL,
                operations=[],
                max_model_len=self.max_model_len,
                block_size=16,
                kv_blocks_total=1,
                kv_blocks_free=1,
                running=0,
                waiting=0,
                open_prompts=len(self.core.tokens),
            )
        )

    async def _open(self, request: web.Request) -> web.Response:
        op = decode(Open, await request.read())
        return _json(await self.sessions.open(request.match_info["id"], op))

    async def _extend(self, request: web.Request) -> web.Response:
        op = decode(Extend, await request.read())
        return _json(await self.sessions.extend(request.match_info["id"], op))

    async def _invalidate(self, request: web.Request) -> web.Response:
        op = decode(Invalidate, await request.read())
        return _json(await self.sessions.invalidate(request.match_info["id"], op))

    async def _status(self, request: web.Request) -> web.Response:
        return _json(await self.sessions.status(request.match_info["id"]))

    async def _abort(self, request: web.Request) -> web.Response:
        return _json(await self.sessions.abort(request.match_info["id"]))

    async def _finish(self, request: web.Request) -> web.StreamResponse:
        prompt_id = request.match_info["id"]
        session, answer = self.sessions.finish(prompt_id, decode(Finish, await request.read()))
        self.finished[prompt_id] = session.tokens
        answer.begun = True
        await self.core.close(prompt_id)
        response = web.StreamResponse()
        await response.prepare(request)
        for text in ("an", "swer"):
            await response.write(encode(TokenEvent(token_ids=[1], text=text)) + b"\n")
        done = DoneEvent(
            finish_reason="stop",
            prompt_tokens=len(session.tokens),
            cached_tokens=0,
            completion_tokens=2,
        )
        await response.write(encode(done) + b"\n")
        await response.write_eof()
        return response


def _json(message: Progress | EngineInfo) -> web.Response:
    return web.Response(body=encode(message), content_type="application/json")


if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    web.run_app(
        FakeEngine().app(), host="127.0.0.1", port=parser.parse_args().port, access_log=None
    )
