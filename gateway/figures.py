"""Metrics that are looked up when Prometheus asks: how streams and engines are just then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine_adapter.messages import EngineInfo


class StreamFigures(Collector):
    """Streams by state."""

    def __init__(self, states: tuple[str, ...]) -> None:
        """
        Args:
            states: that are shown, also where no stream is in one.
        """
        self.count: Callable[[], Mapping[str, int]] = dict
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = GaugeMetricFamily(
            "stream2llm_live_streams", "Streams not ended yet, by state", labels=["state"]
        )
        counts = self.count()
        for state in self._states:
            family.add_metric([state], counts.get(state, 0))
        yield family


class EngineFigures(Collector):
    """What each engine said last of itself; nothing of one that does not answer."""

    def __init__(self) -> None:
        self.said: dict[str, EngineInfo] = {}

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        for name, what, figure in _GAUGES:
            gauge = GaugeMetricFamily(f"stream2llm_engine_{name}", what, labels=["engine"])
            for url, info in self.said.items():
                gauge.add_metric([url], figure(info))
            yield gauge
        for name, what, figure in _COUNTERS:
            counter = CounterMetricFamily(f"stream2llm_engine_{name}", what, labels=["engine"])
            for url, info in self.said.items():
                counter.add_metric([url], figure(info))
            yield counter


def _kv_use(info: EngineInfo) -> float:
    return 1 - info.kv_blocks_free / info.kv_blocks_total if info.kv_blocks_total else 0.0


_Figure = tuple[str, str, Callable[[EngineInfo], float]]

_GAUGES: tuple[_Figure, ...] = (
    ("kv_use_ratio", "Share of an engine's KV blocks that requests hold", _kv_use),
    ("running", "Requests in an engine's steps", lambda info: info.running),
    ("waiting", "Requests that wait at an engine", lambda info: info.waiting),
    ("open_prompts", "Prompts open at an engine", lambda info: info.open_prompts),
    ("waiting_tokens", "Tokens an engine could compute and has not", lambda i: i.waiting_tokens),
)
_COUNTERS: tuple[_Figure, ...] = (
    ("preemptions", "Requests whose KV an engine gave back to make room", lambda i: i.preemptions),
    ("invalidated_tokens", "Tokens an engine computed for nothing: their prompt changed",
     lambda info: info.invalidated_tokens),
    ("abandoned_tokens", "Tokens an engine computed for nothing: their prompt was given up",
     lambda info: info.abandoned_tokens),
)  # fmt: skip
