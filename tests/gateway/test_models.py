"""Requests that are passed through find an engine of their model, and clients find all models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from tests.conftest import until
from tests.fake_engine import FakeEngine
from tests.gateway.pools import Breakable, Front, front, served

pytestmark = pytest.mark.slow

ENGINES = {"small": ("small",), "other-small": ("small",), "large": ("large", "large-adapter")}
"""The models that each engine lists; the first is the one that it serves to streams."""


def lists(engine: Breakable, name: str, models: tuple[str, ...]) -> web.Application:
    app = engine.app()

    async def listing(request: web.Request) -> web.Response:
        data = [{"id": model, "object": "model", "root": name} for model in models]
        return web.json_response({"object": "list", "data": data})

    async def complete(request: web.Request) -> web.Response:
        return web.json_response({"engine": name, "asked": await request.json()})

    app.add_routes([web.get("/v1/models", listing), web.post("/v1/completions", complete)])
    return app


@asynccontextmanager
async def running(model_dir: Path, *names: str) -> AsyncIterator[Front]:
    async with AsyncExitStack() as stack:
        urls = []
        for name in names:
            models = ENGINES[name]
            engine = Breakable(FakeEngine(model=models[0]))
            urls.append(await stack.enter_async_context(served(lists(engine, name, models))))
        f = await stack.enter_async_context(front(model_dir, 0, engine=tuple(urls)))

        async def all_answer() -> bool:
            return len(f.pool.ready) == len(names)

        await until(all_answer, within_s=20)
        yield f


async def complete(f: Front, body: dict[str, Any]) -> httpx.Response:
    return await f.http.post(f.url + "/v1/completions", json=body)


async def test_a_request_goes_to_an_engine_of_its_model(model_dir: Path) -> None:
    async with running(model_dir, "small", "large") as f:
        for model, engine in (("large", "large"), ("small", "small"), ("large-adapter", "large")):
            for _ in range(3):  # whichever has the least to do
                answer = await complete(f, {"model": model, "prompt": "x"})
                assert answer.json()["engine"] == engine
                assert answer.json()["asked"]["model"] == model


@pytest.mark.parametrize("body", [{"model": "unknown"}, {"prompt": "x"}, {"model": 7}])
async def test_a_model_that_no_engine_serves_is_named(
    model_dir: Path, body: dict[str, Any]
) -> None:
    async with running(model_dir, "small", "large") as f:
        answer = await complete(f, body)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert "['large', 'small']" in answer.json()["error"]["message"]


async def test_engines_of_one_model_say_themselves_what_they_think_of_a_name(
    model_dir: Path,
) -> None:
    async with running(model_dir, "small", "other-small") as f:
        answer = await complete(f, {"model": "an alias"})
        assert answer.json()["engine"] in ("small", "other-small")


async def test_all_models_are_listed_once(model_dir: Path) -> None:
    async with running(model_dir, *ENGINES) as f:
        listed = (await f.http.get(f.url + "/v1/models")).json()
        assert listed["object"] == "list"
        cards = {card["id"]: card for card in listed["data"]}
        assert sorted(cards) == ["large", "large-adapter", "small"]
        assert len(listed["data"]) == 3
        assert cards["large-adapter"]["root"] == "large"


async def test_an_engine_without_a_list_is_listed_with_what_it_serves(model_dir: Path) -> None:
    async with front(model_dir, 1) as f:
        listed = (await f.http.get(f.url + "/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == ["fake"]
