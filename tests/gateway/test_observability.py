"""What an operator sees: traces that go on at the engine, log lines, figures, spans."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deploy.local import gateway
from gateway.app import build
from gateway.logs import Json, Text
from gateway.settings import Settings
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine

SECRET = "retrieved-text-that-nobody-logs"
MESSAGES = [{"role": "user", "content": f"{{{{documents}}}}\n{SECRET}?"}]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass
class Seen:
    """A gateway, and the headers of what came to its engine."""

    http: httpx.AsyncClient
    calls: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def headers_of(self, suffix: str) -> dict[str, str]:
        """Of the last call whose path ends so."""
        return next(headers for path, headers in reversed(self.calls) if path.endswith(suffix))

    async def open(self, **headers: str) -> str:
        body = {"model": MODEL, "messages": MESSAGES}
        created = await self.http.post("/v1/streams", json=body, headers=headers)
        assert created.status_code == 201, created.text
        return str(created.json()["id"])

    async def chunk(self, stream_id: str) -> None:
        path = f"/v1/streams/{stream_id}/chunks"
        assert (await self.http.post(path, json={"text": SECRET})).status_code == 202

    async def finish(self, stream_id: str, **headers: str) -> str:
        path = f"/v1/streams/{stream_id}/finish"
        return (await self.http.post(path, json={}, headers=headers)).text

    async def called(self, suffix: str) -> None:
        async def seen() -> bool:
            return any(path.endswith(suffix) for path, _ in self.calls)

        await until(seen, within_s=5)


@asynccontextmanager
async def engine_that_is_watched(
    calls: list[tuple[str, dict[str, str]]],
) -> AsyncIterator[str]:
    @web.middleware
    async def watch(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        calls.append((request.path, headers))
        return await handler(request)

    app = FakeEngine().app()
    app.middlewares.append(watch)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("")).rstrip("/")
    await server.close()


@pytest_asyncio.fixture(scope="module")
async def gateway_that_is_watched(model_dir: Path) -> AsyncIterator[Seen]:
    calls: list[tuple[str, dict[str, str]]] = []
    async with engine_that_is_watched(calls) as engine:
        server = TestServer(build(Settings(engine=(engine,), tokenizer=str(model_dir))))
        await server.start_server()
        url = str(server.make_url(""))
        async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
            yield Seen(http, calls)
        await server.close()


@pytest.fixture
def seen(gateway_that_is_watched: Seen) -> Seen:
    gateway_that_is_watched.calls.clear()
    return gateway_that_is_watched


async def test_a_clients_trace_goes_on_at_the_engine_with_every_operation(seen: Seen) -> None:
    stream_id = await seen.open(traceparent=PARENT, tracestate="vendor=1")
    await seen.called(stream_id)
    opened = seen.headers_of(stream_id)
    assert opened["traceparent"].split("-")[1] == TRACE
    assert opened["tracestate"] == "vendor=1"
    other = PARENT.replace("4bf9", "aaaa")
    assert "[DONE]" in await seen.finish(stream_id, traceparent=other)
    assert seen.headers_of("/finish")["traceparent"].split("-")[1] == TRACE.replace("4bf9", "aaaa")


async def test_plain_requests_carry_it_too(seen: Seen) -> None:
    await seen.http.get("/v1/models", headers={"traceparent": PARENT})
    assert seen.headers_of("/v1/models")["traceparent"].split("-")[1] == TRACE


@pytest.mark.parametrize("sent", [None, "nonsense", f"00-{'0' * 32}-00f067aa0ba902b7-01"])
async def test_where_a_client_sends_none_that_can_be_read_a_trace_begins_here(
    sent: str | None, seen: Seen
) -> None:
    headers = {} if sent is None else {"traceparent": sent}
    for _ in range(2):
        await seen.http.get("/v1/models", headers=headers)
    first, second = (h["traceparent"] for path, h in seen.calls if path == "/v1/models")
    traces = [TRACEPARENT.fullmatch(found) for found in (first, second)]
    assert traces[0] is not None
    assert traces[1] is not None
    assert traces[0][1] != traces[1][1]
    assert set(traces[0][1]) != {"0"}


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What is logged, as `--log-format json` shows it."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(Json())
    logger = logging.getLogger("gateway")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(before)


async def test_a_stream_is_one_log_line_with_its_counts_and_its_trace_and_without_its_text(
    seen: Seen, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    stream_id = await seen.open()
    await seen.chunk(stream_id)
    await seen.finish(stream_id, traceparent=PARENT)
    (line,) = [line for line in lines() if line["message"] == "stream ended"]
    assert line["stream_id"] == stream_id
    assert line["trace_id"] == TRACE
    assert line["state"] == "done"
    assert line["model"] == MODEL
    assert line["engine"].startswith("http://127.0.0.1:")
    assert line["completion_tokens"] == 2
    assert 0 < line["context_tokens"] < line["prompt_tokens"]
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert SECRET not in json.dumps(lines())


async def test_a_cancelled_stream_is_one_line_too(
    seen: Seen, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    stream_id = await seen.open()
    for _ in range(2):
        await seen.http.delete(f"/v1/streams/{stream_id}")
    (line,) = [line for line in lines() if line["message"] == "stream ended"]
    assert (line["stream_id"], line["state"], line["ttft_s"]) == (stream_id, "cancelled", None)


def test_text_lines_end_with_their_fields() -> None:
    record = logging.LogRecord("gateway.x", logging.INFO, "", 1, "said %s", ("it",), None)
    record.fields = {"stream_id": "st-1", "error": None}
    assert Text().format(record).endswith("INFO gateway.x said it stream_id=st-1")


async def test_figures_of_streams_and_engines_are_those_of_the_moment(seen: Seen) -> None:
    async def figures() -> dict[str, float]:
        text = (await seen.http.get("/metrics")).text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    is_open = 'stream2llm_live_streams{state="open"}'
    before = await figures()
    stream_id = await seen.open()
    assert (await figures())[is_open] == before[is_open] + 1
    await seen.finish(stream_id)
    after = await figures()
    assert after[is_open] == before[is_open]
    assert after['stream2llm_streams_total{end="failed"}'] == 0
    labels = f'gen_ai_operation_name="chat",gen_ai_provider_name="stream2llm",' \
             f'gen_ai_request_model="{MODEL}"'  # fmt: skip
    for name in (
        'stream2llm_streams_total{end="done"}',
        f"gen_ai_server_time_to_first_token_seconds_count{{{labels}}}",
        f'gen_ai_server_request_duration_seconds_count{{error_type="",{labels}}}',
    ):
        assert after[name] == before.get(name, 0) + 1
    for name in (
        "kv_use_ratio",
        "preemptions_total",
        "invalidated_tokens_total",
        "abandoned_tokens_total",
    ):
        (value,) = (v for k, v in after.items() if k.startswith(f"stream2llm_engine_{name}{{"))
        assert value == 0


@asynccontextmanager
async def collector(spans: list[Any]) -> AsyncIterator[str]:
    """An OTLP collector, and its URL."""

    async def take(request: web.Request) -> web.Response:
        sent = ExportTraceServiceRequest.FromString(await request.read())
        scopes = [s for r in sent.resource_spans for s in r.scope_spans]
        spans.extend(span for scope in scopes for span in scope.spans)
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("")).rstrip("/")
    await server.close()


@pytest.mark.engine  # a gateway process takes its time to start
async def test_spans_are_exported_where_the_environment_names_a_collector(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[Any] = []
    calls: list[tuple[str, dict[str, str]]] = []
    async with engine_that_is_watched(calls) as engine, collector(spans) as url:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with gateway([engine], ["--tokenizer", str(model_dir)]) as server:
            server.start()

            async def ready() -> bool:
                return await _ready(server.url)

            await until(ready, within_s=60)
            async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
                seen = Seen(http, calls)
                stream_id = await seen.open(traceparent=PARENT)
                await seen.chunk(stream_id)
                await seen.finish(stream_id, traceparent=PARENT)

            async def exported() -> bool:
                return any(span.name == f"chat {MODEL}" for span in spans) and len(spans) >= 4

            await until(exported, within_s=10)
    assert SECRET not in str(spans)
    (chat,) = [span for span in spans if span.name == f"chat {MODEL}"]
    (finish,) = [span for span in spans if span.name == "POST /v1/streams/{id}/finish"]
    assert chat.trace_id.hex() == finish.trace_id.hex() == TRACE
    assert chat.parent_span_id == finish.span_id
    assert seen.headers_of("/finish")["traceparent"] == f"00-{TRACE}-{finish.span_id.hex()}-01"
    attributes = {a.key: a.value for a in chat.attributes}
    assert attributes["gen_ai.operation.name"].string_value == "chat"
    assert attributes["gen_ai.conversation.id"].string_value == stream_id
    assert attributes["gen_ai.usage.output_tokens"].int_value == 2
    assert chat.end_time_unix_nano >= chat.start_time_unix_nano


async def _ready(url: str) -> bool:
    try:
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(url + "/ready")).status_code == 200
    except httpx.TransportError:
        return False
