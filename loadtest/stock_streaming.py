"""vLLM's own streaming input behind a WebSocket: what it can do without the plug-in.

vLLM takes a prompt in pieces only inside its process (`AsyncLLM.generate` with an async generator
of `StreamingInput`); no HTTP route offers it for text. This server is that route, for comparison.
It takes vLLM's flags.

    GET /sessions/{salt}    WebSocket: lines of {"tokens": [...], "answer": n}
                            -> lines of {"token_ids": [...]}, then it closes
    GET /metrics, /health

A part with `answer` 0 is followed by others. vLLM samples a token after each of them all the same
and drops it when the next part comes; these are not passed on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from contextlib import suppress

from aiohttp import WSMsgType, web
from prometheus_client import generate_latest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.prometheus import get_prometheus_registry


def sampling(tokens: int) -> SamplingParams:
    """Greedy, and exactly so many tokens, given out as they come."""
    return SamplingParams(
        max_tokens=tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )


class Session:
    """One prompt that arrives in parts over a WebSocket, and its answer."""

    def __init__(self, llm: AsyncLLM, socket: web.WebSocketResponse, salt: str, name: str) -> None:
        self._llm = llm
        self._socket = socket
        self._salt = salt
        self._name = name
        self._parts: asyncio.Queue[tuple[list[int], int]] = asyncio.Queue()
        self._dropped = 0  # tokens sampled after parts that others followed
        self._complete = False

    async def run(self) -> None:
        """Until the answer is complete or the client goes away."""
        answering = asyncio.create_task(self._answer())
        try:
            async for message in self._socket:
                if message.type is WSMsgType.TEXT:
                    part = json.loads(message.data)
                    self._parts.put_nowait((part["tokens"], part["answer"]))
        finally:
            answering.cancel()  # vLLM aborts the request
            with suppress(asyncio.CancelledError):
                await answering

    async def _inputs(self) -> AsyncGenerator[StreamingInput, None]:
        while not self._complete:
            tokens, answer = await self._parts.get()
            self._complete = answer > 0
            self._dropped += not self._complete
            prompt = TokensPrompt(prompt_token_ids=tokens, cache_salt=self._salt)
            yield StreamingInput(prompt, sampling(answer or 1))

    async def _answer(self) -> None:
        sampled: list[int] = []
        passed = 0
        async for output in self._llm.generate(self._inputs(), sampling(1), self._name):
            sampled += output.outputs[0].token_ids
            answer = sampled[self._dropped :] if self._complete else []
            if len(answer) > passed:
                await self._socket.send_json({"token_ids": answer[passed:]})
                passed = len(answer)
        await self._socket.close()


def app(llm: AsyncLLM) -> web.Application:
    """The server for one engine."""
    numbers = itertools.count()

    async def session(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await Session(llm, socket, request.match_info["salt"], f"session-{next(numbers)}").run()
        return socket

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(get_prometheus_registry()))

    async def health(request: web.Request) -> web.Response:
        await llm.check_health()
        return web.Response()

    async def shutdown(_: web.Application) -> None:
        llm.shutdown()

    server = web.Application()
    server.add_routes(
        [
            web.get("/sessions/{salt}", session),
            web.get("/metrics", metrics),
            web.get("/health", health),
        ]
    )
    server.on_cleanup.append(shutdown)
    return server


def main() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(description=__doc__))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    options = parser.parse_args()
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(options))
    web.run_app(app(llm), host=options.host, port=options.port, print=None)


if __name__ == "__main__":
    main()
