"""Which engine a stream goes to, and how it says why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest_asyncio
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from cache_index.names import Hashing
from gateway.app import build
from gateway.client import Client
from gateway.routing import POLICIES, Candidate
from gateway.settings import Settings
from tests.fake_engine import MODEL, FakeEngine

candidates = st.lists(
    st.builds(
        Candidate,
        url=st.uuids().map(str),
        streams=st.integers(0, 50),
        waiting_tokens=st.integers(0, 100_000),
        open_prompts=st.integers(0, 50),
        running=st.integers(0, 100),
        kv_use=st.floats(0, 1),
        held_tokens=st.integers(0, 20_000),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda c: c.url,
)


@given(engines=candidates, prompt_tokens=st.integers(0, 20_000), placed=st.integers(0, 1000))
def test_prefix_takes_the_engine_with_least_to_do_before_the_first_token(
    engines: list[Candidate], prompt_tokens: int, placed: int
) -> None:
    best, scores = POLICIES["prefix"](engines, prompt_tokens, placed)
    assert scores[best.url].total == min(score.total for score in scores.values())
    for engine in engines:
        score = scores[engine.url]
        assert score.missing == max(prompt_tokens - engine.held_tokens, 0)
        assert score.queued == engine.waiting_tokens


@given(engines=candidates, prompt_tokens=st.integers(0, 20_000))
def test_least_load_does_not_look_at_what_is_held(
    engines: list[Candidate], prompt_tokens: int
) -> None:
    bare = [replace(engine, held_tokens=0) for engine in engines]
    best, _ = POLICIES["least-load"](engines, prompt_tokens, 0)
    assert best.url == POLICIES["least-load"](bare, prompt_tokens, 0)[0].url


@given(engines=candidates, placed=st.integers(0, 1000))
def test_round_robin_takes_turns(engines: list[Candidate], placed: int) -> None:
    turns = [POLICIES["round-robin"](engines, 1, placed + i)[0].url for i in range(len(engines))]
    assert sorted(turns) == sorted(e.url for e in engines)


@dataclass
class Two:
    """A gateway in front of two engines that name their blocks alike."""

    client: Client
    urls: list[str]


@pytest_asyncio.fixture(scope="module")
async def two(model_dir: Path) -> AsyncIterator[Two]:
    hashing = Hashing.of("sha256", 16)
    async with AsyncExitStack() as running:
        urls = []
        for _ in range(2):
            engine = FakeEngine()
            engine.core.publishes = {
                "endpoint": "tcp://127.0.0.1:9",
                "replay_endpoint": None,
                "topic": "",
                "hash_algorithm": hashing.algorithm,
                "hash_root": hashing.root.hex(),
                "block_size": hashing.block_size,
            }
            server = TestServer(engine.app())
            await server.start_server()
            running.push_async_callback(server.close)
            urls.append(str(server.make_url("")).rstrip("/"))
        gateway = TestServer(build(Settings(engine=tuple(urls), tokenizer=str(model_dir))))
        await gateway.start_server()
        running.push_async_callback(gateway.close)
        async with Client(str(gateway.make_url(""))) as client:
            yield Two(client, urls)


def messages(system: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": system + " {{documents}}"},
        {"role": "user", "content": "Why?"},
    ]


async def test_streams_with_the_same_documents_go_to_the_same_engine(two: Two) -> None:
    long = "The shared document says many things. " * 60
    chosen = set()
    for i in range(4):
        async with two.client.stream(MODEL, messages("Read.")) as stream:
            assert (await stream.status())["engine"] is None  # its documents decide
            await stream.send(long)
            await stream.finish()
            status = await stream.status()
            chosen.add(status["engine"])
            routing = status["routing"]
            assert routing["policy"] == "prefix"
            assert routing["engine"] == status["engine"]
            assert set(routing["scores"]) == set(two.urls)
            held = routing["scores"][status["engine"]]["held"]
            assert held > 400 if i else held == 0
    assert len(chosen) == 1


async def test_streams_with_nothing_in_common_share_the_engines(two: Two) -> None:
    chosen = set()
    for i in range(4):
        async with two.client.stream(MODEL, messages(f"Number {i}.")) as stream:
            await stream.send(f"{i} is another document. " * 60)
            await stream.finish()
            chosen.add((await stream.status())["engine"])
    assert chosen == set(two.urls)
