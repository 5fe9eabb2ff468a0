"""Answers whose connection breaks: resumed with Last-Event-ID, or freed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from gateway import resuming
from gateway.answers import Chunks, Whole
from gateway.books import Books
from gateway.errors import EngineFailed
from gateway.keys import LIFECYCLE, SETTINGS
from gateway.requests import Options
from gateway.stream import Stream
from tests.conftest import until
from tests.gateway.tenancy import BODY, Gateway, events, gateway

pytestmark = pytest.mark.slow

KEY = {"Idempotency-Key": "once"}
RESUME_S = 30.0
SHORT_S = 1.0


@pytest_asyncio.fixture(scope="module")
async def at(model_dir: Path) -> AsyncIterator[Gateway]:
    async with gateway(model_dir, None, resume_s=RESUME_S) as running:
        yield running


@pytest_asyncio.fixture
async def http(at: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with at.client(None) as client:
        yield client
    at.engine.core.prefill_s = lambda tokens: 0.0


@pytest.fixture
def hurried(at: Gateway) -> Iterator[None]:
    """An answer is kept for `SHORT_S` only."""
    settings, before = at.app[SETTINGS], at.app[SETTINGS].now
    settings.now = replace(before, resume_s=SHORT_S)
    yield
    settings.now = before


async def opened(http: httpx.AsyncClient) -> str:
    return f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"


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


@pytest.mark.usefixtures("hurried")
async def test_who_does_not_come_back_in_time_has_the_stream_freed(
    at: Gateway, http: httpx.AsyncClient
) -> None:
    path = await opened(http)
    at.engine.core.prefill_s = lambda tokens: 30.0
    begun_s = time.monotonic()
    await cut_off(http, path, headers=KEY)

    async def cancelled() -> bool:
        return await state(http, path) == "cancelled"

    await until(cancelled, within_s=10)
    assert time.monotonic() - begun_s > SHORT_S / 2
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

    await until(cancelled, within_s=10)
    refused = await http.get(path + "/answer")
    assert refused.status_code == 409


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 5000])
async def test_a_number_that_is_none_is_refused(http: httpx.AsyncClient, last: str) -> None:
    path = await opened(http)
    await http.post(path + "/finish", headers=KEY)
    response = await http.get(path + "/answer", headers={"Last-Event-ID": last})
    assert response.status_code == 400


@pytest.mark.parametrize("last", ["x", "-1", "9" * 5000])
async def test_a_number_that_is_none_does_not_close_the_input(
    http: httpx.AsyncClient, last: str
) -> None:
    path = await opened(http)
    refused = await http.post(path + "/finish", headers=KEY | {"Last-Event-ID": last})
    assert (refused.status_code, await state(http, path)) == (400, "open")


async def test_the_rest_of_an_answer_that_was_given_elsewhere_is_not_made_up(
    http: httpx.AsyncClient,
) -> None:
    path = await opened(http)
    gone = await http.post(path + "/finish", headers=KEY | {"Last-Event-ID": "1"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "answer_gone")
    assert await state(http, path) == "open"
    whole = await http.post(path + "/finish", headers=KEY)
    assert events(whole.text)[0][0] == 0
    beyond = {"Last-Event-ID": str(len(events(whole.text)))}
    gone = await http.get(path + "/answer", headers=beyond)
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "answer_gone")


async def cut_off_while_it_is_written(
    at: Gateway, http: httpx.AsyncClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finish, and hang up when the input is closed, but the index has not heard of it yet."""
    writing, go_on = asyncio.Event(), asyncio.Event()
    write = Books.write

    async def slow(books: Books, *, renew: bool) -> None:
        if books.now().state == "finishing":
            writing.set()
            await go_on.wait()
        await write(books, renew=renew)

    with monkeypatch.context() as patch:
        patch.setattr(Books, "write", slow)
        first = asyncio.create_task(http.post(path + "/finish", headers=KEY))
        await writing.wait()
        first.cancel()
        await asyncio.wait({first})
        await http.get(path)  # the gateway has heard of it too
        go_on.set()


async def test_a_finish_that_was_cut_off_while_it_is_written_has_its_answer_kept(
    at: Gateway, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await opened(http)
    await cut_off_while_it_is_written(at, http, path, monkeypatch)
    again = await http.post(path + "/finish", headers=KEY)
    assert again.status_code == 200
    assert events(again.text)[-1][1] == "data: [DONE]"


@pytest.mark.usefixtures("hurried")
async def test_a_finish_that_was_cut_off_and_is_not_asked_for_again_is_freed(
    at: Gateway, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = await opened(http)
    at.engine.core.prefill_s = lambda tokens: 30.0
    begun_s = time.monotonic()
    await cut_off_while_it_is_written(at, http, path, monkeypatch)

    async def cancelled() -> bool:
        return await state(http, path) == "cancelled"

    await until(cancelled, within_s=10)
    assert time.monotonic() - begun_s > SHORT_S / 2


@pytest.mark.parametrize("body", [{}, {"stream": False}])
async def test_all_who_wait_hear_why_a_finish_failed(
    at: Gateway, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    path, asked, fail = await opened(http), asyncio.Event(), asyncio.Event()

    async def failing(stream: Stream, options: Options, seq: int | None) -> None:
        asked.set()
        await fail.wait()
        raise EngineFailed("no engine")

    monkeypatch.setattr(Stream, "finish", failing)
    first = asyncio.create_task(http.post(path + "/finish", headers=KEY, json=body))
    await asked.wait()
    second = asyncio.create_task(http.get(path + "/answer"))

    async def both() -> bool:
        return at.app[LIFECYCLE].requests == 2

    await until(both, within_s=10)
    await asyncio.wait({second}, timeout=0.3)  # longer than a sign of life takes
    fail.set()
    for response in await asyncio.gather(first, second):
        assert (response.status_code, response.json()["error"]["message"]) == (503, "no engine")


async def test_an_answer_that_the_gateway_can_not_write_ends_with_an_error(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Chunks, "of", wrong)
    monkeypatch.setattr(Whole, "add", wrong)
    path = await opened(http)
    told = await http.post(path + "/finish", headers=KEY, timeout=5)
    assert (told.status_code, '"code":"internal_error"' in told.text) == (200, True)
    path = await opened(http)
    told = await http.post(path + "/finish", headers=KEY, json={"stream": False}, timeout=5)
    assert (told.status_code, told.json()["error"]["code"]) == (500, "internal_error")


async def test_what_is_kept_of_an_answer_is_bounded(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "MAX_KEPT_BYTES", 300)
    path = await opened(http)
    await http.post(path + "/finish", headers=KEY)
    gone = await http.get(path + "/answer", headers={"Last-Event-ID": "0"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "answer_gone")
