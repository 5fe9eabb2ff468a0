"""How a gateway begins and ends: what it says of itself, and what becomes of what is open."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import pytest

from deploy.local import free_port
from gateway.keys import KEEPER, LIFECYCLE, SETTINGS, STREAMS
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine
from tests.gateway.pools import QUESTION, Breakable, Front, front, served

BODY = {"model": MODEL, "messages": QUESTION}


def drain(f: Front) -> asyncio.Task[bool]:
    app = f.app
    return app[LIFECYCLE].begin_drain(app[SETTINGS], app[STREAMS], app[KEEPER])


async def test_a_gateway_says_what_it_waits_for(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    away = f"http://127.0.0.1:{free_port()}"
    async with front(model_dir, 0, engine=(away,)) as f:
        assert (await f.http.get(f.url + "/health")).status_code == 200
        answer = await f.ready()
        assert answer.status_code == 503
        said = answer.json()
        assert not said["ready"]
        assert said["engines"] == {away: False}
        assert any(away in line and "away" in line for line in said["missing"])
        assert "no engine takes streams" in said["missing"]
    waiting = [r.getMessage() for r in caplog.records if "waiting for engine" in r.getMessage()]
    assert len(waiting) == 1
    assert away in waiting[0]


async def test_a_gateway_is_ready_when_a_stream_can_be_opened_and_not_before(
    model_dir: Path, tmp_path: Path
) -> None:
    late = Breakable()
    late.runs.clear()
    async with (
        served(late.app()) as late.url,
        front(model_dir, 0, engine=(late.url,), poll_timeout_s=0.2) as f,
    ):
        assert not await f.is_ready()
        late.runs.set()
        await until(f.is_ready, within_s=5)
        said = (await f.ready()).json()
        assert said["missing"] == []
        assert said["models"] == {MODEL: 1}
        assert (await f.http.post(f.url + "/v1/streams", json=BODY)).status_code == 201


async def test_a_model_without_tokenizer_is_missing(model_dir: Path, tmp_path: Path) -> None:
    engine = Breakable(FakeEngine(model="another"))
    async with (
        served(engine.app()) as engine.url,
        front(model_dir, 0, engine=(engine.url,), tokenizer=str(tmp_path)) as f,
    ):

        async def told() -> bool:
            missing = (await f.ready()).json()["missing"]
            return any("no tokenizer for 'another'" in line for line in missing)

        await until(told, within_s=10)
        assert not await f.is_ready()


async def test_a_drained_gateway_refuses_new_streams_and_lets_open_ones_end(
    model_dir: Path,
) -> None:
    async with front(model_dir, 1) as f:
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("before")
            drained = drain(f)
            for path in ("/v1/streams", "/v1/chat/completions"):
                refused = await f.http.post(f.url + path, json=BODY)
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "draining"
                assert refused.headers["Retry-After"] == "1"
                assert refused.headers["Connection"] == "close"
            answer = await f.ready()
            assert (answer.status_code, answer.json()["draining"]) == (503, True)
            await stream.send("after")
            whole = await stream.finish()
            assert whole["choices"][0]["message"]["content"] == "answer"
        async with asyncio.timeout(10):
            assert await drained


async def test_a_drain_waits_for_an_answer_under_way(model_dir: Path) -> None:
    async with front(model_dir, 1) as f:
        f.engines[0].fake.core.prefill_s = lambda tokens: 0.5
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("text")
            finishing = asyncio.create_task(stream.finish())

            async def asked() -> bool:
                return bool(f.engines[0].fake.finished)

            await until(asked, within_s=5)
            drained = drain(f)
            assert await drained
            assert finishing.done(), "it was cut off"
            await finishing


async def test_a_drain_has_an_end(model_dir: Path) -> None:
    async with front(model_dir, 1, drain_timeout_s=0.3) as f, f.client.stream(MODEL, QUESTION):
        async with asyncio.timeout(10):
            assert not await drain(f)


async def test_operators_can_drain_a_gateway_that_goes_on_running(model_dir: Path) -> None:
    async with front(model_dir, 1) as f:
        answer: httpx.Response = await f.http.post(f.admin_url + "/admin/drain")
        assert answer.status_code == 202
        assert answer.json()["draining"]
        assert not await f.is_ready()
        assert (await f.http.get(f.url + "/health")).status_code == 200
