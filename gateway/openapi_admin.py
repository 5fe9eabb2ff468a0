"""What operators can ask: the admin routes as operations, for their description."""

from __future__ import annotations

from dataclasses import replace

from gateway import openapi_shapes as shapes
from gateway.errors import (
    BadRequest,
    BodyTooLarge,
    EngineFailed,
    EngineThere,
    NoSuchEngine,
    NotAdmin,
    RequestTimeout,
)
from gateway.openapi import DESCRIBING, JSON, PROMETHEUS, Answer, Operation, Parameter, described
from gateway.reloading import Difference
from gateway.requests import NewEngine
from gateway.settings import Settings

ABOUT = "Routes for operators, on a port of their own. Nothing here has text of prompts."
KEY = "The admin key; none is asked for without `--admin-key-file`. Browsers are refused."

_ID = Parameter("id", "path", "Of an engine: its URL without the scheme, or all of it, encoded.")
_ENGINE = (NotAdmin, NoSuchEngine, BadRequest)

OPERATIONS = (
    Operation(
        "get", "/admin/engines", "listEngines", "What each engine is, has and lacks", "engines",
        {200: Answer("All of them.", {JSON: shapes.EngineList})},
        errors=(NotAdmin,),
    ),
    Operation(
        "post", "/admin/engines", "addEngine", "An engine joins", "engines",
        {201: Answer("It has joined.", {JSON: shapes.EngineStatus})},
        body={JSON: NewEngine},
        errors=(NotAdmin, BadRequest, BodyTooLarge, RequestTimeout, EngineThere, EngineFailed),
    ),
    Operation(
        "delete", "/admin/engines/{id}", "removeEngine", "Drain an engine, then remove it",
        "engines",
        {202: Answer("It is being drained.", {JSON: shapes.EngineStatus})},
        parameters=(_ID,),
        errors=_ENGINE,
    ),
    Operation(
        "post", "/admin/engines/{id}/drain", "drainEngine", "No new streams there", "engines",
        {202: Answer("It is being drained.", {JSON: shapes.EngineStatus})},
        parameters=(_ID,),
        errors=_ENGINE,
    ),
    Operation(
        "delete", "/admin/engines/{id}/drain", "undrainEngine", "Streams there again", "engines",
        {200: Answer("It takes streams.", {JSON: shapes.EngineStatus})},
        parameters=(_ID,),
        errors=_ENGINE,
    ),
    Operation(
        "get", "/admin/streams", "countStreams", "How many streams there are", "gateway",
        {200: Answer("Counts.", {JSON: shapes.StreamCounts})},
        errors=(NotAdmin,),
    ),
    Operation(
        "post", "/admin/drain", "drainGateway", "No new streams at this gateway", "gateway",
        {202: Answer("It is being drained.", {JSON: shapes.StreamCounts})},
        errors=(NotAdmin,),
    ),
    Operation(
        "post", "/admin/reload", "reload", "Read the settings again", "gateway",
        {200: Answer("What has changed, and what needs a restart.", {JSON: Difference})},
        errors=(NotAdmin, BadRequest),
    ),
    Operation(
        "get", "/admin/config", "showConfig", "The settings in force, without secrets", "gateway",
        {200: Answer("All of them.", {JSON: Settings})},
        errors=(NotAdmin,),
    ),
    Operation(
        "get", "/metrics", "metrics", "For Prometheus", "gateway",
        {200: Answer("The text exposition format.", {PROMETHEUS: {"type": "string"}})},
        errors=(NotAdmin,),
    ),
    replace(DESCRIBING, tag="gateway", errors=(NotAdmin,), open=False),
)  # fmt: skip


def administration() -> bytes:
    """The description of the admin routes."""
    return described("stream2llm: administration", ABOUT, OPERATIONS, key=KEY)
