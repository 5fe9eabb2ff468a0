"""Counters and timings, for Prometheus. No label per stream, no prompt text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine_adapter.messages import EngineInfo
from gateway.figures import EngineFigures, StreamFigures

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
"""As OpenTelemetry's GenAI conventions give them for gen_ai.server.time_to_first_token."""

TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""As they are for gen_ai.server.time_per_output_token."""

DURATION_BUCKETS_S = (
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
)  # fmt: skip
"""As they are for gen_ai.server.request.duration."""

GENAI_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")

LIVE, ENDS = ("open", "finishing"), ("done", "failed", "cancelled", "expired", "moved", "lost")
"""States of streams."""
OPERATIONS = ("open", "extend", "finish")

CHUNK_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)

RETRIEVAL_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._standings: dict[str, str] = {}
        self.open_streams = Gauge(
            "stream2llm_open_streams",
            "Streams not ended yet",
            registry=self.registry,
        )
        self.tasks = Gauge(
            "stream2llm_tasks", "Tasks of the gateway's event loop", registry=self.registry
        )
        self.streams = Counter(
            "stream2llm_streams_total", "Streams by how they ended", ["end"], registry=self.registry
        )
        for end in ENDS:  # so that a rate of the first one is seen
            self.streams.labels(end)
        self.stream_bound = Gauge(
            "stream2llm_stream_bound",
            "Streams that may be open at once, as learned from what engines do",
            ["gen_ai_request_model"],
            registry=self.registry,
        )
        self.live = StreamFigures(LIVE)
        self.registry.register(self.live)
        self.chunks = Counter("stream2llm_chunks_total", "Chunks taken in", registry=self.registry)
        self.context_tokens = Counter(
            "stream2llm_context_tokens_total", "Context tokens taken in", registry=self.registry
        )
        self.lists = Counter(
            "stream2llm_ranked_lists_total", "Ranked lists taken in", registry=self.registry
        )
        self.invalidated_tokens = Counter(
            "stream2llm_invalidated_tokens_total",
            "Prompt tokens that ranked lists gave up",
            registry=self.registry,
        )
        self.cached_tokens = Counter(
            "stream2llm_prefilled_early_tokens_total",
            "Prompt tokens the engine had computed when the input was closed",
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "stream2llm_prompt_tokens_total", "Prompt tokens of answers", registry=self.registry
        )
        self.completion_tokens = Counter(
            "stream2llm_completion_tokens_total", "Tokens of answers", registry=self.registry
        )
        self.operations = Counter(
            "stream2llm_engine_operations_total",
            "Operations sent to engines",
            ["operation"],
            registry=self.registry,
        )
        for operation in OPERATIONS:
            self.operations.labels(operation)
        self.errors = Counter(
            "stream2llm_errors_total", "Errors told to clients", ["code"], registry=self.registry
        )
        self.connections = Gauge(
            "stream2llm_connections", "Connections of clients", registry=self.registry
        )
        self.cut_readers = Counter(
            "stream2llm_cut_readers_total",
            "Connections cut off because the client did not take what was sent",
            registry=self.registry,
        )
        self.handoffs = Counter(
            "stream2llm_handoffs_total",
            "Answers by where they were to be decoded, here or elsewhere, and why",
            ["decoded", "reason"],
            registry=self.registry,
        )
        self.resumed = Counter(
            "stream2llm_answers_resumed_total",
            "Answers gone on with after an engine broke off: continued, or retold by another",
            ["how"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "stream2llm_time_to_first_token_seconds",
            "From finish to the first token of the answer",
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self.genai_ttft = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "As stream2llm_time_to_first_token_seconds, of ended streams",
            GENAI_LABELS,
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self.genai_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time between two tokens of one answer",
            GENAI_LABELS,
            buckets=TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self.genai_duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From finish to the end of the stream",
            [*GENAI_LABELS, "error_type"],
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.chunk_seconds = Histogram(
            "stream2llm_chunk_acknowledgement_seconds",
            "From the head of a chunk's request to its acknowledgement",
            buckets=CHUNK_BUCKETS_S,
            registry=self.registry,
        )
        self.retrieval_sources = Counter(
            "stream2llm_retrieval_sources_total",
            "Sources that the gateway searched, by kind and by how the search ended",
            ["source", "end"],
            registry=self.registry,
        )
        self.retrieval_seconds = Histogram(
            "stream2llm_retrieval_seconds",
            "All sources of one stream, from the beginning to the last one's end",
            buckets=RETRIEVAL_BUCKETS_S,
            registry=self.registry,
        )
        self.engine_up = Gauge(
            "stream2llm_engine_up", "1 if an engine answers", ["engine"], registry=self.registry
        )
        self._engines = EngineFigures()
        self.registry.register(self._engines)
        self.engine_standing = Gauge(
            "stream2llm_engine_standing",
            "1 for what an engine is now: healthy, ejected, half-open, away, draining or drained",
            ["engine", "standing"],
            registry=self.registry,
        )
        self.ejections = Counter(
            "stream2llm_engine_ejections_total",
            "How often an engine's operations failed so that it got no streams for a while",
            ["engine"],
            registry=self.registry,
        )
        self.index_up = Gauge(
            "stream2llm_index_up", "1 if the index answers in time", registry=self.registry
        )
        self.index_seconds = Histogram(
            "stream2llm_index_seconds",
            "Waiting for the index, each call",
            buckets=CHUNK_BUCKETS_S,
            registry=self.registry,
        )
        self.unkept = Counter(
            "stream2llm_unkept_writes_total",
            "Changes of streams that no other replica knew when they were acknowledged",
            registry=self.registry,
        )
        self.forwarded = Counter(
            "stream2llm_forwarded_requests_total",
            "Requests passed on to the replica that holds the stream",
            registry=self.registry,
        )
        self.taken_over = Counter(
            "stream2llm_streams_taken_over_total",
            "Streams whose holder was gone",
            registry=self.registry,
        )

    def engine_seen(self, url: str, info: EngineInfo | None) -> None:
        """An engine was asked how it does; None: it does not answer."""
        self.engine_up.labels(url).set(info is not None)
        if info is None:
            self._engines.said.pop(url, None)
        else:
            self._engines.said[url] = info

    def show_engine(self, url: str, standing: str) -> None:
        """What an engine is now."""
        if (before := self._standings.get(url)) != standing:
            if before is not None:
                self.engine_standing.remove(url, before)
            self._standings[url] = standing
        self.engine_standing.labels(url, standing).set(1)

    def forget_engine(self, url: str) -> None:
        """An engine is no longer of the pool."""
        self._engines.said.pop(url, None)
        if (before := self._standings.pop(url, None)) is not None:
            self.engine_standing.remove(url, before)
            self.engine_up.remove(url)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
