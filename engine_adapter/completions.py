"""The OpenAI completions API as vLLM, SGLang and llama.cpp's server speak it: what is asked, what
is answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

import msgspec

from engine_adapter.errors import BadOperation, EngineError, EngineOverloaded, EngineUnavailable
from engine_adapter.messages import DoneEvent, Event, Sampling, TokenEvent, TokenLogprob

Json = dict[str, Any]

DATA = b"data:"
LAST = b"[DONE]"
BROKEN = ("abort", "error")
"""Finish reasons of answers that the server gave up."""


class Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Tokens of one completion."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Logprob(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[Logprob] = []


class Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    content: list[Logprob] = []
    """In place of the others: llama.cpp's server has them in the shape of chat completions."""


class Choice(msgspec.Struct):
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """A whole answer, or what one server-sent event adds to it."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Json | None = None


M = TypeVar("M")


def read(kind: type[M], body: bytes) -> M:
    """What a server has answered.

    Raises:
        EngineUnavailable: it is not of that kind.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise EngineUnavailable(f"the server's answer can't be read: {e}") from e


def prompt(model: str, tokens: list[int], cache_salt: str | None) -> Json:
    """The part of a request that says what is to be completed."""
    body: Json = {"model": model, "prompt": tokens}
    return body if cache_salt is None else body | {"cache_salt": cache_salt}


def warming(model: str, tokens: list[int], cache_salt: str | None) -> Json:
    """A request whose only use is what it leaves in the server's prefix cache."""
    return prompt(model, tokens, cache_salt) | {"max_tokens": 1, "temperature": 0}


def streamed(sampling: Sampling, room: int) -> Json:
    """The part of a request that says how to answer, and that the answer is to be streamed.

    Args:
        room: tokens that the answer may have at most.
    """
    given = {k: v for k, v in msgspec.structs.asdict(sampling).items() if v is not None}
    given["max_tokens"] = min(given.get("max_tokens") or room, room)
    return given | {
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


async def events(
    lines: AsyncIterator[bytes], prompt_tokens: int, cached_tokens: int, logprobs: int | None
) -> AsyncGenerator[Event, None]:
    """The events of a streamed answer.

    Args:
        prompt_tokens, cached_tokens: told at the end where the server itself does not tell.
        logprobs: how many alternatives were asked for.

    Raises:
        EngineError: the answer broke off.
    """
    reason, usage, sampled = None, None, 0
    async for completion in _completions(lines):
        usage = completion.usage or usage
        for choice in completion.choices:
            reason = choice.finish_reason or reason
            if reason in BROKEN:
                raise EngineUnavailable("the server gave the answer up")
            token_ids = choice.token_ids or []
            sampled += len(token_ids)
            if token_ids or choice.text:
                yield TokenEvent(
                    token_ids=token_ids,
                    text=choice.text,
                    logprobs=_logprobs(choice.logprobs, logprobs or 0),
                )
    if reason is None:
        raise EngineUnavailable("the server ended the answer without completing it")
    yield _done(reason, usage or Usage(prompt_tokens, sampled), cached_tokens)


async def _completions(lines: AsyncIterator[bytes]) -> AsyncGenerator[Completion, None]:
    async for line in lines:
        if not line.startswith(DATA):
            continue
        data = line[len(DATA) :].strip()
        if data == LAST:
            return
        completion = read(Completion, data)
        if completion.error is not None:
            raise refused(int(completion.error.get("code") or 500), data)
        yield completion


def _done(reason: str, usage: Usage, cached_tokens: int) -> DoneEvent:
    details = usage.prompt_tokens_details
    told = None if details is None else details.cached_tokens
    return DoneEvent(
        finish_reason=reason,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=cached_tokens if told is None else told,
        completion_tokens=usage.completion_tokens,
    )


def _logprobs(found: Logprobs | None, alternatives: int) -> list[TokenLogprob] | None:
    if found is None:
        return None
    if found.content:
        return [
            TokenLogprob(
                token=one.token,
                logprob=one.logprob,
                top=_best({top.token: top.logprob for top in one.top_logprobs}, alternatives),
            )
            for one in found.content
        ]
    tops = found.top_logprobs or [None] * len(found.tokens)
    return [
        TokenLogprob(token=token, logprob=logprob or 0.0, top=_best(top or {}, alternatives))
        for token, logprob, top in zip(found.tokens, found.token_logprobs, tops, strict=True)
    ]


def _best(top: dict[str, float], alternatives: int) -> list[TokenLogprob]:
    """The likeliest ones: servers add the sampled token to those that were asked for."""
    ranked = sorted(top.items(), key=lambda item: -item[1])[:alternatives]
    return [TokenLogprob(token=token, logprob=logprob) for token, logprob in ranked]


def refused(status: int, body: bytes) -> EngineError:
    """What a server's refusal is to whoever uses an engine.

    Args:
        body: in the shape of OpenAI (vLLM), or with the message at its top (SGLang).
    """
    message = f"the server answers {status}: {_message(body)}"
    if status == 429:
        return EngineOverloaded(message)
    if status in (400, 413, 422):
        return BadOperation(message)
    return EngineUnavailable(message)


def _message(body: bytes) -> str:
    try:
        error: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return repr(body[:200])
    if isinstance(error, dict):
        inner = error.get("error")
        error = (inner if isinstance(inner, dict) else error).get("message", error)
    return str(error)[:500]
