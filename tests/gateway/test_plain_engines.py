"""A gateway in front of a server that was not modified: its clients see no difference."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.app import build
from gateway.client import Client, StreamError
from gateway.keys import ENGINES
from gateway.settings import Settings, SettingsError, load
from tests.conftest import until
from tests.fake_openai import MODEL, FakeOpenAI

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "Why?"}]


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


@asynccontextmanager
async def in_front_of(fake: FakeOpenAI, model_dir: Path) -> AsyncIterator[Client]:
    """A client of a gateway whose only engine is this server."""
    async with serving(fake.app()) as url:
        app = build(Settings(plain_engine=(url,), tokenizer=str(model_dir)))
        async with serving(app) as gateway, Client(gateway) as client:
            yield client


async def test_a_stream_is_warmed_while_it_grows_and_answered_whole(model_dir: Path) -> None:
    fake = FakeOpenAI()
    async with (
        in_front_of(fake, model_dir) as client,
        client.stream(MODEL, QUESTION, max_tokens=3) as stream,
    ):
        await stream.send("It rains. " * 60)

        async def warmed() -> bool:
            return (await stream.status())["tokens"]["prefilled"] > 100

        await until(warmed, within_s=5)
        text = "".join([piece async for piece in stream.answer()])
    (answer,) = fake.answers
    first = sum(answer["prompt"])
    assert text == f" {first} {first + 1} {first + 2}"
    assert fake.warmings[0]["prompt"] == answer["prompt"][: len(fake.warmings[0]["prompt"])]


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({"temperature": 0}, "continued"),
        ({"temperature": 0, "stop": ["never"]}, "retold"),
        ({"temperature": 1, "seed": 3}, "retold"),
    ],
)
async def test_an_answer_goes_on_at_another_engine_when_its_own_breaks_off(
    model_dir: Path, options: dict[str, Any], how: str
) -> None:
    fakes = [FakeOpenAI(first_token=lambda prompt: 1000 + len(prompt)) for _ in range(2)]
    fakes[0].breaks_after = 3
    async with serving(fakes[0].app()) as one, serving(fakes[1].app()) as other:
        app = build(
            Settings(plain_engine=(one, other), tokenizer=str(model_dir), routing="round-robin")
        )
        async with serving(app) as gateway, Client(gateway) as client:
            async with client.stream(MODEL, QUESTION, max_tokens=9, **options) as stream:
                await stream.send("It rains. ")
                text = "".join([piece async for piece in stream.answer()])
                handoff = (await stream.status())["handoff"]
            metrics = (await client._http.get("/metrics")).text
    first, second = fakes[0].answers[0], fakes[1].answers[0]
    length = len(first["prompt"])
    assert text == "".join(f" {1000 + length + i}" for i in range(9))
    assert (len(second["prompt"]) > length) == (how == "continued")
    assert len(second["prompt"]) + second["max_tokens"] == length + 9
    assert stream.usage is not None
    assert stream.usage["prompt_tokens"] == length
    assert stream.usage["completion_tokens"] == 9
    assert handoff == {
        "decided": False, "reason": "engine_cannot", "decode_engine": None, "resumed": 1,
    }  # fmt: skip
    assert f'stream2llm_answers_resumed_total{{how="{how}"}} 1.0' in metrics


async def test_an_unseeded_answer_that_breaks_off_ends_in_an_error(model_dir: Path) -> None:
    fake = FakeOpenAI(breaks_after=3)
    async with (
        in_front_of(fake, model_dir) as client,
        client.stream(MODEL, QUESTION, max_tokens=9) as stream,
    ):
        await stream.send("It rains. ")
        with pytest.raises(StreamError, match="broke off") as broken:
            async with asyncio.timeout(2):
                _ = [piece async for piece in stream.answer()]
        assert broken.value.code == "engine_unavailable"


async def test_a_ranked_list_may_change_until_the_end(model_dir: Path) -> None:
    fake = FakeOpenAI()
    lists = [["a", "b"], ["b"], ["b", "a"]]
    texts = {"a": "First words. " * 40, "b": "Other words. " * 40}
    async with in_front_of(fake, model_dir) as client:
        for ranked in (lists, lists[-1:]):  # by way of the others, and at once
            async with client.stream(MODEL, QUESTION, max_tokens=1) as stream:
                for names in ranked:
                    await stream.replace([{"id": name, "text": texts[name]} for name in names])
                await stream.finish()
    by_way, at_once = (answer["prompt"] for answer in fake.answers)
    assert by_way == at_once


async def test_the_log_tells_an_engine_without_the_plug_in_from_one_that_is_away(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "gateway")
    async with serving(FakeOpenAI().app()) as url:
        app = build(Settings(engine=(url,), tokenizer=str(model_dir), poll_s=0.05))
        async with serving(app):
            engines = app[ENGINES]
            for _ in range(3):
                await engines.pool.check(engines.all[0])
            assert not engines.ready
    warnings = [r.getMessage() for r in caplog.records if url in r.getMessage()]
    assert len(warnings) == 1
    assert "--plain-engine" in warnings[0]


def test_plain_engines_are_settings_like_any_other(tmp_path: Path) -> None:
    flags = ["--plain-engine", "http://a:1", "--plain-engine", "http://b:2"]
    assert load(flags, {}).plain_engine == ("http://a:1", "http://b:2")
    with pytest.raises(SettingsError, match="plain_engine"):
        load([], {"STREAM2LLM_PLAIN_ENGINE": "ftp://a"})
