"""Traces on the simulated engine: the scheduler that ships, on a virtual clock.

The model is replaced by an estimate of what a step costs; a run gives the same figures however
busy the machine is.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest import workload
from loadtest.scripts import common, consecutive, contexts, question
from loadtest.timeline import Line, Recorder
from loadtest.workload import Query

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
    simulation = _Simulation(case)
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
        fetched_tokens=engine.transfers.blocks_in * simulation.block_tokens,
        steps=engine.counters.steps,
        host_s=time.perf_counter() - begun_s,
        lines=simulation.recorder.lines(),
    )


class _Simulation:
    """One trace under way."""

    def __init__(self, case: Case) -> None:
        # vLLM takes seconds to load: only where something is simulated
        logging.getLogger("vllm").setLevel(logging.ERROR)
        from engine_adapter.simulated.engine import BLOCK_TOKENS, SimulatedEngine
        from engine_adapter.simulated.hardware import H100X2, H200X2, LLAMA_3_1_8B

        pressed = case.delay_factor != 1
        self.block_tokens = BLOCK_TOKENS
        self._streaming = case.policy != WAITING
        self.engine = SimulatedEngine(
            H200X2 if pressed else H100X2,
            LLAMA_3_1_8B,
            policy=case.policy.partition(",")[0] if self._streaming else "fcfs",
            step_tokens=case.step_tokens,
            host_bytes=HOST_BYTES if pressed and case.policy in POLICIES else 0,
        )
        make = workload.crawl if case.workload == "crawl" else workload.ann
        trace = make(case.queries, case.qps, case.seed, case.delay_factor)
        self.queries = {str(query.query_id): query for query in trace}
        self.ttft_s: dict[str, float] = {}
        self.oracle_s: dict[str, float] = {}
        self._asked_s: dict[str, float] = {}
        self._states = {name: contexts(q, consecutive) for name, q in self.queries.items()}
        self.recorder = Recorder(_middle(trace, case.recorded), self._computed_tokens)

    def run(self) -> None:
        """Deliver every input when it is due, and turn the engine's loop in between."""
        events = sorted(
            (q.arrival_s + given.at_s, q.query_id, i)
            for q in self.queries.values()
            for i, given in enumerate(q.inputs)
        )
        at = 0
        while len(self.ttft_s) < len(self.queries):
            while at < len(events) and events[at][0] <= self.engine.now_s:
                due_s, query_id, i = events[at]
                self._deliver(due_s, str(query_id), i)
                at += 1
            if self._step():
                continue
            if at == len(events):
                missing = len(self.queries) - len(self.ttft_s)
                raise RuntimeError(f"{missing} queries are never answered")
            self.engine.now_s = max(self.engine.now_s, events[at][0])

    def _step(self) -> bool:
        """Whether the engine had anything to compute."""
        begun_s = self.engine.now_s
        self.recorder.before()
        step = self.engine.step()
        if step is None:
            return False
        now_s = self.engine.now_s
        self.recorder.after(begun_s, now_s, step.finished)
        for name in step.finished:
            self.ttft_s[name] = now_s - self._asked_s[name]
        return True

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
            self.engine.open(name, context)
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
        engine.finish(name, states[i] + asked, name if self._streaming and i else None)


def _middle(trace: Sequence[Query], count: int) -> Sequence[Query]:
    """Some queries from where the load is what it is on average."""
    start = max(0, (len(trace) - count) // 2)
    return trace[start : start + count]
