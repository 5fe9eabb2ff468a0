"""Faults: what is done to a bed and undone again, by a schedule that a seed repeats."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from loadtest.chaos.bed import Bed, Node
from loadtest.chaos.links import Link

CLOCK_JUMPS_S = (-86_400, -3600, -60, 60, 3600, 86_400)
FILLER = "filler"
AHEAD = 12


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault of a schedule."""

    at_s: float
    """Since the beginning."""
    name: str
    target: str
    lasts_s: float
    draw: float
    """Decides what else there is to decide, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of faults."""

    name: str
    weight: float
    """How often, against the others."""
    targets: Callable[[Bed], Sequence[str]]
    lasts_s: tuple[float, float]
    act: Callable[[Bed, Planned], AbstractAsyncContextManager[None]]
    """Does it on entry and undoes it on leaving."""


@dataclass(frozen=True, slots=True)
class Done:
    """A fault that was."""

    planned: Planned
    began_s: float
    ended_s: float

    def line(self) -> str:
        """For the log."""
        planned = self.planned
        return (
            f"{self.began_s:7.1f} s  {planned.name:<14} {planned.target:<24} "
            f"{self.ended_s - self.began_s:5.1f} s"
        )


@asynccontextmanager
async def _kill(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    node = _node(bed, planned)
    await node.kill()
    yield
    await node.start()


@asynccontextmanager
async def _terminate(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    node = _node(bed, planned)
    await node.terminate()
    yield
    await node.start()


@asynccontextmanager
async def _stop(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    node = _node(bed, planned)
    node.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        node.signal(signal.SIGCONT)


@asynccontextmanager
async def _jump(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    node = _node(bed, planned)
    node.set_clock(CLOCK_JUMPS_S[int(planned.draw * len(CLOCK_JUMPS_S))])
    try:
        yield
    finally:
        node.set_clock(0)


@asynccontextmanager
async def _slow(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    link = _link(bed, planned)
    link.delay_s = 0.05 + 0.45 * planned.draw
    try:
        yield
    finally:
        link.delay_s = 0.0


@asynccontextmanager
async def _trickle(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    link = _link(bed, planned)
    link.trickles = True
    try:
        yield
    finally:
        link.trickles = False


@asynccontextmanager
async def _cut(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    _link(bed, planned).cut()
    yield


@asynccontextmanager
async def _swallow(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    link = _link(bed, planned)
    link.swallow()
    try:
        yield
    finally:
        link.release(cut=planned.draw < 0.5)


@asynccontextmanager
async def _full_redis(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    async with _told(bed) as told:
        await told("CONFIG", "SET", "maxmemory-policy", "noeviction")
        await told("CONFIG", "SET", "maxmemory", "1")
        try:
            yield
        finally:
            await told("CONFIG", "SET", "maxmemory", "0")


@asynccontextmanager
async def _read_only_redis(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    """A replica of a server that is not there takes no writes."""
    async with _told(bed) as told:
        await told("REPLICAOF", "127.0.0.1", "1")
        try:
            yield
        finally:
            await told("REPLICAOF", "NO", "ONE")


@asynccontextmanager
async def _forget(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    async with _told(bed) as told:
        await told("FLUSHALL")
    yield


@asynccontextmanager
async def _fill(bed: Bed, planned: Planned) -> AsyncIterator[None]:
    assert bed.disk is not None
    filler = bed.disk / FILLER
    with suppress(OSError), filler.open("wb", buffering=0) as file:  # ends when there is no room
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def _links(bed: Bed) -> Sequence[str]:
    return [link.name for link in bed.links]


def _gateways(bed: Bed) -> Sequence[str]:
    return [node.name for node in bed.gateways]


def _engines(bed: Bed) -> Sequence[str]:
    return [node.name for node in bed.engines]


def _clocks(bed: Bed) -> Sequence[str]:
    return [node.name for node in bed.nodes if node.clock is not None]


def _redis(bed: Bed) -> Sequence[str]:
    return [bed.redis.name]


def _disk(bed: Bed) -> Sequence[str]:
    return [] if bed.disk is None else ["disk"]


KINDS = (
    Kind("kill", 3, _gateways, (0.2, 2.0), _kill),
    Kind("kill engine", 1.5, _engines, (0.2, 2.0), _kill),
    Kind("terminate", 1, _gateways, (0.2, 1.0), _terminate),
    Kind("stop", 4, lambda bed: [node.name for node in bed.nodes], (0.5, 6.0), _stop),
    Kind("clock jump", 4, _clocks, (1.5, 5.0), _jump),
    Kind("slow link", 4, _links, (1.0, 5.0), _slow),
    Kind("trickle", 2, _links, (1.0, 4.0), _trickle),
    Kind("cut link", 6, _links, (0.0, 0.1), _cut),
    Kind("silent link", 4, _links, (1.0, 6.0), _swallow),
    Kind("restart redis", 0.8, _redis, (0.1, 3.0), _kill),
    Kind("full redis", 0.8, _redis, (1.0, 5.0), _full_redis),
    Kind("read-only redis", 0.8, _redis, (1.0, 5.0), _read_only_redis),
    Kind("lost data", 0.5, _redis, (0.0, 0.1), _forget),
    Kind("full disk", 2, _disk, (1.0, 5.0), _fill),
)


def schedule(bed: Bed, seed: int, count: int, within_s: float) -> list[Planned]:
    """So many faults, evenly likely at any moment; the same ones for the same seed and machine.

    Every kind that can be had here comes at least once if there are enough of them.
    """
    rng = random.Random(f"faults {seed}")
    possible = [kind for kind in KINDS if kind.targets(bed)]
    kinds = possible[:count] + rng.choices(
        possible, [kind.weight for kind in possible], k=max(count - len(possible), 0)
    )
    rng.shuffle(kinds)
    times = sorted(rng.uniform(0, within_s) for _ in kinds)
    return [
        Planned(
            at_s,
            kind.name,
            rng.choice(list(kind.targets(bed))),
            rng.uniform(*kind.lasts_s),
            rng.random(),
        )
        for at_s, kind in zip(times, kinds, strict=True)
    ]


class Faults:
    """Carries out a schedule. What is done to a link comes one after the other, and what is done to
    gateways, to engines, or to Redis: there is always another gateway and another engine."""

    def __init__(self, bed: Bed, planned: Sequence[Planned], told: Callable[[Done], None]) -> None:
        """
        Args:
            told: called with each fault that was undone.
        """
        self.done: list[Done] = []
        self._bed = bed
        self._planned = planned
        self._told = told
        self._kinds = {kind.name: kind for kind in KINDS}
        self._locks: dict[str, asyncio.Lock] = {}

    def behind(self, share: float) -> bool:
        """Whether far fewer than this share of the faults are undone: on a slow machine what is
        killed takes long to start again."""
        return len(self.done) + AHEAD < share * len(self._planned)

    async def run(self) -> None:
        """All of them, until the last one is undone."""
        begun_s = time.monotonic()
        async with asyncio.TaskGroup() as running:
            for one in self._planned:
                await asyncio.sleep(begun_s + one.at_s - time.monotonic())
                running.create_task(self._carry_out(one, begun_s))

    async def _carry_out(self, planned: Planned, begun_s: float) -> None:
        lock = self._locks.setdefault(self._bed.group(planned.target), asyncio.Lock())
        async with lock:
            began_s = time.monotonic() - begun_s
            async with self._kinds[planned.name].act(self._bed, planned):
                await asyncio.sleep(planned.lasts_s)
            done = Done(planned, began_s, time.monotonic() - begun_s)
        self.done.append(done)
        self._told(done)


def _node(bed: Bed, planned: Planned) -> Node:
    return next(node for node in bed.nodes if node.name == planned.target)


def _link(bed: Bed, planned: Planned) -> Link:
    return next(link for link in bed.links if link.name == planned.target)


@asynccontextmanager
async def _told(bed: Bed) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Gives Redis commands, directly."""
    async with Redis(port=bed.redis.server.port, socket_timeout=5.0) as client:
        yield client.execute_command
