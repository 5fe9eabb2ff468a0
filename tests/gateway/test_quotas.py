"""What a tenant has used and may use, whatever its clients do and while its limits change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import orjson
import pytest
from aiohttp import web

from engine_adapter.messages import Event, TokenEvent
from gateway.keys import RELOADER, STREAMS
from tests.conftest import until
from tests.gateway.tenancy import BODY, gateway, tenants_file
from tests.gateway.test_limits import refused

pytestmark = pytest.mark.slow


async def test_hanging_up_does_not_make_an_answer_cheaper(model_dir: Path, tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        return web.Response()

    async def long(*args: object, **options: object) -> AsyncGenerator[Event, None]:
        for _ in range(40):
            yield TokenEvent(token_ids=[1], text="x")
        await asyncio.Event().wait()

    few = "tokens_per_minute = 10"
    file = tmp_path / "tenants.toml"
    keys = tenants_file(file, a=few, b=few)

    async def left(http: httpx.AsyncClient) -> int:
        found = await http.get("/v1/streams/none")
        return int(found.headers["x-ratelimit-remaining-tokens"])

    async with (
        gateway(model_dir, file, [("POST", "/v1/completions", never)]) as at,
        at.client(keys["a"]) as a,
        at.client(keys["b"]) as b,
    ):
        path = f"/v1/streams/{(await a.post('/v1/streams', json=BODY)).json()['id']}"
        await a.post(path + "/finish", json={"stream": False})
        assert await left(a) >= 8, "an answer of two tokens costs two"
        path = f"/v1/streams/{(await a.post('/v1/streams', json=BODY)).json()['id']}"
        at.engine.core.answer = long  # type: ignore[method-assign]
        async with a.stream("POST", path + "/finish") as answer:
            seen = 0
            async for line in answer.aiter_lines():
                seen += '"content":"x"' in line
                if seen == 40:
                    break
        assert await left(a) == 0
        refused(await a.post("/v1/streams", json=BODY), "rate_limit_exceeded")

        asking = asyncio.create_task(b.post("/v1/completions", json=BODY | {"max_tokens": 1000}))
        await asked.wait()
        asking.cancel()

        async def used_up() -> bool:
            return await left(b) == 0

        await until(used_up, within_s=5)
        refused(await b.post("/v1/completions", json=BODY), "rate_limit_exceeded")


async def test_limits_that_change_hold_for_streams_that_are_open(
    model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    keys = tenants_file(file, a="context_tokens = 1000")
    async with gateway(model_dir, file) as at, at.client(keys["a"]) as http:
        paths = [
            f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"
            for _ in range(2)
        ]
        file.write_text(file.read_text().replace("= 1000", "= 10"))
        at.app[RELOADER].reload()
        for text, status in (("word " * 20, 400), ("word", 202)):
            taken = await http.post(paths[0] + "/chunks", json={"text": text})
            assert taken.status_code == status
        file.write_text(file.read_text().replace("context_tokens = 10", "idle_s = 0.2"))
        at.app[RELOADER].reload()

        async def expired() -> bool:
            states = [at.app[STREAMS].find(path.rpartition("/")[2]) for path in paths]
            return all(stream is not None and stream.state == "expired" for stream in states)

        await until(expired, within_s=5)


async def test_retrieval_keeps_to_the_context_that_its_tenant_may_have(
    model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "tenants.toml"
    keys = tenants_file(file, a="context_tokens = 40\ncollections_write = true")
    folder = str(tmp_path / "collections")
    async with gateway(model_dir, file, collections=folder) as at, at.client(keys["a"]) as http:
        await http.post("/v1/collections", json={"name": "docs"})
        rows = [
            {"id": str(n), "text": f"Ships sail the wide ocean, {n} of them."} for n in range(9)
        ]
        content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
        added = await http.post("/v1/collections/docs/passages", content=content)
        assert added.status_code == 200
        source = {"type": "ann", "collection": "docs", "query": "Ships sail", "k": 9}
        made = await http.post("/v1/streams", json=BODY | {"retrieval": [source]})
        path = f"/v1/streams/{made.json()['id']}"
        answer = await http.post(path + "/finish", json={"stream": False})
        found = answer.json()["retrieval"]
        assert (found["complete"], found["reason"]) == (True, None)
        assert found["dropped"] > 0
        received = (await http.get(path)).json()["tokens"]["received"]
        assert 20 < received <= 40
