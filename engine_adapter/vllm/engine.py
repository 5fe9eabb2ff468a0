"""The engine's loop as its HTTP server reaches it.

Operations on open prompts travel as one utility call, `EngineCore.stream2llm`, which the
plug-in adds to vLLM's engine process; the closing one is an ordinary `generate`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from engine_adapter.errors import BadOperation, EngineError, EngineUnavailable
from engine_adapter.messages import (
    DoneEvent,
    ErrorEvent,
    Event,
    Sampling,
    TokenEvent,
    TokenLogprob,
)
from engine_adapter.sessions import Status
from engine_adapter.vllm.handing_over import first_token_only, hands_over
from engine_adapter.vllm.sampling import sampling_params
from engine_adapter.vllm.scheduler import StreamScheduler

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore

logger = logging.getLogger("vllm.stream2llm")

CALL_TIMEOUT_S = 120.0
"""An operation waits for the step under way; more than this means the engine hangs."""

NO_SCHEDULER = (
    "this vLLM runs without the streaming scheduler; start it with "
    "--scheduler-cls engine_adapter.vllm.scheduler.StreamScheduler"
)


def stream2llm(self: EngineCore, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one operation in the engine's process; installed as a method of EngineCore.

    Never raises: an exception here would be logged by vLLM as a failure of its own.
    """
    scheduler = self.scheduler
    if not isinstance(scheduler, StreamScheduler):
        return {"error": NO_SCHEDULER}
    try:
        return _apply(scheduler, self.request_block_hasher, operation, arguments)
    except KeyError as e:
        return {"error": f"no open prompt {e}"}
    except EngineError as e:
        return {"error": e.message, "code": e.code}
    except Exception as e:
        logger.exception("operation %s failed", operation)
        return {"error": f"{operation}: {e!r}"}


def _apply(
    scheduler: StreamScheduler, hasher: Any, operation: str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    match operation:
        case "open":
            return scheduler.open_prompt(hasher=hasher, **arguments)
        case "extend":
            return scheduler.extend_prompt(**arguments)
        case "reopen":
            return scheduler.reopen_prompt(**arguments)
        case "close":
            scheduler.close_prompt(**arguments)
            return {}
        case "status":
            return scheduler.status(**arguments)
        case "handed_over":
            return scheduler.handed_over(**arguments)
        case "load":
            return scheduler.load()
        case "kv_events":
            return scheduler.prefix_cache.events()
        case "blocks":
            return scheduler.prefix_cache.blocks()
        case "policy":
            scheduler.set_policy(**arguments)
            return {}
        case "check":
            scheduler.check_blocks()
            return {}
    raise ValueError(f"unknown operation {operation!r}")


class VllmEngine:
    """The `Engine` of `StreamingPrompts` on a running AsyncLLM."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._defaults: dict[str, Any] = llm.model_config.get_diff_sampling_param()

    async def open(
        self, prompt_id: str, tokens: list[int], cache_salt: str | None, weight: float | None
    ) -> Status:
        arguments = {"tokens": tokens, "cache_salt": cache_salt, "weight": weight}
        return await self._call("open", {"prompt_id": prompt_id, **arguments})

    async def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> Status:
        return await self._call("extend", {"prompt_id": prompt_id, "keep": keep, "tokens": tokens})

    async def reopen(self, prompt_id: str, version: int, tokens: list[int]) -> Status:
        return await self._call(
            "reopen", {"prompt_id": prompt_id, "version": version, "tokens": tokens}
        )

    async def status(self, prompt_id: str) -> Status:
        return await self._call("status", {"prompt_id": prompt_id})

    async def close(self, prompt_id: str) -> Status:
        return await self._call("close", {"prompt_id": prompt_id})

    async def handed_over(self, prompt_id: str, forget: bool) -> Status:
        return await self._call("handed_over", {"prompt_id": prompt_id, "forget": forget})

    async def load(self) -> Status:
        """How busy the engine is; see `StreamScheduler.load`."""
        return await self._call("load", {})

    async def kv_events(self) -> Mapping[str, Any]:
        """How to follow the prefix cache; see `PrefixCache.events`."""
        return await self._call("kv_events", {})

    async def blocks(self) -> Mapping[str, Any]:
        """What the prefix cache could find now; see `PrefixCache.blocks`."""
        return await self._call("blocks", {})

    async def set_policy(self, policy: str) -> None:
        """Order by another policy from the next step on."""
        await self._call("policy", {"policy": policy})

    async def _call(self, operation: str, arguments: dict[str, Any]) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer = await self._llm.engine_core.call_utility_async(
                    "stream2llm", operation, arguments
                )
        except (EngineDeadError, TimeoutError) as e:
            raise EngineUnavailable("the engine does not answer") from e
        if "error" in answer:
            raise EngineError.from_json({**answer, "message": answer["error"]})
        result: Mapping[str, Any] = answer
        return result

    def sampling_params(
        self, sampling: Sampling, prompt_id: str, version: int, room: int
    ) -> SamplingParams:
        """vLLM's form of a `Sampling`; what it leaves open comes from the model's defaults."""
        return sampling_params(sampling, prompt_id, version, room, self._defaults)

    def first_token_only(self, params: SamplingParams) -> SamplingParams:
        """The same answer, cut behind its first token, with its KV kept for another engine."""
        if not hands_over(self._llm.vllm_config.kv_transfer_config):
            raise BadOperation("this engine has no KV connector that could hand a prompt over")
        return first_token_only(params)

    async def answer(
        self,
        prompt_id: str,
        tokens: list[int],
        cache_salt: str | None,
        params: SamplingParams,
        request_id: str,
    ) -> AsyncGenerator[Event, None]:
        """Generate the answer to a whole prompt. Closing the iterator aborts it."""
        prompt = TokensPrompt(prompt_token_ids=tokens)
        if cache_salt is not None:
            prompt["cache_salt"] = cache_salt
        completion_tokens = 0
        try:
            async for output in self._llm.generate(prompt, params, request_id):
                completion = output.outputs[0]
                completion_tokens += len(completion.token_ids)
                if completion.finish_reason in ("abort", "error"):
                    yield _broken("engine_unavailable", "the engine aborted the answer")
                    return
                yield _tokens(completion, params.logprobs)
                if completion.finish_reason is not None:
                    yield _done(output, completion.finish_reason, completion_tokens)
        except (EngineDeadError, EngineGenerateError) as e:
            yield _broken("engine_unavailable", f"the engine died: {e}")
        except (VLLMValidationError, ValueError) as e:
            yield _broken("bad_operation", str(e))

    async def abort(self, request_id: str) -> None:
        """Stop an answer."""
        await self._llm.abort(request_id)


def _broken(code: str, message: str) -> ErrorEvent:
    return ErrorEvent(error={"code": code, "message": message})


def _done(output: RequestOutput, finish_reason: str, completion_tokens: int) -> DoneEvent:
    return DoneEvent(
        finish_reason=finish_reason,
        prompt_tokens=len(output.prompt_token_ids or ()),
        cached_tokens=output.num_cached_tokens or 0,
        completion_tokens=completion_tokens,
        kv_transfer=output.kv_transfer_params if finish_reason == "length" else None,
    )


def _tokens(completion: CompletionOutput, wanted: int | None) -> TokenEvent:
    ids = list(completion.token_ids)
    logprobs = None
    if wanted is not None and completion.logprobs is not None:
        logprobs = [
            _logprob(position, token_id, wanted)
            for position, token_id in zip(completion.logprobs, ids, strict=True)
        ]
    return TokenEvent(token_ids=ids, text=completion.text, logprobs=logprobs)


def _logprob(position: Mapping[int, Any], token_id: int, wanted: int) -> TokenLogprob:
    best = sorted(position.values(), key=lambda entry: entry.rank)[:wanted]
    sampled = position[token_id]
    return TokenLogprob(
        token=sampled.decoded_token or "",
        logprob=sampled.logprob,
        top=[TokenLogprob(token=e.decoded_token or "", logprob=e.logprob) for e in best],
    )
