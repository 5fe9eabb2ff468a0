"""All streams of one gateway: made, found, kept alive, forgotten."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any

from gateway.accounts import Account, Accounts
from gateway.crowd import Crowd
from gateway.engines import AnyEngine
from gateway.errors import GatewayError, Overloaded
from gateway.handoff import Rule
from gateway.keeper import Keeper, Moved
from gateway.line import Placer
from gateway.logs import bind
from gateway.prompt import Prompt
from gateway.record import Found, Ledger
from gateway.requests import Options
from gateway.resuming import KeptAnswer
from gateway.settings import Settings
from gateway.stream import Stream
from gateway.tasks import again_and_again, begin
from gateway.telemetry import Metrics
from gateway.tenants import Tenant

logger = logging.getLogger(__name__)

SWEEP_S = 0.5
AT_ONCE = 64
"""Records that are written side by side, and engines' prompts that are looked at."""


class Streams:
    """The streams by id, and the task that looks after the silent ones."""

    def __init__(
        self, settings: Settings, keeper: Keeper, metrics: Metrics, accounts: Accounts
    ) -> None:
        self._settings = settings
        self._keeper = keeper
        self._metrics = metrics
        self._accounts = accounts
        self.answers: dict[str, KeptAnswer] = {}
        """Those that can be read again, by stream."""
        self._streams: dict[str, Stream] = {}
        self._alive = 0
        self._alive_of: Counter[str] = Counter()
        self._crowds: dict[str, Crowd] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._renewing, self._looking = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)
        metrics.live.count = lambda: Counter(s.state for s in self._streams.values())

    def use(self, settings: Settings) -> None:
        """Go by these settings from now on."""
        self._settings = settings

    async def start(self) -> None:
        """Begin to look after the streams."""
        self._metrics.tasks.set_function(lambda: len(asyncio.all_tasks()))
        self._sweeper = asyncio.create_task(
            again_and_again(self._sweep, lambda: SWEEP_S, "looking after the streams")
        )

    async def stop(self) -> None:
        """End all tasks. Streams that no other replica can go on with are cancelled."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        for answer in self.answers.values():
            answer.stop()
        streams = list(self._streams.values())
        if self._settings.index is None:
            await asyncio.gather(*(stream.close() for stream in streams))
        else:
            await asyncio.gather(*(stream.leave() for stream in streams))
        await asyncio.gather(*self._work, return_exceptions=True)

    async def cut_off(self, reason: GatewayError) -> None:
        """The gateway ends: so do the answers under way. Other replicas, if there are any, can be
        asked for them."""
        shared = self._settings.index is not None
        answered = [s for s in self._streams.values() if s.state == "finishing"]
        for some in _batches(answered):
            await asyncio.gather(*(stream.cut_off(reason, shared=shared) for stream in some))

    def create(
        self,
        tenant: Tenant,
        model: str,
        prompt: Prompt,
        placer: Placer,
        options: Options,
        *,
        kept: bool,
        stream_id: str | None = None,
    ) -> Stream:
        """A new stream, not begun yet.

        Args:
            kept: other replicas can go on with it.
            stream_id: if the caller has chosen one that is free.

        Raises:
            Overloaded, RateLimited
        """
        self.check_room()
        self._accounts.of(tenant).check_streams()
        stream_id = stream_id or f"st-{uuid.uuid4().hex}"
        return self._add(stream_id, tenant, model, prompt, placer, options, kept=kept)

    def check_room(self) -> None:
        """Whether one more stream may be opened.

        Raises:
            Overloaded
        """
        if self._alive >= self._settings.max_streams:
            raise Overloaded(f"{self._alive} streams are open")

    def check_crowd(self, model: str, account: Account) -> None:
        """Whether the engines of a model can do with one more stream of a tenant.

        Raises:
            Overloaded
        """
        crowd = self._crowd(model)
        try:
            share = self._accounts.share(account)
            crowd.check(self._alive_of[model], account.streams, share)
        finally:
            self._metrics.stream_bound.labels(model).set(crowd.bound)

    def _crowd(self, model: str) -> Crowd:
        return self._crowds.setdefault(model, Crowd())

    def adopt(
        self,
        stream_id: str,
        tenant: Tenant,
        found: Found,
        prompt: Prompt,
        placer: Placer,
        ledger: Ledger,
    ) -> Stream:
        """A stream that another replica held, not begun yet."""
        about = found.about
        stream = self._add(stream_id, tenant, about.model, prompt, placer, about.options, kept=True)
        stream.asked = about.asked
        stream.resume(found.taken, about.created_s, ledger)
        return stream

    def _add(
        self,
        stream_id: str,
        tenant: Tenant,
        model: str,
        prompt: Prompt,
        placer: Placer,
        options: Options,
        *,
        kept: bool,
    ) -> Stream:
        account = self._accounts.of(tenant)
        stream = Stream(
            stream_id,
            account,
            model,
            prompt,
            options=options,
            lease_s=self._settings.lease_s,
            placer=placer,
            keeper=self._keeper if kept else None,
            rule=self._rule(),
            metrics=self._metrics,
            crowd=self._crowd(model),
            ended=self._ended,
            moved=self._moved,
        )
        bind(stream_id=stream_id)
        self._streams[stream_id] = stream
        self._alive += 1
        self._alive_of[model] += 1
        account.streams += 1
        self._metrics.open_streams.set(self._alive)
        return stream

    async def unmake(self, stream: Stream) -> None:
        """A creation under an idempotency key failed: leave nothing that the key could find."""
        await stream.close()
        if stream.state != "moved":
            await self._keeper.forget(stream.id, stream.books.ledger)
            self._moved(stream)

    def _rule(self) -> Rule:
        now = self._settings
        return Rule(now.handoff_min_tokens, now.handoff_idle_tokens, now.handoff_timeout_s)

    def find(self, stream_id: str) -> Stream | None:
        """The stream of an id, if this replica holds it."""
        return self._streams.get(stream_id)

    def alive(self, model: str) -> int:
        """Streams of a model that have not ended."""
        return self._alive_of[model]

    @property
    def movable(self) -> list[Stream]:
        """Those that another replica can go on with, as they are now."""
        if self._settings.index is None:
            return []
        return [stream for stream in self._streams.values() if stream.movable]

    @property
    def bound(self) -> int:
        """How many can only end here."""
        return self._alive - len(self.movable)

    def counts(self) -> dict[str, Any]:
        """How many there are, by what operators ask for."""
        alive = [stream for stream in self._streams.values() if not stream.ended]
        engines = Counter(s.line.engine.url for s in alive if s.line.engine is not None)
        return {
            "streams": self._alive,
            "by_state": Counter(stream.state for stream in alive),
            "by_model": Counter(stream.model for stream in alive),
            "by_engine": engines,
        }

    def engine_lost(self, engine: AnyEngine) -> None:
        """Streams of an engine that is gone go on elsewhere, or fail."""
        for stream in list(self._streams.values()):
            stream.engine_lost(engine)

    def leave(self, engine: AnyEngine, answered_too: bool) -> None:
        """Streams of an engine that is to get no more go on elsewhere, as if it were gone. Those
        whose input is closed stay, or have to go too."""
        for stream in list(self._streams.values()):
            if answered_too or stream.state == "open":
                stream.engine_lost(engine)

    async def keep_again(self) -> None:
        """Write every record anew."""
        for some in _batches(list(self._streams.values())):
            await asyncio.gather(*(stream.keep_again() for stream in some))

    def _ended(self, stream: Stream) -> None:
        self._alive -= 1
        self._alive_of[stream.model] -= 1
        stream.account.streams -= 1
        self._metrics.open_streams.set(self._alive)
        if stream.retrieval is not None:
            stream.retrieval.cancel()

    def _moved(self, stream: Stream) -> None:
        if self._streams.get(stream.id) is stream:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.id]
        self.answers.pop(stream.id, None)

    async def _sweep(self) -> None:
        for work in self._due(time.monotonic()):  # nobody waits: one may take long
            self._look_after(work)

    def _look_after(self, work: Coroutine[Any, Any, None]) -> None:
        task = begin(work, "looking after a stream")
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _due(self, now_s: float) -> list[Coroutine[Any, Any, None]]:
        """What has to be done for silent streams now; forgets the long ended ones."""
        work, lease_s = list[Coroutine[Any, Any, None]](), self._settings.lease_s
        for stream in list(self._streams.values()):
            silent_s, limits = now_s - stream.touched_s, stream.limits
            idle_s = limits.idle_s or self._settings.idle_timeout_s
            life_s = limits.stream_s or self._settings.max_stream_s
            if stream.ended:
                if silent_s > self._settings.keep_finished_s:
                    self._forget(stream)
            elif now_s - stream.begun_s > life_s or (stream.state == "open" and silent_s > idle_s):
                work.append(self._expire(stream))
            elif now_s - stream.renewed_s > lease_s / 3 and now_s - stream.heard_of_s > lease_s / 3:
                stream.renewed_s = now_s
                work += [self._renew(stream), self._look(stream)]
        return work

    async def _expire(self, stream: Stream) -> None:
        with suppress(Moved):
            await stream.cancel("expired")

    async def _renew(self, stream: Stream) -> None:
        async with self._renewing:
            with suppress(Moved):
                await stream.keep(renew=True)

    async def _look(self, stream: Stream) -> None:
        async with self._looking:
            await stream.look()


def _batches(streams: list[Stream]) -> Iterator[list[Stream]]:
    return (streams[i : i + AT_ONCE] for i in range(0, len(streams), AT_ONCE))
