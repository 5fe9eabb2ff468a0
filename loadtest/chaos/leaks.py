"""What is left of a run when all faults are undone and all clients have gone."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
import psutil
from redis.asyncio import Redis

from loadtest.chaos.bed import Bed, Node

CLOSED_S = 30.0
"""Gateways close connections that are idle so long."""
SPARE_S = 15.0
SPARE_FILES, SPARE_TASKS = 16, 4
"""Questions to engines keep up to eight connections to each in use; their tasks come and go."""
TRACEBACK = re.compile(r"^Traceback[^\n]*\n(?:[ \t][^\n]*\n)*([^\n]*)", re.MULTILINE)
"""Its last line is the group."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the processes hold, by name."""

    streams: Mapping[str, int]
    """Open at each gateway."""
    blocks: Mapping[str, int]
    """Of KV, that requests and open prompts of each engine have."""
    prompts: Mapping[str, int]
    """Open at each engine."""
    files: Mapping[str, int]
    """Descriptors of gateways and engines, without the connections to Redis."""
    redis: Mapping[str, int]
    """Each gateway's connections to Redis: a pool, of 16 at most for each purpose."""
    tasks: Mapping[str, int]
    """Of each gateway."""


async def held(bed: Bed) -> Held:
    """What is held now."""
    async with aiohttp.ClientSession() as http:
        metrics = {node.name: await _metrics(http, node) for node in bed.gateways}
        engines = {node.name: await _info(http, node) for node in bed.engines}
    redis_ports = {link.port for link in bed.links if link.name.endswith("to redis")}
    pools = {node.name: _connections(node, redis_ports) for node in bed.gateways}
    return Held(
        streams={name: int(m["stream2llm_open_streams"]) for name, m in metrics.items()},
        blocks={n: e["kv_blocks_total"] - e["kv_blocks_free"] for n, e in engines.items()},
        prompts={
            name: e["open_prompts"] + e["running"] + e["waiting"] for name, e in engines.items()
        },
        files={
            node.name: psutil.Process(node.pid).num_fds() - pools.get(node.name, 0)
            for node in (*bed.gateways, *bed.engines)
        },
        redis=pools,
        tasks={name: int(m["stream2llm_tasks"]) for name, m in metrics.items()},
    )


async def settled(bed: Bed, before: Held) -> tuple[Held, float]:
    """What is held when nothing is left, or at the end of the time for that; and how long it
    took."""
    begun_s = time.monotonic()
    while True:
        now, took_s = await held(bed), time.monotonic() - begun_s
        # Idle streams end, then engines' leases run out.
        if not leaked(before, now) or took_s > 2 * bed.lease_s + CLOSED_S:
            return now, took_s
        await asyncio.sleep(0.5)


def leaked(before: Held, now: Held) -> list[str]:
    """What is held that should not be, in words."""
    found = [
        f"{name} holds {count} {what}"
        for what, counts in (
            ("open streams", now.streams),
            ("KV blocks", now.blocks),
            ("open prompts", now.prompts),
        )
        for name, count in counts.items()
        if count
    ]
    for what, was, counts, spare in (
        ("file descriptors", before.files, now.files, SPARE_FILES),
        ("tasks", before.tasks, now.tasks, SPARE_TASKS),
    ):
        found += [
            f"{name} has {count} {what}, {was[name]} at the beginning"
            for name, count in counts.items()
            if count > was[name] + spare
        ]
    return found


async def keys_left(bed: Bed) -> tuple[list[str], float]:
    """What Redis still has when the last leases have run out, and how long that took. The gateways
    are to be stopped first."""
    begun_s = time.monotonic()
    async with Redis(port=bed.redis.server.port, decode_responses=True) as client:
        while True:
            keys: list[str] = await client.keys("*")  # type: ignore[assignment]
            took_s = time.monotonic() - begun_s
            if not keys or took_s > bed.lease_s + SPARE_S:
                return sorted(keys), took_s
            await asyncio.sleep(0.5)


def exceptions(bed: Bed) -> list[str]:
    """The last lines of every traceback in the logs of gateways and engines."""
    found = []
    for node in (*bed.gateways, *bed.engines):
        text = node.server.log_path.read_text(errors="replace")
        found += [f"{node.name}: {line}" for line in TRACEBACK.findall(text)]
    return found


async def _metrics(http: aiohttp.ClientSession, node: Node) -> dict[str, float]:
    async with http.get(f"{node.server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")
    }


async def _info(http: aiohttp.ClientSession, node: Node) -> dict[str, int]:
    async with http.get(f"{node.server.url}/stream2llm/info") as response:
        info: dict[str, int] = await response.json()
        return info


def _connections(node: Node, ports: set[int]) -> int:
    """How many lead to one of these ports."""
    found = psutil.Process(node.pid).net_connections("tcp")
    return sum(1 for one in found if one.raddr and one.raddr.port in ports)
