"""Answers whose connection breaks: resumed with Last-Event-ID, or freed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from gateway import resuming
from tests.conftest import until
from tests.gateway.tenancy import BODY, Gateway, gateway

KEY = {"Idempotency-Key": "once"}
RESUME_S = 1.0


@pytest_asyncio.fixture(scope="module")
async def at(model_dir: Path) -> AsyncIterator[Gateway]:
    async with gateway(model_dir, None, resume_s=RESUME_S) as running:
        yield running


@pytest_asyncio.fixture
async def http(at: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with at.client(None) as client:
        yield client
    at.engine.core.prefill_s = lambda tokens: 0.0


async def opened(http: httpx.AsyncClient) -> str:
    return f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"


def events(text: str) -> list[tuple[int, str]]:
    """Number and data of each event; signs of life are left out."""
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("id: ")]
    return [(int(lines[0][4:]), lines[1]) for lines in blocks]


async def cut_off(http: httpx.AsyncClient, path: str, **more: Any) -> str:
    """Finish, and hang up after the first event."""
    async with http.stream("POST", path + "/finish", **more) as answer:
        return await anext(answer.aiter_lines())


async def state(http: httpx.AsyncClient, path: str) -> str:
    return str((await http.get(path)).json()["state"])


async def test_the_rest_of_an_answer_comes_after_a_broken_connection(
    at: Gateway, http: httpx.AsyncClient
) -> None:
    path = await opened(http)
    at.engine.core.prefill_s = lambda tokens: 0.4
    assert await cut_off(http, path, headers=KEY) == "id: 0"
    rest = await http.get(path + "/answer", headers={"Last-Event-ID": "0"})
    numbered = events(rest.text)
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))
    assert numbered[-1][1] == "data: [DONE]"
    whole = events((await http.get(path + "/answer")).text)
    assert whole[1:] == numbered
    for i in range(len(whole)):  # from everywhere, also by asking for the same once more
        got = await http.post(path + "/finish", headers=KEY | {"Last-Event-ID": str(i)})
        assert events(got.text) == whole[i + 1 :]
    assert await state(http, path) == "done"


async def test_who_does_not_come_back_in_time_has_the_stream_freed(
    at: Gateway, http: httpx.AsyncClient
) -> None:
    path = await opened(http)
    at.engine.core.prefill_s = lambda tokens: 30.0
    await cut_off(http, path, headers=KEY)

    async def cancelled() -> bool:
        return await state(http, path) == "cancelled"

    assert await until(cancelled, within_s=5) > RESUME_S / 2
    broken = await http.get(path + "/answer", headers={"Last-Event-ID": "0"})
    assert '"code":"input_closed"' in broken.text


async def test_without_a_key_a_client_that_is_gone_is_gone(
    at: Gateway, http: httpx.AsyncClient
) -> None:
    path = await opened(http)
    at.engine.core.prefill_s = lambda tokens: 30.0
    await cut_off(http, path)

    async def cancelled() -> bool:
        return await state(http, path) == "cancelled"

    assert await until(cancelled, within_s=5) < 1.0
    refused = await http.get(path + "/answer")
    assert refused.status_code == 409


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 5000])
async def test_a_number_that_is_none_is_refused(http: httpx.AsyncClient, last: str) -> None:
    path = await opened(http)
    await http.post(path + "/finish", headers=KEY)
    response = await http.get(path + "/answer", headers={"Last-Event-ID": last})
    assert response.status_code == 400


async def test_what_is_kept_of_an_answer_is_bounded(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "MAX_KEPT_BYTES", 300)
    path = await opened(http)
    await http.post(path + "/finish", headers=KEY)
    gone = await http.get(path + "/answer", headers={"Last-Event-ID": "0"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "answer_gone")
