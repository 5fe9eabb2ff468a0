"""The scheduler in one situation after the other, against a worker that checks every KV slot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from engine_adapter.errors import PromptFinished
from tests.engine_adapter.harness import BLOCK_SIZE, SMALL_POOL_BLOCKS, Engine, expected_answer

pytestmark = pytest.mark.slow


def test_what_came_before_its_tenant_was_known_is_the_tenants_too(model_dir: Path) -> None:
    engine = Engine(model_dir, 100)
    engine.request("early", [5] * 20, 6, cache_salt="t")
    engine.step()
    engine.scheduler.open_prompt("p", [6] * 20, "t", engine.hasher, 2.0)
    engine.request("other", [7] * 20, 6)
    engine.drain()  # each step checks that what it was planned by is true
    assert engine.finished == {"early", "other"}


def test_idle_prompts_give_way_to_an_ordinary_request(model_dir: Path) -> None:
    engine = Engine(model_dir, SMALL_POOL_BLOCKS)
    for i in range(3):
        tokens = [i + 1] * 40
        engine.scheduler.open_prompt(f"p{i}", tokens, None, engine.hasher)
    engine.drain()
    held = engine.idle_blocks - engine.free_blocks
    assert held > 20
    prompt = [7] * 80
    engine.request("plain", prompt, 4)
    engine.drain()
    assert engine.answers["plain"] == expected_answer(prompt, 4)


def test_an_idle_prompt_loses_only_the_blocks_that_are_needed(model_dir: Path) -> None:
    engine = Engine(model_dir, 1 + 24)
    engine.scheduler.open_prompt("p", [5] * 81, None, engine.hasher)  # 20 blocks of 24
    engine.drain()
    assert engine.scheduler.status("p")["computed"] == 80
    engine.request("plain", [7] * 30, 1)  # 8 blocks
    while not engine.answers["plain"]:
        engine.step()
        computed = engine.scheduler.status("p")["computed"]
    assert computed == 64


def test_an_idle_prompt_is_computed_again_when_memory_comes_back(model_dir: Path) -> None:
    engine = Engine(model_dir, SMALL_POOL_BLOCKS)
    engine.scheduler.open_prompt("p", [5] * 81, None, engine.hasher)
    engine.drain()
    engine.request("plain", [7] * 90, 2)
    engine.drain()
    assert engine.scheduler.status("p") == {"state": "idle", "length": 81, "computed": 80}


def test_invalidation_gives_back_whole_blocks_and_the_prompt_goes_on(model_dir: Path) -> None:
    engine = Engine(model_dir, 100)
    engine.scheduler.open_prompt("p", [5] * 41, None, engine.hasher)
    engine.drain()
    answer = engine.scheduler.extend_prompt("p", 10, [])
    assert (answer["length"], answer["computed"], answer["freed_blocks"]) == (10, 8, 8)
    engine.request("answer", [5] * 10 + [6] * 9, 3, "p")
    engine.drain()
    assert engine.answers["answer"] == expected_answer([5] * 10 + [6] * 9, 3)
    assert engine.free_blocks == engine.idle_blocks


def test_a_partial_prompt_never_takes_what_another_has_computed(model_dir: Path) -> None:
    engine = Engine(model_dir, SMALL_POOL_BLOCKS)
    engine.scheduler.set_policy("srpf")
    engine.scheduler.open_prompt("first", [5] * 81, None, engine.hasher)
    engine.drain()
    engine.scheduler.open_prompt("second", [6] * 81, None, engine.hasher)
    engine.drain()
    assert engine.scheduler.status("first")["computed"] == 80
    assert engine.scheduler.status("second")["computed"] == 0
    assert not engine.scheduler.has_requests(), "a starved prompt keeps the loop spinning"


def test_an_update_keeps_whole_blocks_below_the_change(model_dir: Path) -> None:
    engine = Engine(model_dir, 100)
    tokens = list(range(41))
    engine.scheduler.open_prompt("p", tokens, None, engine.hasher)
    engine.drain()
    answer = engine.scheduler.extend_prompt("p", 22, [49] * 10)
    assert answer == {
        "state": "waiting",
        "length": 32,
        "computed": 20,
        "invalidated": 20,
        "freed_blocks": 5,
    }


def test_documents_that_come_back_are_found_in_the_prefix_cache(model_dir: Path) -> None:
    engine = Engine(model_dir, 100)
    first, second = list(range(41)), [48] * 41
    engine.scheduler.open_prompt("p", first, None, engine.hasher)
    engine.drain()
    engine.scheduler.extend_prompt("p", 0, second)
    engine.drain()
    engine.scheduler.extend_prompt("p", 0, first)
    engine.step()
    assert engine.scheduler.status("p")["computed"] == 40


def test_documents_that_another_prompt_has_read_are_not_computed_again_piece_by_piece(
    model_dir: Path,
) -> None:
    engine = Engine(model_dir, SMALL_POOL_BLOCKS)
    scheduler, documents = engine.scheduler, [[n] * 11 for n in range(6)]
    computed = 0

    def read(prompt_id: str, wait: bool) -> None:
        nonlocal computed
        scheduler.open_prompt(prompt_id, [9, 9, 9], None, engine.hasher)
        length = 3
        for document in documents:
            scheduler.extend_prompt(prompt_id, length, document)
            length += len(document)
            while wait and engine.step():
                pass
        engine.drain()
        assert scheduler.status(prompt_id)["computed"] == length - 1

    schedule = scheduler.schedule

    def counting(*args: Any) -> Any:
        nonlocal computed
        output = schedule(*args)
        computed += output.total_num_scheduled_tokens
        return output

    engine.scheduler.schedule = counting  # type: ignore[method-assign]
    read("first", wait=True)
    assert computed == 68
    computed = 0
    read("second", wait=True)  # only what is left behind a whole block, each time
    assert computed <= 7 * (BLOCK_SIZE - 1)
    computed = 0
    tokens = [9, 9, 9, *(t for document in documents for t in document)]
    scheduler.open_prompt("third", tokens[:6], None, engine.hasher)
    engine.drain()
    computed = 0
    engine.request("end", tokens, 2, "third")  # the closing request finds the rest too
    engine.drain()
    assert computed <= BLOCK_SIZE + 2
    assert engine.answers["end"] == expected_answer(tokens, 2)


def test_what_was_computed_for_a_prompt_that_is_given_up_is_counted(model_dir: Path) -> None:
    engine = Engine(model_dir, 100)
    for name in ("given up", "answered"):
        engine.scheduler.open_prompt(name, list(range(41)), None, engine.hasher)
    engine.drain()
    engine.request("answer", list(range(45)), 2, "answered")
    engine.scheduler.close_prompt("given up")
    engine.scheduler.close_prompt("given up")
    engine.drain()
    assert engine.scheduler.load()["abandoned_tokens"] == 40


def swapped_out(model_dir: Path, host_blocks: int = 60) -> Engine:
    """An engine with an open prompt, 81 tokens, whose KV had to go for another request."""
    engine = Engine(model_dir, SMALL_POOL_BLOCKS, host_blocks=host_blocks)
    engine.scheduler.open_prompt("p", [5] * 81, None, engine.hasher)
    engine.drain()
    engine.request("plain", [7] * 90, 2)
    while not engine.finished:
        engine.step()
    return engine


def test_what_was_swapped_out_comes_back_without_being_computed(model_dir: Path) -> None:
    engine = swapped_out(model_dir)
    engine.drain()
    assert engine.scheduler.status("p") == {"state": "idle", "length": 81, "computed": 80}
    assert engine.worker.copies.fetched_blocks > 10
    assert engine.fetching == 0


def test_host_memory_that_is_full_means_computing_again(model_dir: Path) -> None:
    engine = swapped_out(model_dir, host_blocks=3)
    engine.drain()
    assert engine.scheduler.status("p")["computed"] == 80
    assert engine.worker.copies.fetched_blocks <= 3


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("change", ["update", "invalidate", "finish", "close"])
def test_a_prompt_changes_while_its_kv_is_swapped_out_or_on_its_way_back(
    model_dir: Path, change: str, steps: int
) -> None:
    engine = swapped_out(model_dir)
    for _ in range(steps):
        engine.step()
    tokens = [5] * 81
    match change:
        case "update":
            engine.scheduler.extend_prompt("p", 30, [6] * 20)
            tokens = [5] * 30 + [6] * 20
        case "invalidate":
            engine.scheduler.extend_prompt("p", 30, [])
            tokens = [5] * 30
        case "close":
            engine.scheduler.close_prompt("p")
    engine.step()
    prompt_id = None if change == "close" else "p"
    engine.request("answer", [*tokens, 8], 3, prompt_id)
    engine.drain()
    assert engine.answers["answer"] == expected_answer([*tokens, 8], 3)
    assert engine.free_blocks == engine.idle_blocks
    assert engine.fetching == 0


@pytest.mark.parametrize("keep", [77, 79, 80])
def test_a_block_that_came_whole_from_host_memory_is_not_written_for_an_update(
    model_dir: Path, keep: int
) -> None:
    """vLLM computes the last token of such a prompt again, in a block that others may share."""
    engine = swapped_out(model_dir)
    engine.scheduler.extend_prompt("p", 80, [])
    engine.drain()
    assert engine.worker.copies.fetched_blocks > 10
    assert engine.scheduler.status("p")["computed"] == 79
    tokens = [*[5] * keep, *[6] * (81 - keep)]
    engine.scheduler.extend_prompt("p", keep, tokens[keep:])
    engine.request("answer", tokens, 3, "p")
    engine.request("other", [*[5] * 80, 9], 3)
    engine.drain()
    assert engine.answers["answer"] == expected_answer(tokens, 3)
    assert engine.answers["other"] == expected_answer([*[5] * 80, 9], 3)


def test_a_finished_prompt_that_is_updated_keeps_its_beginning(model_dir: Path) -> None:
    engine = Engine(model_dir, 100, step_tokens=40)
    tokens = list(range(41))
    engine.scheduler.open_prompt("p", tokens, None, engine.hasher)
    engine.drain()
    engine.request("late", [*tokens, 49], 3, "p", version=1)
    updated = [*tokens[:22], *[48] * 10]
    answer = engine.scheduler.reopen_prompt("p", 2, updated)
    assert (answer["length"], answer["computed"]) == (32, 20)
    assert (answer["invalidated"], answer["freed_blocks"]) == (20, 5)
    engine.request("answer", updated, 3, "p", version=2)
    engine.drain()
    assert engine.answers == {"late": [], "answer": expected_answer(updated, 3)}
    assert engine.free_blocks == engine.idle_blocks


def test_a_token_that_is_only_being_sampled_is_taken_back_and_one_that_is_out_is_not(
    model_dir: Path,
) -> None:
    engine = Engine(model_dir, 100, step_tokens=40)
    tokens = [5] * 20
    engine.request("first", tokens, 3, "p", version=1)
    engine.step()
    assert engine.in_flight, "the step that samples is under way"
    longer = [*tokens, 6]
    answer = engine.scheduler.reopen_prompt("p", 2, longer)
    assert (answer["computed"], answer["invalidated"]) == (20, 0)
    engine.request("second", longer, 3, "p", version=2)
    while not engine.answers["second"]:
        engine.step()
    with pytest.raises(PromptFinished):
        engine.scheduler.reopen_prompt("p", 3, longer)
    engine.drain()
    with pytest.raises(PromptFinished):
        engine.scheduler.reopen_prompt("p", 3, longer)
    assert engine.answers == {"first": [], "second": expected_answer(longer, 3)}


def test_a_preempted_answer_is_updated_too(model_dir: Path) -> None:
    engine = Engine(model_dir, 100, step_tokens=16)
    tokens = [5] * 60
    engine.request("first", tokens, 2, "p", version=1)
    engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert [r.status.name for r in engine.scheduler.waiting] == ["PREEMPTED"]
    answer = engine.scheduler.reopen_prompt("p", 2, tokens[:50])
    assert (answer["length"], answer["computed"], answer["invalidated"]) == (50, 0, 0)
    engine.request("second", tokens[:50], 2, "p", version=2)
    engine.drain()
    assert engine.answers == {"first": [], "second": expected_answer(tokens[:50], 2)}
    assert engine.free_blocks == engine.idle_blocks


def test_an_end_that_an_update_has_overtaken_is_dropped(model_dir: Path) -> None:
    engine = Engine(model_dir, 100)
    engine.scheduler.open_prompt("p", [5] * 41, None, engine.hasher)
    engine.drain()
    updated = [5] * 45
    assert engine.scheduler.reopen_prompt("p", 2, updated)["computed"] == 40
    engine.request("late", [5] * 42, 2, "p", version=1)
    engine.drain()
    assert engine.scheduler.status("p") == {"state": "idle", "length": 45, "computed": 44}
    engine.request("answer", updated, 2, "p", version=2)
    engine.drain()
    assert engine.answers == {"late": [], "answer": expected_answer(updated, 2)}
