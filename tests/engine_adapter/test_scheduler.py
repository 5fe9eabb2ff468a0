"""The scheduler under histories of operations, against a worker that checks every KV slot."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from engine_adapter.errors import PromptFinished
from engine_adapter.scheduling import fairness
from engine_adapter.scheduling.policies import POLICIES
from tests.engine_adapter.harness import BLOCK_SIZE, MAX_MODEL_LEN, Engine, expected_answer

pytestmark = pytest.mark.slow

SMALL_POOL_BLOCKS = 1 + MAX_MODEL_LEN // 4 + 8
"""Room for one longest prompt and a little more, plus vLLM's null block."""


class History:
    """One random run: what clients do, and what each of them must get."""

    def __init__(
        self, model: Path, seed: int, blocks: int, host_blocks: int = 0, tenants: int = 0
    ) -> None:
        self.random = random.Random(seed)
        self.weights = {f"t{i}": self.random.choice([0.5, 1.0, 4.0]) for i in range(tenants)}
        self.salts: dict[str, str] = {}  # of prompts that are a tenant's
        step_tokens = self.random.choice([5, 16, 40])
        self.engine = Engine(model, blocks, step_tokens, host_blocks)
        self.switch_policy()
        self.open: dict[str, list[int]] = {}
        self.versions: dict[str, int] = {}  # of the prompts, as of their newest update
        self.expected: dict[str, list[int]] = {}
        self.ends: dict[str, tuple[str, list[int]]] = {}  # prompt and tokens, by request
        self.given_up: list[str] = []
        self.documents = [self.text(self.random.randint(1, 30)) for _ in range(4)]
        self.story = self.text(MAX_MODEL_LEN - 12)
        self.number = 0

    def text(self, length: int) -> list[int]:
        return [self.random.randrange(50) for _ in range(length)]

    def new_id(self) -> str:
        self.number += 1
        return f"r{self.number}"

    def more_of_the_story(self, tokens: list[int], room: int) -> list[int]:
        """The next piece of what several prompts read, each in pieces of its own; or nothing."""
        if self.random.random() < 0.5 or self.story[: len(tokens)] != tokens:
            return []
        return self.story[len(tokens) :][: self.random.randint(0, max(room, 0))]

    def some_tokens(self, room: int) -> list[int]:
        """Often the start of a document that others use too, so that prefixes are shared."""
        source = self.random.choice([*self.documents, self.text(20)])
        return source[: self.random.randint(0, max(room, 0))]

    def act(self) -> None:
        actions = [self.do_step] * 4 + [self.do_open, self.do_plain, self.do_ask_for_the_load]
        if self.open:
            actions += [self.do_extend] * 4 + [self.do_update] * 2 + [self.do_finish] * 2
            actions += [self.do_close, self.switch_policy]
        if self.expected:
            actions += [self.do_abort]
        if self.ends:
            actions += [self.do_reopen] * 3
        self.random.choice(actions)()

    def switch_policy(self) -> None:
        self.engine.scheduler.set_policy(self.random.choice(list(POLICIES)))

    def do_step(self) -> None:
        self.engine.step()

    def do_ask_for_the_load(self) -> None:
        assert int(self.engine.scheduler.load()["waiting_tokens"]) >= 0

    def do_open(self) -> None:
        self.begin(self.more_of_the_story([], 20) or self.some_tokens(20) or [1])

    def do_open_long(self) -> None:
        self.begin(self.text(self.random.randint(1, MAX_MODEL_LEN - 12)))

    def begin(self, tokens: list[int]) -> None:
        prompt_id = self.new_id()
        salt, weight = self.random.choice([*self.weights.items()] or [(None, None)])
        self.engine.scheduler.open_prompt(prompt_id, list(tokens), salt, self.engine.hasher, weight)
        if salt is not None:
            self.salts[prompt_id] = salt
        self.open[prompt_id] = tokens
        self.versions[prompt_id] = 0

    def do_extend(self) -> None:
        self.change(keep_all=True)

    def do_update(self) -> None:
        self.change(keep_all=False)

    def change(self, keep_all: bool) -> None:
        prompt_id = self.random.choice(list(self.open))
        keep, new = self.changed(self.open[prompt_id], keep_all)
        answer = self.engine.scheduler.extend_prompt(prompt_id, keep, new)
        self.open[prompt_id] = self.open[prompt_id][:keep] + new
        assert answer["length"] == len(self.open[prompt_id])
        assert answer["computed"] <= keep

    def changed(self, tokens: list[int], keep_all: bool) -> tuple[int, list[int]]:
        longest = min(len(tokens), MAX_MODEL_LEN - 12)
        keep = longest if keep_all else self.random.randint(0, longest)
        room = min(30, MAX_MODEL_LEN - 12 - keep)
        new = self.more_of_the_story(tokens[:keep], room) or self.some_tokens(room)
        return keep, new or ([] if keep else [2])

    def reopen(self, prompt_id: str, tokens: list[int]) -> list[int]:
        """Update a prompt whose input is closed; its new tokens."""
        keep, new = self.changed(tokens, keep_all=self.random.random() < 0.3)
        self.versions[prompt_id] += 1
        answer = self.engine.scheduler.reopen_prompt(
            prompt_id, self.versions[prompt_id], tokens[:keep] + new
        )
        assert answer["length"] == keep + len(new)
        assert int(answer["computed"]) < keep + len(new)
        return tokens[:keep] + new

    def do_reopen(self) -> None:
        """The engine's loop decides: as long as no token has come, the update is in time."""
        request_id = self.random.choice(list(self.ends))
        prompt_id, tokens = self.ends[request_id]
        if self.engine.answers[request_id]:
            with pytest.raises(PromptFinished):
                self.reopen(prompt_id, tokens)
            return
        self.open[prompt_id] = self.reopen(prompt_id, tokens)
        self.give_up(request_id)

    def give_up(self, request_id: str) -> None:
        del self.expected[request_id], self.ends[request_id]
        self.given_up.append(request_id)

    def do_finish(self) -> None:
        prompt_id = self.random.choice(list(self.open))
        tokens = self.open.pop(prompt_id)
        if self.random.random() < 0.3:
            tokens = tokens[: self.random.randint(1, len(tokens))]
        tokens = tokens + self.text(self.random.randint(0, 5))
        self.versions[prompt_id] += 1
        version = self.versions[prompt_id]
        request_id = f"{prompt_id}-answer-{version}"
        overtaken = self.random.random() < 0.2
        if overtaken:  # an update is faster than the request that ends the prompt
            self.open[prompt_id] = self.reopen(prompt_id, tokens)
        self.ask(request_id, tokens, prompt_id, version)
        self.ends[request_id] = prompt_id, tokens
        if overtaken:
            self.give_up(request_id)

    def do_plain(self) -> None:
        self.ask(self.new_id(), self.some_tokens(40) or [3], None)

    def do_plain_long(self) -> None:
        self.ask(self.new_id(), self.text(self.random.randint(1, MAX_MODEL_LEN - 12)), None)

    def ask(
        self, request_id: str, tokens: list[int], prompt_id: str | None, version: int = 0
    ) -> None:
        max_tokens = self.random.randint(1, 6)
        self.expected[request_id] = expected_answer(tokens, max_tokens)
        salt = self.random.choice([*self.weights] or [None])
        if prompt_id is not None:
            salt = self.salts.get(prompt_id)
        self.engine.request(request_id, tokens, max_tokens, prompt_id, version, cache_salt=salt)

    def do_close(self) -> None:
        prompt_id = self.random.choice(list(self.open))
        del self.open[prompt_id]
        self.engine.scheduler.close_prompt(prompt_id)

    def do_abort(self) -> None:
        request_id = self.random.choice(list(self.expected))
        if request_id not in self.engine.finished:
            del self.expected[request_id]
            self.ends.pop(request_id, None)
            self.engine.abort(request_id)

    def end(self) -> None:
        self.engine.drain()
        while self.open:
            self.do_finish()

    def check(self) -> None:
        """Once all has ended, every answer must be right and no block lost."""
        self.engine.drain()
        answers = {request_id: self.engine.answers[request_id] for request_id in self.expected}
        assert answers == self.expected
        assert not any(self.engine.answers[request_id] for request_id in self.given_up)
        assert self.engine.free_blocks == self.engine.idle_blocks
        assert self.engine.fetching == 0
        self.engine.scheduler.check_blocks()


def answered_exactly(
    model: Path, blocks: int, seed: int, actions: int, host_blocks: int = 0, tenants: int = 0
) -> None:
    """Run a history; every answer must be right and no block lost."""
    history = History(model, seed, blocks, host_blocks, tenants)
    for _ in range(actions):
        history.act()
    history.end()
    history.check()


histories = given(seed=st.integers(0, 2**32), actions=st.integers(5, 80))
pools = pytest.mark.parametrize(
    ("blocks", "host_blocks"),
    [(SMALL_POOL_BLOCKS, 0), (SMALL_POOL_BLOCKS, 10), (SMALL_POOL_BLOCKS, 60), (400, 0)],
    ids=["small pool", "little host memory", "host memory", "large pool"],
)
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pools
@settings(patient, max_examples=60)
@histories
def test_every_history_is_answered_exactly_and_leaves_no_block(
    model_dir: Path, blocks: int, host_blocks: int, seed: int, actions: int
) -> None:
    answered_exactly(model_dir, blocks, seed, actions, host_blocks)


@settings(patient, max_examples=20)
@given(seed=st.integers(0, 2**32), actions=st.integers(5, 80), tenants=st.sampled_from([2, 3, 12]))
def test_every_history_of_several_tenants_is_answered_exactly_and_leaves_no_block(
    model_dir: Path, seed: int, actions: int, tenants: int
) -> None:
    answered_exactly(model_dir, SMALL_POOL_BLOCKS, seed, actions, tenants=tenants)


@settings(patient, max_examples=40)
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


def test_what_came_before_its_tenant_was_known_is_the_tenants_too(model_dir: Path) -> None:
    engine = Engine(model_dir, 100)
    engine.request("early", [5] * 20, 6, cache_salt="t")
    engine.step()
    engine.scheduler.open_prompt("p", [6] * 20, "t", engine.hasher, 2.0)
    engine.request("other", [7] * 20, 6)
    engine.drain()  # each step checks that what it was planned by is true
    assert engine.finished == {"early", "other"}


@pytest.mark.engine  # not for its needs, for its time
@pools
@settings(patient, max_examples=1000)
@histories
def test_four_thousand_histories(
    model_dir: Path, blocks: int, host_blocks: int, seed: int, actions: int
) -> None:
    answered_exactly(model_dir, blocks, seed, actions, host_blocks)


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
