"""The engine's HTTP routes over sessions without a model."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
from fastapi import FastAPI

from engine_adapter.sessions import Limits, Sessions
from engine_adapter.vllm.routes import router
from tests.fake_engine import FakeCore


async def test_operations_are_answered_and_errors_have_their_status() -> None:
    core = FakeCore()
    app = FastAPI()
    app.include_router(router)
    app.state.stream2llm = SimpleNamespace(sessions=Sessions(core, Limits(50, 100, 2)))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
        path = "/stream2llm/prompts/p"
        assert (await http.post(path, json={"tokens": [1, 2, 3]})).status_code == 200
        cut = await http.post(path + "/invalidate", json={"version": 1, "keep": 1})
        assert cut.json()["length"] == 1
        assert core.tokens["p"] == [1]
        told = await http.get(path + "/tokens")
        assert told.json() == {"prompt_id": "p", "version": 1, "finished": False, "tokens": [1]}
        assert (await http.get("/stream2llm/prompts/q/tokens")).status_code == 404
        gap = await http.post(path + "/invalidate", json={"version": 3, "keep": 1})
        assert gap.status_code == 409
        assert gap.json()["error"]["expected_version"] == 2
        malformed = await http.post(path + "/extend", content=b"{")
        assert malformed.status_code == 400
        unknown = await http.get("/stream2llm/prompts/q")
        assert unknown.status_code == 404
