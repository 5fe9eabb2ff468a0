"""Gateway processes that share a Redis and an engine without a model, and a client that goes on
at another one when one is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from aiohttp.test_utils import TestServer

from deploy.local import Server, gateway
from gateway.prompt import PromptBuilder
from tests.fake_engine import MODEL, FakeEngine

MESSAGES = [
    {"role": "system", "content": "Read {{documents}} with care."},
    {"role": "user", "content": "Why?"},
]
GONE = (httpx.TransportError,)


@asynccontextmanager
async def fake_engine() -> AsyncIterator[tuple[FakeEngine, str]]:
    """An engine in this process, and its URL."""
    engine = FakeEngine(max_model_len=1_000_000)
    server = TestServer(engine.app())
    await server.start_server()
    try:
        yield engine, str(server.make_url("")).rstrip("/")
    finally:
        await server.close()


@contextmanager
def replicas(
    n: int, engines: Sequence[str], redis_url: str, extra: Sequence[str] = ()
) -> Iterator[list[Server]]:
    """Gateways that share an index, started and ready."""
    with ExitStack() as running:
        servers = [
            running.enter_context(gateway(engines, ["--index", redis_url, *extra]))
            for _ in range(n)
        ]
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready(60)
        yield servers


async def expected(builder: PromptBuilder, texts: Sequence[str]) -> list[int]:
    """The whole prompt of MESSAGES with these chunks."""
    prompt = await builder.frame(MESSAGES)
    prompt = prompt.with_documents([await builder.document(text) for text in texts])
    return prompt.open.all() + list(prompt.tail)


def answered(engine: FakeEngine, stream_id: str) -> list[list[int]]:
    """Every prompt of a stream that the engine was asked to answer."""
    return [t for name, t in engine.finished.items() if name.startswith(stream_id)]


@dataclass
class Caller:
    """A client of several replicas. It repeats what got no answer at the next one, and what was
    answered 503; `seconds_lost` says how long that took."""

    http: httpx.AsyncClient
    urls: list[str]
    patience_s: float = 20.0
    refusals: int = 0
    broken: int = 0

    async def call(self, method: str, path: str, first: int, body: Any = None) -> Any:
        """The answer of the first replica that gives one, beginning with number `first`."""
        async with asyncio.timeout(self.patience_s):
            while True:
                url = self.urls[first % len(self.urls)] + path
                try:
                    response = await self.http.request(method, url, json=body)
                except GONE:
                    self.broken += 1
                    first += 1
                    await asyncio.sleep(0.02)
                    continue
                if response.status_code == 503:
                    self.refusals += 1
                    first += 1
                    await asyncio.sleep(0.1)
                    continue
                assert response.status_code < 400, (method, path, response.text)
                return response.json()

    async def open(self, first: int, **options: Any) -> str:
        body = {"model": MODEL, "messages": MESSAGES, **options}
        created = await self.call("POST", "/v1/streams", first, body)
        return str(created["id"])

    async def send(self, stream_id: str, first: int, seq: int, text: str) -> Any:
        path = f"/v1/streams/{stream_id}/chunks"
        return await self.call("POST", path, first, {"text": text, "seq": seq})

    async def replace(self, stream_id: str, first: int, seq: int, texts: Sequence[str]) -> Any:
        path = f"/v1/streams/{stream_id}/documents"
        documents = [{"text": text} for text in texts]
        return await self.call("PUT", path, first, {"documents": documents, "seq": seq})

    async def finish(self, stream_id: str, first: int) -> str:
        path = f"/v1/streams/{stream_id}/finish"
        answer = await self.call("POST", path, first, {"stream": False})
        return str(answer["choices"][0]["message"]["content"])
