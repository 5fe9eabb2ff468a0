"""What the flood of `make bench-throughput` says of what it has seen."""

from __future__ import annotations

from loadtest.flood import GRACE_S, Seen


def test_chunks_that_were_not_taken_in_time_count_as_slow() -> None:
    seen = Seen(due=1000, ack_s=[0.01] * 982 + [0.2] * 9)
    p50, _, p99, most = seen.figures(1.0)["ack_ms"]
    assert p50 == 10
    assert p99 >= 200
    assert most == 1000 * GRACE_S
