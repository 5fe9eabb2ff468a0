"""Turns among tenants: by values, and on the scheduler that ships, in virtual time."""

from __future__ import annotations

import random
import statistics
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.scheduling.fairness import FLOODED_STEP_TOKENS, Shares
from engine_adapter.scheduling.order import Order
from engine_adapter.scheduling.plan import plan
from engine_adapter.scheduling.policies import POLICIES
from engine_adapter.scheduling.view import View
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.simulated.hardware import H100X2, LLAMA_3_1_8B

pytestmark = pytest.mark.slow

BUDGET = 100


def view(name: str, tenant: str, tokens: int, *, full: bool = True) -> View:
    return View(
        request_id=name,
        full=full,
        arrival_s=0.0,
        last_input_s=0.0,
        computed_tokens=0,
        remaining_tokens=tokens,
        held_blocks=0,
        needed_blocks=0,
        tenant=tenant,
        step_tokens=BUDGET,
    )


def steps(order: Order, shares: Shares, count: int, views: dict[str, View]) -> list[dict[str, int]]:
    """Tokens by tenant in each of some steps; every request is endless."""
    done = []
    for _ in range(count):
        turns = shares.turns(order)
        grants = plan(order, budget_tokens=BUDGET, free_blocks=9, slots=999, turns=turns).grants
        if turns is not None:
            shares.settle(turns)
        served: dict[str, int] = {}
        for name, tokens in grants.items():
            tenant = views[name].tenant
            served[tenant] = served.get(tenant, 0) + tokens
        done.append(served)
    return done


@settings(deadline=None)
@given(
    crowds=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=4, max_size=4),
    tokens=st.integers(1, 60),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_who_is_never_idle_is_served_by_weight_however_many_requests_there_are(
    crowds: list[int], weights: list[float], tokens: int, policy: str
) -> None:
    shares, views = Shares(), {}
    for i, crowd in enumerate(crowds):
        shares.weigh(f"t{i}", weights[i])
        # As many as fill a step alone, so that nobody runs out of requests within one.
        for n in range(crowd + BUDGET // tokens + 1):
            name = f"t{i}-{n}"
            views[name] = view(name, f"t{i}", tokens)
    order = Order(POLICIES[policy], views.values())
    served = steps(order, shares, 60, views)
    got = [sum(step.get(f"t{i}", 0) for step in served) / weights[i] for i in range(len(crowds))]
    # Nobody is more than one request before another, counted by weight.
    assert max(got) - min(got) <= 2 * tokens / min(weights) + 1e-6


@settings(deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 150), st.booleans(), st.sampled_from("abc")), max_size=20
    ),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_one_tenant_is_planned_as_ever_and_several_never_leave_a_step_emptier(
    sizes: list[tuple[int, bool, str]], policy: str
) -> None:
    def planned(tenants: list[str]) -> int:
        views = [
            view(str(i), tenant, size, full=full)
            for i, ((size, full, _), tenant) in enumerate(zip(sizes, tenants, strict=True))
        ]
        order, shares = Order(POLICIES[policy], views), Shares()
        turns = shares.turns(order)
        decided = plan(order, budget_tokens=BUDGET, free_blocks=9, slots=99, turns=turns)
        if len(set(tenants)) < 2:
            assert turns is None
        return sum(decided.grants.values())

    together = planned([tenant for *_, tenant in sizes])
    if not POLICIES[policy].restrained:
        assert together == planned(["" for _ in sizes])
    assert bool(together) == bool(sizes)


@pytest.mark.parametrize("credit_tokens", [100, 300])
def test_rest_is_saved_up_to_a_bound(credit_tokens: int) -> None:
    views = {f"{t}{n}": view(f"{t}{n}", t, 10) for t in "abc" for n in range(12)}
    order, shares = Order(POLICIES["fcfs"], views.values()), Shares(credit_tokens)
    for name in [name for name in views if name.startswith("a")]:
        order.discard(name)
    steps(order, shares, 50, views)  # b and c alone
    for name in [name for name in views if name.startswith("a")]:
        order.put(views[name])
    done = steps(order, shares, 9, views)
    ahead = [step.get("a", 0) - step.get("b", 0) for step in done]
    assert credit_tokens - 20 <= sum(ahead) <= credit_tokens + 20
    assert all(step["a"] <= 40 and step["b"] >= 30 for step in done[-3:])


def flooded(flood_tokens: int, *others: View, alone_steps: int = 20) -> dict[str, int]:
    """Tokens by tenant in one step of 4,096, in which `a` has prompts of 500 tokens to compute and
    some more tenants are there; it had some steps alone before."""
    flood = [view(f"a{n}", "a", 500) for n in range(flood_tokens // 500)]
    order, shares = Order(POLICIES["srpf"], flood), Shares()
    for n in range(alone_steps + 1):
        if n == alone_steps:
            for other in others:
                order.put(other)
        turns = shares.turns(order, "abc")
        assert turns is not None
        grants = plan(order, budget_tokens=4096, free_blocks=9, slots=999, turns=turns).grants
        shares.settle(turns)
    served: dict[str, int] = {}
    for name, tokens in grants.items():
        served[name[0]] = served.get(name[0], 0) + tokens
    return served


def test_a_flood_only_fills_steps_up_while_other_tenants_are_there() -> None:
    alone = flooded(40_000)
    assert 512 <= alone["a"] <= FLOODED_STEP_TOKENS
    assert flooded(20_000)["a"] > 3500, "what is soon done is no flood"
    beside = flooded(40_000, view("b", "b", 3000))
    assert beside["b"] == 3000
    assert beside.get("a", 0) <= FLOODED_STEP_TOKENS
    assert flooded(40_000, alone_steps=3)["a"] > 3500, "it has not had much"


def test_a_flood_gets_its_share_of_others_who_are_never_idle() -> None:
    views = {f"a{n}": view(f"a{n}", "a", 500) for n in range(200)}
    views |= {f"b{n}": view(f"b{n}", "b", 500) for n in range(80)}
    order, shares, got = Order(POLICIES["srpf"], views.values()), Shares(), {"a": 0, "b": 0}
    for _ in range(100):  # every request is endless
        turns = shares.turns(order, "ab")
        assert turns is not None
        grants = plan(order, budget_tokens=4096, free_blocks=9, slots=999, turns=turns).grants
        shares.settle(turns)
        for name, tokens in grants.items():
            got[name[0]] += tokens
    assert 0.9 < got["a"] / got["b"] < 1.1


# The scheduler that ships.


def play(rates: dict[str, float], seconds: float, *, salted: bool = True) -> dict[str, list[float]]:
    """TTFT of each tenant's streams, which arrive at random, this many a second: four documents of
    1,000 tokens, then the question."""
    events = sorted(chain.from_iterable(_trace(t, rate, seconds) for t, rate in rates.items()))
    engine, at = SimulatedEngine(H100X2, LLAMA_3_1_8B), 0
    asked: dict[str, float] = {}
    ttft: dict[str, float] = {}
    while len(ttft) < len(asked) or at < len(events):
        while at < len(events) and events[at][0] <= engine.now_s:
            when_s, name, kind, tokens = events[at]
            salt, at = name[0] if salted else None, at + 1
            if kind == "finish":
                asked[name] = when_s
                engine.finish(name, tokens, f"prompt-{name}", 32, salt)
            elif kind == "open":
                engine.open(f"prompt-{name}", tokens, salt, weight=1.0)
            else:
                engine.extend(f"prompt-{name}", len(tokens) - 1000, tokens[-1000:])
        step = engine.step()
        if step is None:
            engine.now_s = max(engine.now_s, events[at][0]) if at < len(events) else engine.now_s
        for output in step.outputs if step is not None else ():
            ttft.setdefault(output.request_id, engine.now_s - asked[output.request_id])
        if engine.now_s > seconds:  # a flood is never done
            break
    for name in asked:
        ttft.setdefault(name, engine.now_s - asked[name])
    return {t: [s for name, s in ttft.items() if name[0] == t] for t in rates}


def _trace(tenant: str, rate: float, seconds: float) -> list[tuple[float, str, str, list[int]]]:
    rng, now_s, events = random.Random(tenant), 0.0, []
    while (now_s := now_s + rng.expovariate(rate)) < seconds:
        name, at_s = f"{tenant}{len(events)}", now_s
        tokens: list[int] = []
        for kind in ("open", "extend", "extend", "extend", "finish"):
            tokens = tokens + [
                rng.randrange(120_000) for _ in range(1000 if kind != "finish" else 64)
            ]
            events.append((at_s, name, kind, tokens))
            at_s += rng.expovariate(1 / 0.3)
    return events


def p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[18]


def test_the_others_hardly_notice_a_flood_of_an_engine_that_has_time() -> None:
    share = {"a": 2.0, "b": 2.0, "c": 2.0}
    calm, flood = (play(rates, 6.0) for rates in (share, share | {"a": 20.0}))
    assert p95(flood["b"] + flood["c"]) < 1.25 * p95(calm["b"] + calm["c"])


def test_a_flood_of_one_tenant_does_not_starve_the_others() -> None:
    share = {"a": 2.5, "b": 2.5, "c": 2.5}
    flood = share | {"a": 25.0}
    flooded, unfair = (play(flood, 3.0, salted=salted) for salted in (True, False))
    others, starved = (p95(found["b"] + found["c"]) for found in (flooded, unfair))
    assert others < 0.4 * starved
    assert others < 0.4 * p95(flooded["a"])
