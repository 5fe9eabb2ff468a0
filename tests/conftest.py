"""Fixtures that every test may use. The real engine is started once, when first asked for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from deploy.local import EngineOptions, Server, engine, gateway, redis_server
from gateway.client import Client

# A machine that does something else for a while is no failure of what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

KV_BLOCKS = 133
"""132 blocks of 32 tokens, and vLLM's null block: 4,224 tokens."""


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The model, unpacked: weights, tokenizer and chat template."""
    if (given := os.environ.get("STREAM2LLM_MODEL_DIR")) is not None:
        return Path(given)
    from deploy.model import model_dir

    return model_dir()


@pytest.fixture(scope="session")
def engine_server(model_dir: Path) -> Iterator[Server]:
    """A real vLLM in float32 with a small KV pool, its block accounts checked at every step."""
    options = EngineOptions(
        model=model_dir,
        dtype="float32",
        max_model_len=4096,
        kv_blocks=KV_BLOCKS,
        debug_checks=True,
    )
    with engine(options) as server:
        server.start().wait_ready(300)
        yield server


@pytest.fixture(scope="session")
def gateway_server(engine_server: Server) -> Iterator[Server]:
    """A gateway process in front of the engine."""
    with gateway([engine_server.url]) as server:
        server.start().wait_ready(60)
        yield server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis that all tests share: the one that REDIS_URL names, else one of their own."""
    if (given := os.environ.get("REDIS_URL")) is not None:
        yield given
        return
    with redis_server() as server:
        yield server.start().wait_ready(10).url


@pytest_asyncio.fixture(scope="session")
async def client(gateway_server: Server) -> AsyncIterator[Client]:
    async with Client(gateway_server.url, timeout_s=120) as client:
        yield client


@pytest_asyncio.fixture(scope="session")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=120, trust_env=False) as http:
        yield http


async def until(
    condition: Callable[[], Awaitable[bool]], *, within_s: float, every_s: float = 0.02
) -> float:
    """Wait for a condition; returns how long it took. Fails when it does not come true."""
    begun_s = time.monotonic()
    while not await condition():
        assert time.monotonic() - begun_s < within_s, "not true in time"
        await asyncio.sleep(every_s)
    return time.monotonic() - begun_s
