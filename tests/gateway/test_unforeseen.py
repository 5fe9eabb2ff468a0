"""What goes wrong in a task that nobody waits for costs one turn, not the task."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway import builders, readiness, streams
from gateway.app import build
from gateway.keeper import Keeper
from gateway.keys import SESSION
from gateway.pool import Pool
from gateway.prefixes import Prefixes
from gateway.prompt import PromptBuilder
from gateway.retrieving import Retrievals
from gateway.settings import Settings
from gateway.streams import Streams
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine
from tests.fake_openai import FakeOpenAI
from tests.gateway.pools import QUESTION, Breakable, Front, front, served, shared_builder

INFO = "/stream2llm/info"


class Garbled(Breakable):
    """An engine whose answers to polls are a test's."""

    says: web.Response | None = None

    def app(self) -> web.Application:
        app = super().app()

        @web.middleware
        async def garbled(request: web.Request, handler: Any) -> web.StreamResponse:
            if self.says is not None and request.path == INFO:
                return web.Response(
                    status=self.says.status, body=self.says.body, content_type="application/json"
                )
            answer: web.StreamResponse = await handler(request)
            return answer

        app.middlewares.append(garbled)
        return app


@asynccontextmanager
async def garbled_one(model_dir: Path) -> AsyncIterator[tuple[Garbled, Front]]:
    engine = Garbled()
    async with (
        served(engine.app()) as engine.url,
        front(model_dir, 0, engine=(engine.url,), poll_s=0.02) as f,
    ):
        await f.standing(engine, "healthy")
        yield engine, f


EXAMPLES = [
    (200, b"{"),
    (200, b"\xff\xfe"),
    (200, b"[]"),
    (200, b'{"instance_id": 5}'),
    (500, b'{"error": "a text"}'),
    (500, b'{"error": {"message": {}, "code": [], "self": 1, "status": 2}}'),
    (503, b'"busy"'),
    (404, b"null"),
]


async def test_an_engine_whose_answers_can_not_be_read_is_away_until_they_can(
    model_dir: Path,
) -> None:
    async with garbled_one(model_dir) as (engine, f):
        told = (await f.http.get(engine.url + INFO)).json()
        events = {"endpoint": "tcp://*:1", "replay_endpoint": None, "topic": "",
                  "hash_algorithm": "sha256", "hash_root": "not hex", "block_size": 16}  # fmt: skip
        no_root = json.dumps(told | {"kv_events": events}).encode()
        no_block = json.dumps(told | {"kv_events": events | {"hash_root": "", "block_size": 0}})
        for status, body in (*EXAMPLES, (200, no_root), (200, no_block.encode())):
            engine.says = web.Response(status=status, body=body)
            await f.standing(engine, "away")
            assert f.at(engine).trouble
            engine.says = None
            await f.standing(engine, "healthy")
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("some context")
            assert (await stream.finish())["choices"][0]["message"]["content"] == "answer"


async def test_a_plain_engine_whose_metrics_are_no_numbers_is_away_until_they_are(
    model_dir: Path,
) -> None:
    plain = FakeOpenAI()
    async with (
        served(plain.app()) as url,
        front(model_dir, 0, plain_engine=(url,), poll_s=0.02) as f,
    ):

        async def answers() -> bool:
            return bool(f.pool.ready)

        async def is_away() -> bool:
            return not f.pool.ready

        await until(answers, within_s=5)
        plain.waiting = math.nan  # type: ignore[assignment]
        await until(is_away, within_s=5)
        plain.waiting = 0
        await until(answers, within_s=5)


async def test_streams_are_looked_after_although_that_has_failed_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    due, fails = Streams._due, [True]

    def fails_once(self: Streams, now_s: float) -> Any:
        if fails.pop() if fails else False:
            raise RuntimeError("nobody thought of this")
        return due(self, now_s)

    monkeypatch.setattr(Streams, "_due", fails_once)
    monkeypatch.setattr(streams, "SWEEP_S", 0.05)
    async with front(model_dir, 1, idle_timeout_s=0.1) as f:
        body = {"model": MODEL, "messages": QUESTION}
        stream_id = (await f.http.post(f.url + "/v1/streams", json=body)).json()["id"]

        async def expired() -> bool:
            found = (await f.http.get(f"{f.url}/v1/streams/{stream_id}")).json()
            return bool(found["state"] == "expired")

        await until(expired, within_s=5)
    assert "nobody thought of this" in caplog.text


async def test_a_tokenizer_is_loaded_although_a_library_has_failed_once(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = [True]

    def made(*args: Any) -> PromptBuilder:
        if fails:
            fails.pop()
            raise RuntimeError("nobody thought of this")
        return shared_builder(str(model_dir))

    monkeypatch.setattr(builders, "PromptBuilder", made)
    monkeypatch.setattr(readiness, "AGAIN_S", 0.05)
    engine = Breakable(FakeEngine(model="another"))
    async with served(engine.app()) as url, front(model_dir, 0, engine=(url,)) as f:
        await until(f.is_ready, within_s=5)


@pytest.mark.parametrize("fails", [Retrievals, Streams, Keeper, Pool, Prefixes])
async def test_everything_is_closed_although_something_can_not_be(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, fails: Any
) -> None:
    ended: list[str] = []

    def ending(kind: Any) -> None:
        stop = kind.stop

        async def stopped(self: Any) -> None:
            await stop(self)
            ended.append(kind.__name__)
            if kind is fails:
                raise RuntimeError("it can't be ended")

        monkeypatch.setattr(kind, "stop", stopped)

    for kind in (Retrievals, Streams, Keeper, Pool, Prefixes):
        ending(kind)
    app = build(Settings(tokenizer=str(model_dir)))
    server = TestServer(app)
    await server.start_server()
    with pytest.raises(RuntimeError, match="it can't be ended"):
        await server.close()
    assert ended == ["Retrievals", "Streams", "Keeper", "Pool", "Prefixes"]
    assert app[SESSION].closed
