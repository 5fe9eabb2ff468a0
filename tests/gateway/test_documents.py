"""Ranked lists that replace a stream's documents, against an engine without a model."""

from __future__ import annotations

import asyncio
import random
from itertools import takewhile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.client import Stream, StreamError
from gateway.keys import BUILDERS, STREAMS
from gateway.known import KnownDocuments
from gateway.prompt import Document
from tests.conftest import until
from tests.fake_engine import MODEL
from tests.gateway.conftest import Stack
from tests.gateway.test_streams import MESSAGES, expected_tokens

quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

A = {"id": "a", "text": "The first of them."}
B = {"id": "b", "text": "Another, rather longer one."}


def texts_of(*documents: dict[str, str]) -> list[str]:
    return [d["text"] for d in documents]


async def read_whole(stream: Stream) -> None:
    async def all_read() -> bool:
        return bool((await stream.status())["tokens"]["waiting"] == 0)

    await until(all_read, within_s=5)


async def put(stack: Stack, stream: Stream, body: object) -> tuple[int, dict[str, object]]:
    answer = await stack.http.put(f"{stack.url}/v1/streams/{stream.id}/documents", json=body)
    return answer.status_code, answer.json()


async def test_the_engine_answers_the_last_list(stack: Stack) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        await stream.replace([A, B])
        await read_whole(stream)
        await stream.replace([B, {"text": "no id"}])
        await stream.finish()
        assert stack.held(stream.id) == await expected_tokens(stack, [B["text"], "no id"])


async def test_a_document_sent_before_in_any_way_is_known_by_its_id(stack: Stack) -> None:
    begin = [{"id": "begin", "text": "at the beginning"}]
    async with stack.client.stream(MODEL, MESSAGES, documents=begin) as stream:
        await stream.send(A["text"], id="a")
        await stream.replace([B])
        await stream.replace([{"id": "a"}, {"id": "begin"}, {"id": "b"}])
        await stream.finish()
        wanted = await expected_tokens(stack, [A["text"], "at the beginning", B["text"]])
        assert stack.held(stream.id) == wanted


async def test_a_new_text_replaces_what_was_known_by_an_id(stack: Stack) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        await stream.replace([A])
        await stream.replace([{"id": "a", "text": "changed"}])
        await stream.replace([])
        await stream.replace([{"id": "a"}])
        await stream.finish()
        assert stack.held(stream.id) == await expected_tokens(stack, ["changed"])


async def test_counts_are_tokens_of_the_open_prompt(stack: Stack) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        a = await stream.send(A["text"], id="a")
        head = (await stream.status())["tokens"]["prompt"] - a  # and the tail
        same = await stream.replace([{"id": "a"}])
        assert (same["invalidated"], same["added"], same["tokens_received"]) == (0, 0, a)
        more = await stream.replace([{"id": "a"}, B])
        b = more["added"]
        assert (more["kept"], more["invalidated"]) == (same["kept"], 0)
        assert a < more["kept"] < head + a
        less = await stream.replace([{"id": "b"}])
        assert less["kept"] + less["invalidated"] == more["kept"] + b
        assert less["kept"] + less["added"] == more["kept"] - a + b
        empty = await stream.replace([])
        assert empty["tokens_received"] == 0
        assert (empty["kept"], empty["invalidated"]) == (more["kept"] - a, b)


async def test_lists_and_chunks_share_one_numbering(stack: Stack) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        await stream.send(A["text"], id="a")
        status, first = await put(stack, stream, {"documents": [B, {"id": "a"}], "seq": 1})
        assert (status, first["seq"]) == (200, 1)
        assert set(first) == {"id", "seq", "tokens_received", "kept", "invalidated", "added"}
        _, third = await put(stack, stream, {"documents": [B]})
        assert third["seq"] == 2
        assert await put(stack, stream, {"documents": [], "seq": 1}) == (200, first)
        status, gap = await put(stack, stream, {"documents": [], "seq": 4})
        assert (status, gap["error"]["expected_seq"]) == (409, 3)  # type: ignore[index]
        await stream.finish()
        assert await put(stack, stream, {"documents": [], "seq": 1}) == (200, first)
        assert (await put(stack, stream, {"documents": []}))[0] == 409
        assert stack.held(stream.id) == await expected_tokens(stack, [B["text"]])


@pytest.mark.parametrize(
    "documents",
    [
        [A, {"id": "never sent"}],
        [A, {"id": "a"}],
        [{"text": ""}],
        [{}],
        [{"id": "a", "txt": "misspelt"}],
        [{"id": "a", "text": 1}],
        "a",
        None,
    ],
)
async def test_a_bad_list_is_refused_and_changes_nothing(stack: Stack, documents: object) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        await stream.replace([B])
        status, answer = await put(stack, stream, {"documents": documents, "seq": 1})
        error: dict[str, object] = answer["error"]  # type: ignore[assignment]
        unknown = documents == [A, {"id": "never sent"}]
        code = "unknown_document" if unknown else "invalid_request"
        assert (status, error["code"]) == (400, code)
        assert str(error["param"]).startswith("documents")
        with pytest.raises(StreamError):  # a text in a refused list is not known
            await stream.replace([{"id": "a"}])
        await stream.finish()
        assert stack.held(stream.id) == await expected_tokens(stack, [B["text"]])


async def test_a_list_too_long_leaves_the_stream_as_it_was(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        await stream.replace([B])
        too_long = {"id": "a", "text": "word " * stack.engine.max_model_len}
        status, answer = await put(stack, stream, {"documents": [too_long]})
        error: dict[str, object] = answer["error"]  # type: ignore[assignment]
        assert (status, error["code"], error["param"]) == (
            400,
            "context_length_exceeded",
            "documents",
        )
        assert (await stream.replace([{"id": "b"}]))["added"] == 0
        await stream.finish()
        assert stack.held(stream.id) == await expected_tokens(stack, [B["text"]])


async def test_what_a_list_moved_waits_until_an_operation_carries_it(stack: Stack) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        first = await stream.replace([A, B])
        await read_whole(stream)
        operations = stack.engine.core.operations
        before = operations.count("extend")

        async def begun() -> bool:
            return operations.count("extend") > before

        stack.engine.core.delay_s = lambda: 5.0
        try:
            await stream.send("carried by an operation that takes long")
            await until(begun, within_s=10)
            moved = await stream.replace([{"id": "b"}, {"id": "a"}])
            assert moved["tokens_received"] == first["tokens_received"]
            held = stack.app[STREAMS].find(stream.id)
            assert held is not None
            assert held.waiting_tokens == moved["added"] > 0
        finally:
            stack.engine.core.delay_s = lambda: 0.0


async def test_posts_take_effect_in_the_order_in_which_they_came(stack: Stack) -> None:
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        inner = stack.app[STREAMS].find(stream.id)
        assert inner is not None
        slow, order = asyncio.Event(), []

        async def first() -> list[Document]:
            await slow.wait()
            order.append("list")
            return [Document((7,), "x")]

        async def second() -> list[Document]:
            order.append("chunk")
            assert inner.known.get("x") == Document((7,), "x")
            return [Document((8,))]

        posts = [asyncio.create_task(inner.replace(first, None))]
        await asyncio.sleep(0)
        posts.append(asyncio.create_task(inner.add(second, None)))
        await asyncio.sleep(0.01)
        slow.set()
        assert [seq for seq, _ in await asyncio.gather(*posts)] == [0, 1]
        assert order == ["list", "chunk"]
        assert [d.tokens for d in inner.prompt.documents] == [(7,), (8,)]


def test_documents_dropped_longest_ago_are_forgotten_first() -> None:
    documents = {name: Document((1, 2, 3), name) for name in "abcd"}
    known = KnownDocuments(max_dropped=8)  # two documents of three tokens and a name of one
    known.add(list(documents.values()))
    known.replace([documents["c"], documents["d"]])
    assert {name for name in "abcd" if known.get(name)} == set("abcd")
    known.replace([documents["d"], documents["a"]])
    assert {name for name in "abcd" if known.get(name)} == set("abcd")
    known.replace([])
    assert {name for name in "abcd" if known.get(name)} == {"d", "a"}
    known.clear()
    assert known.get("a") is None


def test_a_document_that_comes_back_is_no_longer_counted_as_dropped() -> None:
    a, b = Document((1, 2, 3), "a"), Document((1, 2, 3), "b")
    known = KnownDocuments(max_dropped=8)
    known.add([a, b])
    for current in ([b], [a], [b], [a], []):
        known.replace(current)
    assert (known.get("a"), known.get("b")) == (a, b)


names = st.sampled_from(["a", "b", "c", "d", "e", None])
words = st.text("abc \n", min_size=1, max_size=20)
chunk_posts = st.tuples(st.just("chunk"), st.lists(st.tuples(names, words), min_size=1, max_size=2))
lists = st.tuples(
    st.just("list"), st.lists(st.tuples(names, st.one_of(st.none(), words)), max_size=6)
)


@quick
@given(
    posts=st.lists(st.one_of(chunk_posts, lists), max_size=12),
    seed=st.integers(0, 2**32),
    slowest_s=st.sampled_from([0.0, 0.005, 0.03]),
)
async def test_the_engine_is_asked_what_a_plain_model_says(
    stack: Stack,
    posts: list[tuple[str, list[tuple[str | None, str | None]]]],
    seed: int,
    slowest_s: float,
) -> None:
    rng = random.Random(seed)
    stack.engine.core.delay_s = lambda: rng.uniform(0, slowest_s)
    texts: list[str] = []
    known: dict[str, str] = {}
    async with stack.client.stream(MODEL, MESSAGES) as stream:
        for kind, documents in posts:
            if kind == "chunk":
                for name, text in documents:
                    assert text is not None
                    await stream.send(text, id=name)
                    texts.append(text)
                    if name is not None:
                        known[name] = text
            else:
                wanted = applied(documents, known)
                body = [
                    {k: v for k, v in (("id", n), ("text", t)) if v is not None}
                    for n, t in documents
                ]
                if wanted is None:
                    with pytest.raises(StreamError):
                        await stream.replace(body)
                    continue
                known |= {n: t for (n, _), t in zip(documents, wanted, strict=True) if n}
                before, after = await open_tokens(stack, texts), await open_tokens(stack, wanted)
                taken = await stream.replace(body)
                kept = common(before, after)
                assert taken["kept"] == kept
                assert taken["invalidated"] == len(before) - kept
                assert taken["added"] == len(after) - kept
                texts = wanted
            if rng.random() < 0.5:
                await asyncio.sleep(rng.uniform(0, 0.01))
        await stream.finish()
        assert stack.held(stream.id) == await expected_tokens(stack, texts)
    stack.engine.core.delay_s = lambda: 0.0


def common(before: list[int], after: list[int]) -> int:
    pairs = zip(before, after, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


async def open_tokens(stack: Stack, texts: list[str]) -> list[int]:
    builder = await stack.app[BUILDERS][MODEL]
    prompt = await builder.frame(MESSAGES)
    return prompt.with_only([await builder.document(text) for text in texts]).open.all()


def applied(
    documents: list[tuple[str | None, str | None]], known: dict[str, str]
) -> list[str] | None:
    """The texts a list stands for, or None if it has to be refused."""
    given_names = [name for name, _ in documents if name is not None]
    if len(given_names) != len(set(given_names)):
        return None
    texts = [known.get(name or "") if text is None else text for name, text in documents]
    return None if None in texts else [text for text in texts if text is not None]
