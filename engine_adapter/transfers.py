"""What moving KV to host memory and back takes, read from vLLM's own counters.

vLLM's OffloadingConnector copies what is computed to host memory and loads it again for a prompt
that the GPU's prefix cache has lost. It counts bytes and seconds of both directions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import orjson
from prometheus_client.parser import text_string_to_metric_families

from engine_adapter.errors import EngineUnavailable

COUNTERS = {
    "stored_bytes": "vllm:kv_offload_store_bytes",
    "stored_s": "vllm:kv_offload_store_time",
    "loaded_bytes": "vllm:kv_offload_load_bytes",
    "loaded_s": "vllm:kv_offload_load_time",
}

SETTLE_S = 1.0
"""Transfers go on behind the answers: they have ended when the counters rest for this long."""
DEADLINE_S = 60.0
POLL_S = 0.1

NO_RESET = (
    "swapping in can't be measured: this engine has no /reset_prefix_cache; "
    "start it with VLLM_SERVER_DEV_MODE=1"
)


class TransfersNotMeasured(Exception):
    """The engine swaps, but what that takes can't be told; says why."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the engine's start, over all its workers."""

    stored_bytes: float
    stored_s: float
    loaded_bytes: float
    loaded_s: float


def read_counters(metrics: str) -> Counters | None:
    """The counters in a Prometheus text; None if the engine has none of them: it does not swap."""
    families = {family.name: family.samples for family in text_string_to_metric_families(metrics)}
    if not families.keys() & set(COUNTERS.values()):
        return None
    return Counters(
        **{
            field: sum(s.value for s in families.get(name, ()) if s.name == f"{name}_total")
            for field, name in COUNTERS.items()
        }
    )


class Transfers:
    """The transfers of one engine, which nobody else may use meanwhile."""

    def __init__(self, session: aiohttp.ClientSession, url: str, accelerators: int) -> None:
        """
        Args:
            accelerators: how many devices move their share of the KV at the same time.
        """
        self._session = session
        self._url = url.rstrip("/")
        self._accelerators = accelerators

    async def counters(self) -> Counters | None:
        """The engine's counters now; None if it does not swap."""
        status, body = await self._ask("GET", "/metrics")
        return read_counters(body.decode()) if status == 200 else None

    async def seconds(self, prefill: Callable[[], Awaitable[object]]) -> tuple[float, float]:
        """Seconds that the KV of a prompt takes to host memory, and back.

        Args:
            prefill: computes the prompt, the same each time, which the engine does not know yet.

        Raises:
            TransfersNotMeasured: nothing was moved, or the engine can't forget what it computed.
        """
        before = await self._settled()
        await prefill()
        stored = await self._settled()
        await self._forget()
        await prefill()
        loaded = await self._settled()
        out_bytes = stored.stored_bytes - before.stored_bytes
        in_bytes = loaded.loaded_bytes - stored.loaded_bytes
        out_s, in_s = stored.stored_s - before.stored_s, loaded.loaded_s - stored.loaded_s
        moved = out_s > 0 and in_s > 0
        if not moved or in_bytes < out_bytes / 2:  # a last block may stay away
            raise TransfersNotMeasured(
                f"{out_bytes:.0f} bytes went to host memory and {in_bytes:.0f} came back; "
                "is it too small for the prompt?"
            )
        return out_s / self._accelerators, in_s / self._accelerators

    async def _settled(self) -> Counters:
        """The counters once they rest."""
        deadline_s = time.monotonic() + DEADLINE_S
        last, since_s = await self.counters(), time.monotonic()
        while time.monotonic() - since_s < SETTLE_S or last is None:
            if time.monotonic() > deadline_s:
                raise TransfersNotMeasured(f"the counters still change after {DEADLINE_S:g} s")
            await asyncio.sleep(POLL_S)
            if (now := await self.counters()) != last:
                last, since_s = now, time.monotonic()
        return last

    async def _forget(self) -> None:
        """Drop the prefix cache of the GPU, not that of host memory."""
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s:
            status, body = await self._ask("POST", "/reset_prefix_cache")
            if status != 200:
                raise TransfersNotMeasured(NO_RESET)
            if orjson.loads(body)["success"]:
                return
            await asyncio.sleep(POLL_S)  # blocks are held, perhaps by a transfer
        raise TransfersNotMeasured("the engine does not give up its prefix cache")

    async def _ask(self, method: str, path: str) -> tuple[int, bytes]:
        try:
            async with self._session.request(method, self._url + path) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as e:
            raise EngineUnavailable(f"the engine can't be reached or broke off: {e!r}") from e
