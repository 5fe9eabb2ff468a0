"""Locust users of a gateway: streams fed with chunks, ranked lists, streams given up, plain chat.

    python -m locust -f loadtest/locustfile.py --host http://127.0.0.1:8000            web page
    python -m locust ... --headless --users 20 --spawn-rate 2 --run-time 2m

Beside its requests, Locust's statistics have rows of type `metric`: what a user of a gateway feels.
Their times are milliseconds, as all of Locust's; the row of invalidated tokens counts tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pydoc_data.topics import topics
from typing import Any, ClassVar

import requests
from locust import HttpUser, between, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.clients import ResponseContextManager
from locust.env import Environment

from loadtest.locust_metrics import serve_metrics
from loadtest.sse import Answer, AnswerBroken, read_answer

TEXT_CHARS = 600
"""Of one chunk: about 150 tokens."""
QUESTION = "In one sentence: what is this about?"
TEXTS = tuple(
    text[at : at + TEXT_CHARS]
    for text in topics.values()
    for at in range(0, len(text) - TEXT_CHARS, TEXT_CHARS)
)
"""Real prose, from Python's own documentation."""


@events.init_command_line_parser.add_listener
def _arguments(parser: LocustArgumentParser) -> None:
    parser.add_argument(
        "--api-key", env_var="LOCUST_API_KEY", default="", is_secret=True, help="of a tenant"
    )
    group = parser.add_argument_group("streams")
    group.add_argument("--model", default="", help="default: the first that the gateway names")
    group.add_argument("--chunks", type=int, default=4, help="chunks or lists of one stream")
    group.add_argument("--gap-s", type=float, default=0.5, help="mean time between two of them")
    group.add_argument("--answer-tokens", type=int, default=16, help="longest answer")


@events.init.add_listener
def _started(environment: Environment, **_: Any) -> None:
    serve_metrics(environment)


class GatewayUser(HttpUser):
    """What all users have in common."""

    abstract = True
    wait_time = between(0.1, 1.0)
    served: ClassVar[dict[str, str]] = {}
    """The model that is asked for, by gateway."""

    def on_start(self) -> None:
        """Learn which model there is."""
        self.options = self.environment.parsed_options
        self.chance = random.Random()
        if self.options.api_key:
            self.client.headers["Authorization"] = f"Bearer {self.options.api_key}"
        self.model = self.options.model or self._served()

    def _served(self) -> str:
        host = str(self.host)
        if host not in self.served:
            models = self.client.get("/v1/models").json()["data"]
            self.served[host] = models[0]["id"]
        return self.served[host]

    def note(self, name: str, value: float) -> None:
        """One value for a row of the statistics."""
        self.environment.events.request.fire(
            request_type="metric",
            name=name,
            response_time=value,
            response_length=0,
            exception=None,
            context={},
        )

    @contextmanager
    def stream(self) -> Iterator[str]:
        """An open stream; cancelled if the user does not come to its end."""
        body = {
            "model": self.model,
            "max_tokens": self.options.answer_tokens,
            "messages": [
                {"role": "system", "content": f"{self.chance.random()}: answer briefly."},
                {"role": "user", "content": "{{documents}}\n" + QUESTION},
            ],
        }
        created = self.client.post("/v1/streams", json=body)
        created.raise_for_status()
        path = f"/v1/streams/{created.json()['id']}"
        try:
            yield path
        except BaseException:
            self.client.delete(path, name="/v1/streams/{id}")
            raise

    def pause(self) -> None:
        """Until retrieval finds something more. (Locust makes `sleep` let other users run.)"""
        time.sleep(self.chance.expovariate(1 / max(self.options.gap_s, 1e-6)))

    def chunk(self, path: str, seq: int) -> None:
        """Post one chunk."""
        body = {"text": self.chance.choice(TEXTS), "seq": seq}
        sent = self.client.post(path + "/chunks", json=body, name="/v1/streams/{id}/chunks")
        sent.raise_for_status()
        self.note("chunk acknowledgement", 1000 * sent.elapsed.total_seconds())

    def finish(self, path: str) -> None:
        """Ask, and read the answer."""
        self.read(path + "/finish", {}, "/v1/streams/{id}/finish")

    def read(self, path: str, body: dict[str, Any], name: str) -> None:
        """Post a question and read the answer's events as they come."""
        begun_s = time.perf_counter()
        with self.client.post(
            path, json=body, name=name, stream=True, catch_response=True
        ) as response:
            try:
                response.raise_for_status()
                answer = read_answer(response.iter_lines(chunk_size=None), time.perf_counter)
            except (requests.RequestException, AnswerBroken) as e:
                response.failure(e)
                return
            self._noted(response, answer, begun_s)

    def _noted(self, response: ResponseContextManager, answer: Answer, begun_s: float) -> None:
        if not answer.pieces_s:
            response.success()  # the model ended at once
            return
        self.note("time to first token", 1000 * (answer.pieces_s[0] - begun_s))
        for before_s, after_s in zip(answer.pieces_s, answer.pieces_s[1:], strict=False):
            self.note("time between tokens", 1000 * (after_s - before_s))
        response.success()


class Appending(GatewayUser):
    """Posts chunks as they are found, then asks."""

    weight = 4

    @task
    def append(self) -> None:
        """One stream."""
        with self.stream() as path:
            for seq in range(self.options.chunks):
                self.pause()
                self.chunk(path, seq)
            self.finish(path)


class Ranking(GatewayUser):
    """Sends a better ranked list each time retrieval knows more, then asks."""

    weight = 2

    @task
    def rank(self) -> None:
        """One stream."""
        ranked: list[dict[str, str]] = []
        with self.stream() as path:
            for seq in range(self.options.chunks):
                self.pause()
                new = {"id": f"d{seq}", "text": self.chance.choice(TEXTS)}
                ranked.insert(self.chance.randint(0, len(ranked)), new)
                self._replace(path, seq, ranked)
            self.finish(path)

    def _replace(self, path: str, seq: int, ranked: list[dict[str, str]]) -> None:
        body = {"documents": ranked, "seq": seq}
        sent = self.client.put(path + "/documents", json=body, name="/v1/streams/{id}/documents")
        sent.raise_for_status()
        self.note("tokens invalidated", sent.json()["invalidated"])


class GivingUp(GatewayUser):
    """Begins like `Appending`, then loses interest."""

    weight = 1

    @task
    def give_up(self) -> None:
        """One stream."""
        with self.stream() as path:
            for seq in range(max(1, self.options.chunks // 2)):
                self.pause()
                self.chunk(path, seq)
            self.client.delete(path, name="/v1/streams/{id}")


class Chatting(GatewayUser):
    """Asks without context, as any OpenAI client."""

    weight = 1
    wait_time = constant(1.0)

    @task
    def chat(self) -> None:
        """One question."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.chance.choice(TEXTS)[:80]}],
            "max_tokens": self.options.answer_tokens,
            "stream": True,
        }
        self.read("/v1/chat/completions", body, "/v1/chat/completions")
