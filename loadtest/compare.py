"""Chosen workloads against chosen targets, in one run: a report with tables and pictures.

- `simulated`: the scheduler that ships on a simulated 2x H100, waiting and by every policy.
- `waiting`: stock vLLM on this machine with the small model; each prompt is sent whole.
- `warming`: the same; one-token completions leave the growing prompt in its prefix cache.
- `sessions`: vLLM's own `StreamingInput`.
- `gateway`: a gateway in front of vLLM with the plug-in, by every policy.

`make report`. Into the folder `--out` go `report.json` (every figure, with seeds, versions,
machine and settings), `report.md` (tables), and the pictures.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from loadtest import real, simulation
from loadtest.plots import draw
from loadtest.published import RATES
from loadtest.report import processor, vllm_version
from loadtest.results import LEGEND, SIMULATED, Result, load, markdown, save
from loadtest.simulation import Case, Played

WORKLOADS = tuple(RATES)
TOKENS = 288
RECORDED = 24
"""Queries of each simulated row of which the Gantt chart is made."""
VERSIONS = ("aiohttp", "matplotlib", "numpy", "torch", "transformers")

T = TypeVar("T")


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "report.json"
    if options.redraw:
        write(options.out, *load(file))
        return 0
    begun_s = time.perf_counter()
    about = about_this(options)
    results: list[Result] = []
    for target in options.targets:
        results += TARGETS[target](options)
        about["took_s"] = round(time.perf_counter() - begun_s, 1)
        save(file, results, about)  # what there is, should a later target fail
    write(options.out, results, about)
    print(f"{options.out / 'report.md'}: {len(results)} rows in {about['took_s']:.0f} s")
    return 0 if all(result.errors == 0 for result in results) else 1


def simulated(options: argparse.Namespace) -> Iterator[Result]:
    """Both ends of what streaming can do, on a virtual clock: waiting, and every policy."""
    cases = [
        Case(name, qps, options.delay_factor, policy, options.sim_queries, options.seed,
             recorded=RECORDED)
        for name in options.workloads
        for qps in options.qps or RATES[name]
        for policy in (simulation.WAITING, *simulation.POLICIES)
    ]  # fmt: skip
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for case, played in zip(cases, pool.map(simulation.play, cases), strict=True):
            print(f"  simulated {case.name}: {played.host_s:.0f} s", flush=True)
            yield result_of(case, played)


def result_of(case: Case, played: Played) -> Result:
    """A row of the report."""
    return Result(
        engine=SIMULATED,
        workload=case.workload,
        qps=case.qps,
        delay_factor=case.delay_factor,
        target=case.policy,
        queries=case.queries,
        errors=0,
        ttft_s=played.ttft_s,
        completion_s=played.completion_s,
        computed_tokens=played.computed_tokens,
        invalidated_tokens=played.invalidated_tokens,
        preemptions=played.preemptions,
        over_oracle=played.over_oracle,
        lines=played.lines,
    )


TARGETS: dict[str, Callable[[argparse.Namespace], Iterator[Result]]] = {
    SIMULATED: simulated,
    **{name: partial(real.played, name) for name in real.SIDES},
}


def about_this(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    tokens = " or ".join(str(count) for count in dict.fromkeys(options.tokens.values()))
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "vllm": vllm_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "settings": settings,
        "real": "smollm2-135m-instruct, float32, on this machine's CPU; traces scaled to "
        f"{tokens} tokens a prompt; KV of 24 mean prompts over {options.memory_share}",
        "simulated": "ESTIMATED step times of Llama-3.1-8B on 2x H100, or 2x H200 with "
        f"{simulation.HOST_BYTES >> 30} GiB of host memory where delays are multiplied; steps of "
        "8192 tokens; answers of one token",
    }


def write(folder: Path, results: Sequence[Result], about: dict[str, Any]) -> None:
    """The tables and the pictures."""
    pictures = draw(results, folder)
    lines = [f"- {name}: {value}" for name, value in about.items() if not isinstance(value, dict)]
    lines += [
        f"- {name}: " + ", ".join(f"{key} {value}" for key, value in about[name].items())
        for name in ("versions", "settings")
    ]
    shown = [f"![{path.stem}]({path.name})" for path in pictures]
    parts = ["# Report", "\n".join(lines), LEGEND.strip(), markdown(results).strip(), *shown]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def listed(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a list with commas in between, of these words."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in choices]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(choices)}")
        return words

    return read


def each(read: Callable[[str], T]) -> Callable[[str], dict[str, T]]:
    """Reads a value for every workload, or `name=value` for some; what is empty is left out."""

    def values(text: str) -> dict[str, T]:
        found: dict[str, T] = {}
        for part in text.split(",") if "=" in text else [f"={text}"]:
            name, _, value = part.partition("=")
            if name and name not in WORKLOADS:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(WORKLOADS)}")
            if value:
                found |= dict.fromkeys([name] if name else WORKLOADS, read(value))
        return found

    return values


def rates(text: str) -> list[float]:
    """Reads queries per second, with commas in between."""
    values = [float(word) for word in text.split(",")]
    if min(values) <= 0:
        raise argparse.ArgumentTypeError("a rate must be above 0")
    return values


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", type=listed(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--targets", type=listed(tuple(TARGETS)), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=1)
    sim = parser.add_argument_group("simulated rows")
    sim.add_argument("--sim-queries", type=int, default=300, help="in each")
    sim.add_argument("--qps", type=rates, help="queries per second (default: the paper's)")
    sim.add_argument("--delay-factor", type=float, default=1.0, help="of times within a query")
    sim.add_argument("--processes", type=int, default=os.cpu_count(), help="that simulate")
    engine = parser.add_argument_group("rows of a real engine")
    engine.add_argument("--queries", type=int, default=36, help="in each")
    engine.add_argument(
        "--real-qps", type=each(rates), default="",
        help="for all workloads, or crawl=1.2,ann=1.6 (default: as keeps 24 prompts open)",
    )  # fmt: skip
    engine.add_argument(
        "--tokens", type=each(int), default="",
        help=f"of the mean prompt, for all workloads or for some (default: {TOKENS})",
    )  # fmt: skip
    engine.add_argument("--answer-tokens", type=int, default=4)
    engine.add_argument("--step-tokens", type=int, default=128)
    engine.add_argument("--memory-share", type=int, default=1, help="4: KV for a quarter of them")
    engine.add_argument("--patience", type=float, default=20.0, help="seconds without a step")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder")
    parser.add_argument("--redraw", action="store_true", help="tables and pictures from the JSON")
    options = parser.parse_args()
    options.tokens = dict.fromkeys(WORKLOADS, TOKENS) | options.tokens
    return options


if __name__ == "__main__":
    sys.exit(main())
