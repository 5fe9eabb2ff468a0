"""An engine that reads and one that decodes, behind a gateway: what users see of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import pytest_asyncio

from deploy.local import EngineOptions, Server, engine, gateway
from engine_adapter.client import EngineClient
from engine_adapter.decode_client import DecodeClient
from engine_adapter.errors import EngineUnavailable
from gateway.client import Client, StreamError
from gateway.prompt import PromptBuilder
from tests.conftest import until
from tests.engine.conftest import MODEL, SOON_S, sent_whole

ANSWER_TOKENS = 24
LONG = 250
"""An answer of so many tokens goes on for longer than it takes to kill an engine."""
QUESTION = [{"role": "user", "content": "Tell me a story about {{documents}}."}]
WORDS = [
    "the", "of", "engine", "token", "naïve", "北京", "Ωmega", "{", "==", "3.14", "<|im_end|>", "🙂",
]  # fmt: skip
TEXTS = ["a king and his daughter", "the sea at night", "北京 in the rain", "3.14 wolves", "a mill"]

pytestmark = pytest.mark.timeout(900)


@dataclass
class Pair:
    reads: Server
    decodes: Server
    gateway: Server
    client: Client

    def options(self) -> dict[str, Any]:
        return {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def servers(model_dir: Path) -> Iterator[tuple[Server, Server, Server]]:
    def options(role: Any, plugin: bool, core: str) -> EngineOptions:
        return EngineOptions(
            model=model_dir, dtype="float32", max_model_len=2048, kv_blocks=133,
            kv_role=role, plugin=plugin, debug_checks=plugin, cores=core,
        )  # fmt: skip

    with ExitStack() as running:
        reads = running.enter_context(engine(options("kv_producer", True, "0")))
        decodes = running.enter_context(engine(options("kv_consumer", False, "1")))
        for server in (reads, decodes):
            server.start()
        for server in (reads, decodes):
            server.wait_ready(400)
        flags = [
            "--decode-engine", decodes.url, "--handoff-idle-tokens", "-1",
            "--handoff-timeout-s", "60", "--poll-timeout-s", "30", "--tokenizer", str(model_dir),
        ]  # fmt: skip
        front = running.enter_context(gateway([reads.url], flags))
        front.start().wait_ready(60)
        yield reads, decodes, front


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(servers: tuple[Server, Server, Server]) -> AsyncIterator[Pair]:
    async with Client(servers[2].url, timeout_s=120) as client:
        yield Pair(*servers, client)


async def whole(
    http: httpx.AsyncClient, builder: PromptBuilder, pair: Pair, documents: list[str], tokens: int
) -> str:
    """What the prefill engine alone answers to the same prompt, sent whole."""
    prompt = await builder.frame(QUESTION)
    prompt = prompt.with_documents([await builder.document(text) for text in documents])
    asked = prompt.open.all() + list(prompt.tail)
    return (await sent_whole(http, pair.reads, asked, tokens, ignore_eos=True))[1]


async def free_blocks(pair: Pair) -> int:
    async with aiohttp.ClientSession() as session:
        return (await EngineClient(session, pair.reads.url).info()).kv_blocks_free


async def decodes_nothing(pair: Pair) -> bool:
    async with aiohttp.ClientSession() as session:
        try:
            info = await DecodeClient(session, pair.decodes.url).info()
        except EngineUnavailable:  # it was killed
            return True
    return info.running == info.waiting == 0 and info.kv_blocks_free == info.kv_blocks_total


async def quiet(pair: Pair) -> None:
    """The KV of all prompts is given back, which is within the lease of what was fetched, and the
    decode engine has nothing to do."""

    async def free() -> bool:
        return await free_blocks(pair) == 132 and await decodes_nothing(pair)

    await until(free, within_s=10)


async def up(pair: Pair, http: httpx.AsyncClient) -> None:
    """The gateway knows that the decode engine is back."""

    async def back() -> bool:
        metrics = (await http.get(pair.gateway.url + "/metrics")).text
        return f'stream2llm_engine_up{{engine="{pair.decodes.url}"}} 1.0' in metrics

    await until(back, within_s=15)


@pytest.mark.parametrize("mode", ["append", "update"])
async def test_answers_are_those_of_one_engine(
    pair: Pair, http: httpx.AsyncClient, builder: PromptBuilder, mode: str
) -> None:
    rng = random.Random(mode)
    for _ in range(4):
        documents = rng.sample(TEXTS, 3)
        async with pair.client.stream(
            MODEL, QUESTION, max_tokens=ANSWER_TOKENS, **pair.options()
        ) as stream:
            if mode == "append":
                for text in documents:
                    await stream.send(text)
                    await asyncio.sleep(rng.uniform(0, 0.3))
            else:
                for ranked in (rng.sample(TEXTS, 2), rng.sample(TEXTS, 3), documents):
                    await stream.replace([{"id": text, "text": text} for text in ranked])
                    await asyncio.sleep(rng.uniform(0, 0.3))
            text = "".join([piece async for piece in stream.answer()])
            handoff = (await stream.status())["handoff"]
        assert text == await whole(http, builder, pair, documents, ANSWER_TOKENS)
        assert handoff["decided"], handoff
        assert handoff["decode_engine"] == pair.decodes.url
        assert handoff["resumed"] == 0, handoff
        assert stream.usage is not None
        assert stream.usage["completion_tokens"] == ANSWER_TOKENS
    await quiet(pair)


@pytest.mark.parametrize("seed", range(6))
async def test_histories_at_once_are_answered_as_if_sent_whole(
    pair: Pair, http: httpx.AsyncClient, builder: PromptBuilder, seed: int
) -> None:
    """Appends and updates in any pieces and at any pace, eight at a time."""

    async def one(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(6)]
        documents: list[str] = []
        async with pair.client.stream(
            MODEL, QUESTION, max_tokens=ANSWER_TOKENS, **pair.options()
        ) as stream:
            for text in texts[: rng.randint(1, 6)]:
                await asyncio.sleep(rng.choice([0.0, 0.0, 0.02, 0.1, 0.4]))
                if number % 2:
                    documents = rng.sample([*documents, text], rng.randint(1, len(documents) + 1))
                    await stream.replace([{"id": known, "text": known} for known in documents])
                else:
                    documents.append(text)
                    await stream.send(text)
            answer = "".join([piece async for piece in stream.answer()])
            handoff = (await stream.status())["handoff"]
        assert answer == await whole(http, builder, pair, documents, ANSWER_TOKENS)
        assert handoff["decided"], handoff
        assert handoff["resumed"] == 0, handoff

    await asyncio.gather(*(one(number) for number in range(8)))
    await quiet(pair)


@pytest.mark.parametrize("after_pieces", [1, 3])
async def test_leaving_an_answer_frees_both_engines(pair: Pair, after_pieces: int) -> None:
    async with pair.client.stream(MODEL, QUESTION, max_tokens=LONG, **pair.options()) as stream:
        await stream.send("a king")
        pieces = stream.answer()
        for _ in range(after_pieces):
            await anext(pieces)
    left_s = time.monotonic()
    await quiet(pair)
    assert time.monotonic() - left_s < SOON_S


async def test_an_answer_goes_on_when_its_decode_engine_is_killed(
    pair: Pair, http: httpx.AsyncClient, builder: PromptBuilder
) -> None:
    async with pair.client.stream(MODEL, QUESTION, max_tokens=LONG, **pair.options()) as stream:
        await stream.send(TEXTS[0])
        pieces = stream.answer()
        text = "".join([await anext(pieces) for _ in range(12)])
        await asyncio.to_thread(pair.decodes.kill)
        text += "".join([piece async for piece in pieces])
        handoff = (await stream.status())["handoff"]
    assert handoff["resumed"] == 1, handoff
    assert text == await whole(http, builder, pair, [TEXTS[0]], LONG)
    await quiet(pair)


async def test_an_unseeded_answer_ends_in_an_error_when_its_decode_engine_is_killed(
    pair: Pair, http: httpx.AsyncClient
) -> None:
    await asyncio.to_thread(pair.decodes.start().wait_ready, 400)
    await up(pair, http)
    async with pair.client.stream(
        MODEL, QUESTION, max_tokens=LONG, temperature=1, ignore_eos=True
    ) as stream:
        await stream.send(TEXTS[0])
        pieces = stream.answer()
        for _ in range(12):
            await anext(pieces)
        assert (await stream.status())["handoff"]["decode_engine"] == pair.decodes.url
        await asyncio.to_thread(pair.decodes.kill)
        killed_s = time.monotonic()
        with pytest.raises(StreamError):
            async for _ in pieces:
                pass
        assert time.monotonic() - killed_s < SOON_S
    await quiet(pair)


async def test_an_answer_outlives_the_engine_that_read_its_prompt(
    pair: Pair, http: httpx.AsyncClient, builder: PromptBuilder
) -> None:
    await asyncio.to_thread(pair.decodes.start().wait_ready, 400)
    await up(pair, http)
    expected = await whole(http, builder, pair, [TEXTS[1]], LONG)
    async with pair.client.stream(MODEL, QUESTION, max_tokens=LONG, **pair.options()) as stream:
        await stream.send(TEXTS[1])
        pieces = stream.answer()
        text = "".join([await anext(pieces) for _ in range(12)])
        await asyncio.to_thread(pair.reads.kill)
        text += "".join([piece async for piece in pieces])
        assert (await stream.status())["handoff"]["resumed"] == 0
    assert text == expected
