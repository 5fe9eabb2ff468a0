"""What a crawl yields of a site, and how it treats the site."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import psutil
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.crawl import Crawl, CrawlLimits, retry_after_s, urls_in
from retrieval.source import Passage, Query, SourceFailed
from tests.retrieval.sites import Answer, Site, gather, html, local, moved, names, serving, tasks

pytestmark = pytest.mark.slow

FAST = CrawlLimits(delay_s=0.0, backoff_s=0.01)


def page_of(pages: dict[str, web.Response | list[str]]) -> Answer:
    """A site of these pages: a list is a page with these links, whose text is its path."""

    async def answer(request: web.Request) -> web.StreamResponse:
        page = pages.get(request.path_qs)
        if isinstance(page, list):
            return html(f"This is the page at {request.path_qs}.", *page, title=request.path)
        return page if page is not None else web.Response(status=404)

    return answer


def crawl(site: Site, *paths: str, limits: CrawlLimits = FAST, **changes: Any) -> Crawl:
    seeds = [site.url(path) for path in paths or ("/",)]
    return Crawl(seeds, limits=replace(limits, **changes), policy=local(site))


def paths(site: Site, pages: list[Passage]) -> list[str]:
    return [page.id.removeprefix(site.url("")) for page in pages]


async def test_links_are_followed_breadth_first_each_once() -> None:
    site_map = {
        "/": ["/a", "b", "/a#part", "?q=1", "mailto:x@y", "javascript:1", "//127.0.0.1:1/", "/no"],
        "/a": ["/deep", "/"],
        "/b": ["./c/../deep"],
        "/?q=1": [],
        "/deep": ["/deeper"],
        "/deeper": [],
    }
    async with serving(page_of(site_map)) as site:
        pages = await gather(crawl(site, concurrency=1))
        assert paths(site, pages) == ["/", "/a", "/b", "/?q=1", "/deep"]
        assert (pages[1].title, pages[1].text.splitlines()[0]) == ("/a", "This is the page at /a.")
        assert set(site.asked.values()) == {1}


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sets(st.integers(0, 11), max_size=4), min_size=12, max_size=12))
def test_whatever_links_to_what_each_page_in_reach_comes_once(graph: list[set[int]]) -> None:
    site_map: dict[str, Any] = {f"/{i}": [f"/{j}" for j in to] for i, to in enumerate(graph)}
    reached, new = {0}, {0}
    while new := {to for page in new for to in graph[page]} - reached:
        reached |= new

    async def read() -> list[str]:
        async with serving(page_of(site_map)) as site:
            found = await gather(crawl(site, "/0", depth=99, concurrency_per_site=8))
            assert set(site.asked.values()) == {1}
            return paths(site, found)

    assert sorted(asyncio.run(read())) == sorted(f"/{page}" for page in reached)


async def test_depth_breadth_and_the_number_of_pages_are_limited() -> None:
    site_map = {"/": [f"/{i}" for i in range(9)]} | {f"/{i}": [f"/{i}/x"] for i in range(9)}
    async with serving(page_of(site_map)) as site:
        assert paths(site, await gather(crawl(site, depth=0))) == ["/"]
        assert len(await gather(crawl(site, depth=1, links_per_page=4))) == 5
        assert len(await gather(crawl(site, pages=3))) == 3
        assert len(await gather(crawl(site, urls=6))) == 6


async def test_texts_come_once_and_pages_without_text_not_at_all() -> None:
    same = "The very same text, at two addresses."
    site_map: dict[str, Any] = {
        "/": ["/1", "/2", "/empty", "/image", "/plain", "/missing"],
        "/1": html(same),
        "/2": html(same),
        "/empty": html(""),
        "/image": web.Response(body=b"\x89PNG", content_type="image/png"),
        "/plain": web.Response(text="Plain\n\n  text.", content_type="text/plain"),
    }
    async with serving(page_of(site_map)) as site:
        pages = await gather(crawl(site, concurrency=1))
        assert paths(site, pages) == ["/", "/1", "/plain"]
        assert pages[2].text == "Plain\ntext."


async def test_ids_are_addresses_after_redirects_and_each_page_comes_once() -> None:
    site_map: dict[str, Any] = {
        "/": ["/old", "/older", "/new"],
        "/old": moved("/new#x"),
        "/older": moved("/old"),
        "/new": [],
    }
    async with serving(page_of(site_map)) as site:
        assert paths(site, await gather(crawl(site, concurrency=1))) == ["/", "/new"]
        assert site.asked["/new"] == 1


async def test_other_hosts_are_left_alone_unless_named() -> None:
    async def answer(request: web.Request) -> web.Response:
        port = request.url.port
        links = [f"http://{name}.test:{port}/" for name in ("a", "sub.b", "c")]
        away = moved(f"http://c.test:{port}/")
        return away if request.path == "/away" else html(f"At {request.host}.", "/away", *links)

    resolve = names(a_test=["127.0.0.1"], sub_b_test=["127.0.0.1"], c_test=["127.0.0.1"])
    async with serving(answer) as site:
        for hosts, reached in (((), {"a"}), ((".b.test",), {"a", "sub.b"})):
            limits = replace(FAST, hosts=hosts)
            seeds = [site.url(host="a.test")]
            source = Crawl(seeds, limits=limits, policy=local(site), resolve=resolve)
            found = {page.id.split("//")[1].split(".test")[0] for page in await gather(source)}
            assert found == reached


async def test_a_seed_may_lead_to_another_host_and_the_crawl_goes_on_there() -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.host.startswith("a.test"):
            return moved(f"http://www.a.test:{request.url.port}/")
        return html(f"Page {request.path}", "/next")

    resolve = names(a_test=["127.0.0.1"], www_a_test=["127.0.0.1"])
    async with serving(answer) as site:
        seeds = [site.url(host="a.test")]
        pages = await gather(Crawl(seeds, limits=FAST, policy=local(site), resolve=resolve))
        assert [page.id for page in pages] == [
            site.url("/", "www.a.test"),
            site.url("/next", "www.a.test"),
        ]


async def test_pages_come_the_moment_they_are_ready() -> None:
    let_go = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/slow":
            await let_go.wait()
        return html(f"Page {request.path}", "/slow", "/quick")

    async with serving(answer) as site, aclosing(crawl(site).search(Query(""))) as found:
        first = [(await asyncio.wait_for(anext(found), 5)).passage for _ in range(2)]
        assert paths(site, first) == ["/", "/quick"]
        let_go.set()
        assert (await asyncio.wait_for(anext(found), 5)).passage.id == site.url("/slow")


async def test_a_site_is_asked_at_its_pace() -> None:
    begun_s: list[float] = []
    active, most = 0, 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal active, most
        begun_s.append(time.monotonic())
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.1)
        active -= 1
        return html(f"Page {request.path}", *(f"/{i}" for i in range(5)))

    async with serving(answer) as site:
        await gather(crawl(site, delay_s=0.05, concurrency_per_site=2))
    assert len(begun_s) == 6
    assert begun_s[-1] - begun_s[0] > 5 * 0.05 - 0.03  # the loop is shared with the server
    assert most == 2


async def test_robots_txt_is_obeyed() -> None:
    robots = "User-agent: *\nDisallow: /private\nUser-agent: other\nDisallow: /"
    site_map = {"/": ["/private/x", "/open", "/back"], "/private/x": [], "/open": []}
    pages: dict[str, Any] = site_map | {"/back": moved("/private/x")}
    async with serving(page_of(pages), robots=robots) as site:
        assert paths(site, await gather(crawl(site, concurrency=1))) == ["/", "/open"]
        assert not site.asked["/private/x"]
        assert site.asked["/robots.txt"] == 1
        with pytest.raises(SourceFailed, match=r"/private/x: robots\.txt does not allow it"):
            await gather(crawl(site, "/private/x"))


@pytest.mark.parametrize("status", [503, 429])
async def test_a_site_whose_robots_txt_fails_is_not_crawled(status: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return html("secret")

    async with serving(answer, robots_status=status) as site:
        with pytest.raises(SourceFailed, match=rf"status {status} \(robots\.txt\)"):
            await gather(crawl(site))
        assert set(site.asked) == {"/robots.txt"}


async def test_the_delay_that_robots_txt_asks_for_is_kept_up_to_a_cap() -> None:
    site_map = {"/": ["/1", "/2"], "/1": [], "/2": []}
    async with serving(page_of(site_map), robots="User-agent: *\nCrawl-delay: 60") as site:
        begun_s = time.monotonic()
        assert len(await gather(crawl(site, max_crawl_delay_s=0.2))) == 3
        assert 0.4 <= time.monotonic() - begun_s < 20


async def test_failing_servers_are_asked_again_when_they_say() -> None:
    asked_s: list[float] = []

    async def answer(request: web.Request) -> web.Response:
        asked_s.append(time.monotonic())
        if len(asked_s) == 1:
            return web.Response(status=429, headers={"Retry-After": "3"})
        return web.Response(status=500) if len(asked_s) == 2 else html("good")

    async with serving(answer) as site:
        assert len(await gather(crawl(site))) == 1
    assert asked_s[1] - asked_s[0] >= 3
    assert asked_s[2] - asked_s[1] < 3


async def test_who_asks_for_a_longer_wait_than_allowed_is_passed_over() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": "3600"})

    async with serving(answer) as site:
        with pytest.raises(SourceFailed, match="status 503"):
            await asyncio.wait_for(gather(crawl(site)), 5)
        assert site.asked["/"] == 1


async def test_it_ends_at_the_deadline_with_what_was_good() -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path != "/":
            await asyncio.sleep(30)
        return html("good", "/1", "/2")

    before = tasks()
    async with serving(answer) as site:
        begun_s = time.monotonic()
        assert len(await gather(crawl(site), deadline_s=begun_s + 3)) == 1
        assert 3 <= time.monotonic() - begun_s < 12  # giving the other pages up takes 15
        assert len(await gather(crawl(site, time_s=3))) == 1
    assert tasks() == before


async def test_closing_it_leaves_no_task_and_no_connection() -> None:
    async def answer(request: web.Request) -> web.Response:
        if sum(site.asked.values()) == 9:  # robots.txt, the seed, and as many as go at once
            all_asked.set()
        if request.path != "/":
            await asyncio.sleep(30)
        return html("good", *(f"/{i}" for i in range(9)))

    all_asked = asyncio.Event()
    async with serving(answer) as site:
        before = tasks()
        async with aclosing(crawl(site, concurrency_per_site=7).search(Query(""))) as found:
            await anext(found)
            await asyncio.wait_for(all_asked.wait(), 5)
        connections = psutil.Process().net_connections("tcp")
        assert not [c for c in connections if c.raddr and c.raddr.port == site.port]
        left = {task.get_coro().__qualname__ for task in tasks() - before}  # type: ignore[union-attr]
        assert left <= {"RequestHandler.start"}  # the server's own, which hear of it in a moment


async def test_seeds_are_taken_from_the_query_where_the_source_has_none() -> None:
    async with serving(page_of({"/x": [], "/y": []})) as site:
        source = Crawl(limits=FAST, policy=local(site))
        text = f"Compare {site.url('/x')} with ({site.url('/y')})."
        assert sorted(paths(site, await gather(source, text))) == ["/x", "/y"]
        with pytest.raises(SourceFailed, match="no address to begin at"):
            await gather(source, "What is a crawl?")


def test_addresses_are_found_in_text() -> None:
    text = "See <https://a.example/x?y=1>, http://b.example. And HTTPS://C.example/(z)!"
    assert urls_in(text) == ("https://a.example/x?y=1", "http://b.example", "HTTPS://C.example/(z")


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s("7") == 7
    assert retry_after_s("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert retry_after_s("Fri, 31 Dec 2199 23:59:59 GMT") > 1e9
    assert retry_after_s("") == retry_after_s("soon") == 0
