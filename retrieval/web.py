"""Pages of a web site, in the order in which a crawler finds them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urldefrag, urljoin, urlsplit

import httpx
from bs4 import BeautifulSoup

TIMEOUT_S = 10.0
MAX_PAGE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Page:
    """One page: where it is, and its readable text."""

    url: str
    title: str
    text: str


async def crawl(
    seed: str, *, pages: int, delay_s: float = 1.0, max_chars: int | None = None
) -> AsyncIterator[Page]:
    """Fetch a page and what it links to on the same site, breadth first.

    Pages that can't be fetched, are not HTML, have no text, or the text of an earlier one are
    passed over.

    Args:
        pages: stop after this many.
        delay_s: politeness: seconds between two requests to the site.
        max_chars: cut a page's text, at a line end, to at most this many characters.
    """
    queue, seen, texts = deque([seed]), {seed}, set[str]()
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http:
        while queue and len(texts) < pages:
            url = queue.popleft()
            html = await _fetch(http, url)
            if html is not None:
                soup = BeautifulSoup(html, "html.parser")
                for link in _links(soup, url):
                    if link not in seen:
                        seen.add(link)
                        queue.append(link)
                page = _read(soup, url, max_chars)
                if page is not None and page.text not in texts:
                    texts.add(page.text)
                    yield page
            if queue and len(texts) < pages:
                await asyncio.sleep(delay_s)


async def _fetch(http: httpx.AsyncClient, url: str) -> str | None:
    """The HTML at an address, or None if there is none to be had."""
    try:
        async with http.stream("GET", url) as response:
            if response.status_code != 200:
                return None
            if "html" not in response.headers.get("Content-Type", ""):
                return None
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_PAGE_BYTES:
                    return None
            return body.decode(response.encoding or "utf-8", errors="replace")
    except httpx.HTTPError:
        return None


def _links(soup: BeautifulSoup, base: str) -> list[str]:
    site = urlsplit(base).netloc
    absolute = (urldefrag(urljoin(base, str(a["href"])))[0] for a in soup.find_all("a", href=True))
    return [u for u in absolute if urlsplit(u).scheme in ("http", "https")
            and urlsplit(u).netloc == site]  # fmt: skip


def _read(soup: BeautifulSoup, url: str, max_chars: int | None) -> Page | None:
    title = soup.title.get_text(strip=True) if soup.title is not None else url
    for unread in soup(["script", "style", "head", "nav"]):
        unread.decompose()
    lines = [line.strip() for line in soup.get_text("\n").splitlines()]
    text = "\n".join(line for line in lines if line)
    if max_chars is not None and len(text) > max_chars:
        text = text[:max_chars].rpartition("\n")[0] or text[:max_chars]
    return Page(url, title, text) if text else None
