"""Whatever a client sends, it gets a typed error, and nothing is lost for the others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from deploy.local import Server
from engine_adapter.client import EngineClient
from engine_adapter.errors import (
    BadOperation,
    PromptExists,
    PromptTooLong,
    UnknownPrompt,
    VersionConflict,
)
from engine_adapter.messages import Extend, Finish, Open, Sampling
from gateway.client import Client, StreamError
from tests.engine.conftest import MODEL

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CREATE = {"model": MODEL, "messages": QUESTION, "max_tokens": 8, "temperature": 0}


@pytest_asyncio.fixture
async def bystander(client: Client) -> AsyncIterator[None]:
    """Another client's stream, open during the test, that must end well."""
    async with client.stream(MODEL, QUESTION, max_tokens=8, temperature=0) as stream:
        await stream.send("Paris is the capital of France. " * 3)
        yield
        assert "Paris" in "".join([piece async for piece in stream.answer()])


@pytest.fixture
def url(gateway_server: Server) -> str:
    return gateway_server.url + "/v1/streams"


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["code"] == code, error
    return error


async def test_unknown_stream(http: httpx.AsyncClient, url: str, bystander: None) -> None:
    for method, path in [("POST", "/chunks"), ("POST", "/finish"), ("GET", ""), ("DELETE", "")]:
        response = await http.request(method, f"{url}/st-nothing{path}", json={"text": "a"})
        error_of(response, 404, "stream_not_found")


async def test_chunk_and_finish_after_finish(
    http: httpx.AsyncClient, url: str, bystander: None
) -> None:
    stream = (await http.post(url, json=CREATE)).json()["id"]
    whole = await http.post(f"{url}/{stream}/finish", json={"stream": False})
    assert whole.json()["choices"][0]["finish_reason"] in ("stop", "length")
    error_of(await http.post(f"{url}/{stream}/chunks", json={"text": "a"}), 409, "input_closed")
    error_of(await http.post(f"{url}/{stream}/finish"), 409, "input_closed")


async def test_bodies_that_cannot_be_taken(
    http: httpx.AsyncClient, url: str, bystander: None
) -> None:
    stream = (await http.post(url, json=CREATE)).json()["id"]
    chunks = f"{url}/{stream}/chunks"
    error_of(await http.post(chunks, json={"text": ""}), 400, "invalid_request")
    error_of(await http.post(chunks, json={}), 400, "invalid_request")
    error_of(await http.post(chunks, json={"chunks": []}), 400, "invalid_request")
    error_of(await http.post(chunks, json={"txt": "a"}), 400, "invalid_request")
    error_of(await http.post(chunks, content=b'{"text": "\xff\xfe"}'), 400, "invalid_request")
    error_of(await http.post(chunks, content=b'{"text": "\\ud800"}'), 400, "invalid_request")
    error_of(await http.post(chunks, content=b'{"text": '), 400, "invalid_request")
    error_of(await http.post(chunks, content=b"[1]"), 400, "invalid_request")
    big = await http.post(chunks, json={"text": "a" * 10_000_000})
    error_of(big, 413, "body_too_large")
    taken = await http.post(chunks, json={"text": "Paris is the capital of France."})
    assert taken.json()["seq"] == 0
    answer = await http.post(f"{url}/{stream}/finish", json={"stream": False})
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]


async def test_sequence_numbers(http: httpx.AsyncClient, url: str, bystander: None) -> None:
    stream = (await http.post(url, json=CREATE)).json()["id"]
    chunks = f"{url}/{stream}/chunks"
    first = (await http.post(chunks, json={"text": "one", "seq": 0})).json()
    again = (await http.post(chunks, json={"text": "one", "seq": 0})).json()
    assert again == first
    gap = error_of(await http.post(chunks, json={"text": "x", "seq": 2}), 409, "sequence_gap")
    assert gap["expected_seq"] == 1
    await http.delete(f"{url}/{stream}")


async def test_the_chunk_that_crosses_the_models_length_is_refused_and_the_stream_goes_on(
    http: httpx.AsyncClient, url: str, bystander: None
) -> None:
    stream = (await http.post(url, json=CREATE)).json()["id"]
    chunks = f"{url}/{stream}/chunks"
    assert (await http.post(chunks, json={"text": "Paris. " * 100})).status_code == 202
    crossing = await http.post(chunks, json={"text": "word " * 5000})
    error_of(crossing, 400, "context_length_exceeded")
    assert (await http.post(chunks, json={"text": "More."})).status_code == 202
    answer = await http.post(f"{url}/{stream}/finish", json={"stream": False})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "nothing"}, 404, "model_not_found"),
        ({"messages": []}, 400, "invalid_request"),
        ({"messages": "hello"}, 400, "invalid_request"),
        ({"n": 2}, 400, "unsupported_parameter"),
        ({"tools": []}, 400, "unsupported_parameter"),
        ({"cache_salt": "x"}, 400, "unsupported_parameter"),
        ({"temprature": 1}, 400, "invalid_request"),
        ({"max_tokens": "many"}, 400, "invalid_request"),
        ({"max_tokens": 100_000}, 400, "context_length_exceeded"),
        ({"documents": [{"text": "word " * 5000}]}, 400, "context_length_exceeded"),
    ],
)
async def test_streams_that_cannot_be_opened(
    http: httpx.AsyncClient, url: str, change: dict[str, Any], status: int, code: str
) -> None:
    error_of(await http.post(url, json=CREATE | change), status, code)


async def test_sampling_that_vllm_refuses(http: httpx.AsyncClient, url: str) -> None:
    stream = (await http.post(url, json=CREATE)).json()["id"]
    body = {"stream": False, "temperature": -1}
    answer = await http.post(f"{url}/{stream}/finish", json=body)
    assert answer.status_code == 400
    assert "temperature" in answer.json()["error"]["message"]


async def test_one_request_form_that_breaks_off(
    http: httpx.AsyncClient, url: str, bystander: None
) -> None:
    async def post(*lines: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/x-ndjson"}
        return await http.post(url, content=b"\n".join(lines), headers=headers)

    first = json.dumps(CREATE).encode()
    error_of(await post(), 400, "invalid_request")
    error_of(await post(first), 400, "invalid_request")
    error_of(await post(first, b"{nonsense"), 400, "invalid_request")
    error_of(await post(first, b'{"text": ""}'), 400, "invalid_request")
    error_of(await post(first, b'{"text": "a", "finish"'), 400, "invalid_request")
    whole = await post(first, b'{"text": "Paris is the capital."}', b'{"finish": true}')
    assert whole.text.rstrip().endswith("data: [DONE]")


async def test_the_engine_answers_bad_operations_with_typed_errors(
    engine_client: EngineClient, bystander: None
) -> None:
    with pytest.raises(UnknownPrompt):
        await engine_client.extend("never", Extend(version=1, keep=0, tokens=[1]))
    for tokens in ([], [-1], [10**6]):
        with pytest.raises(BadOperation):
            await engine_client.open("bad", Open(tokens=tokens))
    with pytest.raises(PromptTooLong):
        await engine_client.open("bad", Open(tokens=[1] * 4096))
    opened = await engine_client.open("bad", Open(tokens=[1, 2, 3]))
    assert await engine_client.open("bad", Open(tokens=[1, 2, 3])) == opened
    with pytest.raises(PromptExists):
        await engine_client.open("bad", Open(tokens=[9]))
    with pytest.raises(VersionConflict) as gap:
        await engine_client.extend("bad", Extend(version=2, keep=3, tokens=[4]))
    assert gap.value.details["expected_version"] == 1
    with pytest.raises(BadOperation):
        await engine_client.extend("bad", Extend(version=1, keep=4, tokens=[4]))
    first = await engine_client.extend("bad", Extend(version=1, keep=3, tokens=[4]))
    assert await engine_client.extend("bad", Extend(version=1, keep=3, tokens=[4])) == first
    op = Finish(version=2, keep=4, tokens=[], sampling=Sampling(temperature=-1.0))
    with pytest.raises(BadOperation):
        async with engine_client.finish("bad", op):
            pass
    await engine_client.abort("bad")


async def test_a_typed_error_reaches_the_client_library(client: Client) -> None:
    async with client.stream(MODEL, QUESTION) as stream:
        with pytest.raises(StreamError) as refused:
            await stream.send("word " * 5000)
        assert refused.value.code == "context_length_exceeded"
        await asyncio.sleep(0)
