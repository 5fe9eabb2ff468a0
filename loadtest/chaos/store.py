"""A client of the collections: passages that were acknowledged stay, whatever the disk does."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson

from loadtest.chaos.calls import Caller, Refused
from loadtest.chaos.history import History
from retrieval.collections.store import Collections
from retrieval.embedding import MiniLm

NAME = "facts"
FULL = "storage_full"
PASSAGES = 4
EVERY_S = 1.5


@dataclass(slots=True)
class Store:
    """What it did and was told."""

    acknowledged: set[str] = field(default_factory=set)
    full: int = 0
    """How often there was no room."""
    searches: int = 0
    history: History = field(default_factory=lambda: History(-1, "crawl", "", 1))


async def keep_adding(http: aiohttp.ClientSession, url: str, seed: int, store: Store) -> None:
    """Add passages and search them until cancelled."""
    call = Caller(http, [url], store.history, random.Random(f"store {seed}"))
    path, added = "/v1/collections", 0
    created = False
    while True:
        await asyncio.sleep(EVERY_S)
        if not created:
            created = await _done(call, store, "create", path, orjson.dumps({"name": NAME}))
            continue
        ids = [f"p{added + i}" for i in range(PASSAGES)]
        lines = (orjson.dumps({"id": i, "text": f"Passage {i} is about {i}."}) for i in ids)
        if await _done(call, store, "add", f"{path}/{NAME}/passages", b"\n".join(lines)):
            store.acknowledged.update(ids)
            added += PASSAGES
        query = orjson.dumps({"query": f"What is {call.rng.choice(ids)} about?"})
        store.searches += await _done(call, store, "search", f"{path}/{NAME}/search", query)


async def _done(call: Caller, store: Store, what: str, path: str, body: bytes) -> bool:
    """Whether that was done; it is tried again but for want of room."""
    try:
        await call.asked(what, "POST", path, body)
    except Refused as e:
        store.full += e.code == FULL
        return e.code == "collection_exists"
    return True


def missing(folder: Path, store: Store) -> list[str]:
    """Acknowledged passages that are not there."""
    if not store.acknowledged:
        return []
    rows = Collections(folder, MiniLm()).open(NAME).rows
    return sorted(store.acknowledged - {row.id for row in rows})
