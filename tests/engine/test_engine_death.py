"""An engine that dies: its streams are told at once, and the gateway outlives it."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from deploy.local import Server
from gateway.client import Client, StreamError
from tests.conftest import until
from tests.engine.conftest import MODEL, SOON_S

QUESTION = [{"role": "user", "content": "Tell me a long story."}]


async def test_streams_get_an_error_and_the_gateway_works_again_when_the_engine_is_back(
    client: Client, http: httpx.AsyncClient, gateway_server: Server, engine_server: Server
) -> None:
    async with (
        client.stream(MODEL, QUESTION, max_tokens=500, ignore_eos=True) as answering,
        client.stream(MODEL, QUESTION) as quiet,
    ):
        await quiet.send("Once upon a time.")
        pieces = answering.answer()
        await anext(pieces)

        await asyncio.get_running_loop().run_in_executor(None, engine_server.kill)
        killed_s = time.monotonic()
        with pytest.raises(StreamError) as broken:
            async for _ in pieces:
                pass
        assert time.monotonic() - killed_s < SOON_S
        assert broken.value.code == "engine_unavailable"

        async def told() -> bool:
            return (await quiet.status())["state"] == "failed"

        assert await until(told, within_s=20) < SOON_S
        with pytest.raises(StreamError) as refused:
            await quiet.send("And then?")
        assert (refused.value.status, refused.value.code) == (503, "engine_unavailable")

    assert (await http.get(gateway_server.url + "/health")).status_code == 200
    assert (await http.get(gateway_server.url + "/ready")).status_code == 503
    plain = await http.post(gateway_server.url + "/v1/chat/completions", json={"model": MODEL})
    assert plain.status_code == 503

    engine_server.start()
    await asyncio.to_thread(engine_server.wait_ready, 300)

    async def ready() -> bool:
        return (await http.get(gateway_server.url + "/ready")).status_code == 200

    await until(ready, within_s=10)
    async with client.stream(MODEL, QUESTION, max_tokens=4) as stream:
        await stream.send("Once upon a time.")
        assert "".join([piece async for piece in stream.answer()])
