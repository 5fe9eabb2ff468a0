"""What `measure_gpu.py` measures, as values and as a file."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

Direction = Literal["out", "in"]
Moving = Literal["contiguous", "gathered", "batched", "blocks"]
"""How KV moves: in one copy of as many bytes; gathered by a kernel and copied at once (or copied
and scattered); by vLLM's call for many copies; by a call for each block of each layer."""


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what is in the file."""


class Timed(Value, frozen=True):
    """Repeats of one measurement."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Longest over shortest."""
        return max(self.seconds) / min(self.seconds)


class Step(Timed, frozen=True):
    """A step of requests alike."""

    requests: int
    cached: int
    new: int


class Prompt(Timed, frozen=True):
    """A whole prompt, in steps one after the other."""

    tokens: int


class Copy(Timed, frozen=True):
    """KV of so many tokens to pinned host memory, or back."""

    moving: Moving
    direction: Direction
    tokens: int
    call_s: float
    """Median time until the call for it returns: so long the host does nothing else."""


class Overlap(Value, frozen=True):
    """Steps and copies at the same time, in another stream."""

    requests: int
    cached: int
    new: int
    moving: Moving
    direction: Direction
    tokens: int
    """Of a copy."""
    alone_s: float
    """Median of the step."""
    beside_s: float
    """Median of the step while copies run."""
    copy_alone_s: float
    copy_beside_s: float


class Clock(Value, frozen=True):
    """The state of the card while a part of it all was measured, as its driver gave it."""

    part: str
    sm_mhz: tuple[int, ...]
    memory_mhz: tuple[int, ...]
    watts: tuple[int, ...]
    celsius: tuple[int, ...]


class Raw(Value, frozen=True):
    """Everything that was measured on one card."""

    card: str
    host: str
    versions: dict[str, str]
    date: str
    seed: int
    model: str
    attention: str
    step_tokens: int
    steps: tuple[Step, ...]
    prompts: tuple[Prompt, ...]
    copies: tuple[Copy, ...]
    overlaps: tuple[Overlap, ...]
    clocks: tuple[Clock, ...]
    skipped: tuple[str, ...] = ()
    """What could not be measured, and why."""


def write(raw: Raw, path: Path) -> None:
    """Keep it as JSON, one measurement a line; times to the tenth of a microsecond."""
    fields = msgspec.to_builtins(raw)
    lines = []
    for name, value in fields.items():
        if value and isinstance(value, Sequence) and isinstance(value[0], dict):
            rows = ",\n".join("    " + _row(row) for row in value)
            lines.append(f'  "{name}": [\n{rows}\n  ]')
        else:
            lines.append(f'  "{name}": {_row(value)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _row(value: object) -> str:
    return msgspec.json.encode(_rounded(value)).decode()


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 7)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def read(path: Path) -> Raw:
    """What `write` has kept.

    Raises:
        msgspec.DecodeError: it is something else.
    """
    return msgspec.json.decode(path.read_bytes(), type=Raw)
