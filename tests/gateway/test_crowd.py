"""The bound on open streams: learned in a simulation on a virtual clock, and kept over HTTP."""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway.crowd import LEAST, Crowd
from gateway.errors import Overloaded
from gateway.keys import STREAMS
from tests.fake_engine import MODEL
from tests.gateway.pools import QUESTION, front
from tests.gateway.tenancy import gateway, tenants_file

pytestmark = pytest.mark.slow

RETRIEVAL_S = 3.0
DECODE_S = 1.0
BODY = {"model": MODEL, "messages": QUESTION}


@dataclass
class Phase:
    """Poisson arrivals for some time, and what became of them."""

    rate: float
    seconds: float
    ttft_s: list[float] = field(default_factory=list)
    arrived: int = 0
    refused: int = 0

    @property
    def p99_s(self) -> float:
        return statistics.quantiles(self.ttft_s, n=100)[98]

    @property
    def per_s(self) -> float:
        return len(self.ttft_s) / self.seconds


class World:
    """Streams that retrieve, wait for one of an engine's places, and decode."""

    def __init__(self, capacity: float, places: int, seed: int) -> None:
        self.now_s = 0.0
        self.crowd = Crowd(lambda: self.now_s)
        self.most = 0
        self._service_s, self._free = places / capacity, places
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = itertools.count()
        self._queue: deque[tuple[Phase, float, float]] = deque()
        self._alive = 0

    def play(self, *phases: Phase) -> None:
        begin_s = self.now_s
        for phase in phases:
            at_s = begin_s
            while (at_s := at_s + self._rng.expovariate(phase.rate)) < begin_s + phase.seconds:
                self._at(at_s, self._arrives, phase)
            begin_s += phase.seconds
        while self._events:
            self.now_s, _, what, about = heapq.heappop(self._events)
            what(*about)

    def _at(self, at_s: float, what: Callable[..., None], *about: Any) -> None:
        heapq.heappush(self._events, (at_s, next(self._number), what, about))

    def _after(self, mean_s: float, what: Callable[..., None], *about: Any) -> None:
        self._at(self.now_s + max(self._rng.gauss(mean_s, mean_s / 3), mean_s / 10), what, *about)

    def _arrives(self, phase: Phase) -> None:
        phase.arrived += 1
        try:
            self.crowd.check(self._alive, self._alive, 1.0)
        except Overloaded:
            phase.refused += 1
            return
        self._alive += 1
        self.most = max(self.most, self._alive)
        self._after(RETRIEVAL_S, self._asks, phase, self.now_s)

    def _asks(self, phase: Phase, opened_s: float) -> None:
        self.crowd.asked()
        self._queue.append((phase, opened_s, self.now_s))
        self._serve()

    def _serve(self) -> None:
        while self._free and self._queue:
            self._free -= 1
            self._after(self._service_s, self._answers, *self._queue.popleft())

    def _answers(self, phase: Phase, opened_s: float, asked_s: float) -> None:
        self._free += 1
        phase.ttft_s.append(self.now_s - asked_s)
        self.crowd.answered(phase.ttft_s[-1], self.now_s - opened_s)
        self._after(DECODE_S, self._ends, phase.ttft_s[-1], opened_s)
        self._serve()

    def _ends(self, ttft_s: float, opened_s: float) -> None:
        self._alive -= 1
        self.crowd.ended(ttft_s, self.now_s - opened_s)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("capacity", "places"), [(10.0, 1), (10.0, 4), (4.0, 2)])
def test_under_three_times_the_load_those_let_in_wait_little_longer(
    capacity: float, places: int, seed: int
) -> None:
    world = World(capacity, places, seed)
    learning, busy = Phase(2 * capacity, 60), Phase(0.8 * capacity, 200)
    flood = Phase(3 * capacity, 200)
    world.play(Phase(capacity / 2, 30), learning, Phase(0.8 * capacity, 60), busy, flood)
    assert flood.p99_s < 2.5 * busy.p99_s  # 1.0 to 1.5 with these seeds
    assert flood.per_s > 0.85 * capacity  # nor does the engine idle
    assert busy.refused < 0.08 * busy.arrived


def test_without_a_queue_nobody_is_refused() -> None:
    world = World(1000.0, 100, 1)
    many = Phase(300.0, 60)
    world.play(many)
    assert world.most > 1000
    assert many.refused == 0


def test_a_bound_that_is_far_too_low_is_soon_as_high_as_it_has_to_be() -> None:
    world = World(1000.0, 100, 1)
    world.crowd.bound = 50.0
    world.play(Phase(300.0, 90))  # 1,200 at once
    late = Phase(300.0, 20)
    world.play(late)
    assert late.refused == 0


def test_engines_that_become_slower_lower_the_bound_and_quicker_ones_lift_it() -> None:
    world = World(10.0, 1, 2)
    world.play(Phase(30.0, 120))
    bound = world.crowd.bound
    world._service_s *= 4
    world.play(Phase(30.0, 200))
    assert world.crowd.bound < bound / 1.8
    world._service_s /= 4
    world.play(Phase(30.0, 400))
    assert world.crowd.bound > bound / 1.5


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_that_stood_still_for_a_moment_is_not_taken_for_a_slow_one(seed: int) -> None:
    world = World(10.0, 2, seed)
    world.play(Phase(5.0, 40))
    world._service_s *= 10
    world.play(Phase(5.0, 8))
    world._service_s /= 10
    after = Phase(5.0, 60)
    world.play(after)
    assert after.refused < 0.15 * after.arrived  # 1% to 6% with these seeds


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["asked", "answered", "ended", "left", "check"]),
            st.floats(0, 20),
            st.floats(0, 100),
            st.integers(0, 3000),
        ),
        max_size=300,
    )
)
def test_whatever_streams_do_some_are_let_in(
    steps: list[tuple[str, float, float, int]],
) -> None:
    now_s, waiting = 0.0, 0
    crowd = Crowd(lambda: now_s)
    for what, pause_s, took_s, alive in steps:
        now_s += pause_s
        if what == "asked":
            crowd.asked()
            waiting += 1
        elif what == "check":
            try:
                crowd.check(alive, alive, 1.0)
            except Overloaded:
                assert alive + 1 > crowd.bound
        elif what == "ended":
            crowd.ended(took_s, took_s + 1)
        elif waiting:
            waiting -= 1
            crowd.answered(took_s, took_s + 1) if what == "answered" else crowd.left()
        assert crowd.bound >= LEAST


def test_those_that_crowd_in_are_let_in_evenly() -> None:
    now_s = 0.0
    crowd = Crowd(lambda: now_s)
    crowd.bound, crowd._life_s = 40.0, 4.0  # so one more every 0.1 s keeps 40 open
    let_in = list[float]()
    for step in range(2000):
        now_s = step / 100
        try:
            crowd.check(20, 20, 1.0)
            let_in.append(now_s)
        except Overloaded:
            pass
    assert 195 <= len(let_in) <= 206
    gaps = [later - sooner for sooner, later in itertools.pairwise(let_in[10:])]
    assert max(gaps) < 0.15
    assert min(gaps) > 0.05


def test_while_few_are_open_nobody_is_refused() -> None:
    crowd = Crowd(lambda: 0.0)
    crowd.bound, crowd._life_s = 8.0, 60.0
    for alive in range(4):
        crowd.check(alive, alive, 1.0)


def test_whoever_has_less_than_its_share_does_not_wait_for_that() -> None:
    now_s = 0.0
    crowd = Crowd(lambda: now_s)
    crowd.bound, crowd._life_s = 40.0, 4.0
    now_s = 10.0
    crowd.check(20, 19, 0.5)  # of the few that may come at once
    for _ in range(5):
        crowd.check(20, 1, 0.5)
    with pytest.raises(Overloaded):
        crowd.check(20, 19, 0.5)
    crowd.check(20, 1, 0.5)


def bounded(app: web.Application, bound: float) -> Crowd:
    """A gateway's crowd that has learned this bound and learns nothing more."""
    crowd = app[STREAMS]._crowd(MODEL)
    crowd.bound, crowd._clock_s = bound, lambda: crowd._now_s
    return crowd


async def test_beyond_the_bound_new_streams_are_refused_and_open_ones_go_on(
    model_dir: Path,
) -> None:
    async with front(model_dir, 1) as f:
        crowd = bounded(f.app, 2.0)
        at = f.url + "/v1/streams"
        streams = [(await f.http.post(at, json=BODY)).json()["id"] for _ in range(2)]
        refused = await f.http.post(at, json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["Retry-After"]) >= 1
        for stream in streams:
            assert await _answered(f.http, f"{at}/{stream}")
        assert (await f.http.post(at, json=BODY)).status_code == 201
        metrics = (await f.http.get(f.url + "/metrics")).text
        assert f'stream2llm_stream_bound{{gen_ai_request_model="{MODEL}"}} 2.0' in metrics
        assert crowd._waiting == 0


async def test_a_flood_of_one_tenant_leaves_the_others_their_share(
    model_dir: Path, tmp_path: Path
) -> None:
    keys = tenants_file(tmp_path / "tenants.toml", flood="", light="", heavy="weight = 2")
    async with gateway(model_dir, tmp_path / "tenants.toml") as g:
        bounded(g.app, 8.0)

        async def opened(name: str) -> int:
            async with g.client(keys[name]) as http:
                answers = [await http.post("/v1/streams", json=BODY) for _ in range(12)]
            assert {answer.status_code for answer in answers} <= {201, 503}
            return sum(answer.status_code == 201 for answer in answers)

        assert await opened("flood") == 8
        assert await opened("heavy") == 5  # of 8, by weights of 1 and 2
        assert await opened("light") == 2  # of 8, beside 1 and 2
        assert await opened("flood") == 0


async def _answered(http: httpx.AsyncClient, at: str) -> bool:
    posted = await http.post(at + "/chunks", json={"text": "word"})
    finished = await http.post(at + "/finish", json={"stream": False})
    return (posted.status_code, finished.status_code) == (202, 200)
