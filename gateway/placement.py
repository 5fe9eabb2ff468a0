"""The engines behind this gateway: which answer, and which one takes a new stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

from engine_adapter.client import EngineClient
from engine_adapter.errors import EngineError
from engine_adapter.messages import EngineInfo
from gateway.errors import EngineFailed, ModelNotFound
from gateway.telemetry import Metrics

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 10.0
"""An engine's answer to `info` may wait for a step under way, but not longer than this."""


@dataclass(eq=False, slots=True)
class Engine:
    """One engine as the gateway knows it."""

    client: EngineClient
    info: EngineInfo | None = None
    """What it last said; None while it does not answer."""
    streams: int = field(default=0)
    """Streams placed there whose answer is not complete."""

    @property
    def url(self) -> str:
        return self.client.url


class Engines:
    """All engines, each watched by a task. `lost` is called when one is gone or was restarted:
    its prompts no longer exist."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        *,
        poll_s: float,
        metrics: Metrics,
        lost: Callable[[Engine], None],
    ) -> None:
        self.all = tuple(Engine(EngineClient(session, url)) for url in urls)
        self._poll_s = poll_s
        self._metrics = metrics
        self._lost = lost
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Ask every engine once, then keep asking."""
        await asyncio.gather(*(self.check(engine) for engine in self.all))
        self._tasks = [asyncio.create_task(self._watch(engine)) for engine in self.all]

    async def stop(self) -> None:
        """End the tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ready(self) -> list[Engine]:
        """The engines that answer."""
        return [engine for engine in self.all if engine.info is not None]

    def place(self, model: str) -> Engine:
        """The engine for a new stream: among those that serve the model, the one with the
        fewest streams.

        Raises:
            EngineFailed: no engine answers.
            ModelNotFound: none that answers serves the model.
        """
        if not self.ready:
            raise EngineFailed("no engine can be reached")
        fit = [e for e in self.ready if e.info is not None and e.info.model == model]
        if not fit:
            served = sorted({e.info.model for e in self.ready if e.info is not None})
            raise ModelNotFound(f"no engine serves {model!r}; served: {served}", param="model")
        return min(fit, key=lambda engine: engine.streams)

    def any(self) -> Engine:
        """The engine with the fewest streams.

        Raises:
            EngineFailed: no engine answers.
        """
        if not self.ready:
            raise EngineFailed("no engine can be reached")
        return min(self.ready, key=lambda engine: engine.streams)

    async def check(self, engine: Engine) -> None:
        """Ask an engine for its info and act on what changed."""
        before = engine.info
        try:
            engine.info = await engine.client.info(timeout_s=POLL_TIMEOUT_S)
        except EngineError as e:
            engine.info = None
            if before is not None:
                logger.warning("engine %s is gone: %s", engine.url, e)
        else:
            if before is None:
                logger.info("engine %s serves %s", engine.url, engine.info.model)
        self._metrics.engine_up.labels(engine.url).set(engine.info is not None)
        same = engine.info is not None and before is not None
        if before is not None and not (same and engine.info.instance_id == before.instance_id):  # type: ignore[union-attr]
            self._lost(engine)

    async def _watch(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self.check(engine)
