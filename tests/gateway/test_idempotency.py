"""Requests that come twice under one Idempotency-Key."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from cache_index.index import StreamRecord
from gateway.keys import KEEPER, MAKING, STREAMS
from gateway.prompt import Document, PromptBuilder
from tests.conftest import until
from tests.gateway.tenancy import BODY, Gateway, gateway, tenants_file

WHOLE = {"stream": False}


@pytest_asyncio.fixture(scope="module")
async def running(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Gateway, dict[str, str]]]:
    file = tmp_path_factory.mktemp("idempotency") / "tenants.toml"
    keys = tenants_file(file, a="", b="")
    async with gateway(model_dir, file) as at:
        yield at, keys


@pytest_asyncio.fixture
async def http(running: tuple[Gateway, dict[str, str]]) -> AsyncIterator[httpx.AsyncClient]:
    at, keys = running
    async with at.client(keys["a"]) as client:
        yield client


def key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4())}


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_the_same_creation_gives_the_same_stream(http: httpx.AsyncClient) -> None:
    headers = key()
    first = await http.post("/v1/streams", json=BODY, headers=headers)
    path = f"/v1/streams/{first.json()['id']}"
    await http.post(path + "/chunks", json={"text": "x", "seq": 0})
    again = await http.post("/v1/streams", json=BODY, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json()["id"] == first.json()["id"]
    assert again.json()["chunks"] == 1
    assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers


async def test_a_stream_that_is_there_needs_no_room(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    keys, headers = tenants_file(file, a="streams = 1"), key()
    async with gateway(model_dir, file) as at, at.client(keys["a"]) as http:
        first = await http.post("/v1/streams", json=BODY, headers=headers)
        again = await http.post("/v1/streams", json=BODY, headers=headers)
        assert (again.status_code, again.json()["id"]) == (201, first.json()["id"])
        assert (await http.post("/v1/streams", json=BODY, headers=key())).status_code == 429


async def test_many_at_once_make_one(
    running: tuple[Gateway, dict[str, str]], http: httpx.AsyncClient
) -> None:
    before, headers = running[0].app[STREAMS]._alive, key()
    made = await asyncio.gather(
        *(http.post("/v1/streams", json=BODY, headers=headers) for _ in range(8))
    )
    assert len({r.json()["id"] for r in made if r.status_code == 201}) == 1
    assert {r.status_code for r in made} <= {201, 409}
    assert running[0].app[STREAMS]._alive == before + 1


async def test_many_at_once_make_one_while_the_index_is_asked(
    running: tuple[Gateway, dict[str, str]],
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeper, before = running[0].app[KEEPER], running[0].app[STREAMS]._alive
    find, asked = keeper.find, asyncio.Event()

    async def slow(stream_id: str) -> StreamRecord | None:
        await asked.wait()
        return await find(stream_id)

    monkeypatch.setattr(keeper, "find", slow)
    headers = key()
    asking = [
        asyncio.create_task(http.post("/v1/streams", json=BODY, headers=headers)) for _ in range(3)
    ]
    await asyncio.wait(asking, timeout=1, return_when=asyncio.FIRST_COMPLETED)  # one is refused
    asked.set()
    made = await asyncio.gather(*asking)
    assert sorted(r.status_code for r in made) in ([201, 409, 409], [201, 201, 409])
    assert running[0].app[STREAMS]._alive == before + 1


async def test_another_request_under_a_key_is_refused(http: httpx.AsyncClient) -> None:
    headers = key()
    await http.post("/v1/streams", json=BODY, headers=headers)
    other = await http.post("/v1/streams", json=BODY | {"temperature": 0.5}, headers=headers)
    assert code(other) == (422, "idempotency_key_reused")


async def test_while_the_first_is_under_way_the_second_is_refused(
    running: tuple[Gateway, dict[str, str]], http: httpx.AsyncClient
) -> None:
    headers = key()
    stream_id = (await http.post("/v1/streams", json=BODY, headers=headers)).json()["id"]
    running[0].app[MAKING].add(stream_id)
    again = await http.post("/v1/streams", json=BODY, headers=headers)
    running[0].app[MAKING].discard(stream_id)
    assert code(again) == (409, "idempotency_key_in_use")


async def test_a_creation_that_failed_leaves_its_key_free(http: httpx.AsyncClient) -> None:
    headers = key()
    refused = await http.post("/v1/streams", json=BODY | {"model": "other"}, headers=headers)
    assert refused.status_code == 404
    assert (await http.post("/v1/streams", json=BODY, headers=headers)).status_code == 201


async def test_a_creation_that_failed_with_its_stream_leaves_its_key_free(
    http: httpx.AsyncClient,
) -> None:
    headers, long = key(), BODY | {"max_tokens": 10_000_000}
    for _ in range(2):
        refused = await http.post("/v1/streams", json=long, headers=headers)
        assert code(refused) == (400, "context_length_exceeded")
    made = await http.post("/v1/streams", json=BODY, headers=headers)
    assert (made.status_code, made.json()["state"]) == (201, "open")


async def test_a_creation_that_was_cut_off_leaves_its_key_free(
    running: tuple[Gateway, dict[str, str]],
    http: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, headers = asyncio.Event(), key()
    body = BODY | {"documents": [{"text": "not at once " * 40}]}

    async def never(*args: object, **options: object) -> Document:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(PromptBuilder, "document", never)
        first = asyncio.create_task(http.post("/v1/streams", json=body, headers=headers))
        await begun.wait()
        first.cancel()
        await asyncio.wait({first})

        async def over() -> bool:
            return not running[0].app[MAKING]

        await until(over, within_s=5)
    made = await http.post("/v1/streams", json=body, headers=headers)
    assert (made.status_code, made.json()["state"]) == (201, "open")
    assert "Idempotent-Replayed" not in made.headers


async def test_keys_are_the_tenants_own(
    running: tuple[Gateway, dict[str, str]], http: httpx.AsyncClient
) -> None:
    at, keys = running
    headers = key()
    mine = await http.post("/v1/streams", json=BODY, headers=headers)
    async with at.client(keys["b"]) as other:
        theirs = await other.post("/v1/streams", json=BODY | {"seed": 1}, headers=headers)
    assert theirs.status_code == 201
    assert theirs.json()["id"] != mine.json()["id"]


@pytest.mark.parametrize("value", [b"", b"x" * 256, b"\xff", "\u00e9".encode()])
async def test_a_key_is_ascii_and_has_a_length(http: httpx.AsyncClient, value: bytes) -> None:
    response = await http.post("/v1/streams", json=BODY, headers={b"Idempotency-Key": value})
    assert response.status_code == 400


async def test_finishing_twice_gives_the_same_answer(
    running: tuple[Gateway, dict[str, str]], http: httpx.AsyncClient
) -> None:
    headers = key()
    stream_id = (await http.post("/v1/streams", json=BODY)).json()["id"]
    path = f"/v1/streams/{stream_id}/finish"
    running[0].engine.core.prefill_s = lambda tokens: 0.3
    try:
        answers = await asyncio.gather(
            *(http.post(path, json=WHOLE, headers=headers) for _ in range(3))
        )
    finally:
        running[0].engine.core.prefill_s = lambda tokens: 0.0
    answers.append(await http.post(path, json=WHOLE, headers=headers))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["choices"][0]["message"]["content"] == "answer"
    other = await http.post(path, json=WHOLE | {"max_tokens": 3}, headers=headers)
    assert code(other) == (422, "idempotency_key_reused")
    assert code(await http.post(path, json=WHOLE, headers=key())) == (409, "input_closed")


async def test_a_finish_that_failed_leaves_its_key_free(http: httpx.AsyncClient) -> None:
    headers = key()
    path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}/finish"
    long = await http.post(path, json=WHOLE | {"max_tokens": 10_000_000}, headers=headers)
    assert code(long) == (400, "context_length_exceeded")
    assert (await http.post(path, json=WHOLE, headers=headers)).status_code == 200


async def test_a_body_of_ndjson_has_no_key(http: httpx.AsyncClient) -> None:
    headers = key() | {"Content-Type": "application/x-ndjson"}
    refused = await http.post("/v1/streams", content=b"{}", headers=headers)
    assert code(refused) == (400, "invalid_request")
    assert refused.json()["error"]["param"] == "Idempotency-Key"


async def test_an_answer_whose_stream_is_forgotten_is_gone(model_dir: Path) -> None:
    headers = key()
    async with gateway(model_dir, None, keep_finished_s=0.1) as at, at.client(None) as http:
        path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"
        first = await http.post(path + "/finish", json=WHOLE, headers=headers)
        assert first.status_code == 200

        async def forgotten() -> bool:
            return at.app[STREAMS].find(path.rpartition("/")[2]) is None

        await until(forgotten, within_s=5)
        again = await http.post(path + "/finish", json=WHOLE, headers=headers)
        assert code(again) == (410, "answer_gone")
        assert code(await http.get(path + "/answer")) == (410, "answer_gone")
        late = await http.post(path + "/chunks", json={"text": "x"})
        assert code(late) == (404, "stream_not_found")
