"""Whether this gateway can take a stream, and if not, what is missing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gateway.engines import AnyEngine, Engine
from gateway.errors import EngineFailed
from gateway.pool import Pool

logger = logging.getLogger(__name__)

AGAIN_S = 10.0
"""Between two attempts to load a tokenizer."""

Load = Callable[[str], Awaitable[object]]


class Tokenizers:
    """Has the tokenizer of each model loaded as soon as an engine serves it, rather than in the
    time of the first stream."""

    def __init__(self, load: Load) -> None:
        """
        Args:
            load: loads that of a model; raises EngineFailed if it can't.
        """
        self._load = load
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._missing: dict[str, str] = {}

    def seen(self, engine: AnyEngine) -> None:
        """An engine may have answered."""
        if engine.info is not None and isinstance(engine, Engine):
            model = engine.info.model
            if model not in self._tasks:
                self._missing[model] = "being loaded"
                self._tasks[model] = asyncio.create_task(self._loaded(model))

    def missing(self, model: str) -> str | None:
        """Why a model's tokenizer is not there; None if it is."""
        return self._missing.get(model)

    async def stop(self) -> None:
        """End the tasks."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _loaded(self, model: str) -> None:
        begun_s = time.monotonic()
        while True:
            try:
                await self._load(model)
            except Exception as e:  # also one that nobody thought of may be over the next time
                why = e.message if isinstance(e, EngineFailed) else repr(e)
                if self._missing[model] != why:
                    logger.error("%s", why)
                self._missing[model] = why
                await asyncio.sleep(AGAIN_S)
            else:
                took_s = time.monotonic() - begun_s
                logger.info("the tokenizer of %s is there, after %.1f s", model, took_s)
                del self._missing[model]
                return


@dataclass(frozen=True, slots=True)
class Readiness:
    """What `/ready` says."""

    ready: bool
    missing: list[str]
    """What is not as it should be, in words; also where the gateway is ready in spite of it."""
    draining: bool
    index: str
    """`own` in this process, else `up` or `away`; without it streams can't move to other
    replicas."""
    engines: dict[str, bool]
    """Which answer."""
    standing: dict[str, str]
    models: dict[str, int]
    """Models that a stream can be opened for, with the number of engines that take it."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def readiness(pool: Pool, tokenizers: Tokenizers, *, draining: bool, index: str) -> Readiness:
    """How things stand now."""
    models: dict[str, int] = {}
    missing = ["the gateway is being drained"] if draining else []
    for engine in pool.members:
        if engine.standing in ("away", "ejected"):
            missing.append(f"engine {engine.url} is {engine.standing}: {_why(engine)}")
        if isinstance(engine, Engine) and engine.info is not None and engine.takes:
            models[engine.info.model] = models.get(engine.info.model, 0) + 1
    for model in list(models):
        if (why := tokenizers.missing(model)) is not None:
            missing.append(f"the tokenizer of {model}: {why}")
            del models[model]
    if not models:
        missing.append("no engine takes streams")
    if index == "away":
        missing.append("the index does not answer")
    return Readiness(
        ready=bool(models) and not draining,
        missing=missing,
        draining=draining,
        index=index,
        engines={engine.url: engine.info is not None for engine in pool.members},
        standing={engine.url: engine.standing for engine in pool.members},
        models=models,
    )


def _why(engine: AnyEngine) -> str:
    if engine.info is None:
        return engine.trouble or "no answer yet"
    return f"{engine.health.failures} operations in a row failed"
