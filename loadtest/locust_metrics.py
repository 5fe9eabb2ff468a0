"""Locust's statistics for Prometheus, at `/metrics` of its web page."""

from __future__ import annotations

from collections.abc import Iterator

from flask import Response
from locust.env import Environment
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PERCENTILES = (0.5, 0.95, 0.99)
LABELS = ["method", "name"]


def serve_metrics(environment: Environment) -> None:
    """Add the page, where there is a web page at all."""
    if environment.web_ui is None or environment.web_ui.app is None:
        return
    registry = CollectorRegistry()
    registry.register(_Statistics(environment))

    def metrics() -> Response:
        return Response(generate_latest(registry), mimetype="text/plain; version=0.0.4")

    environment.web_ui.app.add_url_rule("/metrics", "metrics", metrics)


class _Statistics(Collector):
    """Every row, as it is when it is asked for."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def collect(self) -> Iterator[Metric]:
        users = GaugeMetricFamily("locust_users", "Users at work")
        users.add_metric([], self._environment.runner.user_count if self._environment.runner else 0)
        yield users
        entries = list(self._environment.stats.entries.values())
        requests = CounterMetricFamily("locust_requests", "Requests and values", labels=LABELS)
        failures = CounterMetricFamily("locust_failures", "Requests that failed", labels=LABELS)
        times = GaugeMetricFamily(
            "locust_response_time_ms", "Percentiles since the start", labels=[*LABELS, "quantile"]
        )
        for entry in entries:
            row = [entry.method or "", entry.name]
            requests.add_metric(row, entry.num_requests)
            failures.add_metric(row, entry.num_failures)
            for share in PERCENTILES:
                value = entry.get_response_time_percentile(share) or 0
                times.add_metric([*row, str(share)], value)
        yield from (requests, failures, times)
