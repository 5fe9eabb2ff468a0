"""`make stack-check`: the stack under load, and whether all that should be seen of it is.

Starts everything in docker-compose.yml as processes, lets Locust's users at it for a while, and
asks Prometheus for every service and for every query of the dashboard.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deploy import stack
from deploy.processes import Report

DASHBOARDS = stack.ROOT / "deploy" / "grafana" / "dashboards"
RATE_S = 30
"""What stands for Grafana's `$__rate_interval`, at least."""
SCRAPES_S = 6.0
"""So that what came last has been scraped too."""


NEEDED = ("proxy", "prometheus", "locust")
"""Services without which there is no load, or nothing to see of it."""


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a dashboard."""

    panel: str
    expression: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a check has found."""

    not_started: dict[str, str]
    """Services, and why."""
    unreached: list[str]
    """Services that run but that Prometheus does not reach."""
    queries: int
    empty: list[Query]
    """Queries without data."""
    requests: int
    failures: int

    @property
    def fine(self) -> bool:
        """Whether all is as it should be, but for programs that this machine does not have."""
        return not (self.unreached or self.empty or self.failures) and self.requests > 0


def queries(folder: Path = DASHBOARDS) -> Iterator[Query]:
    """Every query of every dashboard."""
    for path in sorted(folder.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield Query(panel["title"], target["expr"])


def metrics_of(expression: str) -> set[str]:
    """The names of the metrics in a query."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)", " ", expression)
    words = re.findall(r"[a-z_][a-z0-9_:]*", bare)
    return {word for word in words if word not in _WORDS}


_WORDS = {"absent", "sum", "max", "min", "rate", "histogram_quantile", "vector", "or"}


def check(report: Report, *, users: int, seconds: float, gap_s: float) -> Found:
    """Load what runs, then look.

    Args:
        users: of Locust, at once.
        gap_s: mean time between two chunks of a stream.
    """
    requests, failures = load(report, users=users, seconds=seconds, gap_s=gap_s)
    time.sleep(SCRAPES_S)
    with httpx.Client(base_url=_url(report, "prometheus:9090"), trust_env=False) as prometheus:
        asked = list(queries())
        empty = [query for query in asked if not _data(prometheus, query.expression, seconds)]
        unreached = _unreached(prometheus, report)
    not_started = {
        name: status.why
        for name, status in report.services.items()
        if status.state in ("failed", "not started")
    }
    return Found(not_started, unreached, len(asked), empty, requests, failures)


def load(report: Report, *, users: int, seconds: float, gap_s: float) -> tuple[int, int]:
    """Have the Locust of the stack load it, as its web page does. Returns requests and failures."""
    with httpx.Client(base_url=_url(report, "locust:8089"), trust_env=False, timeout=30) as locust:
        form = {"user_count": users, "spawn_rate": users, "gap_s": gap_s}
        locust.post("/swarm", data=form).raise_for_status()
        time.sleep(seconds)
        locust.post("/stop").raise_for_status()
        total = _total(locust)
    _print_statistics(total)
    return sum(row["num_requests"] for row in total), sum(row["num_failures"] for row in total)


def _total(locust: httpx.Client) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = locust.get("/stats/requests").json()["stats"]
    return [row for row in rows if row["name"] != "Aggregated"]


def _print_statistics(rows: list[dict[str, Any]]) -> None:
    print(f"{'':50} {'count':>7} {'failed':>7} {'P50':>8} {'P95':>8} {'P99':>8}")
    for row in rows:
        name = f"{row['method']} {row['name']}"
        percentiles = (row.get(f"response_time_percentile_{p}") for p in ("0.95", "0.99"))
        times = [row["median_response_time"], *(value or 0 for value in percentiles)]
        shown = " ".join(f"{value:8.0f}" for value in times)
        print(f"{name:50} {row['num_requests']:7} {row['num_failures']:7} {shown}")


def _url(report: Report, place: str) -> str:
    return f"http://{report.published[place]}"


def _data(prometheus: httpx.Client, expression: str, seconds: float) -> bool:
    """Whether a query has had data at any time of the load."""
    filled = expression.replace("$__rate_interval", f"{RATE_S}s")
    now_s = time.time()
    form = {"query": filled, "start": now_s - seconds - SCRAPES_S, "end": now_s, "step": 2}
    answer = prometheus.post("/api/v1/query_range", data=form)
    answer.raise_for_status()
    series = answer.json()["data"]["result"]
    return any(value != "NaN" for one in series for _, value in one["values"])


def _unreached(prometheus: httpx.Client, report: Report) -> list[str]:
    targets = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
    up = {target["labels"]["service"] for target in targets if target["health"] == "up"}
    down = {target["labels"]["service"] for target in targets} - up
    names = {"prefill": "prefill-cpu", "decode": "decode-cpu", "redis": "redis-exporter"}
    states = {name: status.state for name, status in report.services.items()}
    return sorted(
        service
        for service in down
        if states.get(names.get(service, service)) in ("running", "healthy")
    )


def runs(report: Report, name: str) -> bool:
    """Whether a service is there."""
    return report.services[name].state in ("healthy", "running")


def main() -> int:
    """Check the stack. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to load it")
    parser.add_argument("--users", type=int, default=6, help="of Locust, at once")
    parser.add_argument("--gap-s", type=float, default=1.0, help="mean time between two chunks")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stream2llm-stack-"))
    try:
        report = stack.up(folder, stack.FILE, "cpu", free_ports=True)
        lacking = [f"{n} ({report.services[n].why})" for n in NEEDED if not runs(report, n)]
        if lacking:
            print(f"can't be checked without {', '.join(lacking)}; logs: {folder}/logs")
            return 1
        found = check(report, users=options.users, seconds=options.seconds, gap_s=options.gap_s)
    finally:
        stack.down(folder)
    tell(found)
    if not found.fine:
        print(f"logs: {folder}/logs")
        return 1
    shutil.rmtree(folder)
    return 0


def tell(found: Found) -> None:
    """Print what was found."""
    for service, why in found.not_started.items():
        print(f"not checked, since it is not started: {service} ({why})")
    for service in found.unreached:
        print(f"runs, but Prometheus does not reach it: {service}")
    for query in found.empty:
        print(f"no data: {query.panel}: {query.expression}")
    print(
        f"{found.requests} requests and values, {found.failures} failed; "
        f"{found.queries - len(found.empty)} of {found.queries} queries have data"
    )


if __name__ == "__main__":
    sys.exit(main())
