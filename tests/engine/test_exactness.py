"""The answer to a streamed prompt is the answer to the same prompt sent whole."""

from __future__ import annotations

import asyncio
import itertools
import random

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.local import Server
from engine_adapter.client import EngineClient
from engine_adapter.messages import Extend, Open
from gateway.client import Client
from gateway.prompt import PromptBuilder
from tests.engine.conftest import MODEL, finished, sent_whole

ANSWER_TOKENS = 6
WORDS = [
    "the", "of", "engine", "token", "stream", "naïve", "北京", "Ωmega",
    "{", "}", "==", "def", "3.14", "<|im_end|>", "🙂", "a",
]  # fmt: skip

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
gaps_s = st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.15, 0.4])
chunked = st.lists(st.tuples(texts, gaps_s), min_size=0, max_size=5)
seed_numbers = itertools.count()

one_by_one = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


async def whole_answer(
    http: httpx.AsyncClient,
    engine: Server,
    builder: PromptBuilder,
    question: str,
    documents: list[str],
) -> str:
    prompt = await builder.frame(conversation(question))
    prompt = prompt.with_documents([await builder.document(text) for text in documents])
    tokens = prompt.open.all() + list(prompt.tail)
    return (await sent_whole(http, engine, tokens, ANSWER_TOKENS))[1]


async def streamed_answer(client: Client, question: str, chunks: list[tuple[str, float]]) -> str:
    async with client.stream(
        MODEL, conversation(question), max_tokens=ANSWER_TOKENS, temperature=0
    ) as stream:
        for text, gap_s in chunks:
            await stream.send(text)
            await asyncio.sleep(gap_s)
        return "".join([piece async for piece in stream.answer()])


@pytest.mark.timeout(2400)
@one_by_one
@given(question=texts, chunks=chunked)
async def test_any_chunking_and_timing_gives_the_answer_of_the_whole(
    client: Client,
    http: httpx.AsyncClient,
    engine_server: Server,
    builder: PromptBuilder,
    question: str,
    chunks: list[tuple[str, float]],
) -> None:
    streamed = await streamed_answer(client, question, chunks)
    documents = [text for text, _ in chunks]
    assert streamed == await whole_answer(http, engine_server, builder, question, documents)


async def test_eight_streams_at_once(
    client: Client, http: httpx.AsyncClient, engine_server: Server, builder: PromptBuilder
) -> None:
    rng = random.Random(8)
    questions = [f"Question {i}?" for i in range(8)]
    inputs = [
        [(" ".join(rng.choices(WORDS, k=60)), rng.uniform(0, 0.6)) for _ in range(5)]
        for _ in questions
    ]
    streamed = await asyncio.gather(
        *(streamed_answer(client, q, chunks) for q, chunks in zip(questions, inputs, strict=True))
    )
    for question, chunks, answer in zip(questions, inputs, streamed, strict=True):
        documents = [text for text, _ in chunks]
        assert answer == await whole_answer(http, engine_server, builder, question, documents)


async def test_chunks_that_arrive_while_a_prefill_is_in_flight(
    engine_client: EngineClient, http: httpx.AsyncClient, engine_server: Server
) -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(100, 40000) for _ in range(900)]
    await engine_client.open("in-flight", Open(tokens=tokens[:700]))
    length = 700
    for version in range(1, 20):  # far faster than 700 tokens can be computed
        part = tokens[length : length + 10]
        progress = await engine_client.extend(
            "in-flight", Extend(version=version, keep=length, tokens=part)
        )
        length += 10
        assert progress.length == length
    answer, done = await finished(engine_client, "in-flight", 20, length, tokens[length:], 8)
    assert done.prompt_tokens == 900
    assert answer == (await sent_whole(http, engine_server, tokens, 8))[0]


@pytest.mark.timeout(900)
@settings(one_by_one, max_examples=40)
@given(data=st.data())
async def test_histories_of_appends_and_updates(
    data: st.DataObject,
    engine_client: EngineClient,
    http: httpx.AsyncClient,
    engine_server: Server,
) -> None:
    ids = st.integers(100, 40_000)
    prompt_id = f"history-{next(seed_numbers)}"
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    tokens = [rng.randrange(100, 40000) for _ in range(data.draw(st.integers(1, 160)))]
    await engine_client.open(prompt_id, Open(tokens=tokens, cache_salt=prompt_id))
    version = 0
    for keep_share, added, gap_s in data.draw(
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 100), gaps_s), max_size=4)
    ):
        await asyncio.sleep(gap_s)
        version += 1
        keep = max(round(keep_share * len(tokens)), 1)
        new = [rng.randrange(100, 40000) for _ in range(added)]
        op = Extend(version=version, keep=keep, tokens=new)
        progress = await engine_client.extend(prompt_id, op)
        assert progress.kept == keep
        assert progress.computed <= keep
        tokens = tokens[:keep] + new
    tail = [data.draw(ids)]
    answer, _ = await finished(engine_client, prompt_id, version + 1, len(tokens), tail, 6)
    assert answer == (await sent_whole(http, engine_server, tokens + tail, 6))[0]
