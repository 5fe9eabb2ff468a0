"""An unmodified engine that decodes what others have prefilled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import aiohttp

from engine_adapter.completions import events, prompt, streamed
from engine_adapter.messages import EngineInfo, Event, Sampling
from engine_adapter.plain_client import PlainClient
from engine_adapter.plain_server import PlainServer


class DecodeClient:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._server, self._plain = PlainServer(session, url), PlainClient(session, url)
        self._info: EngineInfo | None = None

    @property
    def url(self) -> str:
        return self._server.url

    async def info(self, *, timeout_s: float = 5.0) -> EngineInfo:
        self._info = await self._plain.info(timeout_s=timeout_s)
        return self._info

    @asynccontextmanager
    async def answer(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        kv_transfer: Mapping[str, Any] | None,
        request_id: str,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        assert self._info is not None
        room = self._info.max_model_len - len(tokens)
        body = prompt(self._info.model, list(tokens), None) | streamed(sampling, room)
        if kv_transfer is not None:
            body["kv_transfer_params"] = dict(kv_transfer)
        async with (
            self._server.stream(body) as reading,
            aclosing(events(reading.lines(), len(tokens), 0, sampling.logprobs)) as found,
        ):
            yield found

    async def close(self) -> None:
        await self._plain.close()
