"""Operations of many prompts in one request, where many come at once.

One that comes alone goes at once, as a request of its own. Those that come within `WINDOW_S` of the
one before go together: with thousands of streams a request for each costs a gateway more than all
else that it does for a chunk, and a connection for each of those that wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import Context

from engine_adapter.errors import EngineError, EngineUnavailable
from engine_adapter.messages import Answered, Batch, Operation, Progress

WINDOW_S = 0.008
MOST = 64
"""Operations in one request."""
CLOSED = "the engine is not used any more"

Waiting = tuple[Operation, asyncio.Future[Progress]]


class Batching:
    """Carries `open` and `extend` to one engine."""

    def __init__(
        self,
        alone: Callable[[Operation], Awaitable[Progress]],
        together: Callable[[Batch], Awaitable[list[Answered]]],
    ) -> None:
        """
        Args:
            alone, together: make a request; both raise an `EngineError`.
        """
        self._alone = alone
        self._together = together
        self._waiting: list[Waiting] = []
        self._timer: asyncio.TimerHandle | None = None
        self._sent_s = -float("inf")
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, operation: Operation) -> Progress:
        """Carry out an operation.

        Raises:
            EngineError
        """
        loop, now_s = asyncio.get_running_loop(), time.monotonic()
        left_s = self._sent_s + WINDOW_S - now_s
        if not self._waiting and left_s <= 0:
            self._sent_s = now_s
            return await self._alone(operation)
        answer: asyncio.Future[Progress] = loop.create_future()
        self._waiting.append((operation, answer))
        if self._timer is None:
            self._timer = loop.call_later(max(left_s, 0.0), self._send)
        try:
            return await answer
        finally:
            del answer  # its error knows this frame: a circle, which would keep the stream

    async def hurry(self, prompt_id: str) -> None:
        """Send what waits, if an operation of this prompt does, before anything that follows."""
        if any(operation.prompt_id == prompt_id for operation, _ in self._waiting):
            assert self._timer is not None
            self._timer.cancel()
            self._send()
            await asyncio.sleep(0)  # its request begins now

    async def close(self) -> None:
        """Break off what waits and what is under way: its callers get `EngineUnavailable`."""
        if self._timer is not None:
            self._timer.cancel()
        waiting, self._waiting, self._timer = self._waiting, [], None
        _fail(waiting, EngineUnavailable(CLOSED))
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _send(self) -> None:
        waiting, self._waiting, self._timer = self._waiting, [], None
        self._sent_s = time.monotonic()
        wanted = [(op, answer) for op, answer in waiting if not answer.done()]
        for i in range(0, len(wanted), MOST):
            # In a context of its own: it belongs to no trace, or to many.
            carrying = self._carry(wanted[i : i + MOST])
            task = asyncio.get_running_loop().create_task(carrying, context=Context())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _carry(self, some: list[Waiting]) -> None:
        try:
            answers = await self._together(Batch(operations=[op for op, _ in some]))
            if len(answers) != len(some):
                raise EngineUnavailable("the engine has not answered every operation")
        except EngineError as e:
            _fail(some, e)
            return
        except asyncio.CancelledError:  # not by those that wait: they live on
            _fail(some, EngineUnavailable(CLOSED))
            raise
        except Exception as e:  # whatever it is: they would wait for ever
            _fail(some, EngineUnavailable(f"a shared request failed: {e!r}"))
            return
        for (_, answer), said in zip(some, answers, strict=True):
            if answer.done():
                continue
            if said.progress is not None:
                answer.set_result(said.progress)
            else:
                answer.set_exception(EngineError.from_json(said.error))


def _fail(some: list[Waiting], error: EngineError) -> None:
    """Answer all with the same error, which has been told once then."""
    told = False
    for _, answer in some:
        if not answer.done():
            answer.set_exception(_same(error, told=told))
            told = True


def _same(error: EngineError, *, told: bool) -> EngineError:
    """An error for one of many, with a traceback of its own."""
    same = EngineError.from_json(error.to_json())
    same.__cause__, same.told = error.__cause__, told
    return same
