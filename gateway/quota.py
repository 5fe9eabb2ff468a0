"""So much per minute: pure arithmetic of an allowance that refills steadily (GCRA).

An allowance is one number, the time at which it will be full again if nothing more is spent. A
whole minute's worth may be spent at once; what is spent beyond that is owed, and until it has been
paid off nothing more is to be had.
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_S = 60.0
NEVER_USED_S = float("-inf")


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast an allowance refills. Times are of any clock that does not go back."""

    per_minute: int

    def left(self, full_s: float, now_s: float) -> int:
        """What can be spent now, in whole units; 0 if something is owed."""
        return max(int((WINDOW_S - self.reset_s(full_s, now_s)) * self._per_s + 1e-6), 0)

    def wait_s(self, full_s: float, now_s: float) -> float:
        """How long to wait until one unit can be spent."""
        return max(self.reset_s(full_s, now_s) + 1 / self._per_s - WINDOW_S, 0.0)

    def spent(self, full_s: float, now_s: float, units: int) -> float:
        """The allowance after something was spent, whether it was there or not."""
        return max(full_s, now_s) + units / self._per_s

    def reset_s(self, full_s: float, now_s: float) -> float:
        """How long until it is full again."""
        return max(full_s - now_s, 0.0)

    @property
    def _per_s(self) -> float:
        return self.per_minute / WINDOW_S


def duration(seconds: float) -> str:
    """As the OpenAI API writes it in its headers: `20ms`, `1s`, `6m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
