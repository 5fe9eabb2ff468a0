"""Retrieval by a gateway process, with a real model for search and a real engine to answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
from aiohttp import web

from deploy.local import Server, gateway
from gateway.client import Client
from retrieval.ordering import ORDERINGS
from tests.engine.conftest import MODEL
from tests.gateway.test_streams import ndjson
from tests.retrieval.sites import Site, html, serving

MESSAGES = [{"role": "user", "content": "{{documents}}\nWhat is the capital of France?"}]
PASSAGES = {
    "city": "Paris has been the capital of France for a thousand years.",
    "bread": "Dough is left to rise before it is baked in a hot oven.",
    "sea": "Ships sail on the wide ocean, and gulls follow them.",
}
PAGES = {"one": "France is a country in Europe.", "two": "Rivers run into the sea."}
EXACT = {"temperature": 0, "max_tokens": 12}


async def page(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(0.1)
    return html(PAGES[request.path.strip("/")])


async def test_what_the_gateway_retrieves_is_answered_as_if_it_had_been_sent_whole(
    engine_server: Server, tmp_path: Path
) -> None:
    async with serving(page) as site:
        flags = ["--crawl", "--crawl-ports", str(site.port), "--crawl-networks", "127.0.0.1/32"]
        flags += ["--crawl-delay-s", "0.05", "--collections", str(tmp_path)]
        with gateway([engine_server.url], flags) as front:
            await asyncio.to_thread(front.start().wait_ready, 60)
            await fill(front.url)
            async with Client(front.url, timeout_s=120) as client:
                for ordering in ORDERINGS:
                    await retrieve_and_compare(client, site, ordering)


async def fill(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        await http.post("/v1/collections", json={"name": "docs"})
        rows = [{"id": name, "text": text} for name, text in PASSAGES.items()]
        path = "/v1/collections/docs/passages"
        (await http.post(path, content=ndjson(*rows))).raise_for_status()


async def retrieve_and_compare(client: Client, site: Site, ordering: str) -> None:
    sources = [
        {"type": "crawl", "seeds": [site.url("/one"), site.url("/two")], "depth": 0},
        {"type": "ann", "collection": "docs", "k": 2, "ordering": ordering},
    ]
    async with client.stream(MODEL, MESSAGES, retrieval=sources, **EXACT) as stream:
        retrieved = await stream.finish()
    names = [name.rpartition("/")[2] for name in retrieved["retrieval"]["documents"]]
    assert retrieved["retrieval"]["complete"]
    assert "city" in names
    assert len(names) == 4
    documents = [{"text": (PASSAGES | PAGES)[name]} for name in names]
    async with client.stream(MODEL, MESSAGES, documents=documents, **EXACT) as stream:
        whole = await stream.finish()
    assert retrieved["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    assert retrieved["choices"] == whole["choices"]
