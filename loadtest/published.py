"""What arXiv 2604.16395 publishes: TTFT by workload, queries per second, and policy."""

from __future__ import annotations

from typing import Final

from loadtest.report import Cuts

TTFT_S: Final[dict[str, Cuts]] = {
    "crawl 0.5 non-streaming": (0.120, 0.882, 1.881),
    "crawl 1 non-streaming": (0.140, 1.079, 2.167),
    "crawl 2 non-streaming": (0.198, 1.692, 2.691),
    "crawl 4 non-streaming": (0.956, 4.923, 6.318),
    "crawl 0.5 default": (0.028, 0.230, 0.645),
    "crawl 1 default": (0.031, 0.310, 0.770),
    "crawl 2 default": (0.040, 0.426, 1.057),
    "crawl 4 default": (0.080, 2.926, 5.498),
    "ann 0.25 non-streaming": (0.211, 0.889, 3.162),
    "ann 0.5 non-streaming": (0.209, 1.055, 3.280),
    "ann 1 non-streaming": (0.246, 2.053, 4.218),
    "ann 2 non-streaming": (0.398, 3.699, 5.295),
    "ann 0.25 default": (0.116, 0.542, 1.843),
    "ann 0.5 default": (0.128, 0.601, 2.206),
    "ann 1 default": (0.148, 0.749, 2.780),
    "ann 2 default": (0.265, 1.972, 3.626),
    "crawl x10 4 non-streaming": (0.638, 6.034, 8.969),
}
"""Seconds, P50 / P95 / P99. The last row is of 2x H200, the others of 2x H100. Of default streaming
under that pressure only the P99 is published: 12.65 s."""

SPEEDUPS: Final[dict[str, Cuts]] = {
    "crawl 0.5 fcfs": (4.3, 4.5, 3.1), "crawl 0.5 lcas": (4.3, 4.4, 3.0),
    "crawl 1 fcfs": (4.6, 4.8, 3.2), "crawl 1 lcas": (4.6, 4.6, 3.7),
    "crawl 2 fcfs": (4.9, 6.2, 4.0), "crawl 2 lcas": (4.8, 5.3, 3.4),
    "crawl 4 fcfs": (12.9, 4.9, 1.8), "crawl 4 lcas": (12.6, 3.9, 2.6),
    "ann 0.25 fcfs": (1.8, 1.7, 1.7), "ann 0.25 lcas": (1.8, 1.5, 1.7),
    "ann 0.5 fcfs": (1.7, 1.7, 1.5), "ann 0.5 lcas": (1.7, 1.6, 1.6),
    "ann 1 fcfs": (1.5, 2.7, 1.4), "ann 1 lcas": (1.5, 2.5, 1.7),
    "ann 2 fcfs": (1.5, 1.9, 1.4), "ann 2 lcas": (1.4, 1.9, 1.7),
    "crawl x10 4 fcfs": (8.3, 12.0, 8.6), "crawl x10 4 lcas": (7.8, 11.8, 9.1),
}  # fmt: skip
"""Over non-streaming; with the paper's cost model and swapping."""

RATES: Final = {"crawl": (0.5, 1.0, 2.0, 4.0), "ann": (0.25, 0.5, 1.0, 2.0)}
"""Queries per second of its tables."""
