"""vLLM's front end over the scheduler of the harness: what `VllmEngine` and the routes use of it.

As between vLLM's two processes, calls reach the loop in the order they were sent, between
steps, and replies and outputs come back in the order they were made. How long each way takes,
and when a request has been prepared, is random; all else is the code that ships.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from engine_adapter.vllm.engine import stream2llm
from tests.engine_adapter.harness import BLOCK_SIZE, MAX_MODEL_LEN, VOCABULARY, Engine


class FakeLLM:
    """An AsyncLLM whose engine takes a step at every turn of `run`."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine = engine
        self.engine_core = self
        self.model_config = SimpleNamespace(
            get_diff_sampling_param=dict,
            max_model_len=MAX_MODEL_LEN,
            get_vocab_size=lambda: VOCABULARY,
        )
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config,
            cache_config=SimpleNamespace(block_size=BLOCK_SIZE),
            kv_transfer_config=None,
        )
        self._rng = rng
        self._core = SimpleNamespace(scheduler=engine.scheduler, request_block_hasher=engine.hasher)
        self._numbers = itertools.count()
        self._inbox: deque[Callable[[], None]] = deque()
        self._outbox: deque[Callable[[], None]] = deque()
        self._requests: dict[str, asyncio.Queue[RequestOutput]] = {}  # by internal id
        self._prompts: dict[str, list[int]] = {}
        self._cached: dict[str, int] = {}
        engine.on_output = lambda output: self._outbox.append(lambda: self._output(output))

    async def run(self) -> None:
        """The engine's loop and the two ways to it; until it is cancelled."""
        while True:
            await self.some_turns()
            while self._inbox and self._rng.random() < 0.8:
                self._inbox.popleft()()
            self.engine.step()
            await self.some_turns()
            while self._outbox and self._rng.random() < 0.8:
                self._outbox.popleft()()

    async def some_turns(self, most: int = 3) -> None:
        for _ in range(self._rng.randint(1, most)):
            await asyncio.sleep(0)

    # What the plug-in calls.

    async def call_utility_async(self, method: str, operation: str, arguments: Any) -> Any:
        assert method == "stream2llm"
        reply = asyncio.get_running_loop().create_future()

        def apply() -> None:
            answer = stream2llm(self._core, operation, arguments)
            self._outbox.append(lambda: reply.done() or reply.set_result(answer))

        self._inbox.append(apply)
        return await reply

    async def generate(
        self, prompt: Any, params: Any, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        outputs: asyncio.Queue[RequestOutput] | None = None
        internal_id = f"{request_id}-{next(self._numbers)}"
        try:
            await self.some_turns()  # vLLM prepares a request in a thread
            outputs = self._requests[internal_id] = asyncio.Queue()
            self._prompts[internal_id] = prompt["prompt_token_ids"]
            request = Request(
                request_id=internal_id,
                prompt_token_ids=list(prompt["prompt_token_ids"]),
                sampling_params=params,
                pooling_params=None,
                block_hasher=self.engine.hasher,
            )
            self._inbox.append(lambda: self.engine.scheduler.add_request(request))
            while True:
                output = await outputs.get()
                yield output
                if output.finished:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            if outputs is not None:
                self._abort(internal_id)
            raise

    async def abort(self, request_id: str) -> None:
        for internal_id in [i for i in self._requests if i.rpartition("-")[0] == request_id]:
            self._abort(internal_id)

    def _abort(self, internal_id: str) -> None:
        if internal_id in self._requests:
            self._put(internal_id, [], "abort")
        self._inbox.append(
            lambda: self.engine.scheduler.finish_requests(
                internal_id, RequestStatus.FINISHED_ABORTED
            )
        )

    def _output(self, output: EngineCoreOutput) -> None:
        if output.prefill_stats is not None:
            self._cached[output.request_id] = output.prefill_stats.num_cached_tokens
        if output.request_id in self._requests:
            reason = None if output.finish_reason is None else str(output.finish_reason)
            self._put(output.request_id, output.new_token_ids, reason)

    def _put(self, internal_id: str, tokens: list[int], finish_reason: str | None) -> None:
        completion = CompletionOutput(
            index=0,
            text="",
            token_ids=tokens,
            cumulative_logprob=None,
            logprobs=None,
            finish_reason=finish_reason,
        )
        output = RequestOutput(
            request_id=internal_id,
            prompt=None,
            prompt_token_ids=self._prompts[internal_id],
            prompt_logprobs=None,
            outputs=[completion],
            finished=finish_reason is not None,
            num_cached_tokens=self._cached.get(internal_id, 0),
        )
        self._requests[internal_id].put_nowait(output)
        if output.finished:
            del self._requests[internal_id]
