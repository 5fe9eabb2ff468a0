"""Connections to engines that are used again, also in the moment in which an engine closes one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from gateway.client import Stream
from tests.conftest import until
from tests.fake_engine import MODEL
from tests.fake_openai import FakeOpenAI
from tests.gateway.pools import QUESTION, Breakable, closing, front, served


async def all_there(stream: Stream) -> bool:
    """Whether the engine has all that was sent."""
    return bool((await stream.status())["tokens"]["waiting"] == 0)


@pytest.mark.parametrize("role", ["engine", "plain_engine"])
async def test_no_stream_fails_of_that_and_none_leaves(model_dir: Path, role: str) -> None:
    plain = role == "plain_engine"
    kinds = ["/v1/completions$"] if plain else ["/prompts/[^/]+$", "/extend$", "/finish$"]
    app = (
        FakeOpenAI(card={"id": MODEL, "max_model_len": 4096}).app() if plain else Breakable().app()
    )
    armed = closing(app)
    async with served(app) as url, front(model_dir, 0, **{role: (url,)}) as f:
        await until(f.is_ready, within_s=20)
        armed += kinds
        async with f.client.stream(MODEL, QUESTION, max_tokens=2) as stream:
            for text in ("some", "more"):
                await stream.send(text)
                await until(partial(all_there, stream), within_s=5)
            assert (await stream.finish())["usage"]["completion_tokens"] == 2
        engine = f.pool.by_url(url)
        assert engine is not None
        assert (armed, engine.health.failures, engine.health.ejections) == ([], 0, 0)


@pytest.mark.parametrize("role", ["engine", "plain_engine"])
async def test_an_answer_that_was_read_to_its_end_leaves_its_connection_to_the_next(
    model_dir: Path, role: str
) -> None:
    plain = role == "plain_engine"
    app = (
        FakeOpenAI(card={"id": MODEL, "max_model_len": 4096}).app() if plain else Breakable().app()
    )
    asked_from = list[object]()

    @web.middleware
    async def noting(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path.endswith(("/finish", "/completions")) and request.transport is not None:
            asked_from.append(request.transport.get_extra_info("peername"))
        return await handler(request)

    app.middlewares.append(noting)
    async with served(app) as url, front(model_dir, 0, **{role: (url,)}) as f:
        await until(f.is_ready, within_s=20)
        asked_from.clear()  # a plain engine was asked how it answers
        for _ in range(8):
            async with f.client.stream(MODEL, QUESTION, max_tokens=2) as stream:
                await stream.send("some")
                await stream.finish()
    assert len(set(asked_from)) < 8 <= len(asked_from)
