"""Gateways with tenants in front of an engine without a model, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from gateway import tenants
from gateway.app import build
from gateway.settings import Settings
from tests.fake_engine import MODEL, FakeEngine
from tests.retrieval.words import Words

MESSAGES = [
    {"role": "system", "content": "Read {{documents}} with care."},
    {"role": "user", "content": "Why?"},
]
BODY = {"model": MODEL, "messages": MESSAGES}


def tenants_file(path: Path, **parts: str) -> dict[str, str]:
    """Write a file of tenants, with these further lines for each; returns their keys."""
    keys, text = {}, ""
    for name, more in parts.items():
        keys[name], part = tenants.new(name)
        text += part + more + "\n"
    path.write_text(text)
    return keys


@dataclass
class Gateway:
    """One gateway, and clients that hold a key each."""

    app: web.Application
    url: str
    engine: FakeEngine

    def client(self, key: str | None) -> httpx.AsyncClient:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, trust_env=False, timeout=20)


@asynccontextmanager
async def gateway(
    model_dir: Path, file: Path | None, more: Sequence[tuple[Any, ...]] = (), **settings: Any
) -> AsyncIterator[Gateway]:
    """A gateway in front of an engine of its own."""
    engine = FakeEngine()
    app_of_engine = engine.app()
    app_of_engine.add_routes([web.route(*route) for route in more])
    async with TestServer(app_of_engine) as engine_server:
        port = unused_port()
        given = {"heartbeat_s": 0.1, "poll_s": 0.1, "index_timeout_s": 5.0, "port": port} | settings
        app = build(
            Settings(
                engine=(str(engine_server.make_url("")).rstrip("/"),),
                tokenizer=str(model_dir),
                tenants=None if file is None else str(file),
                **given,
            ),
            Words(),
        )
        async with TestServer(app, port=port) as server:
            yield Gateway(app, str(server.make_url("")).rstrip("/"), engine)


def events(text: str) -> list[tuple[int, str]]:
    """Number and data of each event; signs of life are left out."""
    blocks = [b.splitlines() for b in text.split("\n\n") if b.startswith("id: ")]
    return [(int(lines[0][4:]), lines[1]) for lines in blocks]
