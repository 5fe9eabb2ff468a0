"""The simulated engine: estimates add up, and the shipping scheduler answers every query."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from engine_adapter.scheduling.policies import POLICIES
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.simulated.hardware import H100X2, LLAMA_3_1_8B
from loadtest.bench_sim import run
from loadtest.simulation import WAITING, Case

pytestmark = pytest.mark.slow


def test_kv_and_arithmetic_of_a_known_model() -> None:
    assert LLAMA_3_1_8B.kv_bytes_per_token == 131_072
    assert LLAMA_3_1_8B.matrix_flops(1000) == pytest.approx(2 * 8.03e12)
    assert LLAMA_3_1_8B.attention_flops(0, 1000) == pytest.approx(2.6e11, rel=0.02)
    whole = LLAMA_3_1_8B.attention_flops(0, 5000)
    parts = LLAMA_3_1_8B.attention_flops(0, 3000) + LLAMA_3_1_8B.attention_flops(3000, 2000)
    assert parts == pytest.approx(whole)


def finished(engine: SimulatedEngine) -> list[str]:
    step = engine.step()
    return [] if step is None else step.finished


def test_a_lone_request_takes_what_its_step_is_estimated_at() -> None:
    engine = SimulatedEngine(H100X2, LLAMA_3_1_8B)
    engine.finish("r", list(range(5000)), None)
    assert finished(engine) == ["r"]
    assert engine.now_s == pytest.approx(H100X2.step_s(LLAMA_3_1_8B, [(0, 5000)]))
    assert engine.step() is None


def test_what_was_read_before_the_question_is_not_paid_for_again() -> None:
    engine = SimulatedEngine(H100X2, LLAMA_3_1_8B)
    engine.open("p", list(range(5000)))
    while engine.step() is not None:
        pass
    asked_s = engine.now_s
    engine.finish("answer", list(range(5100)), "p")
    assert finished(engine) == ["answer"]
    expected_s = H100X2.step_s(LLAMA_3_1_8B, [(4999, 101)])
    assert engine.now_s - asked_s == pytest.approx(expected_s)


def test_an_answer_gets_a_token_a_step_and_its_blocks_go_when_it_is_aborted() -> None:
    engine = SimulatedEngine(H100X2, LLAMA_3_1_8B)
    idle_blocks = engine.scheduler.load()["kv_blocks_free"]
    engine.open("p", list(range(2000)))
    while engine.step() is not None:
        pass
    engine.finish("short", list(range(2100)), "p", max_tokens=3)
    engine.finish("long", list(range(9000, 9100)), None, max_tokens=1000)
    steps = [step for _ in range(3) if (step := engine.step()) is not None]
    assert [[o.request_id for o in step.outputs] for step in steps] == [["short", "long"]] * 3
    assert [len(o.token_ids) for step in steps for o in step.outputs] == [1] * 6
    assert [o.cached_tokens for o in steps[0].outputs] == [1999, 0]
    assert [step.finished for step in steps] == [[], [], ["short"]]
    engine.abort("long")
    assert engine.step() is None
    assert engine.scheduler.load()["kv_blocks_free"] == idle_blocks


@pytest.mark.parametrize("policy", [WAITING, *POLICIES])
@pytest.mark.parametrize("workload", ["crawl", "ann"])
def test_every_query_of_a_trace_is_answered(workload: str, policy: str) -> None:
    row = run(Case(workload, 4.0, 1.0, policy, 20, 1))
    assert 0 < row.ttft_s[0] <= row.ttft_s[1] <= row.ttft_s[2]
    assert row.over_oracle >= 0.99


def test_a_trace_gives_the_same_figures_every_time() -> None:
    case = Case("crawl", 4.0, 1.0, "srpf", 20, 3)
    assert run(case).ttft_s == run(case).ttft_s
