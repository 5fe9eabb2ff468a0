"""Texts on their way to tokens, and a tokenizer that is not there yet."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from gateway import readiness
from gateway.keys import LOAD
from gateway.prompt import PromptBuilder, Tokens
from tests.conftest import until
from tests.gateway.tenancy import BODY, gateway
from tests.gateway.test_limits import refused


async def test_what_was_hung_up_on_counts_until_its_tokens_are_there(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun, go_on = PromptBuilder._encode_literally, threading.Event(), threading.Event()

    def slow(builder: PromptBuilder, text: str) -> Tokens:
        begun.set()
        go_on.wait(20)
        return encode(builder, text)

    async with gateway(model_dir, None, max_tokenizing_bytes=1000) as at, at.client(None) as http:
        path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}/chunks"
        monkeypatch.setattr(PromptBuilder, "_encode_literally", slow)
        # One text of any size may be tokenized, but not a heap of them.
        large = {"chunks": [{"text": "\u00e4" * 1000}, {"text": "never begun"}]}
        asking = asyncio.create_task(http.post(path, json=large))
        try:
            await asyncio.to_thread(begun.wait, 20)
            asking.cancel()
            await asyncio.wait({asking})
            waiting = at.app[LOAD].tokenizing

            async def hung_up() -> bool:
                return waiting.waiting_bytes == 2000  # the second text counts no more

            await until(hung_up, within_s=5)
            for body in (BODY, BODY | {"documents": [{"text": "x"}]}):
                refused(await http.post("/v1/streams", json=body), "overloaded")
            refused(await http.post(path, json={"text": "x"}), "overloaded")
        finally:
            go_on.set()

        async def done() -> bool:
            return waiting.waiting_bytes == 0

        await until(done, within_s=5)
        assert (await http.post(path, json={"text": "x"})).status_code == 202


async def test_a_tokenizer_that_could_not_be_loaded_is_tried_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "AGAIN_S", 0.1)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        shutil.copy(model_dir / name, tmp_path / name)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(b'{"version": "1.0"}')  # still being copied
    async with gateway(tmp_path, None) as at, at.client(None) as http:

        async def failed() -> bool:
            return "no tokenizer for" in (await http.get("/ready")).text

        await until(failed, within_s=20)
        stream = await http.post("/v1/streams", json=BODY)
        assert (stream.status_code, stream.json()["error"]["code"]) == (503, "engine_unavailable")
        (tmp_path / "tokenizer.json").write_bytes(whole)

        async def ready() -> bool:
            return (await http.get("/ready")).status_code == 200

        await until(ready, within_s=20)
        assert (await http.post("/v1/streams", json=BODY)).status_code == 201
