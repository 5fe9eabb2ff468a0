"""Times the steps and copies on the GPU of this machine. See `measure_gpu.py`."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata

import torch

from loadtest.gpu_copies import Copies
from loadtest.gpu_model import (
    BLOCK_TOKENS,
    LLAMA_3_1_8B_SHAPE,
    RandomModel,
    Shape,
    Work,
    dense_attention,
    paged_attention,
)
from loadtest.gpu_raw import Clock, Copy, Direction, Moving, Overlap, Prompt, Raw, Step
from loadtest.report import processor

POINT_WITHIN_S = 0.7
"""Repeats of one measurement end after this long, but there are three at least."""
SAMPLE_MS = 200


class NoGpu(Exception):
    """There is none that PyTorch can use."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured."""

    new: tuple[int, ...] = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    cached: tuple[int, ...] = (0, 2048, 8192, 32768, 65536, 131072)
    decodes: tuple[int, ...] = (1, 8, 32, 128)
    decode_contexts: tuple[int, ...] = (1024, 8192)
    prompts: tuple[int, ...] = tuple(1 << i for i in range(7, 18))
    copies: tuple[int, ...] = tuple(1 << i for i in range(7, 18))
    overlap: tuple[Work, ...] = (Work(0, 8192), Work(32768, 2048), Work(8192, 1, 32))
    overlap_tokens: int = 8192
    step_tokens: int = 8192
    kv_tokens: int = 270_336
    repeats: int = 20


def measure(seed: int, date: str) -> Raw:
    """Measure Llama-3.1-8B on the first GPU.

    Raises:
        NoGpu: there is none.
    """
    if not torch.cuda.is_available():
        raise NoGpu("PyTorch finds no GPU here")
    return Measurement(LLAMA_3_1_8B_SHAPE, "cuda", Grid(), seed).run(date)


@dataclass(slots=True)
class Measurement:
    """One card under measurement."""

    shape: Shape
    device: str
    grid: Grid
    seed: int
    _model: RandomModel = field(init=False)
    _name: str = field(init=False)
    _clocks: list[Clock] = field(default_factory=list)
    _skipped: list[str] = field(default_factory=list)

    def run(self, date: str) -> Raw:
        """Measure everything."""
        grid, paged = self.grid, paged_attention()
        attention = paged or dense_attention
        self._name = "PyTorch, contiguous KV" if paged is None else "vLLM, paged KV"
        self._model = RandomModel(self.shape, self.device, grid.kv_tokens, self.seed, attention)
        if paged is not None:
            self._check()
        with self._watched("steps"):
            steps = tuple(self._steps())
        with self._watched("prompts"):
            prompts = tuple(self._prompt(n) for n in grid.prompts)
        copies = Copies(self._model.cache, max(grid.copies), self.seed)
        with self._watched("copies"):
            copied = tuple(self._copies(copies))
        with self._watched("overlap"):
            overlaps = tuple(self._overlaps(copies, copied))
        return Raw(
            card=torch.cuda.get_device_name() if self.device == "cuda" else "none",
            host=f"{processor()}, {os.cpu_count()} cores",
            versions=_versions(),
            date=date,
            seed=self.seed,
            model=self.shape.model.name,
            attention=self._name,
            step_tokens=grid.step_tokens,
            steps=steps,
            prompts=prompts,
            copies=copied,
            overlaps=overlaps,
            clocks=tuple(self._clocks),
            skipped=tuple(self._skipped),
        )

    def _check(self) -> None:
        """Both attentions must agree, or the quick one computes something else."""
        batch = self._model.batch(Work(1000, 300, 2), scattered=False)
        model, cache = self.shape.model, self._model.cache[0]
        q = torch.randn((600, model.heads, model.head_size), dtype=cache.dtype, device=cache.device)
        plain = dense_attention(q, cache, batch).float()
        quick = self._model.attention(q, cache, batch).float()
        off = float((quick - plain).norm() / plain.norm())
        if not off < 0.01:
            raise RuntimeError(f"paged attention is wrong: off by {off:.2g}")
        self._name += f" (within {off:.1e} of PyTorch's)"

    def _steps(self) -> Iterator[Step]:
        grid = self.grid
        works = [Work(cached, new) for new in grid.new for cached in grid.cached]
        works += [Work(c - 1, 1, n) for n in grid.decodes for c in grid.decode_contexts]
        for work in works:
            try:
                seconds = self._time(self._model.runner(work))
            except (ValueError, torch.cuda.OutOfMemoryError) as e:
                self._skipped.append(str(e))
                continue
            yield Step(requests=work.requests, cached=work.cached, new=work.new, seconds=seconds)
            _say(f"{work.requests} x {work.new} behind {work.cached}: {1000 * seconds[0]:.2f} ms")

    def _prompt(self, tokens: int) -> Prompt:
        step = self.grid.step_tokens
        works = [Work(s, min(step, tokens - s)) for s in range(0, tokens, step)]
        runs = [self._model.runner(work) for work in works]
        seconds = self._time(lambda: [run() for run in runs], warm=True)
        _say(f"{tokens} tokens: {seconds[0]:.4f} s")
        return Prompt(tokens=tokens, seconds=seconds)

    def _copies(self, copies: Copies) -> Iterator[Copy]:
        for tokens in self.grid.copies:
            if tokens // BLOCK_TOKENS > self._model.cache.shape[1]:
                continue
            for (moving, direction), run in copies.ways(tokens).items():
                calls_s: list[float] = []
                seconds = self._time(partial(_noting, run, calls_s))
                yield Copy(
                    moving=moving,
                    direction=direction,
                    tokens=tokens,
                    seconds=seconds,
                    call_s=statistics.median(calls_s),
                )
            _say(f"copies of {tokens} tokens")

    def _overlaps(self, copies: Copies, alone: Sequence[Copy]) -> Iterator[Overlap]:
        if self.device == "cpu":
            return
        tokens = self.grid.overlap_tokens
        ways = copies.ways(tokens)
        for work in self.grid.overlap:
            run = self._model.runner(work)
            alone_s = statistics.median(self._time(run))
            for moving in ("contiguous", "gathered", "batched"):
                if (moving, "out") not in ways:
                    continue
                for direction in ("out", "in"):
                    beside_s, copy_s = _beside(run, ways[moving, direction])
                    yield Overlap(
                        requests=work.requests,
                        cached=work.cached,
                        new=work.new,
                        moving=moving,
                        direction=direction,
                        tokens=tokens,
                        alone_s=alone_s,
                        beside_s=beside_s,
                        copy_alone_s=_median_of(alone, moving, direction, tokens),
                        copy_beside_s=copy_s,
                    )

    def _time(self, run: Callable[[], object], warm: bool = False) -> tuple[float, ...]:
        """Seconds of each repeat, after one that does not count if it is not warm."""
        if not warm:
            run()
        found: list[float] = []
        begun_s = time.perf_counter()
        while len(found) < self.grid.repeats:
            found.append(self._once(run))
            if len(found) >= 3 and time.perf_counter() - begun_s > POINT_WITHIN_S:
                break
        return tuple(found)

    def _once(self, run: Callable[[], object]) -> float:
        if self.device == "cpu":
            begun_s = time.perf_counter()
            run()
            return time.perf_counter() - begun_s
        torch.cuda.synchronize()
        begin, end = _event(), _event()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return _between(begin, end)

    @contextlib.contextmanager
    def _watched(self, part: str) -> Iterator[None]:
        """Note the card's clocks meanwhile, as its driver tells them."""
        if self.device == "cpu":
            yield
            return
        fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i",
                   "0", f"--loop-ms={SAMPLE_MS}"]  # fmt: skip
        with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log) as watch:
            try:
                yield
            finally:
                watch.terminate()
            watch.wait()
            log.seek(0)
            rows = [row.split(", ") for row in log.read().splitlines() if row.count(",") == 3]
        if rows:
            sm, memory, watts, celsius = zip(*rows, strict=True)
            self._clocks.append(
                Clock(
                    part=part,
                    sm_mhz=_cut(map(float, sm)),
                    memory_mhz=_cut(map(float, memory)),
                    watts=_cut(map(float, watts)),
                    celsius=_cut(map(float, celsius)),
                )
            )


def _noting(run: Callable[[], object], calls_s: list[float]) -> None:
    """Run it, and note how long the call itself takes."""
    begun_s = time.perf_counter()
    run()
    calls_s.append(time.perf_counter() - begun_s)


def _beside(run: Callable[[], object], copy: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of steps and of copies that run at the same time for a second or more."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    steps: list[float] = []
    copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    while time.perf_counter() - begun_s < 1.0 or len(steps) < 5:
        begin, end = _event(), _event()
        begin.record()
        run()
        end.record()
        while not _over(end):  # keep one copy under way and one waiting, as long as the step runs
            if len(copies) < 2 or _over(copies[-2][1]):
                with torch.cuda.stream(stream):
                    copies.append((_event(), _event()))
                    copies[-1][0].record()
                    copy()
                    copies[-1][1].record()
        steps.append(_between(begin, end))
    torch.cuda.synchronize()
    copied = [_between(*pair) for pair in copies]
    return statistics.median(steps), statistics.median(copied)


def _median_of(copies: Sequence[Copy], moving: Moving, direction: Direction, tokens: int) -> float:
    wanted = (moving, direction, tokens)
    return next(c.median_s for c in copies if (c.moving, c.direction, c.tokens) == wanted)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]


def _between(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(begin.elapsed_time(end)) / 1000


def _cut(values: Iterator[float]) -> tuple[int, int, int]:
    """Least, median and most."""
    found = sorted(values)
    return round(found[0]), round(statistics.median(found)), round(found[-1])


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__), "cuda": torch.version.cuda or "none"}
    for package in ("triton", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    if torch.cuda.is_available():
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
        found["driver"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
