"""W3C trace context: taken from clients, begun where they send none, passed on with every call.

Spans are recorded only where the extra `otel` is installed and `OTEL_EXPORTER_OTLP_ENDPOINT` is
set; without them the client's own context goes through as it came. No span has content.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from types import SimpleNamespace

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACED = "/v1/"
"""Where paths begin whose requests belong to a trace; health and metrics do not."""

tracer = trace.get_tracer("stream2llm.gateway")
_context = TraceContextTextMapPropagator()


class TracingUnavailable(Exception):
    """Spans are to be exported, but the packages for that are not installed."""


def set_up() -> Callable[[], None]:
    """Export spans if the environment says so.

    Returns:
        What has to be called at the end, so that none is lost.

    Raises:
        TracingUnavailable
    """
    if not os.environ.get(ENDPOINT):
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise TracingUnavailable(f"{ENDPOINT} is set: install stream2llm[otel] ({e})") from e
    named = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "stream2llm")})
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


@web.middleware
async def traced(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Handle a request within the trace that its client has begun, or a new one."""
    if not request.path.startswith(TRACED):
        return await handler(request)
    with trace.use_span(_span(request), end_on_exit=True, record_exception=False):
        return await handler(request)


def _span(request: web.Request) -> Span:
    resource = request.match_info.route.resource
    route = "" if resource is None else resource.canonical
    span = tracer.start_span(
        f"{request.method} {route}",
        context=_context.extract(request.headers),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": request.method, "http.route": route},
    )
    return span if span.get_span_context().is_valid else NonRecordingSpan(_begun())


def _begun() -> SpanContext:
    """A new trace, whose spans nobody records here."""
    return SpanContext(
        random.getrandbits(128) or 1, random.getrandbits(64) or 1, False, TraceFlags(0)
    )


def trace_id() -> str | None:
    """Of what is being done now, as in `traceparent`; None if it belongs to no trace."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def passing_on() -> aiohttp.TraceConfig:
    """For a session: every request carries the trace of what it is made for."""
    config = aiohttp.TraceConfig()
    config.on_request_start.append(_pass_on)
    return config


async def _pass_on(
    session: aiohttp.ClientSession, ctx: SimpleNamespace, params: aiohttp.TraceRequestStartParams
) -> None:
    _context.inject(params.headers)
