"""Sites that mean harm, or are broken: a crawl of them ends, small, with what was good."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
import psutil
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.crawl import Crawl, CrawlLimits
from retrieval.fetch import BodyRefused, Fetcher, Unreachable
from retrieval.pages import decode, read_page
from retrieval.source import Passage
from tests.retrieval.sites import Site, gather, html, local, moved, serving

pytestmark = pytest.mark.slow

MIB = 1 << 20
GERMAN = "Die Größe der Bücher hängt davon ab, wie schön ihre Überschriften gesetzt wären."
GROWTH_LIMIT_BYTES = 120 * MIB
"""Generous: 8 bodies of 2 MiB and the trees of 2 pages that are being read."""


@cache
def bomb(mib: int) -> bytes:
    """So many MiB of blanks, gzipped."""
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    parts = [packer.compress(b" " * MIB) for _ in range(mib)]
    return b"".join([*parts, packer.flush()])


async def send(request: web.Request, parts: AsyncIterator[bytes], **headers: str) -> web.Response:
    """A body that comes in pieces."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = web.StreamResponse(headers={"Content-Type": "text/html"} | named)
    await response.prepare(request)
    async for part in parts:
        await response.write(part)
    await response.write_eof()
    return response  # type: ignore[return-value]


async def drip() -> AsyncIterator[bytes]:
    while True:
        yield b"<"
        await asyncio.sleep(0.05)


async def megabytes(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"<p>word</p>" * (MIB // 11)


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def hostile(request: web.Request) -> web.StreamResponse:
    """One site with everything."""
    match request.path.split("/")[1]:
        case "":
            kinds = "slow silent loop bomb bombs big sized reset storm broken endless wrong good"
            return html("The way in.", *(f"/{kind}/1" for kind in kinds.split()))
        case "slow":
            return await send(request, drip())
        case "silent":
            await asyncio.sleep(60)
        case "loop":
            return moved("/loop/2" if request.path == "/loop/1" else "/loop/1")
        case "bomb":
            return await send(request, once(bomb(1)), Content_Encoding="gzip")
        case "bombs":
            return await send(request, once(bomb(100)), Content_Encoding="gzip")
        case "big":
            return await send(request, megabytes(50))
        case "sized":
            return await send(request, megabytes(50), Content_Length=str(50 * MIB))
        case "reset":
            assert request.transport is not None
            request.transport.abort()
        case "storm":
            return web.Response(status=503)
        case "broken":
            return await send(request, once(b"not gzip"), Content_Encoding="gzip")
        case "endless":
            await asyncio.sleep(0.02)
            number = int(request.path.split("/")[2])
            return html(f"Page {number}.", *(f"/endless/{2 * number + i}" for i in (0, 1)))
        case "wrong":
            body = f"<p>{GERMAN}</p>".encode("latin-1")
            return web.Response(body=body, headers={"Content-Type": "text/html; charset=utf-8"})
    return html("The good page.")


@asynccontextmanager
async def growth() -> AsyncIterator[list[int]]:
    """The most by which this process was larger than at the beginning, in bytes."""
    process = psutil.Process()
    before, most = process.memory_info().rss, [0]

    async def watch() -> None:
        while True:
            most[0] = max(most[0], process.memory_info().rss - before)
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    try:
        yield most
    finally:
        watching.cancel()


async def test_a_hostile_site_is_crawled_by_the_deadline_within_bounds(
    record_property: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb(100)
    limits = CrawlLimits(
        pages=10_000,  # 25 s at least, 8 at a time
        urls=50_000,
        depth=50,
        delay_s=0,
        backoff_s=0.1,
        concurrency_per_site=8,
        site_failures=99,
    )
    async with serving(hostile) as site, growth() as grown:
        policy = local(site, idle_s=1.0, total_s=2.0)
        begun_s = time.monotonic()
        pages = await gather(
            Crawl([site.url()], limits=limits, policy=policy), deadline_s=begun_s + 4
        )
        took_s = time.monotonic() - begun_s
    kinds = [page.id.removeprefix(site.url("/")).split("/")[0] for page in pages]
    record_property("growth_mib", grown[0] / MIB)
    with capsys.disabled():
        print(f" [{len(pages)} pages in {took_s:.2f} s, grew by {grown[0] / MIB:.0f} MiB]", end="")
    assert 4 <= took_s < 15
    assert set(kinds) == {"", "endless", "wrong", "good"}
    assert kinds.count("endless") > 10
    assert len(kinds) == len({page.id for page in pages})
    assert [page.text for page in pages if "wrong" in page.id] == [GERMAN]
    assert grown[0] < GROWTH_LIMIT_BYTES
    assert all(site.asked[f"/{kind}/1"] for kind in ("slow", "bombs", "big", "sized", "reset"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/bomb/1", "grows more than 100 times"),
        ("/bombs/1", "more than 2097152 bytes"),
        ("/big/1", "more than 2097152 bytes"),
        ("/sized/1", "52428800 bytes, more than"),
        ("/broken/1", "not gzip"),
    ],
)
async def test_too_large_bodies_are_refused_early(path: str, reason: str) -> None:
    bomb(100)
    async with serving(hostile) as site, growth() as grown, Fetcher(local(site)) as fetcher:
        begun_s = time.monotonic()
        with pytest.raises(BodyRefused, match=reason):
            await fetcher.fetch(site.url(path))
        assert time.monotonic() - begun_s < 8
    assert grown[0] < 30 * MIB


@pytest.mark.parametrize(
    ("path", "idle_s", "total_s", "reason"),
    [
        ("/slow/1", 10, 0.4, "not read in 0.4 s"),
        ("/silent/1", 0.2, 10, "Timeout"),
        ("/reset/1", 10, 10, "disconnected"),
    ],
)
async def test_slow_and_broken_connections_are_given_up(
    path: str, idle_s: float, total_s: float, reason: str
) -> None:
    async with (
        serving(hostile) as site,
        Fetcher(local(site, idle_s=idle_s, total_s=total_s)) as fetcher,
    ):
        begun_s = time.monotonic()
        with pytest.raises(Unreachable, match=reason):
            await fetcher.fetch(site.url(path))
        assert time.monotonic() - begun_s < 8


async def crawled(site: Site, **limits: Any) -> list[Passage]:
    limits = {"delay_s": 0.0, "backoff_s": 0.01} | limits
    return await gather(Crawl([site.url()], limits=CrawlLimits(**limits), policy=local(site)))


async def test_a_site_that_only_fails_is_left_alone() -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/":
            return html("The way in.", *(f"/{i}" for i in range(100)))
        return web.Response(status=500)

    async with serving(answer) as site:
        assert len(await crawled(site, site_failures=10, concurrency=4)) == 1
        assert sum(site.asked.values()) < 20


async def test_links_without_end_are_not_all_remembered() -> None:
    async def answer(request: web.Request) -> web.Response:
        links = (f"{request.path.rstrip('/')}/{i}" for i in range(100))
        return html("The same text everywhere.", *links)

    async with serving(answer) as site:
        assert len(await crawled(site, urls=30, depth=99)) == 1
        assert len(site.asked) == 31  # and robots.txt


async def test_a_gzip_body_of_good_size_is_read() -> None:
    text = "".join(f"<p>This is the paragraph with the number {i}.</p>" for i in range(9000))

    async def answer(request: web.Request) -> web.StreamResponse:
        packed = gzip.compress(text.encode())
        return await send(request, once(packed), Content_Encoding="gzip")

    async with serving(answer) as site, Fetcher(local(site)) as fetcher:
        assert (await fetcher.fetch(site.url())).body.decode() == text


async def test_a_gzip_body_that_is_cut_off_is_refused() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return await send(request, once(bomb(1)[:-20]), Content_Encoding="gzip")

    async with serving(answer) as site, Fetcher(local(site, max_ratio=9999.0)) as fetcher:
        with pytest.raises(BodyRefused, match="ends too early"):
            await fetcher.fetch(site.url())


@pytest.mark.parametrize(
    ("header", "body", "text"),
    [
        ("text/html; charset=utf-8", "é".encode(), "é"),
        ("text/html; charset=UTF-8", GERMAN.encode("latin-1"), GERMAN),
        ("text/html; charset=iso-8859-1", "“é”".encode("cp1252"), "“é”"),
        ("text/html; charset=nonsense", "é".encode(), "é"),
        ("text/html; charset=idna", "é".encode(), "é"),
        ("text/html; charset=zlib", b"plain", "plain"),
        ("text/html", "<meta charset=shift_jis>日本語".encode("shift_jis"), "日本語"),
        ("text/html", "<meta charset=utf-16>é".encode(), "é"),
        ("text/html; charset=latin-1", b"\xef\xbb\xbf" + "é".encode(), "é"),
        ("text/html", "é".encode("utf-16"), "é"),
        ("text/html; charset=gbk", "<meta charset=utf-8>中文".encode("gbk"), "中文"),
        ("", "é".encode(), "é"),
        ("text/html; charset=utf-8", b"\xff\xfe\x00\xd8", ""),
    ],
)
def test_a_page_is_read_in_the_charset_that_fits(header: str, body: bytes, text: str) -> None:
    assert decode(header, body).split(">")[-1].endswith(text)


@settings(deadline=None)
@given(st.binary(max_size=2000), st.sampled_from(["", "utf-8", "utf-16", "utf-7", "hex", "big5"]))
def test_whatever_the_bytes_a_page_can_be_read(body: bytes, charset: str) -> None:
    read_page(httpx.URL("http://a.test/"), f"text/html; charset={charset}", body)


def test_a_page_made_to_be_slow_is_read_in_reasonable_time() -> None:
    body = b"<table>" + b"<tr><td>a<td>b<td>c" * 45_000
    begun_s = time.monotonic()
    read_page(httpx.URL("http://a.test/"), "text/html", body)
    assert time.monotonic() - begun_s < 6  # looking for the main text would take 8
