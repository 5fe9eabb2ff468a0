"""The highest rate of chunks that gateways hold, with many streams open and a simulated engine.

A rate is held when P99 of the acknowledgements is below 50 ms, nothing is refused or lost, and 99%
of what is due is taken in time; what is not counts in the P99 with a second. The search goes up in
steps of a quarter and then halves what is left between the highest rate that was held and the
lowest that was not; the highest is run again with other seeds. Every run has servers of its own.
Rows:

- `1`: one gateway, with the index in the process.
- `1, Redis`: one gateway, every chunk written to Redis before it is acknowledged.
- `2, Redis`: two gateways, each stream spoken to at its own.
- `1 of 0.4`, `2 of 0.4`: the same two, each gateway with 0.4 of a core and no more, all of them on
  the first core, and with as many streams open for each part of a core. These show how a second
  gateway helps where two whole ones have no room. Left out where this user can't make control
  groups.

The load (`loadtest/flood.py`) opens, feeds, finishes and replaces streams, so a chunk's share of
that is in its processor time, as are the gateway's operations to the engine. A chunk has 20 words,
all texts are different. The first gateway has a core of its own; the engine, the load and the
second gateway share the other ones: on two cores two whole gateways are no faster than one.

`make bench-throughput`; the last line is a JSON object with the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import psutil

from loadtest.bench_gateway import busy_s
from loadtest.flooded import Stand, about, flood, stand
from loadtest.quota import NoQuota


class Row(NamedTuple):
    """What stands before the engine."""

    gateways: int
    shared: bool
    """They have an index in Redis."""
    share: float | None = None
    """Of a core, for each; None: all of it."""


ROWS = {
    "1": Row(1, shared=False),
    "1, Redis": Row(1, shared=True),
    "2, Redis": Row(2, shared=True),
    "1 of 0.4": Row(1, shared=True, share=0.4),
    "2 of 0.4": Row(2, shared=True, share=0.4),
}
MOST_P99_MS = 50.0
LEAST_SHARE = 0.99
"""Of what was due in a window, to be taken within it or a second later."""
STEP = 1.25
IDLE_S = 3.0
"""After the start, before the memory of a gateway without streams is looked at."""
HEADS = ("chunks/s", "streams/s", "open", "ack P50 / P99 / max, ms", "load late P99",
         "CPU ms/chunk", "cores", "chunks/s per core", "MB per 1,000", "CPU % per 1,000",
         "errors")  # fmt: skip
WIDTHS = (9, 10, 6, 26, 14, 13, 7, 18, 13, 16, 7)


@dataclass(frozen=True, slots=True)
class Run:
    """One rate, once. CPU and memory are of all gateway processes together."""

    row: str
    rate: float
    seed: int
    chunks_per_s: float
    streams_per_s: float
    open: int
    ack_ms: tuple[float, float, float, float]
    """P50, P95, P99, the largest; of what was not taken in time, the least that it took."""
    late_p99_ms: float
    """Of the load itself: where this is not small, the figures are not the gateways' alone."""
    cpu_ms_per_chunk: float
    cores: float
    """Kept busy by the gateways."""
    mb_per_1000: float
    """Resident memory beyond that of idle gateways, for 1,000 open streams."""
    engine_cores: float
    taken_share: float
    errors: dict[str, int]

    @property
    def held(self) -> bool:
        in_time = self.ack_ms[2] < MOST_P99_MS and self.taken_share >= LEAST_SHARE
        return in_time and not self.errors

    @property
    def per_core(self) -> float:
        return self.chunks_per_s / self.cores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="; ".join(ROWS), help=f"some of: {'; '.join(ROWS)}")
    parser.add_argument("--streams", type=int, default=2000, help="open at once; for a whole core")
    parser.add_argument("--begin", type=float, default=800.0, help="chunks a second, at first")
    parser.add_argument("--rates", help="these, e.g. 500,1000, instead of a search")
    parser.add_argument("--halvings", type=int, default=2)
    parser.add_argument("--again", type=int, default=2, help="more runs of the highest rate")
    parser.add_argument("--seconds", type=float, default=15.0, help="that are measured in a run")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"{about()}; seeds from {options.seed}, {options.seconds:g} s each")
    runs = list[Run]()
    for row in ROWS:
        if row in [name.strip() for name in options.rows.split(";")]:
            try:
                runs += _of_row(row, options)
            except NoQuota as e:
                print(f"left out: {e}")
    _report(runs)
    return 0


def _of_row(row: str, options: argparse.Namespace) -> list[Run]:
    print(f"gateways: {row}")
    print("".join(f"{head:>{width}}" for head, width in zip(HEADS, WIDTHS, strict=True)))
    if options.rates:
        return [_run(row, float(rate), options) for rate in options.rates.split(",")]
    share = ROWS[row].share or 1.0
    runs, low, high, rate = list[Run](), 0.0, 0.0, options.begin * share
    while not high:
        runs.append(_run(row, rate, options))
        low, high = (rate, high) if runs[-1].held else (low, rate)
        rate *= STEP
    for _ in range(options.halvings):
        runs.append(_run(row, (low + high) / 2, options))
        low, high = (runs[-1].rate, high) if runs[-1].held else (low, runs[-1].rate)
    if low:
        runs += [_run(row, low, options, 1 + i) for i in range(options.again)]
    return runs


def _run(row: str, rate: float, options: argparse.Namespace, more: int = 0) -> Run:
    gateways, shared, share = ROWS[row]
    streams = options.streams if share is None else round(options.streams * gateways * share)
    seed = options.seed + more
    arguments = ["--rate", str(rate), "--streams", str(streams), "--seed", str(seed)]
    arguments += ["--seconds", str(options.seconds)]
    with stand(gateways, streams, shared=shared, share=share) as servers:
        run = _measured(row, rate, seed, servers, arguments)
    _show(run)
    return run


def _measured(row: str, rate: float, seed: int, servers: Stand, arguments: list[str]) -> Run:
    fronts = [psutil.Process(front.pid) for front in servers.fronts]
    engine = psutil.Process(servers.engine.pid)
    time.sleep(IDLE_S)
    idle_bytes = sum(front.memory_info().rss for front in fronts)
    with flood(servers, arguments) as said:
        steady = next(said)
        begun_s, cpu_s, engine_s = time.perf_counter(), sum(map(busy_s, fronts)), busy_s(engine)
        seen = next(said)
        wall_s = time.perf_counter() - begun_s
        cores = (sum(map(busy_s, fronts)) - cpu_s) / wall_s
        engine_cores = (busy_s(engine) - engine_s) / wall_s
        grown_bytes = sum(front.memory_info().rss for front in fronts) - idle_bytes
    return Run(
        row=row,
        rate=rate,
        seed=seed,
        chunks_per_s=seen["chunks_per_s"],
        streams_per_s=round(seen["answered"] / seen["seconds"], 1),
        open=seen["open"],
        ack_ms=seen["ack_ms"] or (0.0, 0.0, 0.0, 0.0),
        late_p99_ms=seen["late_ms"][2] if seen["late_ms"] else 0.0,
        cpu_ms_per_chunk=round(1000 * cores / max(seen["chunks_per_s"], 1), 3),
        cores=round(cores, 3),
        mb_per_1000=round(1000 * grown_bytes / max(seen["open"], 1) / 1e6, 1),
        engine_cores=round(engine_cores, 3),
        taken_share=round(seen["chunks"] / max(seen["due"], 1), 4),
        errors=steady["errors"] | seen["errors"],
    )


def _show(run: Run) -> None:
    p50, _, p99, largest = run.ack_ms
    cells = (f"{run.chunks_per_s:.0f}", f"{run.streams_per_s:.0f}", str(run.open),
             f"{p50:.1f} / {p99:.1f} / {largest:.0f}", f"{run.late_p99_ms:.1f}",
             f"{run.cpu_ms_per_chunk:.3f}", f"{run.cores:.2f}", f"{run.per_core:.0f}",
             f"{run.mb_per_1000:.1f}", f"{100_000 * run.cores / max(run.open, 1):.0f}",
             str(sum(run.errors.values())))  # fmt: skip
    line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    print(line + ("  held" if run.held else "  not held"), *run.errors or "", flush=True)


def _report(runs: list[Run]) -> None:
    """The highest rate of each row that was held in every run, and the JSON object."""
    for row in dict.fromkeys(run.row for run in runs):
        rates: dict[float, list[Run]] = {}
        for run in runs:
            if run.row == row:
                rates.setdefault(run.rate, []).append(run)
        held = [rate for rate, some in rates.items() if all(run.held for run in some)]
        if not held:
            print(f"{row}: no rate was held in every run")
            continue
        some = rates[max(held)]
        p99_ms = [run.ack_ms[2] for run in some]
        chunks = statistics.median(run.chunks_per_s for run in some)
        print(f"{row}: {chunks:.0f} chunks/s with {some[0].open} streams open, "
              f"P99 {statistics.median(p99_ms):.1f} ms ({min(p99_ms):.1f} - {max(p99_ms):.1f}), "
              f"{len(some)} runs")  # fmt: skip
    print(json.dumps({"benchmark": "throughput", "runs": [asdict(run) for run in runs]}))


if __name__ == "__main__":
    sys.exit(main())
