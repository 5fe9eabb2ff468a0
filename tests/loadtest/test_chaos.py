"""The chaos suite: its links, its schedule, its checker; and a short run of all of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.local import Server, free_port
from engine_adapter.simulated.answers import chained, chained_answer
from loadtest.chaos.bed import Bed, Node
from loadtest.chaos.clients import histories
from loadtest.chaos.faults import KINDS, schedule
from loadtest.chaos.history import History, Post, Request
from loadtest.chaos.leaks import Held, leaked
from loadtest.chaos.links import Link
from loadtest.chaos.promises import CODES, Tokens, check, documents
from loadtest.chaos.run import Plan, run

README = Path(__file__).parents[2] / "README.md"


# Links.


@asynccontextmanager
async def linked() -> AsyncIterator[Link]:
    """A link to a server that says everything twice."""

    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line + line)
        writer.close()

    server = await asyncio.start_server(twice, "127.0.0.1", 0)
    link = Link("a link", server.sockets[0].getsockname()[1])
    await link.start()
    try:
        yield link
    finally:
        await link.stop()
        server.close()
        await server.wait_closed()


async def test_a_link_passes_on_whatever_its_speed() -> None:
    async with linked() as link:
        for trickles in (False, True):
            link.trickles = trickles
            reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
            line = b"x" * 150 + b"\n"
            writer.write(line)
            assert await asyncio.wait_for(reader.readexactly(len(line) * 2), 5) == line + line
            writer.close()
            assert await reader.read() == b""


async def test_a_silent_link_holds_what_comes_until_it_is_released() -> None:
    async with linked() as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        link.swallow()
        writer.write(b"held\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readline(), 0.1)
        link.release(cut=False)
        assert await asyncio.wait_for(reader.readline(), 5) == b"held\n"
        writer.close()


async def test_a_cut_link_breaks_what_there_is_and_takes_new_connections() -> None:
    async with linked() as link:
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"before\n")
        await asyncio.wait_for(reader.readline(), 5)
        link.cut()
        assert await asyncio.wait_for(_rest(reader), 5) == b"before\n"
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
        writer.write(b"after\n")
        assert await asyncio.wait_for(reader.readline(), 5) == b"after\n"
        writer.close()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b"before\n"


# The schedule.


def a_bed(tmp_path: Path) -> Bed:
    """One of which nothing runs."""

    def node(name: str) -> Node:
        return Node(name, Server(name, [], port=free_port(), log_path=tmp_path / name), tmp_path)

    return Bed(
        gateways=[node("gateway-1"), node("gateway-2")],
        engines=[node("engine-1"), node("engine-2")],
        redis=node("redis"),
        links=[Link("to engine-1", 1), Link("clients to gateway-1", 2)],
        folder=tmp_path,
        lease_s=20.0,
        disk=tmp_path,
    )


def test_a_seed_repeats_its_faults_and_streams_and_every_kind_comes(tmp_path: Path) -> None:
    bed = a_bed(tmp_path)
    planned = schedule(bed, 7, 50, 100.0)
    assert planned == schedule(bed, 7, 50, 100.0)
    assert planned != schedule(bed, 8, 50, 100.0)
    assert {one.name for one in planned} == {kind.name for kind in KINDS}
    assert [one.at_s for one in planned] == sorted(one.at_s for one in planned)
    assert [h.kind for h in histories(7, 99)] == [h.kind for h in histories(7, 99)]


# The checker.


@pytest.fixture(scope="module")
def tokens(model_dir: Path) -> Tokens:
    return Tokens(str(model_dir))


def stream(number: int, *texts: str, replaces: bool = False) -> History:
    history = History(number, "crawl", f"question {number}", 12)
    history.posts = [Post((text,), replaces, {}) for text in texts]
    return history


def answered(history: History, tokens: Tokens, posts: int | None = None) -> History:
    """With the answer to so many of its posts."""
    prompt = tokens.of(history, documents(history.posts[:posts]))
    history.text, history.complete = chained_answer(prompt, history.answer_tokens), True
    return history


def test_right_answers_and_beginnings_of_them_are_right(tokens: Tokens) -> None:
    whole = answered(stream(0, "one", "two"), tokens)
    ranked = answered(stream(1, "one", "two", replaces=True), tokens)
    broken_off = answered(stream(2, "three"), tokens)
    broken_off.text, broken_off.complete = broken_off.text[:20], False
    assert check([whole, ranked, broken_off, stream(3, "four")], tokens) == []


def test_wrong_answers_are_named(tokens: Tokens) -> None:
    fewer = answered(stream(0, "one", "two"), tokens, posts=1)
    mixed, other = stream(1, "one"), answered(stream(2, "two"), tokens)
    mixed.text, mixed.complete = other.text, True
    twice = answered(stream(3, "one"), tokens)
    twice.text += twice.text
    empty = stream(4, "one")
    empty.complete = True
    wrong = check([fewer, mixed, other, twice, empty], tokens)
    assert len(wrong) == 4
    for said, line in zip(("1 of 2 posts", "stream 2", "nobody's", "without any"), wrong,
                          strict=True):  # fmt: skip
        assert said in line


def test_what_gateways_must_not_say_is_named(tokens: Tokens) -> None:
    history = stream(0, "one", "two")
    history.requests = [
        Request("post", "ok", 0.1, 1, 5.0),
        Request("post", "internal_error", 0.1, 2, 5.0),
    ]
    history.posts[1].taken = {"tokens_received": tokens.count(["one"])}
    wrong = check([history], tokens)
    assert len(wrong) == 2
    assert "internal_error" in wrong[0]
    assert "post 1 was acknowledged" in wrong[1]


def test_every_code_that_is_allowed_is_documented() -> None:
    text = README.read_text()
    assert [
        code for code in CODES - {"ok", "broken", "hung", "conflict"} if f"`{code}`" not in text
    ] == []


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50), st.integers(0, 9))
def test_a_chained_answer_that_is_continued_is_the_same(prompt: list[int], told: int) -> None:
    whole = chained_answer(prompt, 10)
    context = list(prompt)
    for _ in range(told):
        context.append(chained(context))
    assert chained_answer(prompt, told) + chained_answer(context, 10 - told) == whole


def test_what_is_held_too_long_is_named() -> None:
    def held(streams: int = 0, files: int = 20, tasks: int = 7) -> Held:
        return Held(
            {"g": streams}, {"e": 0}, {"e": 0}, {"g": files}, {"g": 1}, {"g": tasks}
        )  # fmt: skip

    assert leaked(held(), held(files=22)) == []
    assert len(leaked(held(), held(streams=1, files=90, tasks=90))) == 3


# All of it.


@pytest.mark.engine
async def test_a_short_run_breaks_no_promise_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    plan = Plan(seed=1, streams=20, faults=8, within_s=10.0, collections=False, lease_s=12.0)
    result = await run(plan, tmp_path, said.append)
    said += [f"stream {h.number} gave up: {h.gave_up}" for h in result.histories if h.gave_up]
    told = "\n".join(said)
    assert not result.hung, told
    assert not result.broken, told
    assert not result.leaks, told
    assert not result.exceptions, told
    assert len(result.faults) == 8
    answered, wanted = result.answered(again=True)
    assert answered >= wanted / 2 > 0, told
