"""What is told of a stream when it has ended: one log line, metrics, and a span where they are
recorded. Counts and times only."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opentelemetry.trace import SpanKind, StatusCode

from engine_adapter.messages import DoneEvent
from gateway.errors import GatewayError
from gateway.telemetry import Metrics
from gateway.tenants import EVERYBODY
from gateway.tracing import tracer

if TYPE_CHECKING:
    from gateway.answering import Answering
    from gateway.stream import Stream

logger = logging.getLogger(__name__)

OPERATION, PROVIDER = "chat", "stream2llm"
"""In the words of OpenTelemetry's GenAI conventions."""


def ending_of(stream: Stream, answering: Answering) -> Ending:
    """Of a stream that has just ended."""
    return Ending(
        stream_id=stream.id,
        tenant=None if stream.tenant is EVERYBODY else stream.tenant.name,
        model=stream.model,
        state=stream.state,
        engine=None if stream.engine is None else stream.engine.url,
        error=stream.error,
        created_s=stream.created_s,
        context_tokens=stream.prompt.context_tokens,
        chunks=len(stream.prompt.documents),
        asked_s=answering.asked_at_s,
        ttft_s=answering.ttft_s,
        done=answering.done,
    )


@dataclass(frozen=True, slots=True)
class Ending:
    """One stream, ended."""

    stream_id: str
    tenant: str | None
    """None where there are none."""
    model: str
    state: str
    engine: str | None
    error: GatewayError | None
    created_s: float
    """Unix time."""
    context_tokens: int
    chunks: int
    asked_s: float | None
    """Unix time at which the input was closed; None if it was not."""
    ttft_s: float | None
    """From there to the first token; None if there was none."""
    done: DoneEvent | None
    """How the answer ended, if it did."""

    def told(self, metrics: Metrics) -> None:
        """Tell it."""
        now_s = time.time()
        logger.info("stream ended", extra={"fields": self.fields(now_s)})
        metrics.streams.labels(self.state).inc()
        if self.asked_s is not None:
            self._measure(metrics, now_s - self.asked_s)
            self._span(self.asked_s, now_s)

    def fields(self, now_s: float) -> dict[str, Any]:
        """As the log has it."""
        done = self.done
        return {
            "stream_id": self.stream_id,
            "tenant": self.tenant,
            "state": self.state,
            "model": self.model,
            "engine": self.engine,
            "error": None if self.error is None else self.error.code,
            "chunks": self.chunks,
            "context_tokens": self.context_tokens,
            "prompt_tokens": None if done is None else done.prompt_tokens,
            "early_tokens": None if done is None else done.cached_tokens,
            "completion_tokens": None if done is None else done.completion_tokens,
            "finish_reason": None if done is None else done.finish_reason,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "duration_s": round(now_s - self.created_s, 6),
        }

    def _measure(self, metrics: Metrics, took_s: float) -> None:
        labels = (OPERATION, PROVIDER, self.model)
        metrics.genai_duration.labels(*labels, self._error_type).observe(took_s)
        if self.ttft_s is None:
            return
        metrics.genai_ttft.labels(*labels).observe(self.ttft_s)
        if self.done is not None and self.done.completion_tokens > 1:
            each_s = (took_s - self.ttft_s) / (self.done.completion_tokens - 1)
            metrics.genai_token.labels(*labels).observe(each_s)

    @property
    def _error_type(self) -> str:
        if self.state == "done":
            return ""
        return self.state if self.error is None else self.error.code or "internal_error"

    def _span(self, begun_s: float, ended_s: float) -> None:
        span = tracer.start_span(
            f"{OPERATION} {self.model}", kind=SpanKind.CLIENT, start_time=int(begun_s * 1e9)
        )
        if span.is_recording():
            span.set_attributes(self._attributes())
            if self._error_type:
                span.set_status(StatusCode.ERROR)
        span.end(int(ended_s * 1e9))

    def _attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self.model,
            "gen_ai.conversation.id": self.stream_id,
        }
        if self._error_type:
            attributes["error.type"] = self._error_type
        if (done := self.done) is not None:
            attributes |= {
                "gen_ai.response.finish_reasons": [done.finish_reason],
                "gen_ai.usage.input_tokens": done.prompt_tokens,
                "gen_ai.usage.output_tokens": done.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": done.cached_tokens,
            }
        return attributes
