"""The description of the API and the gateway it describes: neither has what the other lacks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway import errors
from gateway.app import build
from gateway.openapi import PATH
from gateway.openapi_admin import administration
from gateway.openapi_routes import public
from gateway.routes_admin import admin
from gateway.settings import Settings
from tests.fake_engine import MODEL
from tests.gateway.conftest import Stack
from tests.gateway.pools import front
from tests.gateway.tenancy import BODY, MESSAGES, gateway, tenants_file
from tests.retrieval.words import Words

Json = dict[str, Any]

NEVER_TOLD = {
    errors.GatewayError,  # a fault of the gateway's own
    errors.NotHeld,  # replicas tell it to each other
}
DESCRIPTIONS = {"public": public(collections=True), "admin": administration()}


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def routes(app: web.Application) -> set[tuple[str, str]]:
    return {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }


@pytest.mark.parametrize("document", DESCRIPTIONS.values(), ids=DESCRIPTIONS.keys())
def test_the_description_is_valid_and_names_each_operation_once(document: bytes) -> None:
    told = json.loads(document)
    assert [error.message for error in OpenAPIV31SpecValidator(told).iter_errors()] == []
    names = [operation["operationId"] for _, _, operation in operations(told)]
    assert len(names) == len(set(names))
    for _, _, operation in operations(told):
        for answer in operation["responses"].values():
            assert {link["operationId"] for link in answer.get("links", {}).values()} <= set(names)


@pytest.mark.parametrize("collections", [False, True])
def test_every_route_is_described_and_nothing_else(tmp_path: Path, collections: bool) -> None:
    folder = str(tmp_path) if collections else None
    app = build(Settings(engine=("http://127.0.0.1:9",), collections=folder), Words())
    told = json.loads(public(collections=collections))
    assert {(method, path) for method, path, _ in operations(told)} == routes(app)


def test_every_admin_route_is_described_and_nothing_else() -> None:
    app = admin(build(Settings(engine=("http://127.0.0.1:9",))), None)
    told = {(method, path) for method, path, _ in operations(json.loads(administration()))}
    assert told == routes(app)


def every(kind: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from every(narrower)


def codes(document: Json) -> Iterator[tuple[int, str]]:
    for _, _, operation in operations(document):
        for status, answer in operation["responses"].items():
            text = json.dumps(answer)
            for found in text.split('"enum": [')[1:]:
                for code in json.loads("[" + found.partition("]")[0] + "]"):
                    yield int(status), code


def test_every_error_that_clients_are_told_is_described_with_its_status() -> None:
    told = {pair for document in DESCRIPTIONS.values() for pair in codes(json.loads(document))}
    kinds = set(every(errors.GatewayError)) - NEVER_TOLD
    assert told == {(kind.status, kind.code) for kind in kinds}


def test_the_readme_names_only_codes_that_there_are() -> None:
    text = Path("README.md").read_text()
    named = text.partition("Errors have the OpenAI shape. Codes: ")[2].partition("Retry-After")[0]
    found = set(named.split("`")[1::2])
    assert found
    assert found <= {kind.code for kind in every(errors.GatewayError)}


class Held:
    """Holds what a gateway answers against its description, and allows no field besides."""

    def __init__(self, document: Json) -> None:
        self._document = document
        for schema in document["components"]["schemas"].values():
            if schema.get("type") == "object":
                schema.setdefault("additionalProperties", False)

    def body(self, operation: str, response: httpx.Response) -> Json:
        said = next(o for _, _, o in operations(self._document) if o["operationId"] == operation)
        answer = said["responses"][str(response.status_code)]
        media = response.headers["Content-Type"].partition(";")[0]
        content = answer["content"][media]
        if media != "application/json":
            return {}
        found: Json = response.json()
        self._check(content["schema"], found)
        return found

    def component(self, name: str, body: Json) -> None:
        self._check({"$ref": f"#/components/schemas/{name}"}, body)

    def _check(self, schema: Json, body: Json) -> None:
        whole = schema | {"components": self._document["components"]}
        wrong = [e.message for e in Draft202012Validator(whole).iter_errors(body)]
        assert wrong == [], body


def events(text: str) -> Iterable[str]:
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


async def test_what_a_stream_is_answered_is_as_described(stack: Stack) -> None:
    http, url = stack.http, stack.url
    held = Held((await http.get(url + PATH)).json())
    at = url + "/v1/streams"
    stream = held.body("createStream", await http.post(at, json=BODY | {"max_tokens": 3}))["id"]
    here = f"{at}/{stream}"
    post = {"text": "One.", "id": "a", "seq": 0}
    held.body("postChunks", await http.post(here + "/chunks", json=post))
    ranked = {"documents": [{"id": "a"}, {"id": "b", "text": "Two."}]}
    held.body("rankDocuments", await http.put(here + "/documents", json=ranked))
    held.body("getStream", await http.get(here))
    gap = await http.post(here + "/chunks", json={"text": "Three.", "seq": 9})
    assert held.body("postChunks", gap)["error"]["expected_seq"] == 2
    unknown = await http.put(here + "/documents", json={"documents": [{"id": "z"}]})
    assert held.body("rankDocuments", unknown)["error"]["code"] == "unknown_document"
    options = {"stream_options": {"include_usage": True}, "logprobs": True}
    answer = await http.post(here + "/finish", json=options, headers={"Idempotency-Key": "k"})
    held.body("finishStream", answer)
    *told, done = events(answer.text)
    assert done == "[DONE]"
    for event in told:
        held.component("ChatCompletionChunk", json.loads(event))
    rest = await http.get(here + "/answer", headers={"Last-Event-ID": "0"})
    held.body("resumeAnswer", rest)
    assert list(events(rest.text)) == [*told[1:], done]
    gone = await http.get(here + "/answer", headers={"Last-Event-ID": "99"})
    held.body("resumeAnswer", gone)
    held.body("postChunks", await http.post(here + "/chunks", json=post))  # again
    held.body("cancelStream", await http.delete(here))
    whole = held.body("createStream", await http.post(at, json=BODY | {"stream": False}))
    held.body("finishStream", await http.post(f"{at}/{whole['id']}/finish"))
    lines = [BODY | {"stream": False}, {"text": "One."}, {"finish": True}]
    body = "\n".join(json.dumps(line) for line in lines)
    headers = {"Content-Type": "application/x-ndjson"}
    held.body("createStream", await http.post(at, content=body, headers=headers))
    held.body("getStream", await http.get(at + "/st-none"))


async def test_the_other_routes_answer_as_described(model_dir: Path, tmp_path: Path) -> None:
    async with gateway(model_dir, None, collections=str(tmp_path)) as g, g.client(None) as http:
        held = Held((await http.get(PATH)).json())
        for path, name in (("/health", "health"), ("/ready", "ready"), ("/metrics", "metrics")):
            held.body(name, await http.get(path))
        at = "/v1/collections"
        held.body("createCollection", await http.post(at, json={"name": "notes"}))
        held.body("createCollection", await http.post(at, json={"name": "notes"}))
        held.body(
            "addPassages", await http.post(at + "/notes/passages", json={"id": "a", "text": "b"})
        )
        held.body("listCollections", await http.get(at))
        held.body("searchCollection", await http.post(at + "/notes/search", json={"query": "b"}))
        found = {"retrieval": [{"type": "ann", "collection": "notes"}], "stream": False}
        body = {"model": MODEL, "messages": MESSAGES} | found
        answer = await http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        held.component("ChatCompletion", answer.json())
        held.body("deleteCollection", await http.delete(at + "/notes"))
        held.body("searchCollection", await http.post(at + "/notes/search", json={"query": "b"}))


async def test_the_admin_routes_answer_as_described(model_dir: Path) -> None:
    async with front(model_dir, 1) as f:
        http, url = f.http, f.admin_url
        held = Held((await http.get(url + PATH)).json())
        engine = held.body("listEngines", await http.get(url + "/admin/engines"))["engines"][0]
        at = f"{url}/admin/engines/{engine['id']}"
        held.body("addEngine", await http.post(url + "/admin/engines", json={"url": engine["url"]}))
        held.body("addEngine", await http.post(url + "/admin/engines", json={"url": "ftp://a"}))
        held.body("drainEngine", await http.post(at + "/drain"))
        held.body("undrainEngine", await http.delete(at + "/drain"))
        held.body("removeEngine", await http.delete(url + "/admin/engines/nobody"))
        held.body("countStreams", await http.get(url + "/admin/streams"))
        held.body("showConfig", await http.get(url + "/admin/config"))
        held.body("reload", await http.post(url + "/admin/reload"))
        held.body("drainGateway", await http.post(url + "/admin/drain"))


async def test_the_description_is_for_everybody(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    tenants_file(file, acme="")
    async with gateway(model_dir, file) as g, g.client(None) as http:
        told = (await http.get(PATH)).json()
        assert told["openapi"].startswith("3.1")
        assert told["paths"][PATH]["get"]["security"] == []
        held = Held(told)
        refused = await http.post("/v1/streams", json=BODY)
        assert held.body("createStream", refused)["error"]["code"] == "invalid_api_key"
        assert "WWW-Authenticate" in refused.headers
