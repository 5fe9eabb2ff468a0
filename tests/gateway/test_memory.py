"""Streams that have ended are freed by reference counting alone, whatever has become of them."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway import streams
from gateway.keys import STREAMS
from tests.conftest import until
from tests.fake_engine import MODEL
from tests.gateway.pools import QUESTION, Front, front

pytestmark = pytest.mark.slow

BODY = {"model": MODEL, "messages": QUESTION}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    logging.disable()  # pytest keeps what is logged, errors included
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


@pytest_asyncio.fixture
async def f(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, no_collector: None
) -> AsyncIterator[Front]:
    monkeypatch.setattr(streams, "SWEEP_S", 0.05)
    async with front(
        model_dir, 1, keep_finished_s=0.1, idle_timeout_s=1.0, resume_s=0.1, heartbeat_s=0.1
    ) as running:
        yield running


class Client:
    """Does one thing with each stream."""

    def __init__(self, f: Front) -> None:
        self._f, self._http = f, f.http
        self.core = f.engines[0].fake.core

    async def opened(self, **more: Any) -> str:
        created = await self._http.post(self._f.url + "/v1/streams", json=BODY | more)
        path = f"{self._f.url}/v1/streams/{created.json()['id']}"
        await self._http.post(path + "/chunks", json={"text": "some context", "seq": 0})
        return path

    async def answered(self, path: str) -> None:
        assert (await self._http.post(path + "/finish", json={"stream": False})).is_success

    async def answered_in_events(self, path: str) -> None:
        assert "[DONE]" in (await self._http.post(path + "/finish", json={})).text

    async def answered_under_a_key(self, path: str) -> None:
        headers = {"Idempotency-Key": path}
        assert "[DONE]" in (await self._http.post(path + "/finish", json={}, headers=headers)).text
        assert "[DONE]" in (await self._http.get(path + "/answer")).text

    async def ranked(self, path: str) -> None:
        ranked = {"documents": [{"id": "a", "text": "a"}, {"id": "b", "text": "b"}], "seq": 1}
        await self._http.put(path + "/documents", json=ranked)
        await self._http.put(path + "/documents", json={"documents": [{"id": "unknown"}]})
        await self._http.post(path + "/chunks", json={"text": "gap", "seq": 9})
        await self.answered(path)
        assert (await self._http.post(path + "/chunks", json={"text": "late"})).status_code == 409

    async def cancelled(self, path: str) -> None:
        await self._http.delete(path)

    async def expired(self, path: str) -> None:
        """By itself."""

    async def hung_up(self, path: str) -> None:
        self.core.prefill_s = lambda tokens: 30.0
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await self._http.post(path + "/finish", json={})
        self.core.prefill_s = lambda tokens: 0.0

    async def hung_up_under_a_key(self, path: str) -> None:
        self.core.prefill_s = lambda tokens: 30.0
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                headers = {"Idempotency-Key": path}
                await self._http.post(path + "/finish", json={}, headers=headers)
        self.core.prefill_s = lambda tokens: 0.0

    async def failed(self, path: str) -> None:
        self._f.engines[0].breaks = True
        answer = await self._http.post(path + "/finish", json={"stream": False})
        assert answer.status_code == 503
        again = await self._http.post(path + "/finish", json={"stream": False})
        assert again.status_code == 503
        self._f.engines[0].breaks = False

    async def failed_under_a_key(self, path: str) -> None:
        self._f.engines[0].breaks = True
        headers = {"Idempotency-Key": path}
        for _ in range(2):
            await self._http.post(path + "/finish", json={"stream": False}, headers=headers)
        self._f.engines[0].breaks = False

    async def failed_in_events(self, path: str) -> None:
        self._f.engines[0].breaks = True
        assert "engine_unavailable" in (await self._http.post(path + "/finish", json={})).text
        self._f.engines[0].breaks = False


KINDS = [name for name in vars(Client) if not name.startswith("_") and name != "opened"]


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_left_of_a_stream(f: Front, kind: str) -> None:
    client = Client(f)
    path = await client.opened()
    stream = f.app[STREAMS].find(path.rpartition("/")[2])
    assert stream is not None
    left: list[weakref.ref[Any]] = [weakref.ref(stream), weakref.ref(stream.line)]
    del stream
    await getattr(client, kind)(path)

    async def freed() -> bool:
        return not any(ref() for ref in left)

    await until(freed, within_s=8)
