"""KV that waits for another engine: the shipping scheduler with vLLM's own connector beside it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import KVConnectorOutput

from engine_adapter.errors import BadOperation
from engine_adapter.messages import Finish, Sampling
from engine_adapter.vllm.handing_over import KV_TRANSFER, Leases, first_token_only
from engine_adapter.vllm.open_prompts import ADOPT
from engine_adapter.vllm.routes import streaming_prompts
from tests.engine_adapter.fake_llm import FakeLLM
from tests.engine_adapter.harness import BLOCK_SIZE, VOCABULARY, Engine, expected_answer


def handed_over(engine: Engine, tokens: list[int], prompt_id: str = "p") -> str:
    """Grow a prompt, end it, and leave its KV under a lease; the id of the request."""
    half = max(len(tokens) // 2, 1)
    engine.scheduler.open_prompt(prompt_id, tokens[:half], None, engine.hasher)
    for _ in range(4):
        engine.step()
    request_id = f"{prompt_id}-answer"
    engine.request(request_id, tokens, 8, prompt_id, hand_over=True)
    run_until_leased(engine, request_id)
    return request_id


def run_until_leased(engine: Engine, request_id: str) -> None:
    for _ in range(50):
        engine.step()
        if request_id in engine.worker.sends.until_s:
            return
    raise AssertionError("the KV is under no lease")


def some_steps(engine: Engine) -> None:
    """A scheduler that waits for the end of leases never says that it has nothing to do."""
    for _ in range(6):
        engine.step()


def held_blocks(engine: Engine) -> int:
    return engine.idle_blocks - engine.free_blocks


def blocks_of(tokens: list[int]) -> int:
    return -(-len(tokens) // BLOCK_SIZE)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 40])
def test_the_first_token_is_that_of_the_whole_answer_and_the_kv_stays(
    model_dir: Path, length: int
) -> None:
    engine = Engine(model_dir, 30, hands_over=True)
    tokens = random.Random(length).choices(range(VOCABULARY), k=length)
    request_id = handed_over(engine, tokens)
    assert engine.answers[request_id] == expected_answer(tokens, 1)
    assert held_blocks(engine) == blocks_of(tokens)
    engine.worker.sends.fetched.add(request_id)
    some_steps(engine)
    assert held_blocks(engine) == 0
    assert not engine.scheduler.has_requests()


def test_closing_the_prompt_ends_the_lease_at_once(model_dir: Path) -> None:
    engine = Engine(model_dir, 30, hands_over=True)
    handed_over(engine, list(range(21)))
    engine.scheduler.close_prompt("p")
    some_steps(engine)
    assert held_blocks(engine) == 0
    engine.scheduler.close_prompt("p")  # once more is no error
    some_steps(engine)
    assert not engine.worker.sends.until_s
    assert not engine.scheduler.has_requests()


def test_a_lease_that_nobody_ends_runs_out(model_dir: Path) -> None:
    engine = Engine(model_dir, 30, hands_over=True)
    request_id = handed_over(engine, list(range(21)))
    ends_s = engine.worker.sends.until_s[request_id]
    engine.worker.sends.now_s = lambda: ends_s - 1
    some_steps(engine)
    assert held_blocks(engine) == blocks_of(list(range(21)))
    engine.worker.sends.now_s = lambda: ends_s
    some_steps(engine)
    assert held_blocks(engine) == 0


def test_an_id_that_is_used_again_ends_only_its_newest_lease(model_dir: Path) -> None:
    engine = Engine(model_dir, 30, hands_over=True)
    handed_over(engine, list(range(8)))
    engine.scheduler.open_prompt("p", list(range(20)), None, engine.hasher)
    engine.request("again", list(range(20)), 8, "p", hand_over=True)
    run_until_leased(engine, "again")
    engine.scheduler.close_prompt("p")
    some_steps(engine)
    assert list(engine.worker.sends.until_s) == ["p-answer"]


def test_kv_under_a_lease_is_not_taken_for_others(model_dir: Path) -> None:
    engine = Engine(model_dir, 12, hands_over=True)
    tokens = list(range(24))
    request_id = handed_over(engine, tokens)
    others = [[7, *range(10, 30)], [8, *range(10, 30)]]
    for i, other in enumerate(others):
        engine.scheduler.open_prompt(f"o{i}", other, None, engine.hasher)
    some_steps(engine)
    chain = [engine.scheduler.kv_cache_manager.get_block_ids(request_id)[0]]
    assert len(chain[0]) == blocks_of(tokens)
    for i, other in enumerate(others):
        engine.request(f"a{i}", other, 3, f"o{i}")
    engine.worker.sends.fetched.add(request_id)
    engine.drain()
    assert [engine.answers[f"a{i}"] for i in range(2)] == [expected_answer(o, 3) for o in others]
    assert held_blocks(engine) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30))
def test_every_history_ends_with_all_blocks_free(model_dir: Path, seed: int) -> None:
    rng = random.Random(seed)
    engine = Engine(model_dir, rng.randint(26, 40), hands_over=True)
    asked: dict[str, tuple[list[int], int]] = {}
    for number in range(6):
        prompt_id = f"p{number}"
        tokens = rng.choices(range(VOCABULARY), k=rng.randint(1, 60))
        engine.scheduler.open_prompt(prompt_id, tokens[: rng.randint(1, 60)], None, engine.hasher)
        _steps(engine, rng)
        hand_over, max_tokens = rng.random() < 0.7, rng.randint(1, 4)
        engine.request(f"a{number}", tokens, max_tokens, prompt_id, hand_over=hand_over)
        asked[f"a{number}"] = tokens, 1 if hand_over else max_tokens
        _steps(engine, rng)
        match rng.randrange(4):
            case 0:
                engine.worker.sends.fetched.add(f"a{number}")
            case 1:
                engine.scheduler.close_prompt(prompt_id)
            case 2:
                engine.abort(f"a{number}")
                engine.scheduler.close_prompt(prompt_id)
    engine.worker.sends.now_s = lambda: float("inf")
    engine.drain()
    for request_id, (tokens, max_tokens) in asked.items():
        if request_id in engine.answers:
            assert engine.answers[request_id] == expected_answer(tokens, max_tokens)
    assert held_blocks(engine) == 0
    assert not engine.worker.sends.known


@dataclass
class Ended:
    """What `Leases` needs of a request that has ended."""

    request_id: str

    @property
    def sampling_params(self) -> SamplingParams:
        return SamplingParams(extra_args={ADOPT: self.request_id})

    kv_transfer_params = True


def step(sent: set[str], expired: int) -> KVConnectorOutput:
    """What the workers say of one step."""
    stats = NixlKVConnectorStats()
    for _ in range(expired):
        stats.record_kv_expired_req()
    return KVConnectorOutput(finished_sending=sent, kv_connector_stats=stats)


@pytest.mark.parametrize(
    ("workers", "steps", "states"),
    [
        (1, [({"a"}, 0), ({"b"}, 0)], ("fetched", "fetched")),
        (1, [({"a"}, 1), ({"b"}, 0)], ("expired", "fetched")),
        (1, [({"a", "b"}, 1)], ("expired", "expired")),  # nobody says which
        (2, [({"a"}, 0), ({"b"}, 0)], ("fetched", "fetched")),
        (2, [(set(), 1), ({"a"}, 0), ({"b"}, 0)], ("expired", "expired")),
        (2, [({"b"}, 0), (set(), 1), ({"a"}, 0)], ("expired", "fetched")),
    ],
)
def test_kv_that_may_have_been_given_up_never_counts_as_fetched(
    workers: int, steps: list[tuple[set[str], int]], states: tuple[str, str]
) -> None:
    engine_side: Any = SimpleNamespace(_reqs_need_send={})
    leases = Leases(None, workers)
    leases._connector = engine_side
    requests: list[Any] = [Ended("a"), Ended("b")]
    for request in requests:
        leases.put(request)
    for sent, expired in steps:
        leases.take_in(step(sent, expired))
        for request in requests:
            if request.request_id in sent:
                leases.discard(request)
    assert (leases.state("a"), leases.state("b")) == states


def test_a_lease_that_is_ended_early_hides_no_other_that_ran_out() -> None:
    engine_side: Any = SimpleNamespace(_reqs_need_send={})
    leases = Leases(None, 1)
    leases._connector = engine_side
    requests: list[Any] = [Ended("a"), Ended("b")]
    for request in requests:
        leases.put(request)
    assert leases.end("a")
    leases.take_in(step({"a", "b"}, 1))  # the one was read after all: the other ran out
    assert leases.state("b") == "expired"


def _steps(engine: Engine, rng: random.Random) -> None:
    for _ in range(rng.randint(0, 5)):
        engine.step()


def test_the_request_is_cut_behind_its_first_token() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=4, seed=7, extra_args={"other": 1})
    cut = first_token_only(params)
    assert (cut.max_tokens, cut.min_tokens, cut.seed) == (1, 1, 7)
    assert cut.extra_args is not None
    assert cut.extra_args["other"] == 1
    assert cut.extra_args[KV_TRANSFER]["do_remote_decode"]
    assert (params.max_tokens, params.min_tokens, params.extra_args) == (9, 4, {"other": 1})
    assert first_token_only(SamplingParams(max_tokens=1)).extra_args is None


async def test_an_engine_without_a_connector_hands_nothing_over(model_dir: Path) -> None:
    engine = Engine(model_dir, 30)
    prompts = streaming_prompts(FakeLLM(engine, random.Random(0)), "m")  # type: ignore[arg-type]
    op = Finish(version=1, keep=1, tokens=[], sampling=Sampling(), hand_over=True)
    with pytest.raises(BadOperation, match="hand"):
        prompts.answer("p", op)
    assert not engine.scheduler.load()["hands_over"]
    assert Engine(model_dir, 30, hands_over=True).scheduler.load()["hands_over"]
    await prompts.stop()
