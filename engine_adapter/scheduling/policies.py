"""Orders of unfinished requests. A policy is one key function; lower goes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from engine_adapter.scheduling.plan import View

Key = Callable[[View], Any]


def fcfs(view: View) -> tuple[object, ...]:
    """First come, first served, in classes.

    Running answers first (one token each: a long prefill never stalls them), then full
    requests, then partial ones, those with nothing to compute last; by arrival in each.
    After the policy of the same name in Stream2LLM (arXiv 2604.16395), which has no class
    of its own for running answers.
    """
    idle = view.remaining_tokens == 0
    return (not view.decoding, not view.full, idle, view.priority, view.arrival_s)


def order(views: Iterable[View], key: Key = fcfs) -> list[View]:
    """The views, the most urgent first; ties keep the order they came in."""
    return sorted(views, key=key)
