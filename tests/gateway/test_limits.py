"""Limits of tenants and of the gateway: who is refused, how, and how soon."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway.keys import ENGINES
from gateway.metering import PassedTokens
from gateway.quota import NEVER_USED_S, WINDOW_S, Rate, duration
from tests.conftest import until
from tests.gateway.tenancy import BODY, Gateway, gateway, tenants_file

pytestmark = pytest.mark.slow

# The arithmetic.

spendings = st.lists(st.tuples(st.floats(0, 90), st.integers(0, 200)), max_size=40)


@given(per_minute=st.integers(1, 100_000), steps=spendings)
def test_what_is_spent_while_there_is_some_is_bounded_in_every_window(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    rate, full_s, now_s = Rate(per_minute), NEVER_USED_S, 0.0
    granted: list[tuple[float, int]] = []
    for pause_s, units in steps:
        now_s += pause_s
        if rate.wait_s(full_s, now_s) <= 1e-9:
            full_s = rate.spent(full_s, now_s, units)
            granted.append((now_s, units))
    for i, (begin_s, _) in enumerate(granted):
        within = [units for at_s, units in granted[i:] if at_s <= begin_s + WINDOW_S]
        # A full allowance, what refills meanwhile, and the last one, which may owe.
        assert sum(within[:-1]) <= 2 * per_minute + 1


@given(per_minute=st.integers(1, 100_000), units=st.integers(0, 300_000))
def test_after_the_wait_and_not_before_there_is_some(per_minute: int, units: int) -> None:
    rate = Rate(per_minute)
    full_s = rate.spent(NEVER_USED_S, 100.0, units)
    wait_s = rate.wait_s(full_s, 100.0)
    assert rate.left(full_s, 100.0) == max(per_minute - units, 0)
    assert rate.left(full_s, 100.0 + wait_s + 1e-3) >= 1
    assert wait_s == 0 or rate.left(full_s, 100.0 + wait_s * 0.99 - 1e-3) == 0
    assert rate.left(full_s, 100.0 + rate.reset_s(full_s, 100.0)) == per_minute


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, "0ms"), (0.02, "20ms"), (1, "1s"), (59.6, "1m0s"), (360, "6m0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written


@given(
    events=st.integers(0, 20),
    sizes=st.lists(st.integers(1, 50), min_size=1),
    usage=st.booleans(),
    behind=st.sampled_from([0, 100, 20_000]),
)
def test_passed_tokens_are_counted_however_the_answer_is_cut_and_whatever_follows(
    events: int, sizes: list[int], usage: bool, behind: int
) -> None:
    text = b'data: {"choices": [{"text": "data:"}]}\n\n' * events
    if usage:
        for tokens in (3, 5):  # with each event, or at the end
            text += b'data: {"usage": {"prompt_tokens": 7, "completion_tokens": %d}}\n\n' % tokens
    text += b": " + b"x" * behind + b"\n\n"
    text += b"data: [DONE]\n\n"
    passed, at, i = PassedTokens(b"x" * 40), 0, 0
    while at < len(text):
        size = sizes[i % len(sizes)]
        passed.see(text[at : at + size])
        at, i = at + size, i + 1
    assert passed.total == (12 if usage else 10 + (events or len(text) // 4))


@pytest.mark.parametrize(
    ("asked", "tokens"),
    [
        (b'{"max_tokens": 50}', 50),
        (b'{"max_completion_tokens": 50, "n": 2}', 100),
        (b"{}", 1000),
        (b'{"max_tokens": 5000}', 1000),
        (b'{"max_tokens": -5}', 0),
        (b'{"max_tokens": 50, "stream": true}', 0),
        (b'{"max_tokens": "many"}', 0),
        (b"", 0),
    ],
)
def test_an_answer_that_nobody_waited_for_costs_what_it_could_have_had(
    asked: bytes, tokens: int
) -> None:
    passed = PassedTokens(asked)
    passed.hung_up(1000)
    assert passed.total == len(asked) // 4 + tokens


# Over HTTP.

LIMITS = {
    "free": "",
    "slow": "requests_per_minute = 2",
    "small": "tokens_per_minute = 200\nchunk_bytes = 2000\nbody_bytes = 3000",
    "few": "streams = 2",
    "short": "stream_s = 0.5",
    "hasty": "idle_s = 0.5",
}


async def whole(request: web.Request) -> web.Response:
    usage = {"prompt_tokens": 150, "completion_tokens": 100}
    return web.json_response({"choices": [], "usage": usage})


@pytest_asyncio.fixture(scope="module")
async def running(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Gateway, dict[str, str]]]:
    file = tmp_path_factory.mktemp("limits") / "tenants.toml"
    keys = tenants_file(file, **LIMITS)
    more = [("POST", "/v1/completions", whole)]
    async with gateway(model_dir, file, more, poll_s=60.0) as at:
        yield at, keys


def client_of(running: tuple[Gateway, dict[str, str]], name: str) -> httpx.AsyncClient:
    at, keys = running
    return at.client(keys[name])


def refused(response: httpx.Response, code: str) -> None:
    assert response.json()["error"]["code"] == code
    assert response.status_code == (429 if code == "rate_limit_exceeded" else 503)
    assert int(response.headers["Retry-After"]) >= 1


async def test_requests_per_minute(running: tuple[Gateway, dict[str, str]]) -> None:
    async with client_of(running, "slow") as http:
        first = await http.post("/v1/streams", json=BODY)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        reset = re.fullmatch(r"(\d+)s", first.headers["x-ratelimit-reset-requests"])
        assert reset is not None
        assert 10 < int(reset[1]) <= 30  # some of it has passed
        path = f"/v1/streams/{first.json()['id']}"
        for _ in range(5):  # nothing of an open stream counts
            assert (await http.post(path + "/chunks", json={"text": "x"})).status_code == 202
        assert (await http.post("/v1/streams", json=BODY)).status_code == 201
        for path in ("/v1/streams", "/v1/completions", "/v1/chat/completions"):
            response = await http.post(path, json=BODY)
            refused(response, "rate_limit_exceeded")
            assert 1 < int(response.headers["Retry-After"]) <= 30
            assert response.headers["x-ratelimit-remaining-requests"] == "0"


async def test_tokens_per_minute_are_those_of_context_and_answers(
    running: tuple[Gateway, dict[str, str]],
) -> None:
    async with client_of(running, "small") as http:
        created = await http.post("/v1/streams", json=BODY)
        assert created.headers["x-ratelimit-remaining-tokens"] == "200"
        path = f"/v1/streams/{created.json()['id']}"
        taken = await http.post(path + "/chunks", json={"text": "word " * 100})
        assert taken.status_code == 202
        left = int(taken.headers["x-ratelimit-remaining-tokens"])
        assert 200 - taken.json()["tokens"] <= left < 200
        # The next one may owe; then no more comes in, but what is open is answered.
        assert (await http.post(path + "/chunks", json={"text": "word " * 200})).status_code == 202
        refused(await http.post(path + "/chunks", json={"text": "x"}), "rate_limit_exceeded")
        refused(await http.put(path + "/documents", json={"documents": []}), "rate_limit_exceeded")
        refused(await http.post("/v1/streams", json=BODY), "rate_limit_exceeded")
        assert (await http.post(path + "/finish", json={"stream": False})).status_code == 200


async def test_what_passes_through_costs_tokens_too(model_dir: Path, tmp_path: Path) -> None:
    keys = tenants_file(tmp_path / "tenants.toml", small="tokens_per_minute = 200")
    more = [("POST", "/v1/completions", whole)]
    file = tmp_path / "tenants.toml"
    async with gateway(model_dir, file, more) as at, at.client(keys["small"]) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        refused(await http.post("/v1/completions", json=BODY), "rate_limit_exceeded")


async def test_sizes(running: tuple[Gateway, dict[str, str]], tmp_path: Path) -> None:
    async with client_of(running, "free") as free, client_of(running, "small") as small:
        path = f"/v1/streams/{(await free.post('/v1/streams', json=BODY)).json()['id']}"
        big = {"text": "x" * 2001}
        assert (await free.post(path + "/chunks", json=big)).status_code == 202
        # A body that is too large is refused before it is looked at.
        response = await small.post(path + "/chunks", json=big)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


async def test_context_tokens_of_one_stream(model_dir: Path, tmp_path: Path) -> None:
    keys = tenants_file(tmp_path / "tenants.toml", small="context_tokens = 100")
    file = tmp_path / "tenants.toml"
    async with gateway(model_dir, file) as at, at.client(keys["small"]) as http:
        path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"
        for text, status in (("word " * 80, 202), ("word " * 80, 400), ("word", 202)):
            response = await http.post(path + "/chunks", json={"text": text})
            assert response.status_code == status
        documents = {"documents": [{"text": "word " * 120}]}
        response = await http.put(path + "/documents", json=documents)
        assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_streams_at_once(running: tuple[Gateway, dict[str, str]]) -> None:
    async with client_of(running, "few") as few, client_of(running, "free") as free:
        ids = [(await few.post("/v1/streams", json=BODY)).json()["id"] for _ in range(2)]
        refused(await few.post("/v1/streams", json=BODY), "rate_limit_exceeded")
        assert (await free.post("/v1/streams", json=BODY)).status_code == 201
        await few.delete(f"/v1/streams/{ids[0]}")
        assert (await few.post("/v1/streams", json=BODY)).status_code == 201


@pytest.mark.parametrize("name", ["short", "hasty"])
async def test_a_stream_ends_by_its_age_and_by_silence(
    running: tuple[Gateway, dict[str, str]], name: str
) -> None:
    async with client_of(running, name) as http:
        begun_s = time.monotonic()
        path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"

        async def expired() -> bool:
            if name == "short":  # also one that is fed
                await http.post(path + "/chunks", json={"text": "x"})
            return bool((await http.get(path)).json()["state"] == "expired")

        await until(expired, within_s=5, every_s=0.1)
        assert time.monotonic() - begun_s > 0.3


async def test_an_answer_that_takes_too_long_is_broken_off_with_a_reason(
    running: tuple[Gateway, dict[str, str]],
) -> None:
    at, _ = running
    async with client_of(running, "short") as http:
        path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"
        at.engine.core.prefill_s = lambda tokens: 10.0
        try:
            answer = await http.post(path + "/finish", json={"stream": False})
        finally:
            at.engine.core.prefill_s = lambda tokens: 0.0
    assert answer.json()["error"]["code"] == "input_closed"


async def test_a_busy_engine_gets_no_new_streams_and_the_refusal_is_quick(
    running: tuple[Gateway, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    at, _ = running
    async with client_of(running, "free") as http:
        path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"
        engine = at.app[ENGINES].all[0]
        monkeypatch.setattr(engine, "placed_tokens", 2_000_000)
        took_s = []
        large = BODY | {"documents": [{"text": "word " * 800_000}]}  # a second's tokenizing
        for _ in range(10):
            begun_s = time.monotonic()
            refused(await http.post("/v1/streams", json=large), "overloaded")
            took_s.append(time.monotonic() - begun_s)
        refused(await http.post("/v1/completions", json=BODY), "overloaded")
        # Streams that are open go on.
        assert (await http.post(path + "/chunks", json={"text": "x"})).status_code == 202
        assert (await http.post(path + "/finish", json={"stream": False})).status_code == 200
    assert sorted(took_s)[5] < 0.5
