"""Bodies that no description tells of: NDJSON in all states of disrepair, in parts of any size; and
operations of the engine protocol, valid, stale, contradictory and unreadable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import requests
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from engine_adapter.errors import BadOperation
from engine_adapter.messages import DoneEvent, ErrorEvent, Event, Progress, decode
from loadtest.fuzz_tally import TIMEOUT_S, Tally, code_of

Json = dict[str, Any]

NDJSON = "application/x-ndjson"

HUGE = st.sampled_from([1 << 63, -(1 << 63) - 1, 1 << 64, 10**40, -(10**400), 0, -1])
SCALARS: SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | HUGE | st.floats(allow_nan=False) | st.text()
)
VALUES: SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
BROKEN_TEXTS = st.sampled_from(
    [
        b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"{", b"}", b'{"text": "\\ud800"}',
        b'{"text": "\\udc00\\ud800"}', b'{"text": "a", "text": "b"}', b'{"text": "\\x"}',
        b"\xef\xbb\xbf{}", b"[" * 5000, b'{"a":' * 5000, b'{"text": NaN}', b'{"text": 1e999}',
        b'{"finish": true, "finish": false}', b'{"finish": 1}', b'{"text": "\\"finish\\""}',
        b"nul", b"-", b"1" * 5000, b'"' + b"a" * 5000, b"\r", b" \t ",
    ]
)  # fmt: skip


def _line(value: Any) -> bytes:
    return json.dumps(value).encode()  # huge numbers and lone surrogates included


@st.composite
def _objects(draw: DrawFn, fields: Sequence[str]) -> bytes:
    """An object with some of these fields, and anything in them."""
    names = draw(st.lists(st.sampled_from(fields) | st.text(max_size=5), max_size=4))
    pairs = [_line(name) + b": " + _line(draw(VALUES)) for name in names]
    return b"{" + b", ".join(pairs) + b"}"  # a name may stand there twice


@st.composite
def ndjson(draw: DrawFn, model: str) -> list[bytes]:
    """A body of one request that opens, feeds and finishes a stream, in the parts to send."""
    first = {"model": model, "messages": [{"role": "user", "content": draw(st.text())}]}
    options = st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 8)}, optional={"stream": st.booleans(), "seed": st.integers()}
    )
    chunk = st.fixed_dictionaries({"text": st.text(min_size=1)}, optional={"id": st.text()})
    good = [
        _line(first | draw(options)),
        *map(_line, draw(st.lists(chunk, max_size=4))),
        _line({"finish": True}),
    ]
    odd = BROKEN_TEXTS | _objects(["model", "messages", "text", "id", "finish", "max_tokens"])
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        good.insert(draw(st.integers(0, len(good))), draw(odd))
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b" \n"]))
    body = end.join(good) + draw(st.sampled_from([b"", b"\n"]))
    if draw(st.integers(0, 5)) == 0:
        body = body[: draw(st.integers(0, len(body)))]
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=4)))
    return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True) if a < b]


class Lines:
    """Sends NDJSON to a gateway."""

    name = "NDJSON POST /v1/streams"

    def __init__(self, client: requests.Session, url: str, tally: Tally) -> None:
        self._client, self._url, self._tally = client, url + "/v1/streams", tally

    def send(self, parts: list[bytes]) -> None:
        """One body; the answer has an end, and says how it ended."""
        headers = {"Content-Type": NDJSON}
        try:
            response = self._client.post(
                self._url, data=iter(parts), headers=headers, timeout=TIMEOUT_S
            )
        except requests.RequestException as e:
            self._tally.hung(self.name, e, parts)
            return
        self._tally.answered(self.name, response, parts)
        if (wrong := _wrong_with(response)) is not None:
            self._tally.fault(f"{self.name}: {wrong}", parts)


def _wrong_with(response: requests.Response) -> str | None:
    if response.status_code != 200:
        return None if code_of(response) else f"{response.status_code} without a code"
    if response.headers["Content-Type"].startswith("application/json"):
        return None if response.json()["choices"] else "an answer without a choice"
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    if events[-1:] == ["[DONE]"] or '"error"' in (events or [""])[-1]:
        return None
    return "an answer without an end"


# Operations of the engine protocol.

IDS = st.sampled_from(["fuzz-a", "fuzz-b", "fuzz-c"])
"""Few, so that operations meet."""
TOKENS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)
ODD_TOKENS = st.lists(st.integers() | HUGE, max_size=5)
SMALL = st.integers(-1, 60)
SAMPLING = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 8)},
    optional={
        "min_tokens": st.integers(-1, 2), "seed": st.integers() | HUGE, "top_k": SMALL,
        "temperature": st.floats(0, 3), "stop": st.lists(st.text(min_size=1), max_size=2),
        "logprobs": st.integers(0, 5), "stop_token_ids": TOKENS | ODD_TOKENS,
    },
)  # fmt: skip
METHODS = {"status": "GET", "tokens": "GET", "abort": "DELETE"}
LEASE_S = 2.0
"""What is left open is gone soon after the run."""
CODES = frozenset(
    {
        "bad_operation", "prompt_too_long", "unknown_prompt", "version_conflict", "prompt_exists",
        "prompt_finished", "engine_overloaded",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, in part by what the prompt is when it is sent."""

    name: str
    prompt_id: str
    tokens: list[int]
    later: int
    """Versions behind the last one that was acknowledged; 1 is right."""
    keep: float
    """Share of the prompt; above 1 is more than there is."""
    changed: Json
    """Fields in place of the right ones."""
    raw: bytes | None
    """The body in place of all that."""


@st.composite
def operations(draw: DrawFn) -> Operation:
    """One operation: usually right, if the prompt is open."""
    names = ["open", "extend", "invalidate", "finish", "status", "tokens", "abort"]
    fields = ["tokens", "version", "keep", "sampling", "lease_s", "weight", "cache_salt"]
    odd = draw(st.sampled_from([""] * 12 + ["tokens", "later", "keep", "changed", "raw"]))
    return Operation(
        draw(st.sampled_from([*names, "open", "open", "extend", "extend"])),
        draw(IDS),
        draw(ODD_TOKENS if odd == "tokens" else TOKENS),
        draw(st.integers(-2, 3)) if odd == "later" else 1,
        draw(st.floats(-1, 3)) if odd == "keep" else draw(st.sampled_from([0.3, 1.0, 1.0])),
        draw(st.dictionaries(st.sampled_from(fields), VALUES)) if odd == "changed" else {},
        draw(BROKEN_TEXTS | _objects(fields)) if odd == "raw" else None,
    )


class Operations:
    """Sends operations to an engine, beside the gateway that uses it."""

    def __init__(self, client: requests.Session, url: str, tally: Tally) -> None:
        self._client, self._url, self._tally = client, url + "/stream2llm/prompts/", tally
        self._known: dict[str, Progress] = {}
        self._closed = Counter[str]()

    def send(self, operation: Operation, sampling: Json) -> None:
        """It is carried out, or refused by one of the protocol's errors."""
        label, body = f"engine {operation.name}", self._body(operation, sampling)
        try:
            response = self._client.request(
                METHODS.get(operation.name, "POST"), self._url + self._path(operation),
                data=body, timeout=TIMEOUT_S,
            )  # fmt: skip
        except requests.RequestException as e:
            self._tally.hung(label, e, body)
            return
        self._tally.answered(label, response, body)
        if response.status_code != 200:
            if (code := code_of(response)) not in CODES:
                self._tally.fault(f"{label}: {response.status_code} {code}", body)
            return
        try:
            self._held(operation, response.content, body)
        except (BadOperation, ValueError, msgspec.ValidationError) as e:
            self._tally.fault(f"{label}: {e}", body)

    def _body(self, operation: Operation, sampling: Json) -> bytes:
        if operation.name in METHODS:
            return b""
        if operation.raw is not None:
            return operation.raw
        known = self._known.get(operation.prompt_id)
        version, length = (0, 0) if known is None else (known.version, known.length)
        next_one = {"version": version + operation.later, "keep": int(operation.keep * length)}
        tokens = {"tokens": operation.tokens}
        right: dict[str, Json] = {
            "open": tokens | {"lease_s": LEASE_S},
            "extend": next_one | tokens,
            "invalidate": next_one,
            "finish": next_one | tokens | {"sampling": sampling},
        }
        return _line(right[operation.name] | operation.changed)

    def _held(self, operation: Operation, answer: bytes, body: bytes) -> None:
        """What was answered follows from what was asked.

        Raises:
            ValueError: it does not.
        """
        if operation.name == "tokens":
            return
        if operation.name == "finish":
            self._known.pop(operation.prompt_id, None)
            self._closed[operation.prompt_id] += 1
            *_, last = (msgspec.json.decode(line, type=Event) for line in answer.splitlines())
            if not isinstance(last, DoneEvent | ErrorEvent):
                raise ValueError("an answer without an end")
            return
        progress = decode(Progress, answer)
        self._known[operation.prompt_id] = progress
        if operation.name in ("open", "extend", "invalidate"):
            asked = json.loads(body)
            length = asked.get("keep", 0) + len(asked.get("tokens", ()))
            if (progress.length, progress.version) != (length, asked.get("version", 0)):
                raise ValueError("the prompt is not what was asked for")

    def _path(self, operation: Operation) -> str:
        """Behind an answer, usually another prompt: that one stays known until its lease ends."""
        closed = self._closed[operation.prompt_id] - (operation.later < 0)
        own = operation.name in ("extend", "invalidate", "finish", "tokens")
        return f"{operation.prompt_id}-{closed}" + (f"/{operation.name}" if own else "")
