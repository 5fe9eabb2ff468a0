"""How many streams of one model may be open: as many as its engines answer without a long queue.

The bound is learned from the queue in front of first tokens, as TCP Vegas learns a congestion
window (Brakmo, O'Malley and Peterson, 1994) and Netflix's concurrency-limits a bound on requests
(`VegasLimit`): there is a queue if more wait than would with nobody in their way. By Little's law

    queue = mean number of streams that wait for their first token
            - answers per second * mean TTFT when nobody was in the way

or, if that is more, what those who have one have waited too long per second. It is too long if it
costs each more than twice its TTFT without it, and has more than two streams: where few are asked
for, one answer that is slow by itself is no queue. A stream that is let in now joins that queue
when its retrieval has ended, so the bound is moved once in twice the time that this takes, and by
three quarters of what is too much. It never falls below the streams that the best turn of late
would have needed without any queue, as BBR has it (Cardwell and others, 2016): an engine that stood
still for a moment is not taken for a slow one.

Streams are also let in evenly, at the bound over the time that one is open (Little again), a few
more at once: BBR's pacing. Where one may come for each that ends, those that have queued together
let others in together, who queue together when their retrieval has ended: with as many open, fewer
are answered, and the slowest wait twice as long.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from gateway.errors import Overloaded

LEAST = 8
TOLERATED, TOLERATED_S = 2.0, 0.1
"""What a queue may cost each: so many times its TTFT without it, and in any case."""
TOLERATED_STREAMS = 2.0
"""What a queue may have, whatever it costs."""
SHORT, NEARLY_NONE = 0.5, 0.05
"""Of the longest queue that is tolerated: a shorter one lets the bound rise, one that hardly is
there says that it is far too low."""
LEAP, GROWTH = 1.5, 1.05
"""Factors of the bound when it rises: while there is nearly no queue, and else."""
LATE_S = 60.0
SHARE = 0.75
"""Of what a queue has too many: by this the bound falls."""
MIN_ANSWERS = 10
"""What fewer have waited says nothing; but a queue is looked at after twice its turn."""
TURN, MIN_TURN_S = 2.0, 1.0
"""Of the time from a stream's opening to its first token, and in any case."""
TOGETHER, MIN_TOGETHER = 0.125, 2.0
"""Of the bound, and in any case: so many may be let in at once."""
CROWDED = 0.25
"""Of the bound: while fewer are open, nobody is let in too soon."""
SMOOTHING = 0.05


class Turn(NamedTuple):
    """What was seen between two looks at the bound."""

    ended_s: float
    answers_per_s: float
    life_s: float
    """Mean time that streams were open; infinite if too few have ended to say."""


class Crowd:
    """The streams of one model at this gateway."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.bound = math.inf
        """There is none before the first queue."""
        self._clock_s = clock_s
        self._unhindered_s: float | None = None
        """Least mean TTFT of any turn."""
        self._retrieval_s = 0.0
        """From the opening of a stream to its question, smoothed."""
        self._life_s = 0.0
        """From its opening to its end, less what others have cost it before its first token: the
        least mean of late. More of them also slow each other's answers down."""
        self._room = 0.0
        """Streams that may be let in at this moment, as far as the pace goes."""
        self._paced_s = clock_s()
        self._turns: deque[Turn] = deque()
        """Those of late."""
        self._waiting = 0
        self._now_s = clock_s()
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._turn_s = self._now_s
        self._waited_s = 0.0
        """Of all streams together, for their first tokens."""
        self._answers, self._ttft_s, self._open_s = 0, 0.0, 0.0
        self._ended, self._lived_s = 0, 0.0
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
        self._make_room()
        self._peak = max(self._peak, alive)
        full = alive + 1 > self.bound
        hurried = self._room < 1.0 and alive >= max(LEAST, CROWDED * self.bound)
        if (full or hurried) and own + 1 > share * (self.bound if full else alive):
            self._full = True
            raise Overloaded(f"{alive} streams are open, more than are answered without a queue")
        self._room = max(self._room - 1.0, 0.0)

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
        self._retrieval_s = _smoothed(self._retrieval_s, open_s - ttft_s)

    def ended(self, ttft_s: float, life_s: float) -> None:
        """One has had its whole answer.

        Args:
            ttft_s: of that.
            life_s: since it was opened.
        """
        hindered_s = max(ttft_s - (self._unhindered_s or ttft_s), 0.0)
        self._ended += 1
        self._lived_s += life_s - hindered_s

    def left(self) -> None:
        """One does not wait any more."""
        self._go_on()
        self._waiting -= 1

    # How the bound moves.

    def _go_on(self) -> None:
        now_s = self._clock_s()
        self._waited_s += self._waiting * (now_s - self._now_s)
        self._now_s = now_s
        to_first_token_s = self._retrieval_s + (self._unhindered_s or 0.0)
        lasted_s, due_s = now_s - self._turn_s, max(MIN_TURN_S, TURN * to_first_token_s)
        if lasted_s >= due_s and (self._answers >= MIN_ANSWERS or lasted_s >= 2 * due_s):
            self._learn(lasted_s)
            self._begin_turn()

    def _make_room(self) -> None:
        """As much as the time that has gone by since a stream last came is worth."""
        together = max(TOGETHER * self.bound, MIN_TOGETHER)
        if not self._life_s or math.isinf(self.bound):
            self._room = together
        else:
            passed_s = self._now_s - self._paced_s
            self._room = min(self._room + passed_s * self.bound / self._life_s, together)
        self._paced_s = self._now_s

    def _learn(self, lasted_s: float) -> None:
        if self._answers >= MIN_ANSWERS:
            mean_s = self._ttft_s / self._answers
            self._unhindered_s = min(self._unhindered_s or mean_s, mean_s)
        unhindered_s = self._unhindered_s or 0.0
        hindered_s = self._ttft_s - self._answers * unhindered_s
        needed = self._needed(lasted_s, (self._open_s - hindered_s) / max(self._answers, 1))
        waited_s = self._waited_s - self._answers * unhindered_s
        queue = max(waited_s, hindered_s) / lasted_s
        longest = max(TOLERATED_S, TOLERATED * unhindered_s) * self._answers / lasted_s
        if queue > max(longest, TOLERATED_STREAMS):
            streams = min(self.bound, self._peak)
            self.bound = max(streams - SHARE * (queue - longest), needed, LEAST)
        elif self._full and queue < SHORT * longest:
            leaps = queue < NEARLY_NONE * longest
            self.bound = self.bound * (LEAP if leaps else GROWTH) + 1

    def _needed(self, lasted_s: float, to_first_token_s: float) -> float:
        """Streams that the best turn of late would have needed without any queue.

        Args:
            to_first_token_s: mean of this turn; taken for the time that a stream is open while
                none has ended.
        """
        lived_s = self._lived_s / self._ended if self._ended >= MIN_ANSWERS else math.inf
        self._turns.append(Turn(self._now_s, self._answers / lasted_s, lived_s))
        while self._turns[0].ended_s < self._now_s - LATE_S:
            self._turns.popleft()
        least_s = min(turn.life_s for turn in self._turns)
        if least_s < math.inf:
            self._life_s = least_s
        answers_per_s = max(turn.answers_per_s for turn in self._turns)
        return answers_per_s * (self._life_s or to_first_token_s)


def _smoothed(before: float, value: float) -> float:
    return before + SMOOTHING * (value - before) if before else value
