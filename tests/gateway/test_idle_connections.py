"""Engines that close a connection in the moment in which it is used again."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

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
