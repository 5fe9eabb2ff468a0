"""The engines that decode what others have prefilled: which are up, which takes an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine_adapter.errors import EngineError
from engine_adapter.messages import EngineInfo
from engine_adapter.operations import Decoding
from gateway.errors import EngineFailed
from gateway.handoff import DecodeEngine

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 2.0


@dataclass(eq=False, slots=True)
class Decoder:
    """One engine as the gateway knows it."""

    client: Decoding
    info: EngineInfo | None = None
    streams: int = 0

    @property
    def url(self) -> str:
        return self.client.url


class DecodePool:
    """All decode engines, each watched by a task."""

    def __init__(
        self, clients: Sequence[Decoding], *, poll_s: float, lost: Callable[[Decoder], None]
    ) -> None:
        """
        Args:
            lost: called when one is gone or was restarted.
        """
        self.all = tuple(Decoder(client) for client in clients)
        self._poll_s = poll_s
        self._lost = lost
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Ask every engine once, then keep asking."""
        await asyncio.gather(*(self._check(engine) for engine in self.all))
        self._tasks = [asyncio.create_task(self._watch(engine)) for engine in self.all]

    async def stop(self) -> None:
        """End the tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(engine.client.close() for engine in self.all))

    def choose(self, model: str, length: int, avoid: Collection[DecodeEngine]) -> Decoder:
        """The engine with the fewest answers under way; see `handoff.Decoders`."""
        fit = [
            engine
            for engine in self.all
            if engine.info is not None
            and engine.info.model == model
            and length <= engine.info.max_model_len
            and engine not in avoid
        ]
        if not fit:
            raise EngineFailed("no decode engine can take the answer")
        return min(fit, key=lambda engine: engine.streams)

    async def _watch(self, engine: Decoder) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self._check(engine)

    async def _check(self, engine: Decoder) -> None:
        before = engine.info
        try:
            engine.info = await engine.client.info(timeout_s=POLL_TIMEOUT_S)
        except EngineError as e:
            engine.info = None
            if before is not None:
                logger.warning("decode engine %s is gone: %s", engine.url, e)
        now = engine.info
        if before is not None and (now is None or now.instance_id != before.instance_id):
            self._lost(engine)
