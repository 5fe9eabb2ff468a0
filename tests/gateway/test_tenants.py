"""Keys, visibility and salts."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from cache_index.names import Hashing, packed
from gateway.chain import BlockChain
from gateway.identity import FORWARDED
from gateway.keys import RELOADER, TENANTS
from gateway.logs import fields_of
from gateway.prompt import PromptBuilder, Tokens
from gateway.tenants import EVERYBODY, Tenant, Tenants, TenantsError, hashed, new
from tests.conftest import until
from tests.gateway.tenancy import BODY, Gateway, gateway, tenants_file

pytestmark = pytest.mark.slow

TRACE = "1" * 32
asked: list[dict[str, Any]] = []
heard: list[dict[str, str]] = []


async def echo(request: web.Request) -> web.Response:
    """An engine's plain API that remembers what it was asked."""
    asked.append(orjson.loads(await request.read()))
    heard.append({name.lower(): value for name, value in request.headers.items()})
    return web.json_response({"choices": []})


PLAIN = [("POST", "/v1/chat/completions", echo), ("POST", "/v1/completions", echo)]


@pytest_asyncio.fixture(scope="module")
async def running(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Gateway, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("tenants")
    keys = tenants_file(folder / "tenants.toml", a="", b="collections_write = true")
    settings = {"collections": str(folder / "collections")}
    async with gateway(model_dir, folder / "tenants.toml", PLAIN, **settings) as at:
        yield at, keys


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": b"Bearer \xff"},
        {"Authorization": "Bearer s2l-wrong"},
        {"Authorization": "Basic czJsLXdyb25n"},
        {"X-Api-Key": "s2l-wrong"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/streams", "/v1/chat/completions", "/nothing"])
async def test_without_a_key_there_is_a_401_in_the_shape_of_openai(
    running: tuple[Gateway, dict[str, str]], headers: dict[str, str | bytes], path: str
) -> None:
    async with running[0].client(None) as http:
        response = await http.post(path, json=BODY, headers=list(headers.items()))
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_health_and_readiness_need_no_key(running: tuple[Gateway, dict[str, str]]) -> None:
    async with running[0].client(None) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 200


async def test_a_key_may_come_in_either_header(running: tuple[Gateway, dict[str, str]]) -> None:
    at, keys = running
    async with at.client(None) as http:
        for headers in ({"Authorization": f"bearer {keys['a']}"}, {"X-Api-Key": keys["a"]}):
            assert (await http.post("/v1/streams", json=BODY, headers=headers)).status_code == 201


async def test_a_stream_is_there_for_its_tenant_only(
    running: tuple[Gateway, dict[str, str]],
) -> None:
    at, keys = running
    async with at.client(keys["a"]) as a, at.client(keys["b"]) as b:
        path = f"/v1/streams/{(await a.post('/v1/streams', json=BODY)).json()['id']}"
        unknown = await b.get("/v1/streams/st-unknown")
        for response in [
            await b.get(path),
            await b.delete(path),
            await b.post(path + "/chunks", json={"text": "mine"}),
            await b.put(path + "/documents", json={"documents": []}),
            await b.post(path + "/finish"),
        ]:
            assert response.status_code == 404
            assert response.json()["error"]["code"] == unknown.json()["error"]["code"]
        assert (await a.get(path)).json()["state"] == "open"
        assert (await a.post(path + "/finish", json={"stream": False})).status_code == 200


async def salts(at: Gateway, http: httpx.AsyncClient) -> list[str | None]:
    """Of an open prompt at the engine, and of a plain completion."""
    stream_id = (await http.post("/v1/streams", json=BODY)).json()["id"]
    await http.post(f"/v1/streams/{stream_id}/chunks", json={"text": "x"})

    async def at_the_engine() -> bool:
        return stream_id in at.engine.sessions._sessions

    await until(at_the_engine, within_s=10)
    session = at.engine.sessions._sessions[stream_id]
    await http.post("/v1/chat/completions", json=BODY)
    return [session.cache_salt, asked[-1].get("cache_salt")]


async def test_what_is_cached_for_a_tenant_has_its_salt_whichever_way_it_came(
    running: tuple[Gateway, dict[str, str]],
) -> None:
    at, keys = running
    async with at.client(keys["a"]) as a, at.client(keys["b"]) as b:
        of_a, of_b = await salts(at, a), await salts(at, b)
    assert of_a[0] is not None
    assert len(set(of_a)) == len(set(of_b)) == 1
    assert of_a[0] != of_b[0]


async def test_tokens_of_a_text_are_remembered_for_its_tenant_only(
    running: tuple[Gateway, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    at, keys = running
    encode, encoded = PromptBuilder._encode_literally, []

    def counted(builder: PromptBuilder, text: str) -> Tokens:
        encoded.append(text)
        return encode(builder, text)

    monkeypatch.setattr(PromptBuilder, "_encode_literally", counted)
    tokens = []
    for whose, times in (("a", 1), ("a", 1), ("b", 2), ("b", 2)):
        async with at.client(keys[whose]) as http:
            path = f"/v1/streams/{(await http.post('/v1/streams', json=BODY)).json()['id']}"
            posted = await http.post(path + "/chunks", json={"text": "a secret"})
            ranked = {"documents": [{"text": "a secret", "id": "x"}]}
            assert (await http.put(path + "/documents", json=ranked)).status_code == 200
        tokens.append(posted.json()["tokens"])
        assert encoded == ["a secret"] * times
    assert len(set(tokens)) == 1


@pytest.mark.parametrize("path", ["/v1/streams", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("name", ["cache_salt", "kv_transfer_params"])
async def test_clients_do_not_say_what_engines_believe(
    running: tuple[Gateway, dict[str, str]], path: str, name: str
) -> None:
    at, keys = running
    async with at.client(keys["a"]) as http:
        plain = orjson.dumps(BODY | {name: "x"})
        escaped = plain.replace(name.encode(), b"\\u%04x" % ord(name[0]) + name[1:].encode())
        for body in (plain, escaped):
            response = await http.post(path, content=body)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == name


@pytest.mark.parametrize("name", ["stream2llm_prompt", "kv_transfer_params"])
async def test_nor_by_way_of_extensions(running: tuple[Gateway, dict[str, str]], name: str) -> None:
    at, keys = running
    async with at.client(keys["a"]) as http:
        body = BODY | {"vllm_xargs": {name: "st-1"}}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 400
        body = BODY | {"vllm_xargs": {"mine": 1}}
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200


async def test_an_engine_hears_neither_the_key_nor_what_would_steer_it(
    running: tuple[Gateway, dict[str, str]],
) -> None:
    at, keys = running
    async with at.client(keys["a"]) as http:
        steering = {"X-Data-Parallel-Rank": "1", "traceparent": f"00-{TRACE}-{'2' * 16}-01"}
        await http.post("/v1/completions", json={"prompt": "x"}, headers=steering)
    assert keys["a"] not in str(heard[-1])
    assert "x-data-parallel-rank" not in heard[-1]
    assert heard[-1]["traceparent"].split("-")[1] == TRACE


async def test_collections_are_changed_by_those_who_may(
    running: tuple[Gateway, dict[str, str]],
) -> None:
    at, keys = running
    async with at.client(keys["a"]) as a, at.client(keys["b"]) as b:
        refused = await a.post("/v1/collections", json={"name": "wiki"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert (await b.post("/v1/collections", json={"name": "wiki"})).status_code == 201
        assert [c["name"] for c in (await a.get("/v1/collections")).json()["data"]] == ["wiki"]
        assert (await a.delete("/v1/collections/wiki")).status_code == 403


async def test_a_client_cannot_pretend_to_be_a_replica(
    running: tuple[Gateway, dict[str, str]],
) -> None:
    at, keys = running
    async with at.client(keys["a"]) as http:
        stream_id = (await http.post("/v1/streams", json=BODY)).json()["id"]
        at.engine.core.prefill_s = lambda tokens: 5.0
        try:
            finish = http.stream(
                "POST", f"/v1/streams/{stream_id}/finish", headers={FORWARDED: "http://replica"}
            )
            async with finish as answer:
                await anext(answer.aiter_lines())
        finally:
            at.engine.core.prefill_s = lambda tokens: 0.0
        state = "finishing"
        while state == "finishing":
            state = (await http.get(f"/v1/streams/{stream_id}")).json()["state"]
        assert state == "cancelled", "a replica that hangs up leaves the stream open"


async def test_the_file_is_read_again(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    before = tenants_file(file, a="")
    async with gateway(model_dir, file) as at, at.client(before["a"]) as http:
        assert (await http.post("/v1/streams", json=BODY)).status_code == 201
        after = tenants_file(file, a="")
        at.app[RELOADER].reload()
        assert (await http.post("/v1/streams", json=BODY)).status_code == 401
        file.write_text("[[tenants]]\nname = 3")
        with pytest.raises(TenantsError):
            at.app[RELOADER].reload()
        assert at.app[TENANTS].of(after["a"].encode()) is not None, "a broken file changes nothing"


async def test_a_log_line_says_whose_stream_it_is_about(
    running: tuple[Gateway, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    at, keys = running
    caplog.set_level(logging.INFO, "gateway")
    async with at.client(keys["a"]) as http:
        stream_id = (await http.post("/v1/streams", json=BODY)).json()["id"]
        await http.delete(f"/v1/streams/{stream_id}")
    (ended,) = [r for r in caplog.records if r.getMessage() == "stream ended"]
    assert fields_of(ended)["tenant"] == "a"


async def test_an_open_gateway_has_no_salt(model_dir: Path) -> None:
    async with gateway(model_dir, None, PLAIN) as at, at.client(None) as http:
        assert await salts(at, http) == [None, None]


async def test_no_text_of_a_client_is_logged(
    running: tuple[Gateway, dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    at, keys = running
    caplog.set_level(logging.DEBUG, logger="gateway")
    secret = "swordfish"
    async with at.client(keys["a"]) as http:
        messages = [{"role": "user", "content": secret}]
        body = BODY | {"messages": messages, "documents": [{"text": secret}]}
        stream_id = (await http.post("/v1/streams", json=body)).json()["id"]
        await http.post(f"/v1/streams/{stream_id}/chunks", json={"text": secret, "seq": 9})
        await http.post("/v1/streams", content=secret)
        await http.post("/v1/streams", json=body | {"temperature": secret})
        await http.post(f"/v1/streams/{stream_id}/finish", json={"stream": False})
        metrics = (await http.get("/metrics")).text
    assert secret not in caplog.text + metrics


# The file.


@pytest.mark.parametrize(
    "text",
    [
        "tenants = 3",
        '[[tenants]]\nname = "a"',
        '[[tenants]]\nname = "a"\nkeys = ["plain"]',
        f'[[tenants]]\nname = "a"\nsecret = "{"0" * 63}"',
        f'[[tenants]]\nname = "a"\nsecret = "{"0" * 64}"\nstream = 3',
        f'[[tenants]]\nname = "a"\nsecret = "{"0" * 64}"\nstreams = 0',
        f'[[tenants]]\nname = "a"\nsecret = "{"0" * 64}"\n' * 2,
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(TenantsError):
        Tenants(file)


def test_a_tenant_may_have_limits_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    keys = tenants_file(file, a="streams = 5", b="")
    file.write_text("[defaults]\nstreams = 2\nidle_s = 9\n" + file.read_text())
    tenants = Tenants(file)
    found = {name: tenants.of(key.encode()) for name, key in keys.items()}
    assert [(t.streams, t.idle_s) for t in found.values() if t] == [(5, 9), (2, 9)]


def test_the_command_shows_the_key_apart_from_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gateway.tenants"]
    made = subprocess.run([*command, "new", 'a "b"'], capture_output=True, text=True, check=True)
    key = made.stderr.split()[-1]
    file = tmp_path / "tenants.toml"
    file.write_text(made.stdout)
    assert key not in made.stdout
    assert hashed(key) in made.stdout
    found = Tenants(file).of(key.encode())
    assert found is not None
    assert found.name == 'a "b"'
    assert found.cache_salt != EVERYBODY.cache_salt


@given(keys=st.lists(st.text(min_size=1), unique=True, max_size=5), other=st.text())
def test_a_key_finds_its_own_tenant_or_none(
    keys: list[str], other: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("keys") / "tenants.toml"
    parts = [
        f'[[tenants]]\nname = "{i}"\nkeys = ["{hashed(key)}"]\nsecret = "{i:064x}"'
        for i, key in enumerate(keys)
    ]
    file.write_text("\n".join(parts) or "tenants = []")
    tenants = Tenants(file)
    for i, key in enumerate(keys):
        found = tenants.of(key.encode())
        assert found is not None
        assert found.name == str(i)
    assert (tenants.of(other.encode()) is not None) == (other in keys)


@given(tokens=st.lists(st.integers(0, 50_000), max_size=80), cuts=st.lists(st.integers(0, 80)))
def test_names_of_a_growing_prompt_are_salted_as_those_of_a_whole_one(
    tokens: list[int], cuts: list[int]
) -> None:
    hashing, salt = Hashing.of("sha256", 16), Tenant(name="a", secret="0" * 64).cache_salt
    chain, at = BlockChain(hashing, [], salt), 0
    for cut in sorted([*cuts, len(tokens)]):
        chain.append(tokens[at:cut])
        at = max(at, cut)
    chain.rewrite(tokens, 20)
    assert chain.names == packed(hashing.chain(tokens, salt=salt))
    assert len(tokens) < 16 or chain.names != packed(hashing.chain(tokens))


def test_two_new_tenants_have_neither_key_nor_secret_in_common() -> None:
    (one_key, one), (other_key, other) = new("a"), new("a")
    lines = set(one.splitlines()) & set(other.splitlines())
    assert one_key != other_key
    assert lines == {"[[tenants]]", 'name = "a"'}
