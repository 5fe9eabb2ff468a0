"""Requests made from the description of a gateway by Schemathesis: such as it allows, such as it
does not, and walks along its links from one operation to the next.

Statuses, content types, headers and bodies of answers have to be as described, and what the
description does not allow has to be refused. What it allows may be refused: it does not say all
that a chat template or a sampler wants.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jsonschema_rs
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from hypothesis.stateful import run_state_machine_as_test
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from loadtest.fuzz_tally import TIMEOUT_S, Tally

CHECKS: list[Any] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
SSE = "text/event-stream"
FRESH_S = 0.5
"""How long requests go to one stream. None is idle so long."""
MOST_EVENTS = 1 << 20
"""An answer is read to its end."""
STEPS = 10
"""Of a walk."""
WALKED = 0.4
"""Share of the requests that are steps of walks."""
FREE = (
    "n", "min_tokens", "temperature", "top_p", "min_p", "top_k", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "top_logprobs", "stop_token_ids",
    "stop", "seq",
)  # fmt: skip
"""Options that are refused unless others fit; walks leave them out, to get somewhere."""

Json = dict[str, Any]


class Described:
    """Fuzzes one gateway by its description."""

    def __init__(self, client: requests.Session, url: str, model: str, tally: Tally) -> None:
        document = client.get(url + "/openapi.json", timeout=TIMEOUT_S).json()
        for methods in document["paths"].values():
            for operation in methods.values():
                del operation["security"]  # the client has the key
                for answer in operation["responses"].values():
                    if (media := answer.get("content", {}).get(SSE)) is not None:
                        media["schema"] = {}  # taken for that of an event; see `_events`
        self._document: Json = document
        self._client, self._url, self._model, self._tally = client, url, model, tally
        data = [
            {"$ref": f"#/components/schemas/{name}"} for name in ("ChatCompletionChunk", "Error")
        ]
        schema = {"anyOf": data, "components": document["components"]}
        self._data = jsonschema_rs.validator_for(schema)
        self._opened = ("", 0.0)

    def run(self, count: int, number: int) -> None:
        """Send about so many requests, by this seed."""
        self.walk(round(count * WALKED), number)
        self.apart(round(count * (1 - WALKED)), number)

    def apart(self, count: int, number: int) -> None:
        """Each operation by itself, half of the requests not as described."""
        schema = _schema(self._document)
        found: list[Any] = list(schema.get_all_operations())
        operations = [one.ok() for one in found]
        with_input = [one for one in operations if one.body or one.path_parameters]
        for operation in operations:
            each = max(count // (2 * len(with_input)), 1) if operation in with_input else 1
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                self._generated(operation.as_strategy(mode), each, number)

    def _generated(self, cases: Any, count: int, number: int) -> None:
        @seed(number)
        @generating(count)
        @given(case=cases, known=st.booleans())
        def send(case: Any, known: bool) -> None:
            if known and "id" in case.path_parameters:
                case.path_parameters["id"] = self._stream()
            try:
                response = case.call(**self._where())
            except requests.RequestException as e:
                self._tally.hung(case.operation.label, e, case.body)
            else:
                self._held(response, case)

        with suppress(Unsatisfiable):  # nothing can be wrong with a request that has no input
            send()

    def _stream(self) -> str:
        """The id of a stream that was opened a moment ago."""
        name, opened_s = self._opened
        if time.monotonic() > opened_s + FRESH_S:
            messages = [{"role": "user", "content": "Why?"}]
            body = {"model": self._model, "messages": messages, "max_tokens": 4}
            url = self._url + "/v1/streams"
            made = self._client.post(url, data=json.dumps(body), timeout=TIMEOUT_S)
            self._tally.answered("POST /v1/streams", made, body)
            name = made.json().get("id", "")
            self._opened = name, time.monotonic()
        return name

    def walk(self, count: int, number: int) -> None:
        schema = _schema(narrowed(self._document, self._model))
        schema.config.generation.update(modes=[GenerationMode.POSITIVE])
        held, where = self._held, self._where

        class Walk(schema.as_state_machine()):  # type: ignore[misc]
            """Operations on streams that earlier ones have opened."""

            def get_call_kwargs(self, case: Any) -> Json:
                return where()

            def validate_response(self, response: Any, case: Any, **kwargs: Any) -> None:
                held(response, case)

        once: Callable[..., None] = run_state_machine_as_test
        seed(number)(Walk)
        once(Walk, settings=generating(max(count // STEPS, 1), stateful_step_count=STEPS))

    def _where(self) -> Json:
        return {"session": self._client, "base_url": self._url, "timeout": TIMEOUT_S}

    def _held(self, response: Any, case: Any) -> None:
        label = case.operation.label
        self._tally.answered(label, response, case.body)
        try:
            case.validate_response(response, checks=CHECKS)
        except BaseExceptionGroup as e:
            for failure in e.exceptions:
                self._failed(label, failure, case)
        except AssertionError as e:
            self._failed(label, e, case)

        passed_through = label.endswith("completions")
        if response.headers.get("content-type", [""])[0].startswith(SSE) and not passed_through:
            self._events(label, response.text, case)

    def _events(self, label: str, text: str, case: Any) -> None:
        """The data of all events is as described, and the last one says how the answer ended."""
        *told, last = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        if last != "[DONE]":
            told.append(last)
            if '"error"' not in last:
                self._tally.fault(f"{label}: an answer without an end", case.body)
        for data in told:
            if not self._data.is_valid(json.loads(data)):
                self._tally.fault(f"{label}: an event that is not as described", data)

    def _failed(self, label: str, failure: BaseException, case: Any) -> None:
        said = " ".join(str(failure).split())
        self._tally.fault(f"{label}: {type(failure).__name__}: {said[:160]}", case.body)


def narrowed(document: Json, model: str) -> Json:
    """A description with fewer values, so that most walks find their stream open."""
    document = copy.deepcopy(document)
    schemas = document["components"]["schemas"]
    create = schemas["Create"]["properties"]
    create["model"] = {"enum": [model]}
    create["retrieval"] = {"type": "null"}
    message = {
        "type": "object",
        "properties": {"role": {"enum": ["user"]}, "content": {"type": "string"}},
        "required": ["role", "content"],
        "additionalProperties": False,
    }
    create["messages"] = {"type": "array", "items": message, "minItems": 1, "maxItems": 3}
    for name in ("Create", schema_of(document, "finishStream")):
        options = schemas[name]["properties"]
        for option in FREE:
            options.pop(option, None)
        for option in ("max_tokens", "max_completion_tokens"):
            options[option] = {"type": "integer", "minimum": 1, "maximum": 16}
    post = schemas[schema_of(document, "postChunks")]
    del post["properties"]["chunks"]
    post["properties"]["seq"] = {"type": "integer", "minimum": 0, "maximum": 3}
    post["required"] = ["text"]
    return document


def schema_of(document: Json, operation: str) -> str:
    """Name of the schema of an operation's body."""
    for methods in document["paths"].values():
        for said in methods.values():
            if said["operationId"] == operation:
                schema = said["requestBody"]["content"]["application/json"]["schema"]
                return str(schema["$ref"]).rpartition("/")[2]
    raise KeyError(operation)


def _schema(document: Json) -> Any:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.max_stream_events = MOST_EVENTS
    return schema


def generating(count: int, **more: Any) -> settings:
    """Generate so many cases, whatever they are like, and don't look for smaller ones."""
    return settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        **more,
    )
