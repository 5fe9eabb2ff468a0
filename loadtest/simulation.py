"""Traces on the simulated engine: the scheduler that ships, on a virtual clock.

The model is replaced by an estimate of what a step costs; a run gives the same figures however
busy the machine is.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_adapter.scheduling.policies import DEFAULT_POLICY
from loadtest import workload
from loadtest.scripts import common, consecutive, contexts, question
from loadtest.timeline import Line, Recorder
from loadtest.workload import Query

if TYPE_CHECKING:
    from engine_adapter.simulated.engine import SimulatedEngine

POLICIES = ("default", "fcfs", "lcas", "mcps", "srpf")
WAITING = "non-streaming"
WITHOUT_SWAP = "srpf, no swap"
HOST_BYTES = 128 << 30


@dataclass(frozen=True, slots=True)
class Case:
    """One trace on one engine under one policy."""

    workload: str
    qps: float
    delay_factor: float
    policy: str
    queries: int
    seed: int
    step_tokens: int = 8192
    recorded: int = 0
    """Of so many queries in the middle of the trace, what happened to them when."""

    @property
    def trace(self) -> str:
        """What the rows that may be compared have in common."""
        pressed = f" x{self.delay_factor:g}" if self.delay_factor != 1 else ""
        return f"{self.workload}{pressed} {self.qps:g}"

    @property
    def name(self) -> str:
        return f"{self.trace} {self.policy}"


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a case. Seconds, and tokens."""

    ttft_s: tuple[float, ...]
    """Of each query, in the order of their arrival."""
    over_oracle: float
    """Median ratio of a query's TTFT to that of the same query alone, its context cached."""
    completion_s: float
    computed_tokens: int
    invalidated_tokens: int
    preemptions: int
    fetched_tokens: int
    """What came back from host memory."""
    steps: int
    host_s: float
    """Real time that the simulation took."""
    lines: tuple[Line, ...] = ()


def play(case: Case) -> Played:
    """Play a trace to its end.

    Raises:
        RuntimeError: some queries are never answered.
    """
    simulation = _simulation(case)
    begun_s = time.perf_counter()
    simulation.run()
    engine = simulation.engine
    ttft_s, oracle_s = simulation.ttft_s, simulation.oracle_s
    return Played(
        ttft_s=tuple(ttft_s[name] for name in simulation.queries),
        over_oracle=statistics.median(ttft_s[name] / oracle_s[name] for name in ttft_s),
        completion_s=engine.now_s,
        computed_tokens=engine.counters.computed_tokens,
        invalidated_tokens=engine.counters.invalidated_tokens,
        preemptions=int(engine.scheduler.load()["preemptions"]),
        fetched_tokens=engine.transfers.blocks_in * engine.scheduler.block_size,
        steps=engine.counters.steps,
        host_s=time.perf_counter() - begun_s,
        lines=simulation.recorder.lines(),
    )


def _simulation(case: Case) -> Replay:
    pressed = case.delay_factor != 1
    streaming = case.policy != WAITING
    engine = simulated_engine(
        policy=case.policy.partition(",")[0] if streaming else "fcfs",
        step_tokens=case.step_tokens,
        pressed=pressed,
        host_bytes=HOST_BYTES if pressed and case.policy in POLICIES else 0,
    )
    make = workload.crawl if case.workload == "crawl" else workload.ann
    trace = make(case.queries, case.qps, case.seed, case.delay_factor)
    return Replay(engine, trace, streaming=streaming, recorded=case.recorded)


def simulated_engine(
    policy: str = DEFAULT_POLICY,
    step_tokens: int = 8192,
    pressed: bool = False,
    host_bytes: float = 0,
) -> SimulatedEngine:
    """Llama-3.1-8B on two H100s, or on two H200s where memory is to be pressed."""
    # vLLM takes seconds to load: only where something is simulated
    logging.getLogger("vllm").setLevel(logging.ERROR)
    from engine_adapter.simulated.engine import SimulatedEngine
    from engine_adapter.simulated.hardware import H100X2, H200X2, LLAMA_3_1_8B

    return SimulatedEngine(
        H200X2 if pressed else H100X2,
        LLAMA_3_1_8B,
        policy=policy,
        step_tokens=step_tokens,
        host_bytes=host_bytes,
    )


class Replay:
    """One trace under way.

    Args:
        streaming: inputs are handed over as they come; otherwise all of a query's with the last.
        salts: the cache salts of queries, by name; none for those that are not in it.
        weight: of each tenant that a salt stands for; None if salts stand for none.
        max_tokens: of each answer.
        recorded: how many queries in the middle of the trace are watched.
    """

    def __init__(
        self,
        engine: SimulatedEngine,
        trace: Sequence[Query],
        *,
        streaming: bool = True,
        salts: Mapping[str, str] | None = None,
        weight: float | None = None,
        max_tokens: int = 1,
        recorded: int = 0,
    ) -> None:
        self.engine = engine
        self._streaming = streaming
        self._salts = salts or {}
        self._weight = weight
        self._max_tokens = max_tokens
        self.queries = {str(query.query_id): query for query in trace}
        self.ttft_s: dict[str, float] = {}
        self.oracle_s: dict[str, float] = {}
        self._asked_s: dict[str, float] = {}
        self._states = {name: contexts(q, consecutive) for name, q in self.queries.items()}
        self.recorder = Recorder(_middle(trace, recorded), self._computed_tokens)

    def run(self, awaited: Collection[str] | None = None) -> None:
        """Deliver every input when it is due, and turn the engine's loop in between.

        Args:
            awaited: names of the queries whose first tokens end the run; None for all.

        Raises:
            RuntimeError: some queries are never answered.
        """
        missing = set(self.queries if awaited is None else awaited)
        events = sorted(
            (q.arrival_s + given.at_s, q.query_id, i)
            for q in self.queries.values()
            for i, given in enumerate(q.inputs)
        )
        at = 0
        while missing:
            while at < len(events) and events[at][0] <= self.engine.now_s:
                due_s, query_id, i = events[at]
                self._deliver(due_s, str(query_id), i)
                at += 1
            begun = self._step()
            if begun is not None:
                missing.difference_update(begun)
                continue
            if at == len(events):
                raise RuntimeError(f"{len(missing)} queries are never answered")
            self.engine.now_s = max(self.engine.now_s, events[at][0])

    def _step(self) -> list[str] | None:
        """Whose answers have begun; None if the engine had nothing to compute."""
        begun_s = self.engine.now_s
        self.recorder.before()
        step = self.engine.step()
        if step is None:
            return None
        now_s = self.engine.now_s
        self.recorder.after(begun_s, now_s, step.finished)
        begun = [o.request_id for o in step.outputs if o.request_id not in self.ttft_s]
        for name in begun:
            self.ttft_s[name] = now_s - self._asked_s[name]
        return begun

    def _computed_tokens(self, name: str) -> int | None:
        """Of an open prompt or of one that is being answered."""
        scheduler = self.engine.scheduler
        if (request := scheduler.requests.get(name)) is not None:
            return int(request.num_computed_tokens)
        try:
            return int(scheduler.status(name)["computed"])
        except KeyError:
            return None

    def _deliver(self, due_s: float, name: str, i: int) -> None:
        """Hand over one input; it arrives at its own time, also within a step."""
        now_s, self.engine.now_s = self.engine.now_s, due_s
        if i == len(self.queries[name].inputs) - 1:
            self._finish(due_s, name, i)
        elif self._streaming:
            self._grow(due_s, name, i)
        self.engine.now_s = max(now_s, due_s)

    def _grow(self, due_s: float, name: str, i: int) -> None:
        context = self._states[name][i]
        if i == 0:
            self.engine.open(name, context, self._salts.get(name), self._weight)
            return
        keep = common(self._states[name][i - 1], context)
        answer = self.engine.extend(name, keep, context[keep:])
        self.recorder.invalidated(name, due_s, int(answer["invalidated"]))

    def _finish(self, due_s: float, name: str, i: int) -> None:
        states = self._states.pop(name)
        cached = common(states[i - 1], states[i]) if i else 0
        asked = question(self.queries[name], consecutive)
        rest = len(states[i]) - cached + len(asked)
        engine = self.engine
        self.oracle_s[name] = engine.hardware.step_s(engine.model, [(cached, rest)])
        self._asked_s[name] = due_s
        engine.finish(
            name,
            states[i] + asked,
            name if self._streaming and i else None,
            self._max_tokens,
            self._salts.get(name),
        )


def _middle(trace: Sequence[Query], count: int) -> Sequence[Query]:
    """Some queries from where the load is what it is on average."""
    start = max(0, (len(trace) - count) // 2)
    return trace[start : start + count]
