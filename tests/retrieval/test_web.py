"""The crawler on the documentation site that ships with Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from deploy.local import Server, free_port
from retrieval.web import crawl


@pytest.fixture(scope="module")
def docs() -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "pydoc", "-n", "127.0.0.1", "-p", str(port)]
    with Server("pydoc", command, port=port, ready_path="/") as server:
        server.start().wait_ready(30)
        yield server


async def test_pages_come_out_once_each_with_readable_text(docs: Server) -> None:
    seed = f"{docs.url}/json.html"
    pages = [p async for p in crawl(seed, pages=4, delay_s=0.0, max_chars=500)]
    assert pages[0].url == seed
    assert "json" in pages[0].title
    assert len({page.url for page in pages}) == len({page.text for page in pages}) == 4
    assert all(0 < len(page.text) <= 500 and "<" not in page.title for page in pages)


async def test_a_site_that_is_not_there_gives_no_pages() -> None:
    assert [p async for p in crawl(f"http://127.0.0.1:{free_port()}/", pages=3)] == []
