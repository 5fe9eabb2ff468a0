"""What retrieval by the gateway costs and gains, through a real engine: crawls, rankings, both.

Four workloads, each query once for every ordering; only the first words of the prompt differ, so
that no run finds the KV of another:

- `ann`: the gateway searches a collection of real passages. All rankings come within milliseconds.
- `ann, slow`: the same rankings, put into the stream one every `PAUSE_S`, as a slow index would.
- `crawl`: the gateway reads pages of the documentation server that ships with Python.
- `crawl + ann`: both at once; what still changes stands last.

`waits` is the same documents sent whole, when retrieval has ended. Columns, means over queries:

- `invalidated`: tokens of the prompt that a change gave up, as the gateway counts them.
- `computed`: of these, what the engine had already computed, as the engine counts it.
- `early`: share of the prompt that was computed when the input was closed.
- `TTFT`: from the end of retrieval to the first token, as the gateway measures it.
- `all`: from opening the stream to the end of an answer of a few tokens.
- `same set`: whether every query's documents are those of all other ways of the workload.

`make bench-retrieval`; the last line is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from deploy.local import EngineOptions, Server, command, engine, gateway
from deploy.model import MODEL_NAME, cache_dir
from gateway.client import Client, Stream
from loadtest.bench_ann import question
from loadtest.passages import installed, passages
from loadtest.report import machine, p50_p95_p99, slashed, vllm_version
from retrieval.addresses import FetchPolicy
from retrieval.ann import AnnSearch
from retrieval.collections.store import Collections
from retrieval.crawl import Crawl, CrawlLimits
from retrieval.embedding import MiniLm
from retrieval.ordering import ORDERINGS, Documents, OrderingName
from retrieval.source import Passage, Query

COLLECTION = "docs"
BATCH = 2000
PLACES = 20
PAUSE_S = 0.3
PAGES = 6
PAGE_CHARS = 600
DELAY_S = 0.4
"""Between two requests to the site."""
ANSWER_TOKENS = 4
COUNTERS = {
    "invalidated": "stream2llm_invalidated_tokens_total",
    "ttft_s": "stream2llm_time_to_first_token_seconds_sum",
}
WORKLOADS = ("ann", "ann, slow", "crawl", "crawl + ann")
COLUMNS = ("invalidated", "of rank", "computed", "early", "TTFT P50/95/99, s", "all, s", "same set")
WIDTHS = (">13", ">9", ">10", ">8", ">22", ">8", ">10")


@dataclass(frozen=True, slots=True)
class Run:
    """One query answered in one way. Tokens and seconds."""

    workload: str
    way: str
    query: int
    documents: tuple[str, ...]
    invalidated: float
    computed: float
    early: float
    prompt_tokens: int
    ttft_s: float
    all_s: float


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything is."""

    client: Client
    http: httpx.AsyncClient
    front: str
    engine: str
    collections: Collections

    async def counters(self) -> dict[str, float]:
        """What gateway and engine count, now."""
        text = (await self.http.get(self.front + "/metrics")).text
        found = {
            name: float(match[1]) if (match := re.search(rf"^{metric} (\S+)", text, re.M)) else 0.0
            for name, metric in COUNTERS.items()
        }
        info = (await self.http.get(self.engine + "/stream2llm/info")).json()
        return found | {"computed": info["invalidated_tokens"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--passages", type=int, default=4000, help="in the collection")
    options = parser.parse_args()
    print(f"{machine()}, {vllm_version()}, {MODEL_NAME}, faiss-cpu {version('faiss-cpu')}")
    found = passages(options.passages + options.queries, installed())
    if len(found) < options.passages + options.queries:
        sys.exit(f"there are only {len(found)} passages in the packages installed here")
    folder = cache_dir() / f"bench-retrieval-{options.passages}"
    with ExitStack() as running:
        llm, front, site = start(running, folder)
        fill(front, found[: options.passages])
        questions = [question(p.text) for p in found[options.passages :]]
        runs = asyncio.run(measure(llm, front, site, folder, questions))
    report(runs, options)
    return 0 if same_documents(runs) else 1


def start(running: ExitStack, folder: Path) -> tuple[str, str, str]:
    """Engine, gateway and site. Returns their URLs."""
    llm = running.enter_context(engine(EngineOptions(max_model_len=8192)))
    pydoc = [sys.executable, "-m", "pydoc", "-n", "127.0.0.1", "-p", "{port}"]
    site = running.enter_context(command("pydoc", pydoc))
    front: Server = running.enter_context(
        gateway(
            [llm.url],
            [
                "--crawl", "--crawl-ports", str(site.port), "--crawl-networks", "127.0.0.1/32",
                "--crawl-delay-s", str(DELAY_S), "--collections", str(folder),
            ],
        )
    )  # fmt: skip
    for server in (llm, site, front):
        server.start()
    llm.wait_ready(300)
    site.wait_ready(30)
    front.wait_ready(60)
    while httpx.get(front.url + "/ready", trust_env=False).status_code != 200:
        time.sleep(0.1)
    return llm.url, front.url, site.url


def fill(front: str, wanted: Sequence[Passage]) -> None:
    """Have the gateway make the collection, unless it is there from an earlier run."""
    with httpx.Client(base_url=front, timeout=600, trust_env=False) as http:
        listed = http.get("/v1/collections").json()["data"]
        there = {each["name"]: each["passages"] for each in listed}
        if there.get(COLLECTION) == len(wanted):
            print(f"{len(wanted)} passages are there from an earlier run")
            return
        if COLLECTION not in there:
            http.post("/v1/collections", json={"name": COLLECTION}).raise_for_status()
        began_s = time.monotonic()
        for first in range(0, len(wanted), BATCH):
            rows = [{"id": p.id, "text": p.text} for p in wanted[first : first + BATCH]]
            body = "\n".join(map(json.dumps, rows))
            http.post(f"/v1/collections/{COLLECTION}/passages", content=body).raise_for_status()
        took_s = time.monotonic() - began_s
        print(f"{len(wanted)} passages embedded and added over HTTP in {took_s:.0f} s")


async def measure(
    llm: str, front: str, site: str, folder: Path, questions: Sequence[str]
) -> list[Run]:
    """All queries in all ways; of one query the ways follow each other."""
    pages = module_pages(site)
    runs: list[Run] = []
    async with Client(front, timeout_s=300) as client, httpx.AsyncClient(trust_env=False) as http:
        bench = Bench(client, http, front, llm, Collections(folder, MiniLm()))
        await whole(bench, "warm-up", -1, "Why?", [{"id": "w", "text": "Python. " * 100}])
        for n, text in enumerate(questions):
            seeds = [pages[(n * PAGES + k) % len(pages)] for k in range(PAGES)]
            crawl = {"type": "crawl", "seeds": seeds, "depth": 0, "pages": PAGES,
                     "page_chars": PAGE_CHARS}  # fmt: skip
            rankings = await ranked(bench.collections, text)
            for name in ORDERINGS:
                ann = {"type": "ann", "collection": COLLECTION, "k": PLACES, "ordering": name}
                runs.append(await retrieved(bench, "ann", name, n, text, [ann]))
                runs.append(await put(bench, name, n, text, rankings))
                runs.append(await retrieved(bench, "crawl + ann", name, n, text, [crawl, ann]))
            last = [{"id": p.id, "text": p.text} for p in rankings[-1]]
            runs.append(await whole(bench, "ann", n, text, last))
            runs.append(await retrieved(bench, "crawl", "streams", n, text, [crawl]))
            texts = await crawled(crawl)
            runs.append(await whole(bench, "crawl", n, text, texts))
            print(f"query {n + 1} of {len(questions)}", flush=True)
    return [run for run in runs if run.query >= 0]


def module_pages(site: str) -> list[str]:
    """Pages of the site: one of each module that is not private."""
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    return [f"{site}/{name}.html" for name in names if name not in ("antigravity", "this")]


async def ranked(collections: Collections, text: str) -> list[Documents]:
    """The rankings of a search, as the gateway's own source makes them."""
    source = AnnSearch(collections, COLLECTION, places=PLACES)
    async with aclosing(source.search(Query(text))) as events:
        return [event.passages async for event in events]


async def crawled(crawl: dict[str, Any]) -> list[dict[str, str]]:
    """The documents of a crawl, as the gateway would have them."""
    port = httpx.URL(crawl["seeds"][0]).port or 80
    policy = FetchPolicy(ports=frozenset({port}), allowed_networks=("127.0.0.1/32",))
    limits = CrawlLimits(pages=PAGES, depth=0, page_chars=PAGE_CHARS, delay_s=0.0)
    crawler = Crawl(crawl["seeds"], limits=limits, policy=policy)
    async with aclosing(crawler.search(Query(""))) as events:
        found = {event.passage.id: event.passage.text async for event in events}
    return [{"id": url, "text": found[url]} for url in crawl["seeds"] if url in found]


def messages(way: str, query: int, text: str) -> list[dict[str, str]]:
    """The conversation; no two runs begin alike."""
    system = f"{query} {way}. You answer from the documentation you are given."
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": "{{documents}}\nWhat is this about: " + text},
    ]


async def retrieved(
    bench: Bench, workload: str, way: str, query: int, text: str, sources: list[dict[str, Any]]
) -> Run:
    """The gateway retrieves."""

    async def feed(stream: Stream) -> Sequence[str]:
        return ()

    wanted = {"query": text, "sources": sources}
    return await answered(bench, workload, way, query, text, feed, retrieval=wanted)


async def put(
    bench: Bench, name: OrderingName, query: int, text: str, rankings: Sequence[Documents]
) -> Run:
    """The rankings are put into the stream one by one."""

    async def feed(stream: Stream) -> Sequence[str]:
        ordering = ORDERINGS[name]()
        now: Documents = ()
        for each in [*(ordering.update(ranking) for ranking in rankings), ordering.final()]:
            if each != now:
                await stream.replace([{"id": p.id, "text": p.text} for p in each])
            now = each
            await asyncio.sleep(PAUSE_S)
        return tuple(p.id for p in now)

    return await answered(bench, "ann, slow", name, query, text, feed)


async def whole(
    bench: Bench, workload: str, query: int, text: str, documents: list[dict[str, str]]
) -> Run:
    """Everything is sent at once."""

    async def feed(stream: Stream) -> Sequence[str]:
        return tuple(document["id"] for document in documents)

    return await answered(bench, workload, "waits", query, text, feed, documents=documents)


async def answered(
    bench: Bench,
    workload: str,
    way: str,
    query: int,
    text: str,
    feed: Callable[[Stream], Awaitable[Sequence[str]]],
    **options: Any,
) -> Run:
    """Open a stream, feed it, ask, and see what was counted meanwhile.

    Args:
        feed: gives the ids of the documents, where the gateway does not say them.
    """
    before, began_s = await bench.counters(), time.monotonic()
    asked = messages(f"{workload} {way}", query, text)
    options |= {"max_tokens": ANSWER_TOKENS, "temperature": 0}
    async with bench.client.stream(MODEL_NAME, asked, **options) as stream:
        documents = await feed(stream)
        answer = await stream.finish()
    all_s = time.monotonic() - began_s
    if (retrieval := answer.get("retrieval")) is not None:
        if not retrieval["complete"]:
            sys.exit(f"retrieval is not complete: {retrieval}")
        documents = retrieval["documents"]
    after, usage = await bench.counters(), answer["usage"]
    counted = {name: after[name] - before[name] for name in after}
    return Run(
        workload,
        way,
        query,
        tuple(name.removeprefix(f"ann:{COLLECTION}/") for name in documents),
        invalidated=counted["invalidated"],
        computed=counted["computed"],
        early=usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        ttft_s=round(counted["ttft_s"], 4),
        all_s=round(all_s, 3),
    )


def same_documents(runs: Sequence[Run]) -> bool:
    """Whether all ways of a workload end with the same documents, for each query."""
    sets: dict[tuple[str, int], set[frozenset[str]]] = {}
    for run in runs:
        sets.setdefault((run.workload, run.query), set()).add(frozenset(run.documents))
    return all(len(different) == 1 for different in sets.values())


def report(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Print the table, and the JSON object as the last line."""
    print(f"\n{options.queries} queries, {options.passages} passages, the best {PLACES}; crawls of "
          f"{PAGES} pages, {DELAY_S:g} s apart; prompts of "
          f"{statistics.mean(run.prompt_tokens for run in runs):.0f} tokens")  # fmt: skip
    print("".join([f"{'workload, way':24}", *map(format, COLUMNS, WIDTHS)]))
    rows = dict.fromkeys((run.workload, run.way) for run in runs)
    for workload, way in sorted(rows, key=lambda row: WORKLOADS.index(row[0])):
        mine = [run for run in runs if (run.workload, run.way) == (workload, way)]
        rank = sum(r.invalidated for r in runs if (r.workload, r.way) == (workload, "rank"))
        all_of_it = [run for run in runs if run.workload == workload]
        cells = (
            f"{statistics.mean(run.invalidated for run in mine):.1f}",
            f"{sum(run.invalidated for run in mine) / rank:.3f}" if rank else "",
            f"{statistics.mean(run.computed for run in mine):.1f}",
            f"{statistics.mean(run.early for run in mine):.0%}",
            slashed(p50_p95_p99([run.ttft_s for run in mine]), 2),
            f"{statistics.mean(run.all_s for run in mine):.2f}",
            "yes" if same_documents(all_of_it) else "NO",
        )
        print("".join([f"{workload + ', ' + way:24}", *map(format, cells, WIDTHS)]))
    figures = {
        "benchmark": "retrieval",
        "goal_stable_of_rank": 0.1,
        "runs": [asdict(run) | {"documents": len(run.documents)} for run in runs],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
