"""Engines without a model that can be broken, and a gateway in front of them, in this process."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.app import build
from gateway.client import Client
from gateway.engines import Engine
from gateway.keys import BUILDERS, ENGINES
from gateway.pool import Pool
from gateway.prompt import PromptBuilder
from gateway.routes_admin import admin
from gateway.settings import Settings
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine

QUESTION = [{"role": "user", "content": "Why?"}]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Breakable:
    """An engine and what is wrong with it."""

    fake: FakeEngine = field(default_factory=FakeEngine)
    url: str = ""
    breaks: bool = False
    """Its connections, but not those of its info."""
    runs: asyncio.Event = field(default_factory=asyncio.Event)
    """If not, it takes requests and does not answer, as a process that was stopped."""

    def __post_init__(self) -> None:
        self.runs.set()

    def app(self) -> web.Application:
        app = self.fake.app()
        app.middlewares.append(self._spoilt())
        return app

    def _spoilt(self) -> Any:
        @web.middleware
        async def spoilt(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self.breaks and not request.path.endswith("/info"):
                assert request.transport is not None
                request.transport.close()
            await self.runs.wait()
            return await handler(request)

        return spoilt


@dataclass
class Front:
    """A gateway and its engines."""

    app: web.Application
    url: str
    admin_url: str
    engines: list[Breakable]
    client: Client
    http: httpx.AsyncClient

    @property
    def pool(self) -> Pool:
        return self.app[ENGINES].pool

    def at(self, engine: Breakable) -> Engine:
        """An engine as the gateway knows it."""
        found = self.pool.by_url(engine.url)
        assert found is not None
        return found

    async def standing(self, engine: Breakable, wanted: str, within_s: float = 5) -> None:
        """Wait until an engine is what it should be."""

        async def so() -> bool:
            return self.at(engine).standing == wanted

        await until(so, within_s=within_s)

    async def ready(self) -> httpx.Response:
        return await self.http.get(self.url + "/ready")

    async def is_ready(self) -> bool:
        return (await self.ready()).status_code == 200


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


def closing(app: web.Application) -> list[str]:
    """Kinds of requests, as patterns of their paths, whose next one finds its connection closed.
    None yet."""
    kinds: list[str] = []

    @web.middleware
    async def closes(request: web.Request, handler: Any) -> web.StreamResponse:
        for kind in kinds:
            if request.method == "POST" and re.search(kind, request.path):
                kinds.remove(kind)
                assert request.transport is not None
                request.transport.close()
                return web.Response()
        answer: web.StreamResponse = await handler(request)
        return answer

    app.middlewares.append(closes)
    return kinds


@cache
def shared_builder(tokenizer: str) -> PromptBuilder:
    """Loading it takes longer than most tests."""
    return PromptBuilder(tokenizer, ThreadPoolExecutor(1), 10_000)


@asynccontextmanager
async def front(
    model_dir: Path,
    engines: int,
    *,
    key_file: str | None = None,
    read_again: Callable[[], Settings] | None = None,
    **settings: Any,
) -> AsyncIterator[Front]:
    """A gateway that has heard of its engines and can take streams, with its admin routes."""
    async with AsyncExitStack() as running:
        some = [Breakable() for _ in range(engines)]
        for engine in some:
            engine.url = await running.enter_async_context(served(engine.app()))
        given = {
            "engine": tuple(engine.url for engine in some),
            "tokenizer": str(model_dir),
            "poll_s": 0.05,
        }
        app = build(Settings(**(given | settings)), read_again=read_again)
        builder = asyncio.get_running_loop().create_future()
        builder.set_result(shared_builder(str(model_dir)))
        app[BUILDERS][MODEL] = builder
        url = await running.enter_async_context(served(app))
        admin_url = await running.enter_async_context(served(admin(app, key_file)))
        client = await running.enter_async_context(Client(url))
        http = await running.enter_async_context(httpx.AsyncClient(timeout=30, trust_env=False))
        found = Front(app, url, admin_url, some, client, http)
        if engines:
            await until(found.is_ready, within_s=20)
        yield found
