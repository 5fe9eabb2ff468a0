"""Tenants over two replicas: who may see, what is counted where, what a key finds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from gateway.identity import FORWARDED
from gateway.keys import KEEPER, METRICS
from tests.gateway.tenancy import BODY, Gateway, events, gateway, tenants_file


@pytest_asyncio.fixture(scope="module")
async def pair(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory, redis_url: str
) -> AsyncIterator[tuple[Gateway, Gateway, dict[str, str]]]:
    file = tmp_path_factory.mktemp("replicas") / "tenants.toml"
    keys = tenants_file(file, a="tokens_per_minute = 1000", b="")
    async with (
        gateway(model_dir, file, index=redis_url) as one,
        gateway(model_dir, file, index=redis_url) as two,
    ):
        yield one, two, keys


async def made(at: Gateway, key: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async with at.client(key) as http:
        return await http.post("/v1/streams", json=BODY, headers=headers)


async def test_a_stream_is_served_to_its_tenant_and_to_nobody_else_at_every_replica(
    pair: tuple[Gateway, Gateway, dict[str, str]],
) -> None:
    one, two, keys = pair
    path = f"/v1/streams/{(await made(one, keys['a'])).json()['id']}"
    forwarded = two.app[METRICS].forwarded
    async with two.client(keys["a"]) as a, two.client(keys["b"]) as b:
        before = forwarded._value.get()
        for headers in ({}, {FORWARDED: "http://127.0.0.1:1"}):  # nobody believes the second
            assert (await a.get(path, headers=headers)).json()["state"] == "open"
        assert forwarded._value.get() == before + 2
        assert (await b.get(path)).status_code == 404
        assert (await b.post(path + "/finish")).status_code == 404
        assert forwarded._value.get() == before + 2, "nothing of another tenant is sent on"
        answer = await a.post(path + "/finish", json={"stream": False})
    assert answer.json()["choices"][0]["message"]["content"] == "answer"


async def test_a_key_finds_its_stream_at_the_other_replica_and_its_answer_too(
    pair: tuple[Gateway, Gateway, dict[str, str]],
) -> None:
    one, two, keys = pair
    headers = {"Idempotency-Key": "over two"}
    first, again = await made(one, keys["a"], headers), await made(two, keys["a"], headers)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["Idempotent-Replayed"] == "true"
    path = f"/v1/streams/{first.json()['id']}"
    async with two.client(keys["a"]) as http:
        other = await http.post("/v1/streams", json=BODY | {"seed": 1}, headers=headers)
        assert other.status_code == 422
        whole = await http.post(path + "/finish", headers=headers)
    async with one.client(keys["a"]) as http:
        again = await http.get(path + "/answer")
        assert events(again.text) == events(whole.text)
        assert again.text.endswith("data: [DONE]\n\n")


async def test_a_key_at_two_replicas_at_once_makes_one_stream(
    pair: tuple[Gateway, Gateway, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, keys = pair
    headers = {"Idempotency-Key": "at once"}

    async def nothing_yet(stream_id: str) -> None:
        return None

    with monkeypatch.context() as patch:  # both have looked before either has written
        patch.setattr(two.app[KEEPER], "find", nothing_yet)
        first = await made(one, keys["a"], headers)
        second = await made(two, keys["a"], headers)
    assert (first.status_code, second.status_code) == (201, 409)
    assert second.json()["error"]["code"] == "idempotency_key_in_use"
    again = await made(two, keys["a"], headers)
    assert again.json()["id"] == first.json()["id"]
    path = f"/v1/streams/{first.json()['id']}"
    for at in (one, two):
        async with at.client(keys["a"]) as http:
            assert (await http.get(path)).json()["state"] == "open"


async def test_tokens_are_counted_where_the_stream_is_and_told_everywhere(
    pair: tuple[Gateway, Gateway, dict[str, str]],
) -> None:
    one, two, keys = pair
    path = f"/v1/streams/{(await made(one, keys['a'])).json()['id']}"
    async with two.client(keys["a"]) as http:
        taken = await http.post(path + "/chunks", json={"text": "word " * 500})
        own = await http.post("/v1/streams", json=BODY)
    left = "x-ratelimit-remaining-tokens"
    assert int(taken.headers[left]) < int(own.headers[left])
