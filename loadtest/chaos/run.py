"""One chaos run: a bed, its faults, its clients, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from deploy.model import model_dir
from loadtest.chaos import leaks
from loadtest.chaos.bed import Bed, bed
from loadtest.chaos.clients import Player, histories
from loadtest.chaos.faults import Done, Faults, schedule
from loadtest.chaos.history import TRY_AGAIN, WANT_ANSWERS, History
from loadtest.chaos.leaks import Held
from loadtest.chaos.promises import Tokens, check
from loadtest.chaos.store import Store, keep_adding, missing

STREAM_S = 400.0
"""Longer than the patience of any client with all its requests together."""
SETTLE_S, LOOK_S, TICK_S = 2.0, 0.1, 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run consists of."""

    seed: int
    streams: int
    faults: int
    within_s: float
    """Streams and faults begin in this time."""
    collections: bool
    lease_s: float = 20.0
    """See `Bed`; it decides how long the end of a run takes."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    histories: Sequence[History]
    faults: Sequence[Done]
    store: Store
    broken: Sequence[str]
    """Promises, in words."""
    leaks: Sequence[str]
    hung: Sequence[str]
    exceptions: Sequence[str]
    before: Held
    after: Held
    quiet_s: float
    """Until nothing was held any more."""
    forgotten_s: float
    """Until Redis had nothing any more, the gateways being stopped."""
    took_s: float
    late_s: Sequence[float]
    """By how much this process, with its clients and links, was late ten times a second: on a
    machine that is too busy for all of this the processes are slow without a fault."""

    @property
    def failed(self) -> bool:
        return bool(self.broken or self.leaks or self.hung or self.exceptions)

    def answered(self, *, again: bool) -> tuple[int, int]:
        """How many of those that wanted an answer got it.

        Args:
            again: of those that try again, or of the others.
        """
        wanted = [h for h in self.histories
                  if h.kind in WANT_ANSWERS and (h.kind in TRY_AGAIN) == again]  # fmt: skip
        return sum(h.complete for h in wanted), len(wanted)

    @property
    def outcomes(self) -> Counter[str]:
        """How requests ended."""
        return Counter(r.outcome for h in self.histories for r in h.requests)


async def run(plan: Plan, folder: Path, say: Callable[[str], None]) -> Result:
    """Carry out a plan.

    Args:
        folder: an empty one, for logs and collections.
        say: told each fault, and how it goes on.
    """
    tokens = await asyncio.to_thread(Tokens, str(model_dir()))
    async with bed(folder, lease_s=plan.lease_s, collections=plan.collections) as made:
        await asyncio.sleep(SETTLE_S)
        before, begun_s = await leaks.held(made), time.monotonic()
        clients, store = histories(plan.seed, plan.streams), Store()
        planned = schedule(made, plan.seed, plan.faults, plan.within_s)
        faults = Faults(made, planned, lambda done: say(done.line()))
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        ) as http:
            late_s: list[float] = []
            beside = [
                asyncio.create_task(_store(http, made, plan, store)),
                asyncio.create_task(_note_lateness(late_s)),
            ]
            async with asyncio.TaskGroup() as running:
                running.create_task(faults.run())
                running.create_task(_play_all(http, made, plan, clients, faults))
            took_s = time.monotonic() - begun_s
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        say(f"{took_s:7.1f} s  all faults are undone, all clients have gone")
        after, quiet_s = await leaks.settled(made, before)
        found = leaks.leaked(before, after)
        lost = missing(folder / "disk", store)
        for gateway in made.gateways:
            await gateway.terminate()
        keys, forgotten_s = await leaks.keys_left(made)
        found += [f"Redis has {key}" for key in keys]
        exceptions = leaks.exceptions(made)
    everyone = [*clients, store.history]
    broken = check(everyone, tokens)
    broken += [f"passage {name} was acknowledged and is not there" for name in lost]
    hung = [
        f"{r.ended_s - begun_s:7.1f} s  stream {h.number} ({h.kind}): {r.what} had not ended after "
        f"{r.took_s:.1f} s at gateway {r.gateway}"
        for h in everyone
        for r in h.requests
        if r.outcome == "hung"
    ]
    return Result(
        clients, faults.done, store, broken, found, hung, exceptions, before, after, quiet_s,
        forgotten_s, took_s, late_s,
    )  # fmt: skip


async def _play_all(
    http: aiohttp.ClientSession,
    made: Bed,
    plan: Plan,
    clients: Sequence[History],
    faults: Faults,
) -> None:
    """Begin them one after the other, evenly, but not far ahead of the faults, and wait for all."""
    async with asyncio.TaskGroup() as playing:
        for history in clients:
            player = Player(http, made.fronts, history, plan.seed)
            playing.create_task(_play(player, history))
            await asyncio.sleep(plan.within_s / len(clients))
            while faults.behind(history.number / len(clients)):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)


async def _play(player: Player, history: History) -> None:
    try:
        async with asyncio.timeout(STREAM_S):
            await player.play()
    except TimeoutError:
        history.odd.append(f"its client was not done after {STREAM_S:g} s")


async def _note_lateness(late_s: list[float]) -> None:
    while True:
        begun_s = time.monotonic()
        await asyncio.sleep(TICK_S)
        late_s.append(time.monotonic() - begun_s - TICK_S)


async def _store(http: aiohttp.ClientSession, made: Bed, plan: Plan, store: Store) -> None:
    if plan.collections:
        await keep_adding(http, made.fronts[1], plan.seed, store)
