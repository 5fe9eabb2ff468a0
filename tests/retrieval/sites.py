"""Sites on loopback, for tests: what they serve is a function of the request."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from retrieval.addresses import FetchPolicy
from retrieval.source import Found, Passage, Query, Source
from retrieval.transport import Resolve

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Site:
    """A site that counts who asks for what."""

    port: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    hosts: set[str] = field(default_factory=set)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def serving(
    answer: Answer,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    robots: str = "",
    robots_status: int = 404,
) -> AsyncIterator[Site]:
    """A server whose every address is answered by one function; no robots.txt but the given."""
    site = Site()

    async def handle(request: web.Request) -> web.StreamResponse:
        site.asked[request.path_qs] += 1
        site.hosts.add(request.host)
        if request.path == "/robots.txt":
            return web.Response(text=robots, status=200 if robots else robots_status)
        return await answer(request)

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        site.port = runner.addresses[0][1]
        yield site
    finally:
        await runner.cleanup()


def html(text: str, *links: str, title: str = "") -> web.Response:
    """A page with a text and links."""
    anchors = " ".join(f'<a href="{link}">more</a>' for link in links)
    body = f"<html><head><title>{title}</title></head><body><p>{text}</p>{anchors}</body></html>"
    return web.Response(text=body, content_type="text/html")


def moved(location: str) -> web.Response:
    """A redirect."""
    return web.Response(status=302, headers={"Location": location})


def local(*sites: Site, networks: Sequence[str] = ("127.0.0.1/32",), **more: object) -> FetchPolicy:
    """A policy under which these sites may be fetched."""
    ports = frozenset(site.port for site in sites)
    return FetchPolicy(ports=ports, allowed_networks=tuple(networks), **more)  # type: ignore[arg-type]


def names(**table: Sequence[str]) -> Resolve:
    """Looks names up in a table, with `_` for a dot."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        try:
            return table[host.replace(".", "_")]
        except KeyError:
            raise OSError("no such name") from None

    return resolve


async def gather(source: Source, text: str = "", deadline_s: float | None = None) -> list[Passage]:
    """All that a source finds, in order."""
    searching: AsyncGenerator[object, None] = source.search(Query(text, deadline_s))
    async with aclosing(searching) as events:
        return [event.passage async for event in events if isinstance(event, Found)]


def tasks() -> set[asyncio.Task[object]]:
    """Everything that runs on this loop beside the caller."""
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
