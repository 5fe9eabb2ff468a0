"""The engines behind this gateway: which there are, which answer, which are on their way out.

Each is asked for its info by a task of its own, in turn; what fails streams between two such
questions is noticed by `watching` and weighed by `health`. Engines come and go while the gateway
runs.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp

from engine_adapter.client import EngineClient
from engine_adapter.errors import EngineError, EngineUnavailable, WithoutPlugin
from engine_adapter.messages import EngineInfo
from engine_adapter.operations import Decoding
from engine_adapter.plain_client import PlainClient
from gateway.engines import AnyEngine, DecodeEngine, Engine, Member, Role
from gateway.errors import EngineFailed, EngineThere, NoSuchEngine
from gateway.pulse import Pulse
from gateway.settings import Settings
from gateway.tasks import again_and_again, begin
from gateway.telemetry import Metrics
from gateway.watching import WatchedDecoding, WatchedEngine

logger = logging.getLogger(__name__)

LOOK_S = 0.05
"""How often an engine that is drained is looked at."""
FIRST_ANSWERS_S = 2.0
"""How long the gateway waits for its engines before it listens; then it goes on waiting."""
PROGRESS_S = 5.0
"""How often the log says which engines have not answered yet."""
LATE_S = 10.0
"""An operation that failed in time may have failed because this process stood still so long ago."""
CUT_S = 5.0
"""How long streams that were told to leave may take."""


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What a pool tells of its engines."""

    lost: Callable[[AnyEngine], None]
    """It is gone or was restarted: its prompts no longer exist."""
    left: Callable[[AnyEngine, bool], None]
    """Its streams are to go on elsewhere, although it may still be there: those that are open, and
    if the flag is set those that are being answered too."""
    seen: Callable[[AnyEngine], None]
    """It was asked for its info. What it said is in `info`."""
    removed: Callable[[AnyEngine], None]
    """It is no longer of the pool."""


class Pool:
    """All engines, each watched by a task."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: Settings,
        metrics: Metrics,
        *,
        decoding: Callable[[aiohttp.ClientSession, str], Decoding] | None = None,
    ) -> None:
        """
        Args:
            decoding: makes the clients of decode engines; None where there can be none.
        """
        self._session = session
        self._settings = settings
        self._pulse = Pulse()
        self._decoding = decoding
        self._callbacks: Callbacks
        self._metrics = metrics
        self._members: dict[str, AnyEngine] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._draining: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, Role | None] = {}
        """Engines that are removed when they are drained, and the roles in which they come back."""
        self._reporting: asyncio.Task[None] | None = None
        for url, role in configured(settings).items():
            self._join(url, role)

    # What runs.

    async def start(self, callbacks: Callbacks) -> None:
        """Ask every engine, and keep asking. Those that have not answered soon are waited for in
        the background."""
        self._callbacks = callbacks
        self._pulse.start()
        first = [self._watch(engine) for engine in self.members]
        if first:
            await asyncio.wait(first, timeout=FIRST_ANSWERS_S)
        self._reporting = begin(self._report(), "the report of engines")

    async def stop(self) -> None:
        """End the tasks."""
        self._pulse.stop()
        tasks = [*self._watching.values(), *self._draining.values()]
        if self._reporting is not None:
            tasks.append(self._reporting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(engine.client.close() for engine in self.members))

    def use(self, settings: Settings) -> None:
        """Go by these settings from now on. Engines are added and removed one by one."""
        self._settings = settings

    def _watch(self, engine: AnyEngine) -> asyncio.Future[None]:
        """Returns what is done when it has been asked for the first time."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def look() -> None:
            try:
                await self.check(engine)
            finally:
                if not asked.done():
                    asked.set_result(None)

        watching = again_and_again(look, lambda: self._settings.poll_s, f"watching {engine.url}")
        self._watching[engine.url] = asyncio.create_task(watching)
        return asked

    async def _report(self) -> None:
        """Says in the log what the gateway waits for, until every engine has answered."""
        begun_s = time.monotonic()
        while away := [e for e in self.members if e.info is None]:
            for engine in away:
                waited_s, why = time.monotonic() - begun_s, engine.trouble or "no answer yet"
                logger.info("waiting for engine %s for %.0f s: %s", engine.url, waited_s, why)
            await asyncio.sleep(PROGRESS_S)
        logger.info("all %d engines answer", len(self._members))

    # Which there are.

    @property
    def members(self) -> list[AnyEngine]:
        """Every engine, of every role."""
        return list(self._members.values())

    @property
    def all(self) -> list[Engine]:
        """The engines that read prompts."""
        return [engine for engine in self.members if isinstance(engine, Engine)]

    @property
    def decoders(self) -> list[DecodeEngine]:
        """The engines that only decode."""
        return [engine for engine in self.members if isinstance(engine, DecodeEngine)]

    @property
    def ready(self) -> list[Engine]:
        """The engines that read prompts, and answer."""
        return [engine for engine in self.all if engine.info is not None]

    def by_url(self, url: str) -> Engine | None:
        """The engine at an address, if it is one of these."""
        engine = self._members.get(url)
        return engine if isinstance(engine, Engine) else None

    def by_id(self, engine_id: str) -> AnyEngine:
        """The engine that operators name so.

        Raises:
            NoSuchEngine
        """
        for engine in self.members:
            if engine_id in (engine.id, engine.url):
                return engine
        raise NoSuchEngine(f"there is no engine {engine_id!r}")

    @property
    def most_streams(self) -> int | None:
        """Streams and requests that one engine may have; None for any number."""
        return self._settings.engine_max_streams or None

    def has_room(self, engine: Member) -> bool:
        """Whether it has fewer than it may."""
        return self.most_streams is None or engine.load < self.most_streams

    def placed(self, engine: Member) -> None:
        """A stream or a request is about to go there."""
        engine.health = engine.health.given(time.monotonic())

    def add(self, url: str, role: Role) -> AnyEngine:
        """Take an engine in; it gets streams once it answers. One that is on its way out stays, or
        comes back if its role is another.

        Raises:
            EngineThere: it is in the pool already.
        """
        url = url.rstrip("/")
        there = self._members.get(url)
        if there is not None and there.role != role and url in self._leaving:
            self._leaving[url] = role
            return there
        if there is not None and (there.role != role or not there.draining):
            raise EngineThere(f"{url} is there, as {there.role!r}, {there.standing}")
        if there is not None:
            self.undrain(there)
            return there
        engine = self._join(url, role)
        logger.info("engine %s joins (%s)", url, role)
        self._watch(engine)
        return engine

    def _join(self, url: str, role: Role) -> AnyEngine:
        engine = self._members[url] = self._made(url, role)
        return engine

    def _made(self, url: str, role: Role) -> AnyEngine:
        def told(error: EngineUnavailable | None) -> None:
            self.told(engine, error)

        engine: AnyEngine
        if role == "decode":
            if self._decoding is None:
                raise EngineFailed("decode engines can't be had here")
            client = WatchedDecoding(
                self._decoding(self._session, url), told, lambda: self.placed(engine)
            )
            engine = DecodeEngine(url=url, role=role, client=client)
        else:
            make = EngineClient if role == "engine" else PlainClient
            watched = WatchedEngine(make(self._session, url), told)
            engine = Engine(url=url, role=role, client=watched)
        return engine

    # On their way out.

    def drain(self, engine: AnyEngine, *, remove: bool = False, then: Role | None = None) -> None:
        """Place no new streams there. Its streams have `drain_timeout_s` to end, then they go on
        elsewhere.

        Args:
            remove: take it out of the pool when nothing is left there; once said, a drain without
                it changes nothing of that.
            then: after that it joins again, in this role.
        """
        if remove:
            self._leaving[engine.url] = then
        self._stop_drain(engine)
        engine.draining = True
        logger.info("engine %s is drained: %d streams are there", engine.url, engine.streams)
        draining = self._drained(engine)
        self._draining[engine.url] = begin(draining, f"the drain of {engine.url}")
        self._show(engine)

    def undrain(self, engine: AnyEngine) -> None:
        """Place streams there again."""
        self._stop_drain(engine)
        self._leaving.pop(engine.url, None)
        engine.draining = engine.drained = False
        self._show(engine)

    def _stop_drain(self, engine: AnyEngine) -> None:
        if (task := self._draining.pop(engine.url, None)) is not None:
            task.cancel()

    async def _drained(self, engine: AnyEngine) -> None:
        if not await _empty(engine, self._settings.drain_timeout_s):
            logger.warning("engine %s: %d streams have to leave", engine.url, engine.streams)
            self._callbacks.left(engine, True)
            await _empty(engine, CUT_S)
        engine.drained = True
        logger.info("engine %s is drained", engine.url)
        self._show(engine)
        if engine.url in self._leaving:
            await self._remove(engine)
            if (then := self._leaving.pop(engine.url)) is not None:
                self.add(engine.url, then)

    async def _remove(self, engine: AnyEngine) -> None:
        del self._members[engine.url]
        del self._draining[engine.url]
        watching = self._watching.pop(engine.url)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        self._metrics.forget_engine(engine.url)
        self._callbacks.removed(engine)
        await engine.client.close()
        logger.info("engine %s is removed", engine.url)

    # How they are.

    async def check(self, engine: AnyEngine) -> None:
        """Ask an engine for its info and act on what changed."""
        before, begun_s = engine.info, time.monotonic()
        try:
            info = await self._info(engine)
        except EngineError as e:
            if self._says_nothing(e, begun_s):
                return  # it is asked again soon
            engine.info = None
            _log_trouble(engine, e)
        else:
            engine.info, engine.streams_told = info, engine.streams
            if isinstance(engine, Engine):
                engine.placed_tokens, engine.polled_s = 0, begun_s
            engine.trouble = ""
            engine.health = engine.health.answers(time.monotonic())
            if before is None:
                _log_ready(engine)
        self._show(engine)
        same = engine.info is not None and before is not None
        if before is not None and not (same and engine.info.instance_id == before.instance_id):  # type: ignore[union-attr]
            self._callbacks.lost(engine)
        self._callbacks.seen(engine)

    async def _info(self, engine: AnyEngine) -> EngineInfo:
        try:
            return await engine.client.info(timeout_s=self._settings.poll_timeout_s)
        except EngineError:
            raise
        except Exception as e:  # whatever it says: what can't be read is no answer
            raise EngineUnavailable(f"what it says of itself can't be read: {e!r}") from e

    def told(self, engine: AnyEngine, error: EngineUnavailable | None) -> None:
        """An operation there has failed, or has not."""
        now_s, before = time.monotonic(), engine.health
        if error is None:
            engine.health = before.worked(now_s)
        elif not error.told and not self._says_nothing(error, now_s - LATE_S):
            after = self._settings.eject_after
            engine.health = before.failed(now_s, after, random.random())
        if engine.health.state == before.state:
            return
        logger.warning("engine %s: %s%s", engine.url, engine.health.state,
                       "" if error is None else f", since {error}")  # fmt: skip
        if engine.health.state == "ejected":
            self._metrics.ejections.labels(engine.url).inc()
            if self._has_other(engine):
                self._callbacks.left(engine, False)
        self._show(engine)

    def _says_nothing(self, error: EngineError, since_s: float) -> bool:
        """Whether an answer was perhaps there in time, and only not read, since this process had
        to wait for the machine."""
        return isinstance(error.__cause__, TimeoutError) and self._pulse.was_late(since_s)

    def _has_other(self, engine: AnyEngine) -> bool:
        """Whether its streams could go on elsewhere: if not, they are best off where they are."""
        info = engine.info
        return info is not None and any(
            other is not engine and other.takes and other.serves(info.model)
            for other in self.members
            if other.role != "decode"
        )

    @contextmanager
    def passing(self, engine: Engine) -> Iterator[None]:
        """While a request is passed through to an engine."""
        engine.passing += 1
        try:
            yield
        finally:
            engine.passing -= 1

    def _show(self, engine: AnyEngine) -> None:
        self._metrics.engine_seen(engine.url, engine.info)
        self._metrics.show_engine(engine.url, engine.standing)


async def _empty(engine: Member, within_s: float) -> bool:
    """Whether nothing is left there in time."""
    deadline_s = time.monotonic() + within_s
    while engine.load > 0:
        if time.monotonic() >= deadline_s:
            return False
        await asyncio.sleep(LOOK_S)
    return True


def configured(settings: Settings) -> Mapping[str, Role]:
    """The engines that settings name, by URL."""
    named: dict[str, Role] = {}
    roles: tuple[tuple[Role, tuple[str, ...]], ...] = (
        ("engine", settings.engine),
        ("plain", settings.plain_engine),
        ("decode", settings.decode_engine),
    )
    for role, urls in roles:
        named |= {url.rstrip("/"): role for url in urls}
    return named


def _log_trouble(engine: Member, error: EngineError) -> None:
    """Why an engine does not answer, once."""
    if error.message != engine.trouble:
        engine.trouble = error.message
        hint = "; name it with --plain-engine" if isinstance(error, WithoutPlugin) else ""
        logger.warning("engine %s can't be used: %s%s", engine.url, error, hint)


def _log_ready(engine: Member) -> None:
    info = engine.info
    assert info is not None
    logger.info("engine %s serves %s (%s, %s)", engine.url, info.model, info.engine, engine.role)
    if info.lacks and engine.role != "decode":
        logger.info("engine %s lacks %s", engine.url, "; ".join(info.lacks))
