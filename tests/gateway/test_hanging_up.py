"""Clients that go away while their `finish` is on its way: nothing of it is left at the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.books import Books
from gateway.keys import LIFECYCLE, STREAMS
from gateway.prompt import PromptBuilder
from tests.conftest import until
from tests.fake_engine import MODEL, FakeCore
from tests.gateway.pools import QUESTION, Front, front

FREED_S = 10.0
LONG_S = 30.0


class Caller:
    """The client of one stream, whose answer would take long."""

    def __init__(self, f: Front, stream_id: str) -> None:
        self.engine = f.engines[0]
        self.core: FakeCore = self.engine.fake.core
        self.core.prefill_s = lambda tokens: LONG_S
        self._f = f
        self._id = stream_id
        self._path = f"{f.url}/v1/streams/{stream_id}"

    @property
    def state(self) -> str:
        stream = self._f.app[STREAMS].find(self._id)
        assert stream is not None
        return stream.state

    @property
    def requests(self) -> int:
        """Under way at the gateway."""
        return self._f.app[LIFECYCLE].requests

    async def sends(self, text: str) -> int:
        """Post a chunk; its status."""
        answer = await self._f.http.post(self._path + "/chunks", json={"text": text})
        return answer.status_code

    async def hangs_up(self, when: Callable[[], bool]) -> None:
        """Finish, and close the connection at a moment."""
        body = {"stream": False}
        asked = asyncio.create_task(self._f.http.post(self._path + "/finish", json=body))

        async def so() -> bool:
            return when()

        await until(so, within_s=5)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def freed(self) -> None:
        """Wait until the stream has ended and the engine has nothing of it."""
        core, engine = self.core, self._f.at(self.engine)

        async def so() -> bool:
            return self.state == "cancelled" and not (engine.load or core.answering or core.tokens)

        await until(so, within_s=FREED_S)


@asynccontextmanager
async def calling(model_dir: Path) -> AsyncIterator[Caller]:
    async with front(model_dir, 1) as f, f.client.stream(MODEL, QUESTION) as stream:
        await stream.send("some context")
        yield Caller(f, stream.id)


async def test_while_the_index_is_told_that_the_input_is_closed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Books.write

    async def slow(self: Books, *, renew: bool) -> None:
        if self.now().state == "finishing" and not renew:
            await asyncio.sleep(LONG_S)
        await told(self, renew=renew)

    monkeypatch.setattr(Books, "write", slow)
    async with calling(model_dir) as client:
        await client.hangs_up(lambda: client.core.answering == 1)
        await client.freed()


async def test_while_the_engine_has_not_read_it(model_dir: Path) -> None:
    async with calling(model_dir) as client:
        client.engine.runs.clear()
        await client.hangs_up(lambda: client.state == "finishing")
        client.engine.runs.set()
        await client.freed()


async def test_while_a_chunk_before_it_is_tokenized(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with calling(model_dir) as client:
        begun, tokenized = asyncio.Event(), asyncio.Event()
        document = PromptBuilder.document

        async def slow(self: PromptBuilder, *args: Any, **options: Any) -> Any:
            begun.set()
            await tokenized.wait()
            return await document(self, *args, **options)

        monkeypatch.setattr(PromptBuilder, "document", slow)
        async with asyncio.TaskGroup() as group:
            group.create_task(client.sends("more context " * 40))  # not at once
            await begun.wait()
            await client.hangs_up(lambda: client.requests == 2)
            await client.freed()
            tokenized.set()
