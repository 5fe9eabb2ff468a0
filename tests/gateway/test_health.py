"""An engine's health: what is told to it, and whether it is given streams."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.health import FIRST_S, LONGEST_S, TRIAL_S, Health

EJECT_AFTER = 3

happenings = st.lists(
    st.tuples(
        st.sampled_from(["failed", "worked", "answers", "given"]),
        st.floats(0, 40),  # seconds since the one before
        st.floats(0, 1),  # luck
    ),
    max_size=60,
)


def after(health: Health, what: str, now_s: float, luck: float) -> Health:
    if what == "failed":
        return health.failed(now_s, EJECT_AFTER, luck)
    changed: Health = getattr(health, what)(now_s)
    return changed


@given(happenings)
def test_only_failures_in_a_row_eject_and_only_an_operation_that_works_brings_back(
    sequence: list[tuple[str, float, float]],
) -> None:
    health, now_s, in_a_row = Health(), 0.0, 0
    for what, passed_s, luck in sequence:
        now_s += passed_s
        before, health = health, after(health, what, now_s, luck)
        if before.state == "healthy":
            in_a_row = in_a_row + 1 if what == "failed" else 0 if what == "worked" else in_a_row
            assert (health.state == "ejected") == (in_a_row >= EJECT_AFTER)
        elif before.state == "ejected":
            assert health.state in ("ejected", "half-open")
            over = what == "answers" and now_s >= before.retry_s
            assert (health.state == "half-open") == over
        else:
            came_to = {"failed": "ejected", "worked": "healthy"}.get(what, "half-open")
            assert health.state == came_to
        if health.state == "healthy" and before.state != "healthy":
            in_a_row = 0


@given(happenings)
def test_an_ejection_is_bounded_and_no_stream_goes_there_meanwhile(
    sequence: list[tuple[str, float, float]],
) -> None:
    health, now_s = Health(), 0.0
    for what, passed_s, luck in sequence:
        now_s += passed_s
        before, health = health, after(health, what, now_s, luck)
        if health.state == "ejected":
            assert not health.takes(now_s + LONGEST_S)
        if health.state == "ejected" != before.state:
            away_s = round(health.retry_s - now_s, 9)  # of two times added, so not to the last bit
            assert FIRST_S / 2 <= away_s <= LONGEST_S


def test_ejections_grow_one_after_the_other_and_begin_small_after_a_calm_time() -> None:
    health, now_s = Health(), 0.0
    away_s = []
    for _ in range(9):
        while health.state != "ejected":
            health = health.failed(now_s, EJECT_AFTER, luck=1)
        away_s.append(health.retry_s - now_s)
        now_s = health.retry_s
        health = health.answers(now_s).given(now_s).worked(now_s)
    assert away_s == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    now_s += LONGEST_S + 1
    for _ in range(EJECT_AFTER):
        health = health.failed(now_s, EJECT_AFTER, luck=1)
    assert health.retry_s - now_s == FIRST_S


def test_a_half_open_engine_is_given_one_stream_and_another_when_that_says_nothing() -> None:
    health = Health("half-open")
    assert health.takes(0)
    health = health.given(0)
    assert not health.takes(TRIAL_S - 1)
    assert health.takes(TRIAL_S)
