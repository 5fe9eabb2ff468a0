"""What passes between the gateway and an engine: the operations and their answers.

Every type here is a bare value that `encode` turns into JSON and `decode` reads back
strictly: a field of the wrong type or an unknown name is a `BadOperation`, so that a
malformed body is found at the edge and never inside an engine.

An engine serves them over HTTP under `PREFIX`:

    GET     /stream2llm/info                                -> EngineInfo
    GET     /stream2llm/blocks                              -> Blocks
    POST    /stream2llm/operations                          Batch      -> Answers
    POST    /stream2llm/prompts/{prompt_id}                 Open       -> Progress
    POST    /stream2llm/prompts/{prompt_id}/extend          Extend     -> Progress
    POST    /stream2llm/prompts/{prompt_id}/invalidate      Invalidate -> Progress
    POST    /stream2llm/prompts/{prompt_id}/finish          Finish     -> lines of Event
    GET     /stream2llm/prompts/{prompt_id}                 -> Progress
    GET     /stream2llm/prompts/{prompt_id}/tokens          -> PromptTokens
    DELETE  /stream2llm/prompts/{prompt_id}                 -> Progress, the last one

Versions: `open` is version 0 and every later operation of a prompt carries the next
number. An operation that repeats the newest version, with the same content, is answered with
its first answer (a retry is safe); any other is a `VersionConflict`.

After `finish`: as long as the answer has no token, `extend` and `invalidate` are taken. They
replace the prompt as it was finished, its tail included, and the one stream of the answer
then answers the newest prompt, as if that had been sent whole. When a token has been
produced they are a `PromptFinished`; the engine's loop decides, and no answer mixes tokens
of two prompts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from engine_adapter.errors import BadOperation

PREFIX = "/stream2llm"
PROTOCOL_VERSION = 1

PromptState = Literal[
    "waiting", "running", "idle", "finishing", "handed_over", "fetched", "expired"
]
"""`waiting`: has tokens to compute and none under way. `running`: being prefilled.
`idle`: everything it may compute is computed (or evicted) and it waits for more input.
`finishing`: its input is closed; it may still be updated until its answer has a token.
`handed_over`: its KV waits for another engine. `fetched`: that has it, and had it before anything
else was written there. `expired`: the KV is gone; what another engine has read may not be it."""


Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
"""Engines and the index can write down no other."""
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything on the wire."""


class Open(Message, frozen=True):
    """Begin an incremental prefill. Nothing is sampled until `Finish`."""

    tokens: list[int]
    cache_salt: str | None = None
    """Separates the prefix cache of one tenant from another's."""
    weight: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Of the tenant that this salt stands for, against the others, where they compete; None if it
    stands for none."""
    lease_s: float = 60.0
    """Seconds of silence after which the engine frees the prompt."""


class Extend(Message, frozen=True):
    """Keep the first `keep` tokens, drop what is behind them, add `tokens`.

    `keep` equal to the current length is an append. Of a finished prompt `keep` counts the
    tail too, and `tokens` bring the new one.
    """

    version: int
    keep: int
    tokens: list[int]


class Operation(Message, frozen=True):
    """One of many: an `open` or an `extend`, the other one is None."""

    prompt_id: str
    open: Open | None = None
    extend: Extend | None = None


class Batch(Message, frozen=True):
    """Operations of different prompts, each carried out and answered as if it came alone."""

    operations: list[Operation]


class Invalidate(Message, frozen=True):
    """Keep the first `keep` tokens, at least one, and give back the KV of those behind.

    The prompt ends there until the next operation; an `Extend` with no tokens does the same.
    """

    version: int
    keep: int


class Sampling(Message, frozen=True):
    """How to sample, with the names and the defaults of the OpenAI and vLLM APIs.

    `None` leaves a value to the engine's own default for its model.
    """

    max_tokens: AtLeastOne | None = None
    min_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    seed: Int64 | None = None
    stop: list[str] | None = None
    stop_token_ids: list[Int64] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[Int64, float] | None = None
    logprobs: Int64 | None = None
    """How many alternatives to report at each position; 0 reports the sampled token only."""


class Finish(Message, frozen=True):
    """Close the input, as `Extend` does, and stream the answer."""

    version: int
    keep: int
    tokens: list[int]
    sampling: Sampling
    hand_over: bool = False
    """Compute the prompt and give its first token only; its KV waits for another engine, which
    gets it by what the `DoneEvent` says."""


class SetPolicy(Message, frozen=True):
    """Order requests by the policy of this name from the next step on."""

    policy: str


class Progress(Message, frozen=True):
    """Where one prompt stands after an operation. All counts are tokens."""

    prompt_id: str
    version: int
    state: PromptState
    length: int
    """Tokens the prompt has."""
    computed: int
    """Tokens of it whose KV the engine holds now; at most `length`."""
    kept: int = 0
    """Tokens of the earlier version that this operation left in place."""
    invalidated: int = 0
    """Tokens whose computed KV this operation gave back."""
    freed_blocks: int = 0
    """KV blocks this operation gave back; 0 also from an engine that does not count them."""


class Answered(Message, frozen=True):
    """The answer to one operation of a batch: where the prompt stands, or else an error with the
    fields of `EngineError.to_json`."""

    progress: Progress | None = None
    error: dict[str, Any] = {}


class Answers(Message, frozen=True):
    """The answers to a batch, in its order, when the last one is there."""

    answers: list[Answered]


class PromptTokens(Message, frozen=True):
    """What the engine has of a prompt: enough for another client to go on with it."""

    prompt_id: str
    version: int
    finished: bool
    """Its input is closed."""
    tokens: list[int]


class TokenLogprob(Message, frozen=True):
    """A token, its log-probability, and its text."""

    token: str
    logprob: float
    top: list[TokenLogprob] = []


class TokenEvent(Message, frozen=True, tag="tokens"):
    """New output. `text` is what the tokens add to the answer; it may be empty while a
    character or a possible stop string is incomplete."""

    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprob] | None = None


class DoneEvent(Message, frozen=True, tag="done"):
    """The answer is complete; nothing follows."""

    finish_reason: str
    """`stop` or `length`, as in the OpenAI API."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were computed before `Finish` arrived, or before the answer was
    begun anew for a later version."""
    completion_tokens: int
    kv_transfer: dict[str, Any] | None = None
    """Where another engine finds the KV of the prompt, in the words of the engines' connector;
    only after a `Finish` that hands over, and only if the answer goes on behind its token."""


class ErrorEvent(Message, frozen=True, tag="error"):
    """The answer broke off; nothing follows. Fields as in `EngineError.to_json`."""

    error: dict[str, object]


Event = TokenEvent | DoneEvent | ErrorEvent


class KvEvents(Message, frozen=True):
    """How to follow the changes of an engine's prefix cache, and how its blocks are named.

    An engine of several data-parallel ranks tells this of one of them, its first.
    """

    endpoint: str
    """Where ZMQ subscribers connect, as the engine was told to bind it: `*` stands for the
    host of the engine's URL."""
    replay_endpoint: str | None
    """Where lost batches can be asked for; None if nowhere."""
    topic: str
    hash_algorithm: str
    """vLLM's name of it."""
    hash_root: str
    """Hash in front of a prompt's first block, in hexadecimal digits."""
    block_size: int
    """Tokens under one name."""

    def __post_init__(self) -> None:
        bytes.fromhex(self.hash_root)  # raises ValueError
        if self.block_size < 1:
            raise ValueError("a block has at least one token")


class Blocks(Message, frozen=True):
    """The blocks that the prefix cache could find at one moment between two steps."""

    instance_id: str
    """As in `EngineInfo`."""
    next_batch: int
    """The first batch of KV events that is not in here yet; all before it are."""
    names: bytes
    """The last 8 bytes of each block's hash. A name that two blocks have is there twice: the
    events tell of each."""


class EngineInfo(Message, frozen=True):
    """What an engine is and how busy it is."""

    instance_id: str
    """Changes when the engine process is started anew: its prompts are gone then."""
    protocol_version: int
    plugin_version: str
    engine: str
    """Name and version of the serving engine, e.g. `vllm 0.32.0`."""
    model: str
    operations: list[str]
    max_model_len: int
    """Tokens of prompt and answer together."""
    block_size: int
    """Tokens in one KV block."""
    kv_blocks_total: int
    kv_blocks_free: int
    """Blocks no request holds; they may still serve prefix-cache hits."""
    running: int
    waiting: int
    open_prompts: int
    preemptions: int = 0
    """How often the engine gave back a request's KV to make room, since its start."""
    invalidated_tokens: int = 0
    """Computed tokens whose KV went because their prompt changed, since its start."""
    abandoned_tokens: int = 0
    """Computed tokens of prompts that were closed without having been answered, since its start."""
    policy: str = ""
    """By which it orders requests now; empty where it has none to choose."""
    policies: list[str] = []
    """What it can be set to."""
    hardware: str = ""
    """What it computes on."""
    accelerators: int = 1
    """Devices that hold one copy of the model together."""
    settings: str = ""
    """What else its speed depends on: number format, parallelism, tokens in a step and a block."""
    cost_model: str = ""
    """By which it chooses whose KV goes; empty if it has none."""
    waiting_tokens: int = 0
    """Tokens that it could compute now and has not: of all prompts, open and closed."""
    kv_events: KvEvents | None = None
    """None if it publishes none, or holds KV in other than one kind of block."""
    hands_over: bool = False
    """Whether another engine can get the KV of its prompts (`Finish.hand_over`)."""
    lacks: list[str] = []
    """What it can't do that an engine with the plug-in can, in words."""


M = TypeVar("M")


def encode(message: Message) -> bytes:
    """The message as JSON, without a trailing newline."""
    return msgspec.json.encode(message)


def decode(kind: type[M], body: bytes | str) -> M:
    """Read a message of one kind.

    Raises:
        BadOperation: the body is not JSON, not UTF-8, or not of that kind.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise BadOperation(f"not a valid {getattr(kind, '__name__', 'message')}: {e}") from e
