"""An OpenAI-compatible server over HTTP: what it is, how busy it is, completions.

Written for stock vLLM; other servers are taken as far as they answer alike. What a server must have
is found out by asking, not by its name.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec

from engine_adapter.client import MAX_EVENT_BYTES, answered, translated
from engine_adapter.completions import Completion, Json, read, refused, warming
from engine_adapter.errors import BadOperation, EngineUnavailable

COMPLETIONS = "/v1/completions"
WARMING_TIMEOUT_S = 150.0
LOAD_TIMEOUT_S = 5.0
"""For a route that says how the server is, unless the caller has a deadline."""
NO_SUCH_ROUTE = (404, 405, 501)
"""The last is llama.cpp's for metrics that were not asked for at its start."""
PROBE = [10, 11, 12, 13]
"""Token ids that every vocabulary has."""

METRICS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "use",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:cache_config_info": "config",
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
    "process_start_time_seconds": "started",
}
SAMPLE = re.compile(rf"^({'|'.join(METRICS)})(?:\{{(.*)\}})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Identity:
    """What does not change while a server runs."""

    engine: str
    """Name and version, as far as it says."""
    model: str
    max_model_len: int
    """Tokens of prompt and answer together."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a server is. What it does not say is 0, but for these two."""

    started_s: float | None = None
    """When its process was started; None if it does not say."""
    caching: bool = True
    """False if it says that it has no prefix cache."""
    running: int = 0
    waiting: int = 0
    """Requests of which nothing is computed yet."""
    preemptions: int = 0
    block_size: int = 0
    """Tokens in one KV block."""
    kv_blocks: int = 0
    kv_use: float = 0.0
    """Share of the blocks that requests hold."""


def load_of(metrics: str) -> Load:
    """The load as a server's metrics tell it; of several data-parallel engines together."""
    values: dict[str, list[float]] = {}
    config: dict[str, str] = {}
    for name, labels, value in SAMPLE.findall(metrics):
        values.setdefault(METRICS[name], []).append(float(value))
        if METRICS[name] == "config":
            config = dict(LABEL.findall(labels))
    use = values.get("use", [0.0])
    return Load(
        started_s=next(iter(values.get("started", ())), None),
        caching=config.get("enable_prefix_caching") != "False",
        running=round(sum(values.get("running", ()))),
        waiting=round(sum(values.get("waiting", ()))),
        preemptions=round(sum(values.get("preemptions", ()))),
        block_size=_count(config.get("block_size")),
        kv_blocks=_count(config.get("num_gpu_blocks")) * len(use),
        kv_use=sum(use) / len(use),
    )


def _count(value: str | None) -> int:
    return int(value) if value is not None and value.isdecimal() else 0


class _Card(msgspec.Struct):
    id: str
    owned_by: str = ""
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Version(msgspec.Struct):
    version: str = ""


M = TypeVar("M")


class Reading:
    """A streamed completion that is being read."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Its lines.

        Raises:
            EngineUnavailable: it broke off.
        """
        async with translated():
            async for line in self._response.content:
                yield line

    def close(self) -> None:
        """Break it off, which aborts it, also while somebody waits for a line."""
        self._response.close()


class _Props(msgspec.Struct):
    """Of llama.cpp's server."""

    default_generation_settings: dict[str, Any]


class PlainServer:
    """One server. Shares a session that the caller owns. Every method raises an `EngineError`."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._load = Load()
        self._read_s = -float("inf")
        self._reading = asyncio.Lock()

    async def identify(self, *, timeout_s: float = LOAD_TIMEOUT_S) -> Identity:
        """What the server is.

        Args:
            timeout_s: longest wait for each of its answers.

        Raises:
            EngineUnavailable: it can't be reached, or lacks what warming needs. Says what.
        """
        cards = await self._get(_Cards, "/v1/models", timeout_s)
        if not cards.data:
            raise EngineUnavailable(f"{self.url} serves no model")
        card = cards.data[0]
        max_model_len = card.max_model_len or await self._context_tokens(timeout_s)
        await self._probe(card.id)
        try:
            version = (await self._get(_Version, "/version", timeout_s)).version
        except EngineUnavailable:
            version = ""
        name = f"{card.owned_by or 'unknown'} {version} without the plug-in"
        return Identity(" ".join(name.split()), card.id, max_model_len)

    async def _context_tokens(self, timeout_s: float) -> int:
        """Tokens of prompt and answer together, where the list of models does not say."""
        try:
            props = await self._get(_Props, "/props", timeout_s)
            return int(props.default_generation_settings["n_ctx"])
        except (EngineUnavailable, KeyError, TypeError, ValueError) as e:
            raise EngineUnavailable(
                f"{self.url} can't be used: it does not say how many tokens prompt and answer may "
                "have together, as max_model_len in /v1/models or n_ctx in /props"
            ) from e

    async def _probe(self, model: str) -> None:
        """Make sure that the server takes a prompt as token ids, and as no other ones."""
        needs = f"{self.url} can't be used: its {COMPLETIONS} does not take a prompt of token ids"
        try:
            completion = await self.complete(warming(model, PROBE, None))
        except BadOperation as e:
            raise EngineUnavailable(f"{needs}: {e}") from e
        if completion.usage is None or completion.usage.prompt_tokens != len(PROBE):
            raise EngineUnavailable(f"{needs} as it is: it does not count {len(PROBE)} tokens")

    async def load(self, *, at_most_s: float = 0.0, timeout_s: float = LOAD_TIMEOUT_S) -> Load:
        """How busy it is.

        Args:
            at_most_s: the answer may be so old.
            timeout_s: longest wait for it.
        """
        async with self._reading:
            if time.monotonic() - self._read_s > at_most_s:
                metrics = await self._text("/metrics", timeout_s)
                self._load = load_of(metrics.decode(errors="replace"))
                self._read_s = time.monotonic()
            return self._load

    async def healthy(self, *, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Returns if the server is able to answer, as far as it says."""
        await self._text("/health", timeout_s)

    async def complete(self, body: Json) -> Completion:
        """A completion that is not streamed. Cancelling it aborts it."""
        async with self._post(body, WARMING_TIMEOUT_S) as response:
            completion: Completion = read(Completion, await response.read())
            return completion

    @asynccontextmanager
    async def stream(self, body: Json) -> AsyncIterator[Reading]:
        """A completion that is streamed. Leaving the block aborts it."""
        async with self._post(body, None) as response:
            yield Reading(response)

    @asynccontextmanager
    async def _post(
        self, body: Json, total_s: float | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        async with (
            translated(),
            answered(
                self._session,
                "POST",
                self.url + COMPLETIONS,
                data=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=total_s, connect=5.0),
                read_bufsize=MAX_EVENT_BYTES,
            ) as response,
        ):
            if response.status != 200:
                raise refused(response.status, await response.read())
            yield response

    async def _get(self, kind: type[M], path: str, timeout_s: float) -> M:
        return read(kind, await self._text(path, timeout_s))

    async def _text(self, path: str, timeout_s: float) -> bytes:
        """The body of a route, empty where there is no such route."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, connect=2.0)
        async with (
            translated(),
            self._session.get(self.url + path, timeout=timeout) as response,
        ):
            body = await response.read()
            if response.status in NO_SUCH_ROUTE:
                return b""
            if response.status != 200:
                raise refused(response.status, body)
            return body
