"""The simulated engine in real time: each step takes as long as it is estimated.

Operations and requests take effect between steps, in the order made, as in vLLM's own loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from engine_adapter.errors import BadOperation, EngineError, EngineUnavailable
from engine_adapter.messages import DoneEvent, ErrorEvent, Event, Sampling, TokenEvent
from engine_adapter.sessions import Status
from engine_adapter.simulated.answers import Answers
from engine_adapter.simulated.engine import Output, SimulatedEngine, Step
from engine_adapter.vllm.sampling import sampling_params

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

DEFAULTS = {"max_tokens": 128}
"""An answer has as many tokens as it may have; this many where the request does not say."""

Call = Callable[[], Mapping[str, Any] | None]


class RealTimeEngine:
    """The `Engine` of `StreamingPrompts` on a simulated one. For one event loop."""

    def __init__(self, engine: SimulatedEngine, speed: float = 1.0) -> None:
        """
        Args:
            speed: simulated seconds in a real one.
        """
        self._engine = engine
        self._speed = speed
        self._calls: deque[tuple[Call, asyncio.Future[Any]]] = deque()
        self._called = asyncio.Event()
        self._outputs: dict[str, asyncio.Queue[Output | None]] = {}
        self.late_s = 0.0
        """Simulated seconds by which steps took longer than estimated, because the machine
        that simulates was too slow."""

    async def run(self) -> None:
        """Turn the loop; ends only by an error or by being cancelled."""
        loop, engine = asyncio.get_running_loop(), self._engine
        origin_s = loop.time() - engine.now_s / self._speed

        def now_s() -> float:
            return (loop.time() - origin_s) * self._speed

        while True:
            self._carry_out()
            if engine.scheduler.has_requests():
                step = engine.step()
                if step is None:  # e.g. everything was found in the prefix cache
                    engine.now_s += engine.hardware.step_overhead_s
                await self._pass(now_s())
                self._hand_out(step)
            else:
                await self._called.wait()
                engine.now_s = max(engine.now_s, now_s())

    async def _pass(self, now_s: float) -> None:
        """Let the time of the step under way go by.

        The next one begins at its end, however late this task is woken; only a step that this
        machine can't keep up with takes longer than estimated.
        """
        left_s = self._engine.now_s - now_s
        if left_s < 0:
            self._engine.now_s = now_s
            self.late_s -= left_s
        await asyncio.sleep(max(left_s, 0.0) / self._speed)

    def _carry_out(self) -> None:
        self._called.clear()
        while self._calls:
            call, done = self._calls.popleft()
            if not done.cancelled():
                self._settle(call, done)

    @staticmethod
    def _settle(call: Call, done: asyncio.Future[Any]) -> None:
        try:
            done.set_result(call() or {})
        except EngineError as e:
            done.set_exception(e)
        except Exception as e:
            logger.exception("an operation failed")
            done.set_exception(EngineError(repr(e)))

    def _hand_out(self, step: Step | None) -> None:
        for output in step.outputs if step is not None else ():
            if (outputs := self._outputs.get(output.request_id)) is not None:
                outputs.put_nowait(output)

    def _call(self, call: Call) -> asyncio.Future[Any]:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.append((call, done))
        self._called.set()
        return done

    # Operations.

    def open(
        self, prompt_id: str, tokens: list[int], cache_salt: str | None, weight: float | None
    ) -> asyncio.Future[Status]:
        return self._call(lambda: self._engine.open(prompt_id, tokens, cache_salt, weight))

    def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> asyncio.Future[Status]:
        return self._call(lambda: self._engine.extend(prompt_id, keep, tokens))

    def reopen(self, prompt_id: str, version: int, tokens: list[int]) -> asyncio.Future[Status]:
        return self._call(lambda: self._engine.scheduler.reopen_prompt(prompt_id, version, tokens))

    def status(self, prompt_id: str) -> asyncio.Future[Status]:
        return self._call(lambda: self._engine.scheduler.status(prompt_id))

    def close(self, prompt_id: str) -> asyncio.Future[Status]:
        return self._call(lambda: self._engine.scheduler.close_prompt(prompt_id))

    def handed_over(self, prompt_id: str, forget: bool) -> asyncio.Future[Status]:
        """What has become of handed-over KV: there never is any."""
        return self._call(lambda: self._engine.scheduler.handed_over(prompt_id, forget))

    def load(self) -> asyncio.Future[Status]:
        """How busy the engine is; see `StreamScheduler.load`."""
        return self._call(self._engine.scheduler.load)

    def kv_events(self) -> asyncio.Future[Mapping[str, Any]]:
        """How to follow the prefix cache; see `PrefixCache.events`."""
        return self._call(self._engine.scheduler.prefix_cache.events)

    def blocks(self) -> asyncio.Future[Mapping[str, Any]]:
        """What the prefix cache could find now; see `PrefixCache.blocks`."""
        return self._call(self._engine.scheduler.prefix_cache.blocks)

    async def set_policy(self, policy: str) -> None:
        """Order by another policy from the next step on."""
        await self._call(lambda: self._engine.scheduler.set_policy(policy))

    # Answers.

    def sampling_params(
        self, sampling: Sampling, prompt_id: str, version: int, room: int
    ) -> SamplingParams:
        """What vLLM would take. Of all values only `max_tokens` has an effect here."""
        return sampling_params(sampling, prompt_id, version, room, DEFAULTS)

    def first_token_only(self, params: SamplingParams) -> SamplingParams:
        """Not to be had.

        Raises:
            BadOperation
        """
        raise BadOperation("a simulated engine hands no prompt over")

    def answer(
        self,
        prompt_id: str,
        tokens: list[int],
        cache_salt: str | None,
        params: SamplingParams,
        request_id: str,
    ) -> AsyncGenerator[Event, None]:
        """Generate the answer to a whole prompt. Closing the iterator aborts it."""
        return self.generate(request_id, tokens, params.max_tokens, params.extra_args, cache_salt)

    async def generate(
        self,
        request_id: str,
        tokens: list[int],
        max_tokens: int,
        extra_args: dict[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Generate an answer. Closing the iterator aborts it.

        Args:
            extra_args: as the scheduler wants them of a request that ends an open prompt.
        """
        outputs = self._outputs[request_id] = asyncio.Queue()
        try:
            await self._call(
                lambda: self._engine.ask(request_id, tokens, max_tokens, extra_args, cache_salt)
            )
            async for event in _events(outputs, len(tokens), self._engine.answers):
                yield event
        except EngineError as e:
            yield ErrorEvent(error=e.to_json())
        finally:
            self._outputs.pop(request_id, None)
            self._call(lambda: self._engine.abort(request_id))

    async def abort(self, request_id: str) -> None:
        """Stop an answer."""
        await self._call(lambda: self._engine.abort(request_id))
        if (outputs := self._outputs.get(request_id)) is not None:
            outputs.put_nowait(None)


async def _events(
    outputs: asyncio.Queue[Output | None], prompt_tokens: int, answers: Answers
) -> AsyncGenerator[Event, None]:
    """What the outputs of one request say; None among them is its end by an abort."""
    count = cached_tokens = 0
    while (output := await outputs.get()) is not None:
        cached_tokens = max(cached_tokens, output.cached_tokens or 0)
        text = answers.text(count, output.token_ids)
        yield TokenEvent(token_ids=output.token_ids, text=text)
        count += len(output.token_ids)
        if output.finished:
            yield DoneEvent(
                finish_reason="length",
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
                completion_tokens=count,
            )
            return
    yield ErrorEvent(error=EngineUnavailable("the engine aborted the answer").to_json())
