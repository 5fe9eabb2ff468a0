"""Any OpenAI client works against the gateway unchanged."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import pytest_asyncio

from deploy.local import Server
from tests.engine.conftest import MODEL

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest_asyncio.fixture(scope="module")
async def sdk(gateway_server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = gateway_server.url + "/v1"
    http = httpx.AsyncClient(trust_env=False)
    async with openai.AsyncOpenAI(api_key="none", base_url=base_url, http_client=http) as sdk:
        yield sdk


async def test_models_and_plain_chat(sdk: openai.AsyncOpenAI) -> None:
    models = await sdk.models.list()
    assert [model.id for model in models.data] == [MODEL]
    chat = await sdk.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=10, temperature=0
    )
    assert "Paris" in (chat.choices[0].message.content or "")


async def test_streamed_chat_with_usage(sdk: openai.AsyncOpenAI) -> None:
    chunks = [
        chunk
        async for chunk in await sdk.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=10,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert chunks[-1].usage is not None


async def test_completions(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in completion.choices[0].text


async def test_errors_of_the_engine_come_through(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await sdk.chat.completions.create(model="nothing", messages=MESSAGES)


async def test_the_answer_of_a_stream_reads_as_chat_completion_chunks(
    sdk: openai.AsyncOpenAI, gateway_server: Server
) -> None:
    base = gateway_server.url + "/v1/streams"
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 10, "temperature": 0}
        stream = (await http.post(base, json=body)).json()["id"]
    finish = openai.AsyncStream[openai.types.chat.ChatCompletionChunk]
    chunks = await sdk.post(
        f"/streams/{stream}/finish",
        body={"stream": True},
        cast_to=openai.types.chat.ChatCompletionChunk,
        stream=True,
        stream_cls=finish,
    )
    text = "".join([c.choices[0].delta.content or "" async for c in chunks])
    assert "Paris" in text


async def test_a_seeded_prompt_of_several_steps_is_answered_as_one_of_a_single_step(
    http: httpx.AsyncClient, engine_server: Server
) -> None:
    """On CPUs vLLM itself dies of the first of these two requests."""
    body = {
        "model": MODEL,
        "prompt": list(range(1000, 1400)),
        "max_tokens": 8,
        "temperature": 0.9,
        "seed": 5,
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": "seeded",
    }
    answers = []
    for _ in range(2):  # the second finds all but the end in the prefix cache
        response = await http.post(engine_server.url + "/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answers.append(response.json()["choices"][0]["token_ids"])
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]
