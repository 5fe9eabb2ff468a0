"""The engines behind this gateway: which answer, and which one takes a prompt."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp

from cache_index.names import ALGORITHMS, Hashing
from engine_adapter.client import EngineClient
from engine_adapter.errors import EngineError, WithoutPlugin
from engine_adapter.messages import EngineInfo
from engine_adapter.operations import Operations
from engine_adapter.plain_client import PlainClient
from gateway.errors import EngineFailed, ModelNotFound
from gateway.routing import POLICIES, Candidate, Decision
from gateway.telemetry import Metrics

logger = logging.getLogger(__name__)

POLL_TIMEOUT_S = 10.0
"""An engine's answer to `info` may wait for a step under way, but not longer than this."""


@dataclass(eq=False, slots=True)
class Engine:
    """One engine as the gateway knows it."""

    client: Operations
    info: EngineInfo | None = None
    """What it last said; None while it does not answer."""
    streams: int = field(default=0)
    """Streams placed there whose answer is not complete."""
    placed_tokens: int = field(default=0)
    """Of the prompts placed there since it was last asked."""
    streams_told: int = field(default=0)
    """What `streams` was when it was last asked."""
    trouble: str = ""
    """Why it does not answer, as far as that was logged."""

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def keeps_prompts(self) -> bool:
        """Whether it can tell another gateway what it has of a prompt."""
        return self.info is not None and "tokens" in self.info.operations

    @property
    def hashing(self) -> Hashing | None:
        """How it names blocks; None if it does not say, or in a way that is not known here."""
        events = None if self.info is None else self.info.kv_events
        if events is None or events.hash_algorithm not in ALGORITHMS:
            return None
        root = bytes.fromhex(events.hash_root)
        return Hashing(events.hash_algorithm, events.block_size, root)

    @property
    def queued_tokens(self) -> int:
        """Still to be computed there, by its own word, and placed there since."""
        return self.placed_tokens + (0 if self.info is None else self.info.waiting_tokens)

    def candidate(self, held_tokens: int) -> Candidate:
        """As the choice sees it. It has answered at least once."""
        info = self.info
        assert info is not None
        used = 1 - info.kv_blocks_free / info.kv_blocks_total if info.kv_blocks_total else 0.0
        return Candidate(
            url=self.url,
            streams=self.streams,
            waiting_tokens=self.queued_tokens,
            open_prompts=max(info.open_prompts + self.streams - self.streams_told, 0),
            running=info.running,
            kv_use=used,
            held_tokens=held_tokens,
        )


class Prefixes(Protocol):
    """Knows what engines hold."""

    async def held(
        self, engines: Sequence[Engine], tokens: Sequence[int], salt: str | None
    ) -> Mapping[str, int]:
        """How many tokens at the front of a prompt each engine has the KV of, by its URL. Engines
        of which nothing is known are left out."""

    def sent(self, engine: Engine, tokens: Sequence[int], salt: str | None) -> None:
        """A prompt that begins with these tokens is on its way to an engine."""


class Engines:
    """All engines, each watched by a task. `lost` is called when one is gone or was restarted:
    its prompts no longer exist."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        *,
        plain_urls: Sequence[str] = (),
        poll_s: float,
        policy: str,
        prefixes: Prefixes,
        metrics: Metrics,
        lost: Callable[[Engine], None],
        seen: Callable[[Engine], None],
    ) -> None:
        """
        Args:
            urls: of engines with the plug-in.
            plain_urls: of servers that were not modified.
            policy: one of `routing.POLICIES`.
            seen: called after every answer of an engine.
        """
        self.policy = policy
        self._prefixes = prefixes
        self._seen = seen
        self._placed = 0
        self.all = (
            *(Engine(EngineClient(session, url)) for url in urls),
            *(Engine(PlainClient(session, url)) for url in plain_urls),
        )
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
        await asyncio.gather(*(engine.client.close() for engine in self.all))

    @property
    def ready(self) -> list[Engine]:
        """The engines that answer."""
        return [engine for engine in self.all if engine.info is not None]

    def by_url(self, url: str) -> Engine | None:
        """The engine at an address, if it is one of these."""
        return next((engine for engine in self.all if engine.url == url), None)

    def serving(self, model: str) -> list[Engine]:
        """The engines that answer and serve a model, one or more.

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
        return fit

    async def place(
        self, model: str, tokens: Sequence[int], avoid: set[Engine], salt: str | None = None
    ) -> tuple[Engine, Decision]:
        """The engine for a prompt that begins with these tokens, by the policy.

        Args:
            salt: keeps what is cached for one tenant from others.

        Raises:
            EngineFailed: no engine is left.
            ModelNotFound
        """
        fit = [engine for engine in self.serving(model) if engine not in avoid]
        if not fit:
            raise EngineFailed("the engine of this stream died, and there is no other")
        held: Mapping[str, int] = {}
        if self.policy == "prefix" and len(fit) > 1:
            held = await self._prefixes.held(fit, tokens, salt)
            fit = [engine for engine in fit if engine.info is not None]  # time has passed
            if not fit:
                raise EngineFailed("no engine can be reached")
        candidates = [engine.candidate(held.get(engine.url, 0)) for engine in fit]
        best, scores = POLICIES[self.policy](candidates, len(tokens), self._placed)
        engine = fit[candidates.index(best)]
        self._placed += 1
        engine.placed_tokens += len(tokens) - held.get(engine.url, 0)
        if held:
            self._prefixes.sent(engine, tokens, salt)
        return engine, Decision(self.policy, engine.url, len(tokens), scores)

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
            _log_trouble(engine, e)
        else:
            engine.placed_tokens, engine.streams_told = 0, engine.streams
            engine.trouble = ""
            if before is None:
                _log_ready(engine.url, engine.info)
        self._metrics.engine_up.labels(engine.url).set(engine.info is not None)
        same = engine.info is not None and before is not None
        if before is not None and not (same and engine.info.instance_id == before.instance_id):  # type: ignore[union-attr]
            self._lost(engine)
        self._seen(engine)

    async def _watch(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self.check(engine)


def _log_trouble(engine: Engine, error: EngineError) -> None:
    """Why an engine does not answer, once."""
    if error.message != engine.trouble:
        engine.trouble = error.message
        hint = "; name it with --plain-engine" if isinstance(error, WithoutPlugin) else ""
        logger.warning("engine %s can't be used: %s%s", engine.url, error, hint)


def _log_ready(url: str, info: EngineInfo) -> None:
    logger.info("engine %s serves %s (%s)", url, info.model, info.engine)
    if info.lacks:
        logger.info("engine %s lacks %s", url, "; ".join(info.lacks))


@dataclass(frozen=True, slots=True)
class ModelPlacer:
    """Finds engines for the streams of one model."""

    engines: Engines
    model: str
    salt: str | None = None
    """Of the tenant whose streams they are."""

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and answer that every engine takes; None while none answers."""
        limits = [e.info.max_model_len for e in self.engines.ready
                  if e.info is not None and e.info.model == self.model]  # fmt: skip
        return min(limits, default=None)

    @property
    def wants_documents(self) -> bool:
        """Whether the choice depends on the documents, so that it should wait for them."""
        if self.engines.policy != "prefix":
            return False
        models = [e.info.model for e in self.engines.ready if e.info is not None]
        return models.count(self.model) > 1

    async def place(self, tokens: Sequence[int], avoid: set[Engine]) -> tuple[Engine, Decision]:
        """See `Engines.place`."""
        return await self.engines.place(self.model, tokens, avoid, self.salt)
