"""Operations that come together go to the engine together, each with its own answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from aiohttp.typedefs import Handler

from engine_adapter.client import EngineClient
from engine_adapter.errors import EngineError, EngineUnavailable, VersionConflict
from engine_adapter.messages import Extend, Finish, Open, Progress, Sampling
from tests.fake_engine import FakeEngine


class Counted:
    """An engine, a client of it, and how often which path was asked for."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.fake = FakeEngine()
        app, self.asked = self.fake.app(), Counter[str]()
        self.runs = asyncio.Event()
        self.runs.set()

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.asked[request.path.removeprefix("/stream2llm")] += 1
            await self.runs.wait()
            return await handler(request)

        app.middlewares.append(count)
        self.server = TestServer(app)
        self._session = session

    async def client(self) -> EngineClient:
        await self.server.start_server()
        client = EngineClient(self._session, str(self.server.make_url("")))
        await client.info()
        return client


@pytest_asyncio.fixture
async def counted() -> AsyncIterator[Counted]:
    async with aiohttp.ClientSession() as session:
        counted = Counted(session)
        yield counted
        await counted.server.close()


async def test_many_at_once_are_few_requests_and_each_has_its_own_answer(counted: Counted) -> None:
    client = await counted.client()
    opened = await asyncio.gather(
        *(client.open(f"p{i}", Open(tokens=[1] * (i + 1))) for i in range(200))
    )
    assert [(p.prompt_id, p.length) for p in opened] == [(f"p{i}", i + 1) for i in range(200)]
    assert sum(counted.asked.values()) <= 2 + 200 // 64 + 1 + 1
    await client.close()


async def test_one_alone_is_a_request_of_its_own(counted: Counted) -> None:
    client = await counted.client()
    await client.open("p", Open(tokens=[1, 2]))
    await asyncio.sleep(0.05)
    await client.extend("p", Extend(version=1, keep=2, tokens=[3]))
    assert counted.asked["/prompts/p"] == counted.asked["/prompts/p/extend"] == 1
    assert counted.fake.core.tokens["p"] == [1, 2, 3]


async def test_one_that_is_refused_fails_no_other(counted: Counted) -> None:
    client = await counted.client()
    await client.open("first", Open(tokens=[1]))
    answers = await asyncio.gather(
        client.open("good", Open(tokens=[1, 2])),
        client.extend("first", Extend(version=7, keep=1, tokens=[2])),
        client.open("bad", Open(tokens=[-1])),
        client.extend("first", Extend(version=1, keep=1, tokens=[5])),
        return_exceptions=True,
    )
    assert isinstance(answers[0], Progress)
    assert isinstance(answers[1], VersionConflict)
    assert answers[1].details == {"expected_version": 1}
    assert isinstance(answers[2], EngineError)
    assert isinstance(answers[3], Progress)
    assert counted.fake.core.tokens["first"] == [1, 5]


async def test_finish_waits_for_no_window(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_adapter.batching.WINDOW_S", 30.0)
    client = await counted.client()
    await client.open("p", Open(tokens=[1]))
    extending = asyncio.create_task(client.extend("p", Extend(version=1, keep=1, tokens=[2])))
    await asyncio.sleep(0)
    assert counted.asked["/operations"] == 0
    op = Finish(version=2, keep=2, tokens=[3], sampling=Sampling(max_tokens=1))
    async with asyncio.timeout(5), client.finish("p", op) as events:
        assert [event async for event in events]
    assert (await extending).version == 1
    assert counted.fake.core.finished["p"] == [1, 2, 3]
    await client.close()


async def test_an_engine_that_is_gone_fails_them_all(counted: Counted) -> None:
    client = await counted.client()
    await counted.server.close()
    opened = (client.open(f"p{i}", Open(tokens=[1])) for i in range(5))
    answers = await asyncio.gather(*opened, return_exceptions=True)
    assert all(isinstance(answer, EngineUnavailable) for answer in answers)
    # The first goes alone, the others together: two requests have failed.
    assert sum(not answer.told for answer in answers if isinstance(answer, EngineError)) == 2


@pytest.mark.parametrize("sent", [True, False])
async def test_whoever_waits_when_the_client_is_closed_is_told(
    counted: Counted, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    client = await counted.client()
    await client.open("p", Open(tokens=[1]))
    monkeypatch.setattr("engine_adapter.batching.WINDOW_S", 30.0)
    counted.runs.clear()
    first = asyncio.create_task(client.extend("p", Extend(version=1, keep=1, tokens=[2])))
    await asyncio.sleep(0)
    if sent:
        await client._batching.hurry("p")
        await asyncio.sleep(0)
    await client.close()
    with pytest.raises(EngineUnavailable):
        async with asyncio.timeout(5):
            await first
    counted.runs.set()


async def test_an_answer_that_can_not_be_read_is_told_to_all(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreadable(batch: object) -> object:
        raise ValueError

    client = await counted.client()
    monkeypatch.setattr(client._batching, "_together", unreadable)
    await client.open("first", Open(tokens=[1]))
    async with asyncio.timeout(5):
        opened = (client.open(f"p{i}", Open(tokens=[1])) for i in range(3))
        answers = await asyncio.gather(*opened, return_exceptions=True)
    assert all(isinstance(answer, EngineUnavailable) for answer in answers[1:])


async def test_an_engine_that_knows_no_batches_gets_none(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_adapter.prompts.OPERATIONS", ["open", "extend"])
    client = await counted.client()
    await asyncio.gather(*(client.open(f"p{i}", Open(tokens=[1])) for i in range(5)))
    assert counted.asked["/operations"] == 0
    assert len(counted.fake.core.tokens) == 5
