"""The fuzzer: what it sends is taken as described, and it does find what is not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.openapi_routes import public
from loadtest.fuzz import MODEL, fuzz, servers
from loadtest.fuzz_bodies import Lines, Operation, Operations, ndjson
from loadtest.fuzz_described import Described, narrowed
from loadtest.fuzz_tally import Tally, session

pytestmark = pytest.mark.slow

DOCUMENT = {
    "openapi": "3.1.0",
    "info": {"title": "a gateway that does as it likes", "version": "1"},
    "paths": {
        "/things": {
            "post": {
                "operationId": "make",
                "security": [],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"type": "integer"}}},
                },
                "responses": {"200": {"description": "made"}},
            }
        }
    },
    "components": {
        "schemas": {
            "ChatCompletionChunk": {},
            "Error": {},
            "Create": {"properties": {}},
        }
    },
}


@contextmanager
def answering(status: int, body: bytes, media: str = "application/json") -> Iterator[str]:
    """A server that answers every POST alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", media)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(DOCUMENT).encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "media", "fault"),
    [
        (500, b"{}", "application/json", "NDJSON POST /v1/streams: 500 {}"),
        (503, b"{}", "application/json", "NDJSON POST /v1/streams: 503 {}"),  # when again?
        (400, b"{}", "application/json", "NDJSON POST /v1/streams: 400 without a code"),
        (200, b"data: {}\n\n", "text/event-stream", "an answer without an end"),
    ],
)
def test_an_answer_that_was_not_promised_is_found(
    status: int, body: bytes, media: str, fault: str
) -> None:
    tally = Tally()
    with answering(status, body, media) as url:
        Lines(session(), url, tally).send([b"{}"])
    assert any(fault in found for found in tally.faults), tally.faults
    assert tally.sent == 1


def test_an_engine_that_does_something_else_is_found() -> None:
    progress = {"prompt_id": "a", "version": 0, "state": "idle", "length": 9, "computed": 0}
    operation = Operation("open", "a", [1, 2], 1, 1.0, {}, None)
    tally = Tally()
    with answering(200, json.dumps(progress).encode()) as url:
        Operations(session(), url, tally).send(operation, {})
    assert list(tally.faults) == ["engine open: the prompt is not what was asked for"]


def test_what_is_not_as_described_is_found() -> None:
    tally = Tally()
    with answering(418, b"") as url:
        Described(session(), url, MODEL, tally).apart(4, 1)
    assert any("POST /things" in found for found in tally.faults), tally.faults


def test_walks_are_made_of_what_the_gateway_describes() -> None:
    """The narrower description is one still, and lets nothing through that the whole does not."""
    whole = json.loads(public(collections=False))
    narrow = narrowed(whole, MODEL)
    assert [e.message for e in OpenAPIV31SpecValidator(narrow).iter_errors()] == []
    for name, schema in narrow["components"]["schemas"].items():
        assert schema.get("properties", {}).keys() <= (
            whole["components"]["schemas"][name].get("properties", {}).keys()
        )


@given(parts=ndjson(MODEL))
def test_a_body_is_sent_in_parts_that_are_not_empty(parts: list[bytes]) -> None:
    assert all(parts)


@pytest.mark.engine
def test_nothing_but_what_is_described_comes_back() -> None:
    with servers() as at:
        tally = fuzz(at, 500, 1, print)
    assert tally.faults == {}, "\n".join(tally.lines())
    assert tally.sent >= 500
    assert tally.answers["POST /v1/streams", 201]
    assert tally.answers["engine open", 200]
    assert tally.answers["NDJSON POST /v1/streams", 200]
