"""The description of the API in OpenAPI 3.1, made of what the routes themselves use.

Bodies are the types that the routes decode, errors the classes that they raise; only which
operation has which of them is said a second time, in a table of `Operation`s. A test compares the
table with the routes of an application, so neither can be changed alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import msgspec
import orjson
from aiohttp import web

from gateway.errors import GatewayError
from gateway.openapi_shapes import Error

PATH = "/openapi.json"

Json = dict[str, Any]

_REFERENCE = "#/components/schemas/{name}"
JSON = "application/json"
SSE = "text/event-stream"
NDJSON = "application/x-ndjson"
PROMETHEUS = "text/plain"


@dataclass(frozen=True, slots=True)
class Parameter:
    """Something of a request beside its body."""

    name: str
    place: str
    """`header` or `path`."""
    description: str
    schema: Json = field(default_factory=lambda: {"type": "string"})

    def to_json(self) -> Json:
        return {
            "name": self.name,
            "in": self.place,
            "required": self.place == "path",
            "description": self.description,
            "schema": self.schema,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What an operation answers with one status when nothing went wrong."""

    description: str
    content: Mapping[str, Any] = field(default_factory=dict)
    """A type, a tuple of types, or a JSON schema, by media type."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What each means. Those are not always there."""
    links: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By operation: where its path parameters are found, as runtime expressions."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one route."""

    method: str
    path: str
    name: str
    """`operationId`."""
    summary: str
    tag: str
    answers: Mapping[int, Answer]
    description: str = ""
    body: Mapping[str, Any] | None = None
    """As of `Answer.content`."""
    body_required: bool = True
    parameters: Sequence[Parameter] = ()
    errors: Sequence[type[GatewayError]] = ()
    unrendered: Mapping[int, Answer] = field(default_factory=dict)
    """Errors that are not the gateway's own and may look different."""
    open: bool = False
    """Answers also without a key."""


def described(
    title: str,
    description: str,
    operations: Iterable[Operation],
    *,
    key: str,
    also: Sequence[type] = (),
) -> bytes:
    """The whole description as JSON.

    Args:
        key: what the key in `Authorization` is, for the security scheme.
        also: types that only texts speak of.
    """
    operations = list(operations)
    schemas = _Schemas(operations, also)
    paths: dict[str, Json] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schemas)
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {
                "title": title,
                "version": version("stream2llm"),
                "description": description,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {
                "schemas": schemas.components,
                "securitySchemes": {
                    "key": {"type": "http", "scheme": "bearer", "description": key}
                },
            },
        }
    )


def route(document: bytes) -> web.RouteDef:
    """Serves a description."""

    async def show(request: web.Request) -> web.Response:
        return web.Response(body=document, content_type=JSON)

    return web.get(PATH, show)


DESCRIBING = Operation(
    "get", PATH, "describe", "This description", "watching",
    {200: Answer("OpenAPI 3.1.", {JSON: {"type": "object"}})},
    open=True,
)  # fmt: skip


class _Schemas:
    """JSON schemas of all types that the operations name, each written down once."""

    def __init__(self, operations: Iterable[Operation], also: Sequence[type]) -> None:
        contents = [Answer("", {JSON: (Error, *also)})]
        for operation in operations:
            contents += [*operation.answers.values(), *operation.unrendered.values()]
            contents.append(Answer("", operation.body or {}))
        shapes = [shape for content in contents for shape in content.content.values()]
        types = list({kind for shape in shapes for kind in _types(shape)})
        found, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
        self.components: dict[str, Any] = components
        self._by_type = dict(zip(types, found, strict=True))

    def of(self, shape: Any) -> Json:
        """The schema of what an `Answer` has as its content."""
        if isinstance(shape, dict):
            return shape
        found = [self._by_type[kind] for kind in _types(shape)]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def content(self, content: Mapping[str, Any]) -> Json:
        return {media: {"schema": self.of(shape)} for media, shape in content.items()}


def _types(shape: Any) -> tuple[type, ...]:
    if isinstance(shape, tuple):
        return shape
    return () if isinstance(shape, dict) else (shape,)


def _operation(operation: Operation, schemas: _Schemas) -> Json:
    responses = {
        str(status): _answer(answer, schemas)
        for status, answer in {**operation.answers, **operation.unrendered}.items()
    }
    for status in sorted({error.status for error in operation.errors}):
        kinds = [error for error in operation.errors if error.status == status]
        rendered = _refusal(kinds, schemas)
        if (other := operation.unrendered.get(status)) is not None:
            shapes = [schemas.of(other.content[JSON]), rendered["content"][JSON]["schema"]]
            rendered["content"][JSON]["schema"] = {"anyOf": shapes}
            rendered["description"] += "\n\n" + other.description
        responses[str(status)] = rendered
    said: Json = {
        "operationId": operation.name,
        "summary": operation.summary,
        "description": operation.description,
        "tags": [operation.tag],
        "parameters": [parameter.to_json() for parameter in operation.parameters],
        "responses": dict(sorted(responses.items())),
        "security": [] if operation.open else [{"key": []}],
    }
    if operation.body is not None:
        content = schemas.content(operation.body)
        said["requestBody"] = {"required": operation.body_required, "content": content}
    return said


def _answer(answer: Answer, schemas: _Schemas) -> Json:
    said: Json = {"description": answer.description}
    if answer.content:
        said["content"] = schemas.content(answer.content)
    if answer.headers:
        said["headers"] = {
            name: {"description": meaning, "schema": {"type": "string"}}
            for name, meaning in answer.headers.items()
        }
    if answer.links:
        said["links"] = {
            name: {"operationId": name, "parameters": dict(parameters)}
            for name, parameters in answer.links.items()
        }
    return said


def _refusal(kinds: Sequence[type[GatewayError]], schemas: _Schemas) -> Json:
    """Errors with one status: which codes there are, and when."""
    codes = {kind.code: (kind.__doc__ or "").split("\n")[0] for kind in kinds}
    shape = {
        "allOf": [
            schemas.of(Error),
            {"properties": {"error": {"properties": {"code": {"enum": list(codes)}}}}},
        ]
    }
    said: Json = {
        "description": "\n".join(f"- `{code}`: {meaning}" for code, meaning in codes.items()),
        "content": {JSON: {"schema": shape}},
    }
    names = {name for kind in kinds for name in kind("").headers}
    if names:
        said["headers"] = {
            name: {"required": True, "schema": {"type": "string"}} for name in sorted(names)
        }
    return said
