"""A gateway and an engine without a model, in this process, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.app import build
from gateway.client import Client
from gateway.settings import Settings
from tests.fake_engine import FakeEngine


@dataclass
class Stack:
    """What a test talks to."""

    engine: FakeEngine
    engine_server: TestServer
    app: web.Application
    url: str
    client: Client
    http: httpx.AsyncClient

    def held(self, stream_id: str) -> list[int]:
        """The tokens the engine was asked to answer."""
        return self.engine.finished[stream_id]


@pytest_asyncio.fixture(scope="session")
async def stack(model_dir: Path) -> AsyncIterator[Stack]:
    engine = FakeEngine()
    engine_server = TestServer(engine.app())
    await engine_server.start_server()
    app = build(
        Settings(
            engine=(str(engine_server.make_url("")).rstrip("/"),),
            tokenizer=str(model_dir),
            heartbeat_s=0.2,
            max_chunk_bytes=100_000,
            lease_s=30.0,
            idle_timeout_s=20.0,
        )
    )
    server = TestServer(app)
    await server.start_server()
    url = str(server.make_url("")).rstrip("/")
    async with Client(url) as client, httpx.AsyncClient(trust_env=False) as http:
        yield Stack(engine, engine_server, app, url, client, http)
    await server.close()
    await engine_server.close()
