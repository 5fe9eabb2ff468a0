"""`make demo`: an answer that starts almost when its context is complete.

Starts a real engine, Redis, the gateway, and the documentation server that ships with Python;
crawls that site; streams each page as it arrives; asks; then sends the same context whole.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from types import FrameType
from typing import Any

import httpx

from deploy.local import EngineOptions, Server, engine, free_port, gateway, redis_server
from deploy.model import MODEL_NAME
from gateway.client import Client, Stream
from retrieval.addresses import FetchPolicy
from retrieval.crawl import Crawl, CrawlLimits
from retrieval.source import Passage, Query

PAGES = 12
PAGE_CHARS = 500
DELAY_S = 1.3
"""Between two requests to the site, as a polite crawler waits."""
ANSWER_TOKENS = 40
SEED = "asyncio.html"
QUESTION = "In one sentence: what is the asyncio package of Python for?"


@dataclass(slots=True)
class Run:
    """One answer: its text and how long its first piece took, from the end of the input."""

    ttft_s: float
    text: str
    usage: dict[str, Any]


def say(text: str = "") -> None:
    print(text, flush=True)


class Interrupt:
    """Ctrl-C, or SIGTERM. Python drops an exception that a signal raises in a finalizer, so what
    waits for long asks for it too."""

    def __init__(self) -> None:
        self._came = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._come)

    def _come(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if it has come."""
        if self._came:
            raise KeyboardInterrupt


def main() -> int:
    """Run the demo. Returns the exit code; whatever happens, no process is left behind."""
    interrupt = Interrupt()
    try:
        with ExitStack() as running:
            places = start(running, interrupt)
            interrupt.check()
            asyncio.run(demo(*places))
        return 0
    except KeyboardInterrupt:
        say("\ninterrupted; everything is stopped")
        return 130


def start(running: ExitStack, interrupt: Interrupt) -> tuple[str, str]:
    """Start the servers. Returns the URLs of the gateway and of the site to crawl."""
    begun_s = time.monotonic()
    llm = running.enter_context(engine(EngineOptions(max_model_len=8192, kv_events=True)))
    redis = running.enter_context(redis_server())
    port = free_port()
    command = [sys.executable, "-m", "pydoc", "-n", "127.0.0.1", "-p", str(port)]
    docs = running.enter_context(Server("pydoc", command, port=port, ready_path="/"))
    front = running.enter_context(gateway([llm.url], ["--index", redis.url]))
    say(f"starting vLLM with {MODEL_NAME} on this CPU (about a minute) ...")
    for server in (llm, docs, redis, front):
        server.start()
    llm.wait_ready(180, waiting=_dots(interrupt))
    for server in (docs, redis, front):
        server.wait_ready(60)
    _ready(front)
    say(f"\nengine {llm.url}, gateway {front.url}, index {redis.url}, site {docs.url}  "
        f"[{time.monotonic() - begun_s:.0f} s]\n")  # fmt: skip
    return front.url, docs.url


def _ready(front: Server) -> None:
    while httpx.get(front.url + "/ready", trust_env=False).status_code != 200:
        time.sleep(0.1)


def _dots(interrupt: Interrupt) -> Any:
    last = 0

    def waiting(seconds: float) -> None:
        nonlocal last
        interrupt.check()
        if seconds // 5 > last:
            last = int(seconds // 5)
            print(".", end="", flush=True)

    return waiting


async def demo(gateway_url: str, site: str) -> None:
    """Warm up, stream while crawling, send whole, compare."""
    async with Client(gateway_url) as client:
        await whole(client, "warm-up", [Passage("", "Python. " * 40)], ANSWER_TOKENS // 8)
        say(f"streaming: a crawl of {PAGES} pages, one request every {DELAY_S:g} s")
        pages, streamed = await stream_while_crawling(client, site)
        say(f"\nsent whole: the same {len(pages)} pages, now that the crawl is over")
        unstreamed = await whole(client, "2", pages, ANSWER_TOKENS)
        say(f"  first token after {unstreamed.ttft_s:.2f} s "
            f"({unstreamed.usage['prompt_tokens']} tokens to read)")  # fmt: skip
        say(f"  answer: {unstreamed.text.strip()}\n")
    ratio = unstreamed.ttft_s / streamed.ttft_s
    say(
        f"TTFT streamed {streamed.ttft_s:.2f} s, sent whole {unstreamed.ttft_s:.2f} s: {ratio:.1f}x"
    )


def messages(run: str) -> list[dict[str, str]]:
    """The conversation. `run` makes the first tokens of each run differ, so that none finds
    another's KV in the engine's prefix cache."""
    system = f"{run}. You answer from the documentation you are given."
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": "{{documents}}\nQuestion: " + QUESTION},
    ]


async def stream_while_crawling(client: Client, site: str) -> tuple[list[Passage], Run]:
    """Send each page when it arrives, and ask when the crawl ends."""
    pages: list[Passage] = []
    begun_s = time.monotonic()
    async with client.stream(
        MODEL_NAME, messages("1"), max_tokens=ANSWER_TOKENS, temperature=0
    ) as stream:
        async with aclosing(crawler(site).search(Query(QUESTION))) as arriving:
            async for page in (found.passage async for found in arriving):
                pages.append(page)
                before = (await stream.status())["tokens"]
                tokens = await stream.send(page.text, id=page.id)
                received = before["prompt"] + tokens
                say(
                    f"  {time.monotonic() - begun_s:5.1f} s  page {len(pages):2}  +{tokens:4} "
                    f"tokens  read {before['prefilled']:5} of {received:5}  {page.title[:36]}"
                )
        ended_s = time.monotonic()
        say(f"  {ended_s - begun_s:5.1f} s  crawl ended, question asked")
        run = await answer(stream, ended_s)
        say(f"  {ended_s - begun_s + run.ttft_s:5.1f} s  first token, {run.ttft_s:.2f} s after "
            "the end of the crawl")  # fmt: skip
        early = run.usage["prompt_tokens_details"]["cached_tokens"]
        say(f"  {early} of {run.usage['prompt_tokens']} tokens were read before the question")
        say(f"  answer: {run.text.strip()}")
        return pages, run


def crawler(site: str) -> Crawl:
    """Fetches one page after another from a site on this machine."""
    limits = CrawlLimits(
        pages=PAGES, page_chars=PAGE_CHARS, delay_s=DELAY_S, concurrency_per_site=1
    )
    port = httpx.URL(site).port
    policy = FetchPolicy(ports=frozenset({port or 80}), allowed_networks=("127.0.0.0/8",))
    return Crawl([f"{site}/{SEED}"], limits=limits, policy=policy)


async def whole(client: Client, run: str, pages: list[Passage], max_tokens: int) -> Run:
    """Send everything at once, as an application does that waits for its retrieval."""
    begun_s = time.monotonic()
    documents = [{"text": page.text, "id": page.id} for page in pages]
    async with client.stream(
        MODEL_NAME, messages(run), max_tokens=max_tokens, temperature=0, documents=documents
    ) as stream:
        return await answer(stream, begun_s)


async def answer(stream: Stream, from_s: float) -> Run:
    """Read the answer, timing its first piece."""
    ttft_s = None
    pieces = []
    async for piece in stream.answer():
        if ttft_s is None:
            ttft_s = time.monotonic() - from_s
        pieces.append(piece)
    if ttft_s is None or stream.usage is None:
        raise RuntimeError("the answer is empty")
    return Run(ttft_s, "".join(pieces), stream.usage)


if __name__ == "__main__":
    sys.exit(main())
