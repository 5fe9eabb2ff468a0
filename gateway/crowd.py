"""How many streams of one model may be open: as many as its engines answer without a long queue.

The bound is learned from the queue in front of first tokens, as TCP Vegas learns a congestion
window (Brakmo, O'Malley and Peterson, 1994) and Netflix's concurrency-limits a bound on requests
(`VegasLimit`): there is a queue if more wait than would with nobody in their way. By Little's law

    queue = mean number of streams that wait for their first token
            - answers per second * mean TTFT when nobody was in the way

A stream that is let in now joins that queue when its retrieval has ended, so the bound is moved
once in the time that a stream takes to its first token, and by half of what is too much. It never
falls below the streams that the best turn of late would have needed without any queue, as BBR has
it (Cardwell and others, 2016): an engine that stood still for a moment is not taken for a slow one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from gateway.errors import Overloaded

LEAST = 8
FEW, MANY = 1.0, 2.0
"""Times the decimal logarithm of the streams: a queue below the one lets the bound rise, above the
other fall. Netflix's are 3 and 6, for requests that all wait; of streams most still retrieve."""
TOLERATED_S = 0.1
"""Whom a queue costs no more than this, it does not hurt."""
NEARLY_NONE = 0.1
"""Of a short queue: such a one says that the bound is far too low."""
LEAP, GROWTH = 1.5, 1.05
"""Factors of the bound when it rises: while there is nearly no queue, and else."""
LATE_S = 60.0
SHARE = 0.5
"""Of what a queue has too many: by this the bound falls."""
MIN_ANSWERS = 10
"""What fewer have waited says nothing; but a queue is looked at after four times its turn."""
MIN_TURN_S = 1.0
SMOOTHING = 0.05


class Crowd:
    """The streams of one model at this gateway."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.bound = math.inf
        """There is none before the first queue."""
        self._clock_s = clock_s
        self._unhindered_s: float | None = None
        """Least mean TTFT of any turn."""
        self._to_first_token_s = 0.0
        """From the opening of a stream, smoothed."""
        self._needed: deque[tuple[float, float]] = deque()
        """When turns of late have ended, and the streams that would have been enough for them."""
        self._waiting = 0
        self._now_s = clock_s()
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._turn_s = self._now_s
        self._waited_s = 0.0
        """Of all streams together, for their first tokens."""
        self._answers, self._ttft_s, self._open_s = 0, 0.0, 0.0
        self._peak, self._full = 0, False

    # What streams do.

    def check(self, alive: int, own: int, share: float) -> None:
        """Whether a tenant may open one more. A flood of one does not keep another from its share,
        which then goes beyond the bound until some of the flood has ended.

        Args:
            alive: streams that have not ended.
            own: those of the tenant.
            share: its part of the bound while others have streams too.

        Raises:
            Overloaded
        """
        self._go_on()
        self._peak = max(self._peak, alive)
        if alive + 1 > self.bound and own + 1 > share * self.bound:
            self._full = True
            raise Overloaded(f"{alive} streams are open, more than are answered without a queue")

    def asked(self) -> None:
        """The input of one was closed: it waits for its first token."""
        self._go_on()
        self._waiting += 1

    def answered(self, ttft_s: float, open_s: float) -> None:
        """One has its first token.

        Args:
            ttft_s: since its input was closed.
            open_s: since it was opened.
        """
        self.left()
        self._answers += 1
        self._ttft_s += ttft_s
        self._open_s += open_s
        weight = SMOOTHING if self._to_first_token_s else 1.0
        self._to_first_token_s += weight * (open_s - self._to_first_token_s)

    def left(self) -> None:
        """One does not wait any more."""
        self._go_on()
        self._waiting -= 1

    # How the bound moves.

    def _go_on(self) -> None:
        now_s = self._clock_s()
        self._waited_s += self._waiting * (now_s - self._now_s)
        self._now_s = now_s
        lasted_s, due_s = now_s - self._turn_s, max(MIN_TURN_S, self._to_first_token_s)
        if lasted_s >= due_s and (self._answers >= MIN_ANSWERS or lasted_s >= 4 * due_s):
            self._learn(lasted_s)
            self._begin_turn()

    def _learn(self, lasted_s: float) -> None:
        if self._answers >= MIN_ANSWERS:
            mean_s = self._ttft_s / self._answers
            self._unhindered_s = min(self._unhindered_s or mean_s, mean_s)
        unhindered_s = self._unhindered_s or 0.0
        hindered_s = self._ttft_s - self._answers * unhindered_s
        self._needed.append((self._now_s, (self._open_s - hindered_s) / lasted_s))
        while self._needed[0][0] < self._now_s - LATE_S:
            self._needed.popleft()
        queue = (self._waited_s - self._answers * unhindered_s) / lasted_s
        streams = min(self.bound, self._peak)
        scale = math.log10(max(streams, 10.0))
        most = max(MANY * scale, TOLERATED_S * self._answers / lasted_s)
        if queue > most:
            needed = max(streams for _, streams in self._needed)
            self.bound = max(streams - SHARE * (queue - most), needed, LEAST)
        elif self._full and queue < FEW * scale:
            leaps = queue < NEARLY_NONE * FEW * scale
            self.bound = self.bound * (LEAP if leaps else GROWTH) + 1
