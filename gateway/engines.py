"""One engine as the gateway knows it: those that read prompts, and those that only decode."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from cache_index.names import ALGORITHMS, Hashing
from engine_adapter.messages import EngineInfo
from engine_adapter.operations import Decoding, Operations
from gateway.health import Health
from gateway.routing import Candidate

Role = Literal["engine", "plain", "decode"]
"""`engine`: runs the plug-in. `plain`: a server that was not modified. `decode`: decodes prompts
that others have prefilled."""
Standing = Literal["healthy", "ejected", "half-open", "away", "draining", "drained"]
"""Of an engine, as operators see it: its health, but `away` while it does not answer, and
`draining` and `drained` once it takes no new streams for good."""


@dataclass(eq=False, slots=True, kw_only=True)
class Member:
    """What all engines have in common."""

    url: str
    role: Role
    info: EngineInfo | None = None
    """What it last said; None while it does not answer."""
    streams: int = 0
    """Streams placed there whose answer is not complete."""
    passing: int = 0
    """Requests that are passed through to it, and under way."""
    health: Health = field(default_factory=Health)
    draining: bool = False
    """It takes no new streams."""
    drained: bool = False
    """Nothing is left there since."""
    trouble: str = ""
    """Why it does not answer, as far as that was logged."""

    @property
    def id(self) -> str:
        """Short, for operators."""
        return self.url.split("://", 1)[-1]

    @property
    def load(self) -> int:
        """Streams and requests of this gateway there."""
        return self.streams + self.passing

    @property
    def takes(self) -> bool:
        """Whether streams may be placed there, as far as its health goes."""
        return self.info is not None and not self.draining and self.health.takes(time.monotonic())

    @property
    def standing(self) -> Standing:
        """In one word."""
        if self.draining:
            return "drained" if self.drained else "draining"
        return "away" if self.info is None else self.health.state

    def serves(self, model: str) -> bool:
        """Whether it answers, and with this model."""
        return self.info is not None and self.info.model == model


@dataclass(eq=False, slots=True, kw_only=True)
class Engine(Member):
    """An engine that reads prompts while they grow, and answers them."""

    client: Operations
    placed_tokens: int = 0
    """Of the prompts placed there since it was last asked."""
    streams_told: int = 0
    """What `streams` was when it was last asked."""
    polled_s: float = -float("inf")
    """When that was, by the monotonic clock."""

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


@dataclass(eq=False, slots=True, kw_only=True)
class DecodeEngine(Member):
    """An engine that answers prompts which others have read. Whoever has it answer counts that in
    `streams`."""

    client: Decoding
    streams_told: int = 0
    """What `streams` was when it was last asked."""

    @property
    def busy(self) -> int:
        """Requests there, by its own word and as answers came and went since."""
        info = self.info
        told = 0 if info is None else info.running + info.waiting
        return max(told + self.streams - self.streams_told, self.streams)

    def fits(self, length: int) -> bool:
        """Whether it takes a prompt and its answer of so many tokens together."""
        return self.info is not None and length <= self.info.max_model_len


AnyEngine = Engine | DecodeEngine
