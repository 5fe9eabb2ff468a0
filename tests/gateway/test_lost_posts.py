"""Posts that were acknowledged and are lost with the gateway that did: an answer without them is
refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from cache_index.index import IndexUnavailable
from gateway.app import build
from gateway.client import Client, StreamError
from gateway.keys import KEEPER
from gateway.settings import Settings
from tests.fake_engine import MODEL
from tests.gateway.conftest import Stack
from tests.gateway.replicas import MESSAGES, fake_engine


@asynccontextmanager
async def replica(
    model_dir: Path, engine_url: str, redis_url: str
) -> AsyncIterator[tuple[web.Application, str]]:
    port = unused_port()
    app = build(
        Settings(
            engine=(engine_url,),
            tokenizer=str(model_dir),
            index=redis_url,
            index_timeout_s=5.0,
            port=port,
        )
    )
    async with TestServer(app, port=port) as server:
        yield app, str(server.make_url("")).rstrip("/")


async def unreachable(*args: Any) -> None:
    raise IndexUnavailable("it is away")


async def test_an_answer_from_fewer_posts_than_were_acknowledged_is_refused(
    model_dir: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        fake_engine() as (engine, engine_url),
        replica(model_dir, engine_url, redis_url) as (_, there),
        AsyncExitStack() as dies,
    ):
        app, here = await dies.enter_async_context(replica(model_dir, engine_url, redis_url))
        async with Client(here, there) as client, client.stream(MODEL, MESSAGES) as stream:
            await stream.send("one")
            monkeypatch.setattr(app[KEEPER], "_write", unreachable)
            await stream.send("two")
            await stream.send("three")
            await dies.aclose()
            with pytest.raises(StreamError) as lost:
                await stream.finish()
            assert (lost.value.status, lost.value.code) == (409, "sequence_gap")
            assert lost.value.error["expected_seq"] == 1
            assert not engine.finished
            # The stream is there, and takes again what it lacks.
            async with httpx.AsyncClient(trust_env=False, timeout=20) as http:
                for seq, text in ((1, "two"), (2, "three")):
                    path = f"{there}/v1/streams/{stream.id}/chunks"
                    again = await http.post(path, json={"text": text, "seq": seq})
                    assert again.status_code == 202
            answer = await stream.finish()
            assert answer["choices"][0]["message"]["content"] == "answer"


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "one"}])
async def test_finish_may_say_which_post_is_the_last(stack: Stack, headers: dict[str, str]) -> None:
    body = {"model": MODEL, "messages": MESSAGES}
    made = await stack.http.post(stack.url + "/v1/streams", json=body)
    path = f"{stack.url}/v1/streams/{made.json()['id']}"
    for seq in range(2):
        await stack.http.post(path + "/chunks", json={"text": "x", "seq": seq})
    for seq, status in ((-1, 400), (7, 409), (2, 409), (1, 200)):
        finish = await stack.http.post(
            path + "/finish", json={"stream": False, "seq": seq}, headers=headers
        )
        assert finish.status_code == status
        if status == 409:
            assert finish.json()["error"]["code"] == "sequence_gap"
            assert finish.json()["error"]["expected_seq"] == 2
