"""Which engine takes a prompt, and which one decodes what another has read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine_adapter.errors import EngineUnavailable, KvLost
from gateway.engines import DecodeEngine, Engine
from gateway.errors import EngineFailed, ModelNotFound, Overloaded
from gateway.pool import Pool
from gateway.routing import POLICIES, Decision
from gateway.settings import Settings

__all__ = ["Engine", "Engines", "ModelPlacer", "Prefixes"]


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
    """Chooses among the engines of a pool."""

    def __init__(self, pool: Pool, prefixes: Prefixes, policy: str) -> None:
        """
        Args:
            policy: one of `routing.POLICIES`.
        """
        self.pool = pool
        self.policy = policy
        self._prefixes = prefixes
        self._placed = 0

    def use(self, settings: Settings) -> None:
        """Choose by the policy of these settings from now on."""
        self.policy = settings.routing

    @property
    def all(self) -> list[Engine]:
        """The engines that read prompts."""
        return self.pool.all

    @property
    def ready(self) -> list[Engine]:
        """Those of them that answer."""
        return self.pool.ready

    def by_url(self, url: str) -> Engine | None:
        """The engine at an address, if it is one of these."""
        return self.pool.by_url(url)

    def serving(self, model: str) -> list[Engine]:
        """The engines that serve a model and take streams, one or more.

        Raises:
            EngineFailed: no engine answers, or none of these takes any.
            ModelNotFound: none that answers serves the model.
        """
        fit = [engine for engine in self._with(model) if engine.takes]
        if not fit:
            raise EngineFailed(f"no engine of {model!r} takes streams now")
        return fit

    def _with(self, model: str) -> list[Engine]:
        """The engines that serve a model and answer, one or more."""
        if not self.ready:
            raise EngineFailed("no engine can be reached")
        fit = [engine for engine in self.ready if engine.serves(model)]
        if not fit:
            served = sorted({e.info.model for e in self.ready if e.info is not None})
            raise ModelNotFound(f"no engine serves {model!r}; served: {served}", param="model")
        return fit

    def admit(self, model: str, alive: int) -> None:
        """Refuse a new stream that no engine would have room for. One that was let in is placed,
        whatever has happened since.

        Args:
            alive: streams of this model that have not ended, placed or not.

        Raises:
            Overloaded, EngineFailed, ModelNotFound
        """
        self.serving(model)
        if not self._has_room(model, alive):
            raise Overloaded(f"every engine of {model!r} has as many streams as it may")

    def _has_room(self, model: str, alive: int) -> bool:
        """Whether the engines of a model may have one more stream or request than they have, and
        will have when all streams are placed."""
        most = self.pool.most_streams
        if most is None:
            return True
        serving = [engine for engine in self.pool.members if engine.serves(model)]
        unplaced = max(alive - sum(engine.streams for engine in serving), 0)
        fit = (engine for engine in serving if isinstance(engine, Engine) and engine.takes)
        return sum(max(most - engine.load, 0) for engine in fit) > unplaced

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
        fit = self._fit(model, avoid)
        fit = [engine for engine in fit if self.pool.has_room(engine)] or fit
        held: Mapping[str, int] = {}
        if self.policy == "prefix" and len(fit) > 1:
            held = await self._prefixes.held(fit, tokens, salt)
            fit = [engine for engine in fit if engine.serves(model)]  # time has passed
            if not fit:
                raise EngineFailed("no engine can be reached")
            fit = [engine for engine in fit if self.pool.has_room(engine)] or fit
        candidates = [engine.candidate(held.get(engine.url, 0)) for engine in fit]
        best, scores = POLICIES[self.policy](candidates, len(tokens), self._placed)
        engine = fit[candidates.index(best)]
        self._placed += 1
        engine.placed_tokens += len(tokens) - held.get(engine.url, 0)
        self.pool.placed(engine)
        if held:
            self._prefixes.sent(engine, tokens, salt)
        return engine, Decision(self.policy, engine.url, len(tokens), scores)

    def _fit(self, model: str, avoid: set[Engine]) -> list[Engine]:
        """Those that a stream may go to, one or more. Where there are no others it stays with one
        that failed it, as long as that answers when it is asked how it does.

        Raises:
            EngineFailed, ModelNotFound
        """
        answering = [engine for engine in self._with(model) if not engine.draining]
        fit = [engine for engine in answering if engine.takes and engine not in avoid]
        if not (fit or answering):
            raise EngineFailed("the engine of this stream is gone, and there is no other")
        return fit or answering

    def any(self, among: Sequence[Engine], alive: Callable[[str], int]) -> Engine:
        """The engine with the least to do, for a request that is passed through.

        Args:
            among: engines that answer.
            alive: streams of a model that have not ended, placed or not.

        Raises:
            EngineFailed: none takes requests.
            Overloaded: none has room.
        """
        fit = [engine for engine in among if engine.takes]
        if not fit:
            raise EngineFailed("no engine takes requests now")
        models = {engine.info.model for engine in fit if engine.info is not None}
        roomy = {model for model in models if self._has_room(model, alive(model))}
        fit = [e for e in fit if self.pool.has_room(e) and e.info and e.info.model in roomy]
        if not fit:
            raise Overloaded("every engine has as many requests as it may")
        engine = min(fit, key=lambda engine: engine.load)
        self.pool.placed(engine)
        return engine

    def choose(self, model: str, length: int, avoid: Collection[DecodeEngine]) -> DecodeEngine:
        """The decode engine with the least to do. Choosing changes nothing.

        Args:
            length: tokens of the prompt and of the answer, as far as that is known.

        Raises:
            EngineFailed: there is none but those to avoid.
        """
        fit = [
            engine
            for engine in self.pool.decoders
            if engine.serves(model) and engine.takes and engine not in avoid
            and self.pool.has_room(engine) and engine.fits(length)
        ]  # fmt: skip
        if not fit:
            raise EngineFailed(f"no decode engine of {model!r} takes an answer")
        return min(fit, key=lambda engine: (engine.busy, engine.streams))


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
        return sum(e.takes and e.serves(self.model) for e in self.engines.ready) > 1

    def choose(self, length: int, avoid: Collection[DecodeEngine]) -> DecodeEngine:
        """See `Engines.choose`."""
        return self.engines.choose(self.model, length, avoid)

    def failed(self, engine: DecodeEngine, error: KvLost) -> None:
        """See `Decoders.failed`."""
        failure = EngineUnavailable(f"it did not get the KV of a prompt: {error}")
        failure.__cause__ = error.__cause__  # time that this process was late is not counted
        self.engines.pool.told(engine, failure)

    async def place(self, tokens: Sequence[int], avoid: set[Engine]) -> tuple[Engine, Decision]:
        """See `Engines.place`."""
        return await self.engines.place(self.model, tokens, avoid, self.salt)
