"""Structured logs: what a line is about stands in fields of its own. Never any text of a prompt.

`bind` says once, where a request is understood, which stream and which tenant it is about; every
line that is logged from there on, also by tasks that were started there, has that and the trace.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp.http_exceptions import HttpProcessingError

from gateway.tracing import trace_id

FORMATS = ("text", "json")

_bound: ContextVar[Mapping[str, str]] = ContextVar("stream2llm_log_fields")


def bind(**fields: str) -> None:
    """Add fields, e.g. `stream_id`, to all lines of this task and of those it starts later."""
    _bound.set({**_bound.get({}), **fields})


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a line is about: the bound fields, the trace, and its own (`extra={"fields": ...}`)."""
    trace = {} if (found := trace_id()) is None else {"trace_id": found}
    return {**_bound.get({}), **trace, **getattr(record, "fields", {})}


class Text(logging.Formatter):
    """For people: the message, then the fields as `name=value`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        fields = fields_of(record)
        about = "".join(f" {k}={v}" for k, v in fields.items() if v is not None)
        return super().formatMessage(record) + about


class Json(logging.Formatter):
    """For machines: one object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def only_own_errors(record: logging.LogRecord) -> bool:
    """A filter: that a client sends what is no HTTP, or leaves, is no error of the gateway. A
    traceback would also tell what was sent."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ConnectionError):
        return False
    if isinstance(error, HttpProcessingError):
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = "a request is no HTTP: %s", (type(error).__name__,)
        record.exc_info = record.exc_text = None
    return True


def set_up(level: str, format: str) -> None:
    """Log to stderr from now on.

    Args:
        format: one of `FORMATS`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if format == "json" else Text())
    logging.basicConfig(level=level.upper(), handlers=[handler])
