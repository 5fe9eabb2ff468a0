"""The bodies that clients send, read strictly: what is misspelt is named, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from engine_adapter.messages import AtLeastOne, Int64, Sampling
from gateway.errors import BadRequest, Unsupported
from retrieval.merge import Drop
from retrieval.ordering import OrderingName

UNSUPPORTED = frozenset(
    {
        "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call",
        "response_format", "modalities", "audio", "prediction", "web_search_options",
        "kv_transfer_params", "cache_salt", "best_of", "suffix", "echo", "guided_json",
        "structured_outputs", "prompt_logprobs",
    }
)  # fmt: skip
"""Parameters of chat completions that a stream does not take. The plain pass-through does."""


Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As in the OpenAI API."""

    include_usage: bool = False


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to answer, with the names of chat completions."""

    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    min_tokens: Natural | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int64] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[Natural, Bias] | None = None
    """By token id; keys of a JSON object are strings."""
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def __post_init__(self) -> None:
        if self.n not in (None, 1):
            raise Unsupported("a stream has one answer: n must be 1", param="n")

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens the answer may have, if the client says."""
        given = self.max_completion_tokens
        return self.max_tokens if given is None else given

    def sampling(self) -> Sampling:
        """The engine's part of it."""
        return Sampling(
            max_tokens=self.answer_tokens,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **{name: getattr(self, name) for name in _SAME_NAMES},
        )


_SAME_NAMES = tuple(
    name
    for name in Sampling.__struct_fields__
    if name in Options.__struct_fields__ and name not in ("max_tokens", "stop", "logprobs")
)


Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Text = Annotated[str, msgspec.Meta(min_length=1)]


class Chunk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of context."""

    text: Text
    id: str | None = None


class CrawlSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type",
    tag="crawl",
):  # fmt: skip
    """Pages of web sites, in the order in which they are read."""

    seeds: Annotated[list[Text], msgspec.Meta(max_length=100)] = []
    """Where to begin; if none, the addresses in the query."""
    query: str | None = None
    pages: Count = 20
    depth: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Links from a seed."""
    page_chars: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 20_000
    """Of a page's text, from its beginning."""
    deadline_s: Seconds | None = None


class AnnSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type",
    tag="ann",
):  # fmt: skip
    """The passages of a collection nearest to the query, in better and better rankings."""

    collection: str
    query: str | None = None
    k: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10
    """Passages."""
    ordering: OrderingName = "stable"
    deadline_s: Seconds | None = None


SourceSpecs = Annotated[list[CrawlSpec | AnnSpec], msgspec.Meta(min_length=1, max_length=16)]


class RetrievalSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the gateway is to retrieve for a stream. Seconds count from the stream's beginning."""

    sources: SourceSpecs
    query: str | None = None
    """Of sources without one of their own; if there is none, the last user message."""
    deadline_s: Seconds | None = None
    budget_tokens: Count | None = None
    """For what is retrieved; None: what the model has room for."""
    drop: Drop = "ranked"
    """What gives way when the budget is full: see `retrieval.merge.Budget`."""


class Create(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/streams`, and of a chat completion with retrieval."""

    model: str
    messages: list[dict[str, Any]]
    documents: list[Chunk] = []
    retrieval: RetrievalSpec | SourceSpecs | None = None

    @property
    def wanted(self) -> RetrievalSpec | None:
        """What is to be retrieved; a list is short for the sources alone."""
        if isinstance(self.retrieval, list):
            return RetrievalSpec(sources=self.retrieval)
        return self.retrieval


class ChunkPost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/streams/{id}/chunks`: one chunk, or several at once."""

    text: Text | None = None
    id: str | None = None
    chunks: list[Chunk] | None = None
    seq: int | None = None

    def all(self) -> list[Chunk]:
        """The chunks, one or more.

        Raises:
            BadRequest: there is none, or both forms are used.
        """
        if self.chunks is not None and self.text is not None:
            raise BadRequest("give either text or chunks", param="chunks")
        if self.chunks is not None:
            if not self.chunks:
                raise BadRequest("chunks is empty", param="chunks")
            return self.chunks
        if self.text is None:
            raise BadRequest("text is missing", param="text")
        return [Chunk(text=self.text, id=self.id)]


class Ranked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A document of a ranked list; by its id alone if the stream knows its text."""

    text: Text | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.id is None:
            raise BadRequest("a document without id has text", param="documents")


class RankedList(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `PUT /v1/streams/{id}/documents`."""

    documents: list[Ranked]
    seq: int | None = None

    def __post_init__(self) -> None:
        names = [d.id for d in self.documents if d.id is not None]
        if len(names) != len(set(names)):
            raise BadRequest("an id stands twice in the list", param="documents")


class FinishPost(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/streams/{id}/finish`, and its overrides."""

    seq: Natural | None = None
    """Number of the last post that is to be in the prompt."""


class FinishLine(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Last line of the one-request form, and its overrides."""

    finish: bool = True


class NewEngine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /admin/engines`."""

    url: str
    role: Literal["engine", "plain", "decode"] = "engine"

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise BadRequest("url is no http(s) URL", param="url")


T = TypeVar("T")


def read(kind: type[T], body: bytes) -> T:
    """A body of one kind. An empty one is an empty object.

    Raises:
        BadRequest: it is not UTF-8, not JSON, or not of that kind.
        Unsupported: it uses a parameter that can't be honoured.
    """
    try:
        raw = msgspec.json.decode(body or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise BadRequest(f"the body is no valid JSON: {e}") from e
    except RecursionError as e:
        raise BadRequest("the body is nested too deeply") from e
    if not isinstance(raw, dict):
        raise BadRequest("the body must be a JSON object")
    for name in sorted(UNSUPPORTED & raw.keys()):
        raise Unsupported(f"{name} is not supported on streams", param=name)
    try:
        return msgspec.convert(raw, kind, str_keys=True)
    except msgspec.ValidationError as e:
        if isinstance(e.__cause__, BadRequest):
            raise e.__cause__ from None
        message = str(e)
        param = message.rsplit("$.", 1)[1].rstrip("`") if "$." in message else None
        raise BadRequest(message, param=param) from e


def merged(first: Options, later: Options) -> Options:
    """The options of a stream with those that its finish overrides."""
    given = {
        name: value
        for name in Options.__struct_fields__
        if (value := getattr(later, name)) is not None
    }
    base = {name: getattr(first, name) for name in Options.__struct_fields__}
    if later.answer_tokens is not None:  # by whichever of its two names
        base |= {"max_tokens": None, "max_completion_tokens": None}
    return Options(**(base | given))
