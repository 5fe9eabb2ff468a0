"""What the tests on the real engine share."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import pytest_asyncio

from deploy.local import Server
from engine_adapter.client import EngineClient
from engine_adapter.messages import DoneEvent, Finish, Sampling, TokenEvent
from gateway.prompt import PromptBuilder

MODEL = "smollm2-135m-instruct"
SOON_S = 5.0
"""For what is to happen in a second or two, and would take a lease or a whole answer if nobody saw
to it: a busy machine may take longer. `make bench-failures` has the times."""
_salts = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/engine/" in str(item.path):
            item.add_marker(pytest.mark.engine)


@pytest_asyncio.fixture(scope="session")
async def engine_client(engine_server: Server) -> AsyncIterator[EngineClient]:
    async with aiohttp.ClientSession() as session:
        yield EngineClient(session, engine_server.url)


@pytest.fixture(scope="session")
def builder(model_dir: Path) -> PromptBuilder:
    """Makes the prompt that the gateway should make."""
    return PromptBuilder(str(model_dir), ThreadPoolExecutor(1), 1000)


async def sent_whole(
    http: httpx.AsyncClient, engine: Server, tokens: list[int], max_tokens: int, **options: Any
) -> tuple[list[int], str]:
    """What the engine answers to the same tokens as one plain request, with no cache to use."""
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": tokens,
        "max_tokens": max_tokens,
        "temperature": 0,
        "return_token_ids": True,
        "cache_salt": f"whole-{next(_salts)}",
        **options,
    }
    response = await http.post(engine.url + "/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["token_ids"], choice["text"]


async def finished(
    client: EngineClient, prompt_id: str, version: int, keep: int, tokens: list[int], answer: int
) -> tuple[list[int], DoneEvent]:
    """Close a prompt at the engine and read its answer."""
    sampling = Sampling(max_tokens=answer, temperature=0.0)
    op = Finish(version=version, keep=keep, tokens=tokens, sampling=sampling)
    ids: list[int] = []
    async with client.finish(prompt_id, op) as events:
        async for event in events:
            if isinstance(event, TokenEvent):
                ids += event.token_ids
            else:
                assert isinstance(event, DoneEvent), event
                return ids, event
    raise AssertionError("no end")
