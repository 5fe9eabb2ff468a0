"""The planner: pure, so plainly testable."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.scheduling import policies
from engine_adapter.scheduling.order import Order
from engine_adapter.scheduling.plan import Eviction, Plan, plan
from engine_adapter.scheduling.policies import Policy
from engine_adapter.scheduling.view import View

AS_GIVEN = Policy("as given", lambda v: (), lambda v: v.arrival_s, partial_takes=False)


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


def planned(
    *views: View, budget: int = 100, free: int = 100, slots: int = 100, **more: int
) -> Plan:
    order = Order(AS_GIVEN, views)
    slots -= sum(v.running and v.full for v in views)
    return plan(order, budget_tokens=budget, free_blocks=free, slots=slots, **more)


def pinned_blocks(view: View) -> int:
    return 0 if view.request_id.startswith("pinned") else view.held_blocks


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
    order = Order(AS_GIVEN, [view("a", needed_blocks=2), view("pinned", held_blocks=9)])
    result = plan(order, budget_tokens=9, free_blocks=1, slots=9, freeable_blocks=pinned_blocks)
    assert result == Plan({}, ())


def test_the_watermark_stays_free_when_a_request_joins_but_is_not_spent() -> None:
    joining, running = view("a", needed_blocks=4), view("b", needed_blocks=4, running=True)
    assert planned(joining, free=5, watermark_blocks=2).grants == {}
    assert planned(running, free=4, watermark_blocks=2).grants == {"b": 10}
    holder = view("h", needed_blocks=1, held_blocks=2)
    assert planned(holder, free=1, watermark_blocks=2).grants == {}, "it has all it needs"
    two = planned(joining, view("c", needed_blocks=4), free=10, watermark_blocks=2)
    assert set(two.grants) == {"a", "c"}


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
    names = [v.request_id for v in Order(policies.named("srpf"), views)]
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
    ordered = Order(policies.named(policy), BOTH_KINDS)
    assert [v.request_id for v in ordered] == expected


def test_the_shortest_prefill_goes_first_until_a_longer_one_has_waited() -> None:
    long = view("long", remaining_tokens=300, last_input_s=0.0, step_tokens=100)

    def first_of(rival_since_s: float) -> str:
        short = view("short", remaining_tokens=100, last_input_s=rival_since_s, step_tokens=100)
        return next(iter(Order(policies.named("srpf"), [long, short]))).request_id

    assert first_of(0.0) == "short"
    assert first_of(19) == "short"
    assert first_of(21) == "long"


def test_speculation_only_fills_up_short_steps_of_full_requests() -> None:
    partial = [view(f"p{i}", full=False, remaining_tokens=300, arrival_s=i) for i in range(3)]

    def grants(full_tokens: int) -> dict[str, int]:
        full = [view("full", remaining_tokens=full_tokens)] if full_tokens else []
        order = Order(policies.named("srpf"), [*partial, *full])
        return dict(plan(order, budget_tokens=8192, free_blocks=99, slots=99).grants)

    assert grants(100) == {"full": 100, "p0": 300, "p1": 112}
    assert grants(600) == {"full": 600}
    assert grants(0) == {"p0": 300, "p1": 300, "p2": 300}


def test_speculative_steps_grow_with_what_there_is_to_read() -> None:
    def speculated(tokens: int) -> int:
        views = [view(f"p{i}", full=False, remaining_tokens=tokens // 4) for i in range(4)]
        order = Order(policies.named("srpf"), views)
        return sum(plan(order, budget_tokens=8192, free_blocks=99, slots=99).grants.values())

    assert [speculated(n) for n in (400, 4000, 40_000, 400_000)] == [400, 1024, 2000, 8192]


def test_a_long_prefill_does_not_make_short_ones_wait_in_their_step() -> None:
    def grants(policy: str, *tokens: int) -> list[int]:
        views = [view(f"r{i}", remaining_tokens=n, step_tokens=8192) for i, n in enumerate(tokens)]
        order = Order(policies.named(policy), views)
        return list(plan(order, budget_tokens=8192, free_blocks=99, slots=99).grants.values())

    assert grants("srpf", 1000, 2000, 30_000) == [1000, 2000]
    assert grants("srpf", 100, 30_000) == [100, 412], "but short steps are filled up"
    assert grants("srpf", 30_000) == [8192]
    assert grants("fcfs", 1000, 30_000) == [1000, 7192]


def test_an_answer_under_way_does_not_hold_back_speculation() -> None:
    answering = view("a", decoding=True, running=True, remaining_tokens=1)
    partial = view("p", full=False, remaining_tokens=900)
    order = Order(policies.named("srpf"), [partial, answering])
    grants = plan(order, budget_tokens=8192, free_blocks=99, slots=99).grants
    assert grants == {"a": 1, "p": 900}


def test_the_cheapest_of_the_victims_at_the_back_goes_first() -> None:
    def restore_s(victim: View, keep_blocks: int) -> float:
        return {"dear": 9.0, "cheap": 1.0, "front": 0.1}.get(victim.request_id, 5.0)

    holders = [view(f"v{i}", full=False, held_blocks=4, arrival_s=9 - i) for i in range(6)]
    dear = view("dear", full=False, held_blocks=4, arrival_s=20)
    cheap = view("cheap", full=False, held_blocks=4, arrival_s=19)
    front = view("front", full=False, held_blocks=4, arrival_s=-1)
    order = Order(
        policies.named("fcfs"), [view("t", needed_blocks=4), *holders, dear, cheap, front]
    )
    result = plan(order, budget_tokens=9, free_blocks=0, slots=9, restore_s=restore_s)
    assert [e.request_id for e in result.evictions] == ["cheap"], "front is among the first to run"


def test_an_answer_does_not_wait_for_ever_for_idle_prompts_that_came_first() -> None:
    idle = view("idle", full=False, remaining_tokens=0, held_blocks=9)
    answer = view("a", arrival_s=1, running=True, decoding=True, held_blocks=3, needed_blocks=4)
    order = Order(policies.named("default"), [idle, answer])
    result = plan(order, budget_tokens=9, free_blocks=0, slots=9)
    assert result == Plan({"a": 9}, (Eviction("idle", 0),))
    busy = view("busy", held_blocks=3)
    order = Order(policies.named("default"), [idle, answer, busy])
    assert dict(plan(order, budget_tokens=9, free_blocks=0, slots=9).grants) == {"busy": 9}


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
        order = Order(fcfs, [taker, *others])
        result = plan(order, budget_tokens=9, free_blocks=0, slots=9)
        return [e.request_id for e in result.evictions]

    assert victims(earlier, full) == []
    assert victims(earlier, later) == ["l"]


def test_nobody_loses_blocks_to_a_partial_request_that_does_not_fit_even_so() -> None:
    taker = view("t", full=False, needed_blocks=40)
    victim = view("v", full=False, arrival_s=1, held_blocks=9, remaining_tokens=0)
    order = Order(policies.named("fcfs"), [taker, victim])
    result = plan(order, budget_tokens=9, free_blocks=0, slots=9)
    assert result == Plan({}, ())


sizes = st.integers(0, 12)
names = st.integers(0, 30).map("r{}".format) | st.integers(0, 9).map("pinned{}".format)
any_view = st.builds(
    View,
    request_id=names,
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
)


unlike = st.lists(any_view, max_size=12, unique_by=lambda v: v.request_id)


@given(
    views=unlike,
    budget=st.integers(0, 60),
    free=st.integers(0, 30),
    slots=st.integers(0, 12),
    watermark=st.integers(0, 3),
    policy=st.sampled_from(sorted(policies.POLICIES)),
)
def test_a_plan_never_spends_what_the_step_does_not_have(
    views: list[View], budget: int, free: int, slots: int, watermark: int, policy: str
) -> None:
    result = plan(
        Order(policies.named(policy), views),
        budget_tokens=budget,
        free_blocks=free,
        slots=slots,
        watermark_blocks=watermark,
        freeable_blocks=pinned_blocks,
    )
    by_id = {v.request_id: v for v in views}
    assert sum(result.grants.values()) <= budget
    evicted = {e.request_id for e in result.evictions}
    assert not evicted & result.grants.keys(), "a victim computes"
    assert not any(name.startswith("pinned") for name in evicted)
    freed = sum(by_id[e.request_id].held_blocks - e.keep_blocks for e in result.evictions)
    spent = sum(
        max(by_id[name].needed_blocks - by_id[name].held_blocks, 0) for name in result.grants
    )
    joining = sum(not (by_id[name].running and by_id[name].full) for name in result.grants)
    kept_free = watermark if any(not by_id[n].running for n in result.grants) else 0
    assert spent <= free + freed
    assert joining <= slots
    assert kept_free == 0 or freed + free >= kept_free
    for eviction in result.evictions:
        assert 0 <= eviction.keep_blocks < by_id[eviction.request_id].held_blocks


@given(
    history=st.lists(st.tuples(names, any_view | st.none()), max_size=40),
    policy=st.sampled_from(sorted(policies.POLICIES)),
)
def test_an_order_kept_through_changes_is_the_order_of_what_is_left(
    history: list[tuple[str, View | None]], policy: str
) -> None:
    """Up to ties, whose order depends on who came first."""
    chosen = policies.named(policy)
    order, left = Order(chosen), dict[str, View]()
    for name, view in history:
        if view is None:
            order.discard(name)
            left.pop(name, None)
        else:
            order.put(view)
            left[view.request_id] = view
    assert {v.request_id: v for v in order} == left
    assert [chosen.key(v) for v in order] == sorted(map(chosen.key, left.values()))
    for entries, belongs in (
        (order.ready, [v for v in order if v.remaining_tokens > 0]),
        (order.holders, [v for v in order if v.held_blocks > 0]),
    ):
        assert [entry[2] for entry in entries] == belongs
