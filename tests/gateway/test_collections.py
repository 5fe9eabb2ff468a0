"""Collections over HTTP: made, filled, searched, removed; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer

from gateway.app import build
from gateway.settings import Settings
from tests.retrieval.words import Words, files_no_longer_than

AT = "/v1/collections"
SEA = {"id": "sea", "text": "Ships sail on the wide ocean."}
BREAD = {"id": "bread", "text": "Dough is baked in a hot oven.", "title": "Baking"}


@pytest_asyncio.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway whose engine is away: collections need none."""
    settings = Settings(
        engine=("http://127.0.0.1:9",),
        collections=str(tmp_path),
        max_chunk_bytes=1000,
        max_body_bytes=3000,
    )
    async with TestServer(build(settings, Words())) as server:
        url = str(server.make_url(""))
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            yield http


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def refusal(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    return response.status_code, error["code"]


async def test_a_collection_is_made_filled_searched_and_removed(http: httpx.AsyncClient) -> None:
    assert (await http.post(AT, json={"name": "notes"})).status_code == 201
    added = (await http.post(AT + "/notes/passages", content=lines(SEA, BREAD))).json()
    assert (added["added"], added["passages"]) == (2, 2)
    replaced = (await http.post(AT + "/notes/passages", content=lines(BREAD))).json()
    assert (replaced["added"], replaced["passages"]) == (1, 2)
    (info,) = (await http.get(AT)).json()["data"]
    assert (info["name"], info["passages"], info["embedder"]) == ("notes", 2, "words")
    found = (await http.post(AT + "/notes/search", json={"query": "Dough is baked"})).json()["data"]
    assert [passage["id"] for passage in found] == ["bread", "sea"]
    assert found[0]["title"] == "Baking"
    assert found[0]["score"] > found[1]["score"]
    one = (await http.post(AT + "/notes/search", json={"query": "Dough", "k": 1})).json()["data"]
    assert len(one) == 1
    assert (await http.delete(AT + "/notes")).json()["deleted"]
    assert (await http.get(AT)).json()["data"] == []


async def test_what_is_not_there_or_there_already_is_refused(http: httpx.AsyncClient) -> None:
    await http.post(AT, json={"name": "notes"})
    assert refusal(await http.post(AT, json={"name": "notes"})) == (409, "collection_exists")
    assert refusal(await http.post(AT, json={"name": "../x"})) == (400, "invalid_request")
    missing = (404, "collection_not_found")
    assert refusal(await http.delete(AT + "/other")) == missing
    assert refusal(await http.post(AT + "/other/search", json={"query": "q"})) == missing
    assert refusal(await http.post(AT + "/other/passages", content=lines(SEA))) == missing


async def test_a_full_disk_is_said_and_changes_nothing(http: httpx.AsyncClient) -> None:
    await http.post(AT, json={"name": "notes"})
    await http.post(AT + "/notes/passages", content=lines(SEA))
    with files_no_longer_than(100):
        full = await http.post(AT + "/notes/passages", content=lines(BREAD))
        assert refusal(full) == (507, "storage_full")
        found = await http.post(AT + "/notes/search", json={"query": "Ships"})
        assert [passage["id"] for passage in found.json()["data"]] == ["sea"]
    added = await http.post(AT + "/notes/passages", content=lines(BREAD))
    assert added.json()["passages"] == 2


@pytest.mark.parametrize(
    ("content", "status", "named"),
    [
        (lines(SEA, {"id": "no text"}), 400, "passage 2"),
        (lines(SEA, {"id": "empty", "text": ""}), 400, "passage 2"),
        (b'{"id": "torn', 400, "passage 1"),
        (b"", 400, "no passages"),
        (lines(SEA | {"text": "x" * 1001}), 413, "limit 1000"),
        (lines(*[SEA | {"text": "x" * 900}] * 4), 413, "3000 bytes"),
    ],
)
async def test_wrong_passages_are_named_and_none_is_added(
    http: httpx.AsyncClient, content: bytes, status: int, named: str
) -> None:
    await http.post(AT, json={"name": "notes"})
    refused = await http.post(AT + "/notes/passages", content=content)
    assert refused.status_code == status
    assert named in refused.json()["error"]["message"]
    assert (await http.get(AT)).json()["data"][0]["passages"] == 0
