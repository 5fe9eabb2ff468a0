"""Whether an engine is given streams, by how its operations went: a value that changes with what
is told to it, the clock given.

    healthy --failures in a row--> ejected --its time is over, and it answers--> half-open
       ^                              ^                                             |
       |                              +------------ an operation fails -------------+
       +------------------------------------------- an operation succeeds ----------+

A half-open engine is given one stream as a trial, and the next one when that has not said
anything in time. Each ejection lasts longer than the one before, unless the engine has been healthy
for long in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

State = Literal["healthy", "ejected", "half-open"]

FIRST_S = 1.0
"""The first ejection; each one after it is twice as long."""
LONGEST_S = 60.0
TRIAL_S = 30.0
"""A trial that has said nothing for so long is over."""


@dataclass(frozen=True, slots=True)
class Health:
    """One engine's health. All times are seconds of one clock."""

    state: State = "healthy"
    failures: int = 0
    """Operations that failed one after the other, the last one included."""
    ejections: int = 0
    """One soon after the other."""
    since_s: float = 0.0
    """When it came to this state."""
    retry_s: float = 0.0
    """Ejected: not before then may it come back. Half-open: when the next trial may begin."""

    def takes(self, now_s: float) -> bool:
        """Whether a stream may be placed there now."""
        if self.state == "half-open":
            return now_s >= self.retry_s
        return self.state == "healthy"

    def failed(self, now_s: float, eject_after: int, luck: float) -> Health:
        """An operation failed.

        Args:
            eject_after: so many in a row eject.
            luck: evenly from 0 to 1, so that gateways do not all come back in the same moment.
        """
        if self.state == "ejected":
            return self  # it began before
        failures = self.failures + 1
        if self.state == "healthy" and failures < eject_after:
            return replace(self, failures=failures)
        calm = self.state == "healthy" and now_s - self.since_s > LONGEST_S
        ejections = 1 if calm else self.ejections + 1
        away_s = min(FIRST_S * 2 ** min(ejections - 1, 30), LONGEST_S) * (0.5 + luck / 2)
        return Health("ejected", failures, ejections, now_s, now_s + away_s)

    def worked(self, now_s: float) -> Health:
        """An operation succeeded."""
        match self.state:
            case "healthy":
                return replace(self, failures=0) if self.failures else self
            case "half-open":
                return Health("healthy", ejections=self.ejections, since_s=now_s)
            case "ejected":
                return self  # it began before

    def answers(self, now_s: float) -> Health:
        """It was asked for its info, and gave it."""
        if self.state == "ejected" and now_s >= self.retry_s:
            return replace(self, state="half-open", since_s=now_s, retry_s=now_s)
        return self

    def given(self, now_s: float) -> Health:
        """A stream was placed there."""
        if self.state == "half-open":
            return replace(self, retry_s=now_s + TRIAL_S)
        return self
