"""Streams that come, are fed, answered and replaced at a steady rate, for long: does anything grow?

One gateway on a core of its own, the simulated engine in real time and the load
(`loadtest/flood.py`) on the other. A line every 30 s. At the end the load lets its streams end, and
the gateway is looked at until it is as it was before the load, or too much time has passed.

    make soak OPTIONS="--minutes 30 --rate 450"

Memory is the resident set of the gateway's process. Ended streams can be looked up for a minute and
the first ones live as long as all others, so what it is before `--warm-up` is left out; the growth
is that of a straight line through the rest. Exit code 1: it grew by more than 2%, or something is
left: streams, tasks, open files.

`--stop 10` has the gateway's process stand still for so many seconds, a third into the load, as if
the machine had no time for it, and wants hardly a stream refused or broken in the last third.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import psutil

from deploy.local import Server
from loadtest.flooded import Stand, about, flood, stand

EVERY_S, SAMPLES = 30.0, 3
"""A line comes so often, and stands for so many samples."""
MOST_GROWTH = 0.02
LEAST_SAMPLES = 4
ASK_S = 10.0
METRIC = re.compile(r"^(stream2llm_tasks|stream2llm_open_streams) (\S+)$", re.MULTILINE)
REST_S = 150.0
"""After the load, for ended streams to be forgotten and idle connections to be closed."""
SPARE_FILES, SPARE_TASKS = 16, 8
"""More than before the load: connections to the engine that are kept for a while."""
LOST_SHARE = 0.05
"""Most streams refused or broken, of those that come long after the gateway stood still."""
HEADS = ("s", "chunks/s", "open", "answered", "refused", "ack P99, ms", "MB", "files", "tasks")
WIDTHS = (7, 10, 7, 10, 9, 13, 9, 8, 8)


@dataclass(frozen=True, slots=True)
class Sample:
    """The gateway at one moment."""

    at_s: float
    rss_mb: float
    files: int
    tasks: int
    streams: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=450.0, help="chunks a second")
    parser.add_argument("--streams", type=int, default=2000, help="open at once")
    parser.add_argument("--chunks", type=int, default=30, help="of each stream")
    parser.add_argument("--warm-up", type=float, help="seconds (default: 300, at most half)")
    parser.add_argument("--stop", type=float, default=0.0, help="seconds of standing still")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    seconds = 60 * options.minutes
    warm_up_s = min(300.0, seconds / 2) if options.warm_up is None else options.warm_up
    print(f"{about()}; seed {options.seed}, {options.rate:g} chunks/s, {options.streams} streams")
    with stand(1, options.streams, shared=False) as servers:
        front = servers.fronts[0]
        before = _sample(front, time.monotonic())
        print("".join(f"{head:>{width}}" for head, width in zip(HEADS, WIDTHS, strict=True)))
        soak = _played(servers, seconds, options)
        after = _rested(front, before)
    troubles = [*_judged(soak, warm_up_s, options.stop), *_left(soak.left, before, after)]
    print("\n".join(troubles) or "nothing grew and nothing is left")
    figures = {
        "benchmark": "soak",
        "before": asdict(before),
        "after": asdict(after),
        "errors": dict(soak.errors),
        "growth": soak.growth(warm_up_s),
        "troubles": troubles,
        "samples": [asdict(sample) for sample in soak.samples],
    }
    print(json.dumps(figures))
    return 1 if troubles else 0


@dataclass(slots=True)
class Soak:
    """What was seen."""

    samples: list[Sample] = field(default_factory=list)
    """While the load went on."""
    windows: list[dict[str, Any]] = field(default_factory=list)
    """What the load said then."""
    errors: Counter[str] = field(default_factory=Counter)
    left: int = 0
    """Streams that had no answer long after the last chunk."""

    def growth(self, warm_up_s: float) -> float | None:
        """Of the memory after the warm-up, as a share of it: by a line through the samples. None
        if there are too few."""
        some = [s for s in self.samples if s.at_s >= warm_up_s]
        if len(some) < LEAST_SAMPLES:
            return None
        line = statistics.linear_regression([s.at_s for s in some], [s.rss_mb for s in some])
        begin, end = (line.intercept + line.slope * s.at_s for s in (some[0], some[-1]))
        return end / begin - 1


def _played(servers: Stand, seconds: float, options: argparse.Namespace) -> Soak:
    """The load from its beginning to its end, a line every now and then."""
    soak, front = Soak(), servers.fronts[0]
    arguments = ["--rate", str(options.rate), "--streams", str(options.streams)]
    arguments += ["--chunks", str(options.chunks), "--seed", str(options.seed)]
    arguments += ["--seconds", str(seconds), "--every", str(EVERY_S / SAMPLES), "--answer-all"]
    with flood(servers, arguments) as said:
        begun_s = 0.0
        for told in said:
            soak.errors.update(told["errors"])
            if told["at"] == "steady":
                begun_s = time.monotonic()
                if options.stop:
                    threading.Timer(seconds / 3, _stand_still, (front.pid, options.stop)).start()
            elif told["at"] == "window":
                soak.samples.append(_sample(front, begun_s))
                soak.windows.append(told)
                if len(soak.windows) % SAMPLES == 0:
                    _show(soak)
            else:
                soak.left = told["open"]
    return soak


def _stand_still(pid: int, seconds: float) -> None:
    process = psutil.Process(pid)
    process.suspend()
    time.sleep(seconds)
    process.resume()


def _sample(front: Server, begun_s: float) -> Sample:
    process = psutil.Process(front.pid)
    rss_mb, files = process.memory_info().rss / 1e6, process.num_fds()
    found = {"stream2llm_tasks": -1, "stream2llm_open_streams": -1}
    with suppress(httpx.TransportError):
        text = httpx.get(front.url + "/metrics", timeout=ASK_S, trust_env=False).text
        found |= {name: int(float(value)) for name, value in METRIC.findall(text)}
    at_s = time.monotonic() - begun_s
    tasks, streams = found["stream2llm_tasks"], found["stream2llm_open_streams"]
    return Sample(round(at_s, 1), round(rss_mb, 2), files, tasks, streams)


def _show(soak: Soak) -> None:
    some, sample = soak.windows[-SAMPLES:], soak.samples[-1]
    chunks, seconds = (sum(w[name] for w in some) for name in ("chunks", "seconds"))
    p99_ms = max((w["ack_ms"][2] for w in some if w["ack_ms"]), default=0.0)
    refused = sum(sum(w["errors"].values()) for w in some)
    cells = (f"{sample.at_s:.0f}", f"{chunks / seconds:.0f}", str(sample.streams),
             str(sum(w["answered"] for w in some)), str(refused), f"{p99_ms:.1f}",
             f"{sample.rss_mb:.1f}", str(sample.files), str(sample.tasks))  # fmt: skip
    print("".join(f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True)), flush=True)


def _rested(front: Server, before: Sample) -> Sample:
    """The gateway when it is as it was before the load, or some time later."""
    begun_s = time.monotonic()
    while True:
        after = _sample(front, begun_s)
        if not _left(0, before, after) or after.at_s > REST_S:
            return after
        time.sleep(1.0)


def _left(left: int, before: Sample, after: Sample) -> list[str]:
    """What should not be there any more."""
    found = [f"{left} streams were not answered"] if left else []
    if after.streams:
        found.append(f"{after.streams} streams are open at the gateway")
    if after.tasks > before.tasks + SPARE_TASKS:
        found.append(f"{after.tasks} tasks are left, of {before.tasks} before the load")
    if after.files > before.files + SPARE_FILES:
        found.append(f"{after.files} files are open, of {before.files} before the load")
    return found


def _judged(soak: Soak, warm_up_s: float, stopped_s: float) -> Iterator[str]:
    """What is not as it should be in the course of the load."""
    growth = soak.growth(warm_up_s)
    if growth is None:
        yield "too short to tell whether memory grows"
    else:
        print(f"memory after {warm_up_s:.0f} s: {100 * growth:+.2f}% to the end")
        if growth > MOST_GROWTH:
            yield f"memory grew by {100 * growth:.2f}%"
    for error, times in soak.errors.most_common():
        print(f"refused or broken: {times} times {error}")
    if stopped_s:
        some = soak.windows[-(len(soak.windows) // 3) :]
        opened = sum(window["opened"] for window in some)
        lost = sum(sum(window["errors"].values()) for window in some)
        print(f"stood still for {stopped_s:g} s: at the end {opened} streams opened, {lost} lost")
        if lost > LOST_SHARE * (opened + lost) or not opened:
            yield f"{lost} streams refused or broken at the end, beside {opened} opened"


if __name__ == "__main__":
    sys.exit(main())
