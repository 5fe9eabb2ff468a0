"""Random histories of the scheduler: what clients do, and what each of them must get."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine_adapter.errors import PromptFinished
from engine_adapter.scheduling.policies import POLICIES
from tests.engine_adapter.harness import MAX_MODEL_LEN, Engine, expected_answer


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
