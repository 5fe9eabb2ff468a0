"""Whether this process itself had no time: then a late answer says nothing of who owes it."""

from __future__ import annotations

import asyncio
import time

EVERY_S = 0.2
LATE_S = 0.5


class Pulse:
    """Beats on the event loop, and notices when it could not."""

    def __init__(self) -> None:
        self._beat_s = time.monotonic()
        self._late_s = -float("inf")
        self._next: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to beat on the running loop."""
        self._beat_s = time.monotonic()
        self._next = asyncio.get_running_loop().call_later(EVERY_S, self._beat)

    def stop(self) -> None:
        """Beat no more."""
        if self._next is not None:
            self._next.cancel()

    def was_late(self, since_s: float) -> bool:
        """Whether nothing ran here for a while after this moment of `time.monotonic`.

        Timers that were due meanwhile run before anything that has arrived is read, this beat
        perhaps behind them, so it also counts what the next one would find.
        """
        overdue = time.monotonic() - self._beat_s > EVERY_S + LATE_S
        return overdue or self._late_s > since_s

    def _beat(self) -> None:
        now_s = time.monotonic()
        if now_s - self._beat_s > EVERY_S + LATE_S:
            self._late_s = now_s
        self._beat_s = now_s
        self._next = asyncio.get_running_loop().call_later(EVERY_S, self._beat)
