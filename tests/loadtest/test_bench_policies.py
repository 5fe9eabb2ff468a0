"""What `make bench-policies` computes from what it sees, without an engine."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest

from engine_adapter.errors import EngineOverloaded
from loadtest.bench_policies import cells, report
from loadtest.report import p50_p95_p99
from loadtest.scripts import Script
from loadtest.targets import NOT_TOLD, Clock
from loadtest.trial import (
    BLOCK_TOKENS,
    ITERATION,
    PREEMPTIONS,
    STREAMS,
    WHOLE,
    Counters,
    Load,
    Meter,
    Outcome,
    Row,
    compared,
    load_of,
    play,
    play_all,
    pool_blocks,
    row_of,
)

STEP = (
    "(APIServer pid=1) INFO 11-24 09:17:19 [loggers.py:199] Engine 000: Iteration(45): 2 context "
    "requests, 120 context tokens, 3 generation requests, 3 generation tokens, iteration elapsed "
    "time: 172.04 ms, CPU KV cache usage: 2.3%"
)


def a_script(query_id: int, due_s: tuple[float, ...] = (0.0, 0.02), tokens: int = 10) -> Script:
    context = list(range(tokens))
    return Script(query_id, due_s, (context[:5], context), [7, 8])


def a_load(*scripts: Script) -> Load:
    return Load("crawl", scripts, qps=1.0, open_at_once=1)


def an_outcome(query_id: int, ttft_s: float, **fields: Any) -> Outcome:
    given = {"token_ids": (1, 2), "span_s": (0.0, 0.02 + ttft_s)} | fields
    return Outcome(query_id=query_id, ttft_s=ttft_s, **given)


BEFORE, AFTER = Counters(1000, 5, 60), Counters(1040, 7, 90)


def test_recomputed_is_what_was_computed_beyond_the_prompts_and_answers() -> None:
    load = a_load(a_script(0), a_script(1))  # 2 x (12 + 2 - 1) tokens needed
    outcomes = [an_outcome(0, 1.0), an_outcome(1, 3.0)]
    row = row_of(load, "fcfs", outcomes, BEFORE, AFTER, answer_tokens=2)
    assert row.recomputed_tokens == 40 - 26
    assert (row.preemptions, row.invalidated_tokens) == (2, 30)
    assert (row.answered, row.errors, row.completion_s) == (2, 0, 3.02)
    assert row.ttft_s == pytest.approx((2.0, 2.9, 2.98))


def test_a_row_with_queries_that_were_not_answered_claims_no_more_than_it_saw() -> None:
    load = a_load(a_script(0), a_script(1), a_script(2))
    outcomes = [an_outcome(0, 1.0), an_outcome(1, 2.0, error="refused")]
    before = Counters(0, 0, None)
    row = row_of(load, "StreamingInput", outcomes, before, Counters(40, 0, None), 2)
    assert (row.answered, row.errors) == (1, 1)
    assert (row.recomputed_tokens, row.completion_s, row.invalidated_tokens) == (None,) * 3
    assert row.ttft_s == (1.0, 1.0, 1.0)
    assert row.open_at_once == 3  # the one that never ended among them
    assert cells(row) == ["0", "-", "-", "-", "3", "1/3", "1", "0"]


def test_nothing_answered_has_no_percentiles() -> None:
    row = row_of(a_load(a_script(0)), "x", [], BEFORE, AFTER, 2)
    assert (row.answered, row.ttft_s) == (0, None)


def test_answers_are_compared_with_those_of_whole_prompts() -> None:
    load = a_load(a_script(0), a_script(1))
    row = row_of(load, "fcfs", [], BEFORE, AFTER, 2)
    whole = row_of(load, WHOLE, [], BEFORE, AFTER, 2)
    same, other = an_outcome(0, 1.0), an_outcome(1, 1.0, token_ids=(1, 9))
    refused = an_outcome(1, 1.0, token_ids=(), error="refused")
    reference = [an_outcome(0, 1.0), an_outcome(1, 1.0)]
    rows = compared([(whole, reference), (row, [same, other]), (row, [same, refused])])
    assert [row.differing for row in rows] == [0, 1, 0]


def test_the_load_is_the_same_for_a_seed_and_fits_the_pool() -> None:
    loads = [load_of(name, 36, 288, 1) for name in ("crawl", "ann")]
    assert loads == [load_of(name, 36, 288, 1) for name in ("crawl", "ann")]
    lengths = [len(script.prompt) for load in loads for script in load.scripts]
    wanted = STREAMS * sum(lengths) / len(lengths) / 4 / BLOCK_TOKENS
    assert abs(pool_blocks(loads) - wanted) <= 0.5
    assert max(lengths) < pool_blocks(loads) * BLOCK_TOKENS


def test_a_prompt_that_can_never_fit_is_refused_before_an_engine_starts() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pool_blocks([a_load(a_script(0, tokens=5000), *(a_script(i) for i in range(1, 30)))])


def test_what_vllm_prints_is_read() -> None:
    assert ITERATION.findall(STEP) == [("120", "3")]
    text = (
        'vllm:num_preemptions_total{engine="0",model_name="m"} 4.0\nvllm:num_preemptions_created 9'
    )
    assert PREEMPTIONS.findall(text) == ["4.0"]


class Scripted:
    """A target whose queries are answered, refused, broken off, or never answered."""

    invalidated = NOT_TOLD

    def __init__(self, **fates: str) -> None:
        self.fates = fates
        self.closed: list[int] = []

    async def answer(self, script: Script, clock: Clock) -> AsyncGenerator[list[int], None]:
        try:
            await clock.until(script.due_s[-1])
            match self.fates.get(f"q{script.query_id}", "answered"):
                case "refused":
                    raise EngineOverloaded("full")
                case "gone":
                    raise aiohttp.ClientPayloadError
                case "broken":
                    yield [1]
                case "stuck":
                    await asyncio.Event().wait()
                case _:
                    yield []
                    yield [1]
                    yield [2]
        finally:
            self.closed.append(script.query_id)


async def test_ttft_counts_from_when_the_last_input_is_due_to_the_first_token() -> None:
    outcome = await play(Scripted(), a_script(3), Clock(), 2)
    assert (outcome.query_id, outcome.token_ids, outcome.error) == (3, (1, 2), "")
    assert outcome.ttft_s is not None
    assert 0 <= outcome.ttft_s <= outcome.span_s[1] - 0.02
    late = Clock()
    await late.until(0.1)
    outcome = await play(Scripted(), a_script(3), late, 2)
    assert outcome.ttft_s is not None
    assert outcome.ttft_s >= 0.08  # the wait for a busy load generator is counted


@pytest.mark.parametrize(
    ("fate", "error"),
    [
        ("refused", "full"),
        ("gone", "ClientPayloadError"),
        ("broken", "the answer broke off after 1 tokens"),
    ],
)
async def test_what_goes_wrong_is_an_error_of_its_query(fate: str, error: str) -> None:
    outcome = await play(Scripted(q0=fate), a_script(0), Clock(), 2)
    assert outcome.error == error


class Still:
    """A meter of an engine that computes nothing."""

    def computed_tokens(self) -> int:
        return 17


async def test_a_row_ends_when_the_engine_is_stuck_and_leaves_nothing_behind() -> None:
    target = Scripted(q1="stuck")
    options = argparse.Namespace(answer_tokens=2, patience=0.1)
    load = a_load(a_script(0), a_script(1))
    async with asyncio.timeout(10):
        outcomes = await play_all(target, load, cast(Meter, Still()), options)
    assert [o.query_id for o in outcomes] == [0]
    assert sorted(target.closed) == [0, 1]


def test_the_meter_adds_up_the_steps_of_the_log(tmp_path: Path) -> None:
    server = SimpleNamespace(log_path=tmp_path / "log")
    server.log_path.write_text(f"ready\n{STEP}\nrubbish 5 context tokens\n{STEP}\n")
    assert Meter(cast(Any, server), cast(Any, None), plugin=False).computed_tokens() == 246


def test_the_report_ends_with_its_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    load = a_load(a_script(0))
    row: Row = row_of(load, "fcfs", [an_outcome(0, 1.25)], BEFORE, AFTER, 2)
    report([row], [load], argparse.Namespace(answer_tokens=2, seed=1))
    lines = capsys.readouterr().out.splitlines()
    assert "1.25 / 1.25 / 1.25" in next(line for line in lines if line.startswith("crawl fcfs"))
    result = json.loads(lines[-1])
    assert result["needed_tokens"] == {"crawl": 13}
    assert result["rows"][0]["recomputed_tokens"] == 27


def test_percentiles_of_few_values() -> None:
    assert p50_p95_p99([3.0]) == (3.0, 3.0, 3.0)
    assert p50_p95_p99(range(101)) == (50, 95, 99)
