"""Gateways, engines and Redis as processes, faults against them, and clients that know what they
were promised.

Two gateways, two simulated engines, one Redis, links between them that can be slowed, cut and
silenced. Streams begin evenly over the time of the run, faults at random moments, by the seed. See
docs/faults.md for the faults, the promises, and what is counted.

`make chaos`; the exit status is 1 where a promise was broken or something is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from loadtest.chaos.history import History
from loadtest.chaos.run import Plan, Result, run
from loadtest.report import machine, p50_p95_p99, slashed, vllm_version

SHOWN = 20


def main() -> int:
    """Run, and print what came of it."""
    options = _options()
    plan = Plan(
        options.seed, options.streams, options.faults, options.seconds, not options.no_collections
    )
    print(machine(), "-", vllm_version())
    print(
        f"seed {plan.seed}: {plan.streams} streams and {plan.faults} faults "
        f"within {plan.within_s:g} s",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="stream2llm-chaos-") as folder:
        result = asyncio.run(run(plan, Path(folder), _say))
        if options.logs is not None:
            _keep_logs(Path(folder), options.logs)
    show(result)
    return int(result.failed)


def show(result: Result) -> None:
    """The tables."""
    print()
    for name, count in Counter(done.planned.name for done in result.faults).most_common():
        print(f"  {count:4d}  {name}")
    print()
    for again, who in ((True, "that try again"), (False, "that try once")):
        got, wanted = result.answered(again=again)
        share = f"{got / wanted:.1%}" if wanted else ""
        print(f"  answered: {got} of {wanted} streams {who}  {share}")
    got, wanted = map(sum, zip(*(result.answered(again=a) for a in (True, False)), strict=True))
    gave_up = Counter(h.gave_up for h in result.histories if h.gave_up is not None)
    print(f"  given up: {dict(gave_up.most_common())}")
    print(f"  requests: {dict(result.outcomes.most_common())}")
    times = [r.took_s for h in result.histories for r in h.requests if r.what != "answer"]
    print(f"  seconds of requests but answers, P50 / P95 / P99: {slashed(p50_p95_p99(times), 3)}, "
          f"longest {max(times):.1f}")  # fmt: skip
    print(f"  answers begun again: {_sum(result, 'retellings')}; acknowledged posts asked for "
          f"again: {_sum(result, 'lost_posts')}")  # fmt: skip
    late = slashed(p50_p95_p99(result.late_s), 3)
    print(f"  this process was late, P50 / P95 / P99: {late} s, longest {max(result.late_s):.1f}")
    store = result.store
    print(f"  collections: {len(store.acknowledged)} passages acknowledged, {store.searches} "
          f"searches, {store.full} times no room")  # fmt: skip
    print(f"  nothing was held {result.quiet_s:.1f} s after the last client; Redis was empty "
          f"{result.forgotten_s:.1f} s after the gateways")  # fmt: skip
    for what in ("files", "tasks", "redis", "streams", "blocks", "prompts"):
        print(f"  {what}: {getattr(result.before, what)} before, {getattr(result.after, what)}")
    for what in ("hung", "broken", "leaks", "exceptions"):
        found = getattr(result, what)
        print(f"  {what}: {len(found)}")
        for line in found[:SHOWN]:
            print(f"    {line}")
    print(
        json.dumps(
            {
                "streams": len(result.histories),
                "faults": len(result.faults),
                "hung": len(result.hung),
                "broken_promises": len(result.broken),
                "leaks": len(result.leaks),
                "exceptions": len(result.exceptions),
                "answered": got,
                "wanted": wanted,
                "took_s": round(result.took_s, 1),
            }
        )
    )


def _sum(result: Result, name: str) -> int:
    def value(history: History) -> int:
        return int(getattr(history, name))

    return sum(map(value, result.histories))


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _keep_logs(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        (to / log.name).write_bytes(log.read_bytes())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, help="of streams, clients and faults")
    parser.add_argument("--streams", type=int, default=1150)
    parser.add_argument("--faults", type=int, default=220)
    parser.add_argument(
        "--seconds", type=float, default=420.0, help="in which streams and faults begin"
    )
    parser.add_argument("--no-collections", action="store_true", help="and no full disk")
    parser.add_argument("--logs", type=Path, help="folder for the logs of all processes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
