"""The crawler on the documentation site that ships with Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from deploy.local import Server, free_port
from retrieval.addresses import FetchPolicy
from retrieval.crawl import Crawl, CrawlLimits
from retrieval.source import Passage, Query, SourceFailed


@pytest.fixture(scope="module")
def docs() -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "pydoc", "-n", "127.0.0.1", "-p", str(port)]
    with Server("pydoc", command, port=port, ready_path="/") as server:
        server.start().wait_ready(30)
        yield server


def here(port: int) -> FetchPolicy:
    return FetchPolicy(ports=frozenset({port}), allowed_networks=("127.0.0.0/8",))


async def test_pages_come_out_once_each_with_readable_text(docs: Server) -> None:
    seed = f"{docs.url}/json.html"
    limits = CrawlLimits(pages=4, delay_s=0.0, page_chars=500)
    pages: list[Passage] = []
    crawl = Crawl([seed], limits=limits, policy=here(docs.port))
    async with aclosing(crawl.search(Query("JSON"))) as found:
        pages += [each.passage async for each in found]
    assert pages[0].id == seed
    assert "json" in pages[0].title
    assert len({page.id for page in pages}) == len({page.text for page in pages}) == 4
    assert all(0 < len(page.text) <= 500 and "<" not in page.title for page in pages)


async def test_a_site_that_is_not_there_fails_and_says_so() -> None:
    port = free_port()
    crawl = Crawl([f"http://127.0.0.1:{port}/"], policy=here(port))
    with pytest.raises(SourceFailed, match=rf"127\.0\.0\.1:{port}/: .*robots\.txt"):
        assert [found async for found in crawl.search(Query(""))] == []
