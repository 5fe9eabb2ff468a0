"""The scheduler under random histories, against a worker that checks every KV slot."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from engine_adapter.scheduling import fairness
from tests.engine_adapter.harness import BLOCK_SIZE, MAX_MODEL_LEN, SMALL_POOL_BLOCKS
from tests.engine_adapter.histories import History, answered_exactly

pytestmark = pytest.mark.slow

histories = given(seed=st.integers(0, 2**32), actions=st.integers(5, 80))
pools = pytest.mark.parametrize(
    ("blocks", "host_blocks"),
    [(SMALL_POOL_BLOCKS, 0), (SMALL_POOL_BLOCKS, 10), (SMALL_POOL_BLOCKS, 60), (400, 0)],
    ids=["small pool", "little host memory", "host memory", "large pool"],
)


@pools
@settings(max_examples=60)
@histories
def test_every_history_is_answered_exactly_and_leaves_no_block(
    model_dir: Path, blocks: int, host_blocks: int, seed: int, actions: int
) -> None:
    answered_exactly(model_dir, blocks, seed, actions, host_blocks)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), actions=st.integers(5, 80), tenants=st.sampled_from([2, 3, 12]))
def test_every_history_of_several_tenants_is_answered_exactly_and_leaves_no_block(
    model_dir: Path, seed: int, actions: int, tenants: int
) -> None:
    answered_exactly(model_dir, SMALL_POOL_BLOCKS, seed, actions, tenants=tenants)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    tenants=st.sampled_from([2, 3, 5, 12]),
    blocks=st.integers(1 + MAX_MODEL_LEN // BLOCK_SIZE, SMALL_POOL_BLOCKS + 12),
    host_blocks=st.sampled_from([0, 20]),
    flood_tokens=st.sampled_from([fairness.FLOOD_TOKENS, 20]),
)
@example(
    seed=2,
    tenants=2,
    blocks=SMALL_POOL_BLOCKS,
    host_blocks=0,
    flood_tokens=fairness.FLOOD_TOKENS,
)
def test_tenants_whose_prompts_do_not_fit_together_are_all_answered(
    model_dir: Path, seed: int, tenants: int, blocks: int, host_blocks: int, flood_tokens: int
) -> None:
    small = {"FLOOD_REQUESTS": 1, "FLOOD_AHEAD": 0.0, "FLOODED_STEP_TOKENS": 6}
    with patch.multiple(fairness, FLOOD_TOKENS=flood_tokens, **small):
        answer_crowd(model_dir, seed, tenants, blocks, host_blocks)


def answer_crowd(model_dir: Path, seed: int, tenants: int, blocks: int, host_blocks: int) -> None:
    """Many long prompts of several tenants at once, in little memory."""
    history = History(model_dir, seed, blocks, host_blocks, tenants)
    for _ in range(history.random.randint(2, 12)):
        history.random.choice([history.do_open_long, history.do_plain_long])()
        for _ in range(history.random.choice([0, 0, 1, 3])):
            history.do_step()
        if history.open and history.random.random() < 0.5:
            history.do_finish()
    while history.open:
        history.do_finish()
    history.check()


@pytest.mark.engine  # not for its needs, for its time
@pools
@settings(max_examples=1000)
@histories
def test_four_thousand_histories(
    model_dir: Path, blocks: int, host_blocks: int, seed: int, actions: int
) -> None:
    answered_exactly(model_dir, blocks, seed, actions, host_blocks)
