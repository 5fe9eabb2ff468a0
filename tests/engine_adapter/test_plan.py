"""The planner: pure, so plainly testable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.scheduling import policies
from engine_adapter.scheduling.plan import Eviction, Plan, View, plan


def view(name: str, **values: object) -> View:
    defaults: dict[str, object] = {
        "full": True,
        "arrival_s": 0.0,
        "last_input_s": 0.0,
        "computed_tokens": 0,
        "remaining_tokens": 10,
        "held_blocks": 0,
        "needed_blocks": 1,
    }
    return View(request_id=name, **(defaults | values))  # type: ignore[arg-type]


def planned(*order: View, budget: int = 100, free: int = 100, slots: int = 100) -> Plan:
    return plan(order, budget_tokens=budget, free_blocks=free, slots=slots)


def test_tokens_go_to_the_first_until_the_step_is_full() -> None:
    grants = planned(view("a", remaining_tokens=60), view("b", remaining_tokens=60)).grants
    assert grants == {"a": 60, "b": 40}


def test_a_full_request_takes_what_it_lacks_from_the_back() -> None:
    held = {"full": False, "held_blocks": 5, "needed_blocks": 5, "divisible": True}
    first, middle, last = view("a", needed_blocks=7), view("b", **held), view("c", **held)
    result = planned(first, middle, last, free=0)
    assert result.evictions == (Eviction("c", 0), Eviction("b", 3))
    assert result.grants == {"a": 10}


def test_an_indivisible_victim_loses_everything() -> None:
    result = planned(view("a", needed_blocks=2), view("b", held_blocks=8, needed_blocks=8), free=0)
    assert result.evictions == (Eviction("b", 0),)


def test_a_partial_request_uses_free_memory_only() -> None:
    speculative = view("a", full=False, needed_blocks=3)
    idle = view("b", full=False, held_blocks=9, remaining_tokens=0)
    assert planned(speculative, idle, free=2) == Plan({}, ())
    assert planned(speculative, idle, free=3).grants == {"a": 10}


def test_nobody_overtakes_a_full_request_that_does_not_fit() -> None:
    big, small = view("a", needed_blocks=9), view("b", needed_blocks=1)
    assert planned(big, small, free=3).grants == {}


def test_pinned_blocks_stay() -> None:
    pinned = view("b", held_blocks=9, pinned=True)
    assert planned(view("a", needed_blocks=2), pinned, free=1).evictions == ()


def test_slots_bound_who_joins_but_not_who_is_there() -> None:
    grants = planned(view("a", running=True), view("b"), view("c"), slots=2).grants
    assert set(grants) == {"a", "b"}


def test_answers_first_then_full_then_partial_then_idle() -> None:
    views = [
        view("idle", full=False, remaining_tokens=0, arrival_s=0),
        view("partial", full=False, arrival_s=1),
        view("late", last_input_s=3),
        view("early", last_input_s=2),
        view("answering", decoding=True, arrival_s=9),
    ]
    names = [v.request_id for v in policies.order(views, policies.named("srpf"))]
    assert names == ["answering", "early", "late", "partial", "idle"]


BOTH_KINDS = (
    view("full late", arrival_s=5, last_input_s=6, computed_tokens=1, held_blocks=1),
    view("full early", arrival_s=1, last_input_s=9, computed_tokens=3, remaining_tokens=90),
    view("part late", full=False, arrival_s=4, last_input_s=4, computed_tokens=9, held_blocks=2),
    view("part early", full=False, arrival_s=2, last_input_s=8, computed_tokens=2),
    view("idle", full=False, arrival_s=4.5, computed_tokens=50, held_blocks=1, remaining_tokens=0),
)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("default", ["part late", "idle", "full late", "full early", "part early"]),
        ("fcfs", ["full early", "full late", "part early", "part late", "idle"]),
        ("lcas", ["full late", "full early", "part late", "part early", "idle"]),
        ("mcps", ["part late", "full early", "part early", "full late", "idle"]),
        ("srpf", ["full late", "full early", "part early", "part late", "idle"]),
    ],
)
def test_the_order_of_each_policy(policy: str, expected: list[str]) -> None:
    ordered = policies.order(BOTH_KINDS, policies.named(policy))
    assert [v.request_id for v in ordered] == expected


def test_the_shortest_prefill_goes_first_until_a_longer_one_has_waited() -> None:
    long = view("long", remaining_tokens=300, last_input_s=0.0, step_tokens=100)

    def first_of(rival_since_s: float) -> str:
        short = view("short", remaining_tokens=100, last_input_s=rival_since_s, step_tokens=100)
        return policies.order([long, short], policies.named("srpf"))[0].request_id

    assert first_of(0.0) == "short"
    assert first_of(1.9) == "short"
    assert first_of(2.1) == "long"


def test_speculation_leaves_the_rest_of_a_step_to_full_requests() -> None:
    srpf = policies.named("srpf")
    assert srpf.speculative_tokens(8192) == 2048
    assert srpf.speculative_tokens(128) >= 128, "short steps are not cut further"
    partial = [view(f"p{i}", full=False, remaining_tokens=60, arrival_s=i) for i in range(3)]
    grants = plan(
        [*partial, view("full", remaining_tokens=60)],
        budget_tokens=200,
        free_blocks=100,
        slots=100,
        speculative_tokens=90,
    ).grants
    assert grants == {"p0": 60, "p1": 30, "full": 60}


def test_an_unknown_policy_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no policy 'x'; there are default, fcfs"):
        policies.named("x")


def test_a_partial_request_takes_only_from_partial_ones_of_a_higher_rank() -> None:
    fcfs = policies.named("fcfs")
    taker = view("t", full=False, arrival_s=1, needed_blocks=4)
    earlier = view("e", full=False, arrival_s=0, held_blocks=9, remaining_tokens=0)
    later = view("l", full=False, arrival_s=2, held_blocks=9, remaining_tokens=0)
    full = view("f", arrival_s=3, held_blocks=9, remaining_tokens=0)

    def victims(*others: View) -> list[str]:
        ordered = policies.order([taker, *others], fcfs)
        result = plan(ordered, budget_tokens=9, free_blocks=0, slots=9, may_take=fcfs.may_take)
        return [e.request_id for e in result.evictions]

    assert victims(earlier, full) == []
    assert victims(earlier, later) == ["l"]


def test_nobody_loses_blocks_to_a_partial_request_that_does_not_fit_even_so() -> None:
    taker = view("t", full=False, needed_blocks=40)
    victim = view("v", full=False, arrival_s=1, held_blocks=9, remaining_tokens=0)
    order = [taker, victim]
    may_take = policies.named("fcfs").may_take
    result = plan(order, budget_tokens=9, free_blocks=0, slots=9, may_take=may_take)
    assert result == Plan({}, ())


sizes = st.integers(0, 12)
any_view = st.builds(
    View,
    request_id=st.uuids().map(str),
    full=st.booleans(),
    arrival_s=st.floats(0, 100),
    last_input_s=st.floats(0, 100),
    computed_tokens=sizes,
    remaining_tokens=sizes,
    held_blocks=sizes,
    needed_blocks=st.integers(1, 20),
    decoding=st.booleans(),
    running=st.booleans(),
    divisible=st.booleans(),
    pinned=st.booleans(),
)


@given(
    views=st.lists(any_view, max_size=12),
    budget=st.integers(0, 60),
    free=st.integers(0, 30),
    slots=st.integers(0, 12),
    policy=st.sampled_from(sorted(policies.POLICIES)),
)
def test_a_plan_never_spends_what_the_step_does_not_have(
    views: list[View], budget: int, free: int, slots: int, policy: str
) -> None:
    chosen = policies.named(policy)
    ordered = policies.order(views, chosen)
    result = plan(
        ordered,
        budget_tokens=budget,
        free_blocks=free,
        slots=slots,
        may_take=chosen.may_take,
    )
    by_id = {v.request_id: v for v in views}
    assert sum(result.grants.values()) <= budget
    evicted = {e.request_id for e in result.evictions}
    assert not evicted & result.grants.keys(), "a victim computes"
    assert not any(by_id[name].pinned for name in evicted)
    freed = sum(by_id[e.request_id].held_blocks - e.keep_blocks for e in result.evictions)
    spent = sum(
        max(by_id[name].needed_blocks - by_id[name].held_blocks, 0) for name in result.grants
    )
    assert spent <= free + freed
    joining = sum(not by_id[name].running for name in result.grants)
    assert joining == 0 or joining <= slots - sum(v.running for v in views)
    for eviction in result.evictions:
        assert 0 <= eviction.keep_blocks < by_id[eviction.request_id].held_blocks
