"""What no honest client sends: each is told what is wrong, and nothing is left of it."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp.http_exceptions import BadHttpMessage

from engine_adapter.errors import BadOperation
from engine_adapter.messages import Finish, Open, decode
from gateway.errors import BadRequest
from gateway.keys import STREAMS
from gateway.logs import only_own_errors
from gateway.requests import Options, read
from tests.fake_engine import MODEL
from tests.gateway.conftest import Stack
from tests.gateway.tenancy import BODY, gateway, tenants_file

DEEP = 40_000
"""Levels; no parser takes them by recursion."""
ROUTES = ["/v1/streams", "/v1/chat/completions", "/v1/completions"]


def refused(response: httpx.Response) -> None:
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
async def test_a_body_that_is_not_encoded_as_it_says(
    stack: Stack, caplog: pytest.LogCaptureFixture, path: str, encoding: str
) -> None:
    headers = {"Content-Encoding": encoding}
    told = await stack.http.post(stack.url + path, content=b"\xffplain", headers=headers)
    refused(told)
    assert told.headers["Connection"] == "close"  # where the next request begins is not known
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    good = {"content": gzip.compress(json.dumps(BODY).encode())}
    after = await stack.http.post(
        stack.url + "/v1/streams", **good, headers={"Content-Encoding": "gzip"}
    )
    assert after.status_code == 201


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 1 << 64, 10**30, -(10**30)])
@pytest.mark.parametrize(
    "field", ["max_tokens", "max_completion_tokens", "min_tokens", "top_k", "seed", "top_logprobs"]
)
async def test_numbers_that_nobody_can_write_down(stack: Stack, field: str, number: int) -> None:
    alive = stack.app[STREAMS].alive(MODEL)
    told = await stack.http.post(stack.url + "/v1/streams", json=BODY | {field: number})
    refused(told)
    assert told.json()["error"]["param"] == field
    assert stack.app[STREAMS].alive(MODEL) == alive


@pytest.mark.parametrize(
    "options",
    [{"stop_token_ids": [10**20]}, {"logit_bias": {str(10**20): 1}}, {"max_tokens": 0}],
)
async def test_options_that_mean_nothing(stack: Stack, options: dict[str, Any]) -> None:
    refused(await stack.http.post(stack.url + "/v1/streams", json=BODY | options))


def test_a_logit_bias_is_by_token() -> None:
    assert read(Options, b'{"logit_bias": {"5": -1.5, "7": 2}}').logit_bias == {5: -1.5, 7: 2.0}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("closed", [False, True])
async def test_bodies_that_are_nested_deeply(stack: Stack, path: str, closed: bool) -> None:
    nested = b"[" * DEEP + (b"]" * DEEP if closed else b"")
    whole = b'{"model": "fake", "messages": ' + nested + b"}"
    for body in (nested, whole):
        refused(await stack.http.post(stack.url + path, content=body))
    headers = {"Content-Type": "application/x-ndjson"}
    refused(await stack.http.post(stack.url + "/v1/streams", content=whole, headers=headers))


async def test_a_nested_body_that_has_to_be_written_again(model_dir: Path, tmp_path: Path) -> None:
    keys = tenants_file(tmp_path / "tenants.toml", acme="")
    nested = b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}"
    async with gateway(model_dir, tmp_path / "tenants.toml") as g, g.client(keys["acme"]) as http:
        refused(await http.post("/v1/chat/completions", content=nested))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Open, b'{"tokens": ' + b"[" * DEEP),
        (
            Finish,
            b'{"version": 1, "keep": 0, "tokens": [], "sampling": {"seed": 1%b}}' % (b"0" * 30),
        ),
        (Finish, b'{"version": 1, "keep": 0, "tokens": [], "sampling": {"max_tokens": 0}}'),
    ],
)
def test_operations_that_no_engine_could_take(kind: type[Any], body: bytes) -> None:
    with pytest.raises(BadOperation):
        decode(kind, body)


def test_an_error_of_the_body_names_the_place() -> None:
    with pytest.raises(BadRequest) as told:
        read(Options, b'{"seed": 1%b}' % (b"0" * 30))
    assert told.value.param == "seed"


def record(error: BaseException) -> logging.LogRecord:
    about = (type(error), error, None)
    return logging.LogRecord("server", logging.ERROR, "", 0, "Error of %s", ("a",), about)


def test_what_is_no_http_leaves_one_line_without_what_was_sent() -> None:
    line = record(BadHttpMessage("the secret"))
    assert only_own_errors(line)
    assert line.levelno == logging.INFO
    assert line.exc_info is None
    assert "secret" not in line.getMessage()
    assert not only_own_errors(record(ConnectionResetError()))
    own = record(RuntimeError("a fault"))
    assert only_own_errors(own)
    assert own.levelno == logging.ERROR
