"""Measures what evictions cost on a running engine, and writes its cost model.

    python -m engine_adapter.calibrate --engine http://127.0.0.1:8100 --out FOLDER

Recompute: prompts of random tokens, which no cache knows, from closing the input to the first
token, less the time of a call that computes nothing. Swap: `transfers.py`. Nobody else may use
the engine meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import aiohttp

from engine_adapter.client import EngineClient
from engine_adapter.cost_files import save
from engine_adapter.errors import EngineError, EngineUnavailable
from engine_adapter.messages import EngineInfo, ErrorEvent, Finish, Open, Sampling
from engine_adapter.scheduling.cost import CostModel, Curve, Point, Setup, fit
from engine_adapter.transfers import Transfers, TransfersNotMeasured

SMALLEST_TOKENS = 128
TOKEN_IDS = range(100, 1000)
"""What random prompts are made of: ordinary tokens in every vocabulary."""
IDLE_WITHIN_S = 5.0
PROMPT_WITHIN_S = 600.0

RESTLESS = 1.5
"""Longest over shortest time of one size, from which on the machine was not quiet."""

ANSWER = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)

Seconds = Mapping[int, Sequence[float]]
"""Measured times by count of tokens."""


class CannotCalibrate(Exception):
    """The engine is in use, or can't be measured with these settings."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure."""

    tokens: tuple[int, ...] = ()
    """Counts of tokens; none for powers of two up to what the engine takes."""
    repeats: int = 5
    seed: int = 1


def grid(info: EngineInfo, wanted: Sequence[int]) -> list[int]:
    """The counts of tokens to measure, at least three.

    Raises:
        CannotCalibrate: the engine does not take that many tokens, or they are too few.
    """
    most = min(info.max_model_len - 1, (info.kv_blocks_total - 1) * info.block_size)
    sizes = sorted(set(wanted)) or _doubling(most)
    if sizes and (sizes[-1] > most or sizes[0] < 2):
        raise CannotCalibrate(f"this engine takes prompts of 2 to {most} tokens")
    if len(sizes) < 3:
        raise CannotCalibrate("a curve needs three counts of tokens or more: give --tokens")
    return sizes


def _doubling(most: int) -> list[int]:
    sizes = [1 << i for i in range(most.bit_length()) if SMALLEST_TOKENS <= 1 << i <= most]
    return [*sizes, most] if sizes and most >= 1.5 * sizes[-1] else sizes


class Calibration:
    """One measurement of one engine."""

    def __init__(self, client: EngineClient, options: Options, say: Callable[[str], None]) -> None:
        """
        Args:
            say: told about the progress and the result, a line or more at a time.
        """
        self._client = client
        self._options = options
        self._say = say
        self._random = random.Random(options.seed)
        self._calls_s: list[float] = []

    async def run(self, transfers: Callable[[EngineInfo], Transfers]) -> CostModel:
        """Measure, report and fit.

        Raises:
            CannotCalibrate: the engine is in use, or the settings do not fit it.
            EngineError: it does not answer.
        """
        info = await self._idle()
        sizes = grid(info, self._options.tokens)
        self._say(f"{info.model} on {info.hardware} ({info.settings}), {info.engine}")
        recompute = self._fitted("recompute", await self._recompute(sizes), 2)
        swap = await self._swap(sizes, transfers(info))
        return CostModel(
            setup=Setup(model=info.model, hardware=info.hardware, settings=info.settings),
            source="measured",
            recompute=recompute,
            swap_out=swap and swap[0],
            swap_in=swap and swap[1],
            date=datetime.now(UTC).date().isoformat(),
            versions={"engine": info.engine, "stream2llm": info.plugin_version},
        )

    async def _recompute(self, sizes: Sequence[int]) -> Seconds:
        """Rounds over all sizes, each in another order: a slow minute then hits no size alone."""
        found: dict[int, list[float]] = {n: [] for n in sizes}
        for number in range(self._options.repeats + 1):
            name = f"round {number} of {self._options.repeats}" if number else "warming up"
            self._say(f"{name} ...")
            for tokens in self._random.sample(sizes, len(sizes)):
                await self._idle()
                seconds = await self._first_token_s(self._prompt(tokens), uuid.uuid4().hex)
                if number:
                    found[tokens].append(seconds)
        call_s = statistics.median(self._calls_s)
        self._say(f"a call that computes nothing: {1000 * call_s:.1f} ms, subtracted")
        return {n: [seconds - call_s for seconds in times] for n, times in found.items()}

    async def _swap(self, sizes: Sequence[int], transfers: Transfers) -> tuple[Curve, Curve] | None:
        if await transfers.counters() is None:
            self._say("\nno swapping on this engine: recompute only")
            return None
        out_s: dict[int, list[float]] = {n: [] for n in sizes}
        in_s: dict[int, list[float]] = {n: [] for n in sizes}
        try:
            for tokens in [n for n in sizes for _ in range(self._options.repeats)]:
                await self._idle()
                prefill = partial(self._first_token_s, self._prompt(tokens), uuid.uuid4().hex)
                there_s, back_s = await transfers.seconds(prefill)
                out_s[tokens].append(there_s)
                in_s[tokens].append(back_s)
        except TransfersNotMeasured as e:
            self._say(f"\nrecompute only: {e}")
            return None
        return self._fitted("swap out", out_s, 1), self._fitted("swap in", in_s, 1)

    async def _idle(self) -> EngineInfo:
        """Wait until the engine has nothing to do; what this asks of it takes its time, too."""
        deadline_s = time.monotonic() + IDLE_WITHIN_S
        while True:
            begun_s = time.perf_counter()
            info = await self._client.info()
            took_s = time.perf_counter() - begun_s
            if not (info.running or info.waiting or info.open_prompts):
                self._calls_s.append(took_s)
                return info
            if time.monotonic() > deadline_s:
                raise CannotCalibrate(
                    f"the engine is in use: {info.running} running, {info.waiting} waiting, "
                    f"{info.open_prompts} open; calibrate when nobody uses it"
                )
            await asyncio.sleep(0.02)

    def _prompt(self, tokens: int) -> list[int]:
        return self._random.choices(TOKEN_IDS, k=tokens)

    async def _first_token_s(self, tokens: list[int], salt: str) -> float:
        """From closing the input, of which nothing is computed yet, to the first token."""
        prompt_id = f"calibrate-{uuid.uuid4().hex}"
        await self._client.open(prompt_id, Open(tokens=tokens[:1], cache_salt=salt))
        op = Finish(version=1, keep=1, tokens=tokens[1:], sampling=ANSWER)
        took_s = None
        begun_s = time.perf_counter()
        try:
            async with (
                asyncio.timeout(PROMPT_WITHIN_S),
                self._client.finish(prompt_id, op) as events,
            ):
                async for event in events:
                    took_s = took_s or time.perf_counter() - begun_s
                    if isinstance(event, ErrorEvent):
                        raise EngineError.from_json(event.error)
        except TimeoutError as e:
            raise EngineUnavailable(f"{len(tokens)} tokens take over {PROMPT_WITHIN_S:g} s") from e
        if took_s is None:
            raise EngineUnavailable("the engine's answer is empty")
        return took_s

    def _fitted(self, name: str, seconds: Seconds, degree: int) -> Curve:
        medians = {n: statistics.median(times) for n, times in seconds.items()}
        if min(medians.values()) <= 0:
            raise CannotCalibrate(f"{name} takes no measurable time: {medians}")
        curve = fit([Point(tokens=n, seconds=s) for n, s in medians.items()], degree)
        self._say(table(name, seconds, curve))
        return curve


def table(name: str, seconds: Seconds, curve: Curve) -> str:
    """Measured beside fitted, and how good the fit is."""
    lines = [f"\n{name:10}{'median, s':>11}{'spread, s':>19}{'fitted, s':>11}{'off':>8}"]
    for point in curve.points:
        times, fitted_s = seconds[point.tokens], curve.seconds(point.tokens)
        spread = f"{min(times):.4f} - {max(times):.4f}"
        off = fitted_s / point.seconds - 1
        lines.append(
            f"{point.tokens:>10}{point.seconds:>11.4f}{spread:>19}{fitted_s:>11.4f}{off:>+8.1%}"
        )
    lines.append(
        f"seconds = {curve.fixed_s:.3g} + {curve.s_per_token:.3g} n + "
        f"{curve.s_per_token2:.3g} n^2, R^2 {curve.r2:.4f}"
    )
    apart = max(max(times) / max(min(times), 1e-6) for times in seconds.values())
    if apart > RESTLESS:
        lines.append(
            f"WARNING: times of one size differ by up to {apart:.1f}x; something else used the "
            "machine, so measure again when it is quiet"
        )
    return "\n".join(lines)


async def calibrate(url: str, options: Options, say: Callable[[str], None]) -> CostModel:
    """Measure the engine at a URL; raises as `Calibration.run`."""
    async with aiohttp.ClientSession() as session:
        calibration = Calibration(EngineClient(session, url), options, say)
        return await calibration.run(lambda info: Transfers(session, url, info.accelerators))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m engine_adapter.calibrate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--engine", required=True, metavar="URL", help="the running engine")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for the file")
    parser.add_argument("--tokens", type=_counts, default=(), metavar="N,N,...",
                        help="default: powers of two, up to what the engine takes")  # fmt: skip
    parser.add_argument("--repeats", type=_count, default=5, help="of each; default 5")
    parser.add_argument("--seed", type=int, default=1, help="of the random tokens")
    given = parser.parse_args(arguments)
    options = Options(given.tokens, given.repeats, given.seed)
    try:
        cost = asyncio.run(calibrate(given.engine, options, lambda text: print(text, flush=True)))
    except (CannotCalibrate, EngineError) as e:
        print(f"not calibrated: {e}", file=sys.stderr)
        return 1
    print(f"\nwritten to {save(cost, given.out)}")
    return 0


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("less than 1")
    return count


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
