"""Prompts as the scheduler knows them: those that are open, and the requests that end them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request

ADOPT = "stream2llm_prompt"
"""Key in `SamplingParams.extra_args`: the open prompt that a request is the end of."""

VERSION = "stream2llm_version"
"""Key beside it: the version of the prompt that the request answers (default: the newest)."""


@dataclass(slots=True)
class OpenPrompt:
    """A prompt whose input is not closed, and the request that stands for its version."""

    prompt_id: str
    request: Request
    opened_s: float
    last_input_s: float
    scheduled: bool = False
    """The request is in vLLM's queues; otherwise it is parked."""
    lost_tokens: int = 0
    """How many of its first tokens had been computed when its KV was last taken."""
    reopened_version: int = 0
    """Of the update that reopened it: what answers an earlier version comes too late."""

    @property
    def remaining_tokens(self) -> int:
        """What it may compute now: everything but the token that is held back."""
        remaining: int = self.request.num_tokens - 1 - self.request.num_computed_tokens
        return max(remaining, 0)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many first elements two lists share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    differs: int = next(i for i in range(n) if a[i] != b[i])
    return differs


def ended_prompt(request: Request) -> str | None:
    """The open prompt that a request ends, if it ends one."""
    return _extra_args(request).get(ADOPT)


def answers_version_before(request: Request, version: int) -> bool:
    """Whether a request that ends a prompt answers an earlier version of it than this."""
    answered: float = _extra_args(request).get(VERSION, math.inf)
    return answered < version


def _extra_args(request: Request) -> dict[str, Any]:
    params = request.sampling_params
    return (params and params.extra_args) or {}


class Endings:
    """The requests under way that end prompts, one for each prompt."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def put(self, request: Request) -> None:
        """Take in a request that has arrived; one that ends no prompt is not kept."""
        if (prompt_id := ended_prompt(request)) is not None:
            self._requests[prompt_id] = request

    def discard(self, request: Request) -> None:
        """Forget a request that is over."""
        prompt_id = ended_prompt(request)
        if prompt_id is not None and self._requests.get(prompt_id) is request:
            del self._requests[prompt_id]

    def without_token(self, prompt_id: str) -> Request | None:
        """The request that ends a prompt, if it is under way and has produced nothing."""
        request = self._requests.get(prompt_id)
        return None if request is None or request.num_output_tokens else request
