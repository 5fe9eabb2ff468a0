"""What the application carries for its handlers."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from gateway.accounts import Accounts
from gateway.keeper import Keeper
from gateway.lifecycle import Lifecycle
from gateway.placement import Engines
from gateway.prompt import PromptBuilder
from gateway.readiness import Tokenizers
from gateway.reloading import Reloader
from gateway.retrieving import Retrievals
from gateway.settings import Current
from gateway.streams import Streams
from gateway.telemetry import Metrics
from gateway.tenants import Tenants
from retrieval.collections.store import Collections

if TYPE_CHECKING:
    from gateway.limits import Load

SETTINGS = web.AppKey("settings", Current)
METRICS = web.AppKey("metrics", Metrics)
ACCOUNTS = web.AppKey("accounts", Accounts)
TENANTS = web.AppKey("tenants", Tenants)
SESSION = web.AppKey("session", aiohttp.ClientSession)
STREAMS = web.AppKey("streams", Streams)
ENGINES = web.AppKey("engines", Engines)
LOAD: web.AppKey[Load] = web.AppKey("load")
EXECUTOR = web.AppKey("executor", Executor)
"""Where tokenizing runs."""
BUILDERS = web.AppKey("builders", dict[str, asyncio.Future[PromptBuilder]])
"""Prompt builders by model name, made when a model is first asked for."""
COLLECTIONS = web.AppKey("collections", Collections)
"""Only where a folder of collections is set."""
RETRIEVALS = web.AppKey("retrievals", Retrievals)
KEEPER = web.AppKey("keeper", Keeper)
LIFECYCLE = web.AppKey("lifecycle", Lifecycle)
RELOADER = web.AppKey("reloader", Reloader)
TOKENIZERS = web.AppKey("tokenizers", Tokenizers)
MAKING = web.AppKey("making", set[str])
"""Ids of streams that are being made under an idempotency key."""
TELLING = web.AppKey("telling", set[asyncio.Task[None]])
"""Holders that are being told of clients that hung up."""
TAKING_OVER = web.AppKey("taking_over", dict[str, asyncio.Task[None]])
"""Streams that this replica is about to hold."""
