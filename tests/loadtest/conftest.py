"""A gateway in this process over an engine without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from aiohttp.test_utils import TestServer

from gateway.app import build
from gateway.settings import Settings
from tests.fake_engine import FakeEngine


def url_of(server: TestServer) -> str:
    return str(server.make_url("")).rstrip("/")


@pytest_asyncio.fixture(scope="session")
async def gateway_url(model_dir: Path) -> AsyncIterator[str]:
    """A gateway over an engine without a model."""
    engine = TestServer(FakeEngine().app())
    await engine.start_server()
    server = TestServer(build(Settings(engine=(url_of(engine),), tokenizer=str(model_dir))))
    await server.start_server()
    yield url_of(server)
    await server.close()
    await engine.close()
