"""AnnSearch: rankings get better, end early or at the deadline; the event loop stays free."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest

from retrieval.ann import AnnSearch
from retrieval.collections.__main__ import main
from retrieval.collections.store import Collections
from retrieval.embedding import Vectors
from retrieval.refine import Rounds
from retrieval.source import Passage, Query, Ranked, SourceFailed
from tests.retrieval.words import Words

COUNT = 3000


class Vague(Words):
    """Rows in all directions, so that little effort finds little."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        vectors = np.random.default_rng(len(texts)).normal(size=(len(texts), 32))
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


class Stuck(Words):
    """Embeds when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def embed(self, texts: Sequence[str]) -> Vectors:
        if not self.go.wait(30):
            raise TimeoutError
        return super().embed(texts)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Collections:
    collections = Collections(tmp_path_factory.mktemp("many"), Vague())
    collections.create("all")
    collections.add("all", [Passage(str(n), f"text {n}") for n in range(COUNT)])
    return collections


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Collections]:
    Collections(tmp_path, Words()).create("all")
    embedder = Stuck()
    yield Collections(tmp_path, embedder)
    embedder.go.set()


async def rankings(source: AnnSearch, query: Query) -> list[Ranked]:
    async with aclosing(source.search(query)) as events:
        return [event async for event in events]


def recall(found: Ranked, nearest: list[str]) -> float:
    return len({p.id for p in found.passages} & set(nearest)) / len(nearest)


async def test_rankings_get_better_until_they_are_exact(many: Collections) -> None:
    source = AnnSearch(many, "all", rounds=Rounds((10, 40, 160, 2000), unchanged=4))
    found = await rankings(source, Query("anything"))
    (nearest,) = many.open("all").nearest(many.embedder.embed(["anything"]), 10)
    recalls = [recall(each, nearest) for each in found]
    assert len(recalls) == 4
    assert recalls[0] < recalls[-1] == 1
    assert [p.id for p in found[-1].passages] == nearest


async def test_it_ends_when_nothing_has_changed_for_some_rounds(many: Collections) -> None:
    for rounds in (1, 2, 3):
        source = AnnSearch(many, "all", rounds=Rounds((2000,) * 9, unchanged=rounds))
        assert len(await rankings(source, Query("anything"))) == 1 + rounds


async def test_it_ends_at_the_deadline_with_what_it_has(stuck: Collections) -> None:
    began = time.monotonic()
    assert await rankings(AnnSearch(stuck, "all"), Query("q", time.monotonic() + 0.05)) == []
    assert time.monotonic() - began < 1


async def test_searching_and_cancelling_leave_the_event_loop_free(stuck: Collections) -> None:
    task = asyncio.create_task(rankings(AnnSearch(stuck, "all"), Query("q")))
    await asyncio.sleep(0.02)  # the loop turns while the embedder is stuck
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)


async def test_a_collection_that_is_not_there_fails_the_source(many: Collections) -> None:
    with pytest.raises(SourceFailed, match="no collection other"):
        await rankings(AnnSearch(many, "other"), Query("q"))


def test_the_command_line_creates_fills_searches_and_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> str:
        assert main(["--folder", str(tmp_path), *arguments], Words()) == 0
        return capsys.readouterr().out

    def stdin(*lines: object) -> None:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(data)))

    command("create", "notes")
    stdin(
        {"id": "sea", "text": "Ships sail on the ocean."},
        {"id": "bread", "text": "Dough is baked in a hot oven.", "title": "Baking"},
    )
    assert command("add", "notes") == "notes: 2 passages\n"
    assert command("list") == "notes  2 passages  words\n"
    last = command("search", "notes", "Dough is baked").splitlines()[-2:]
    assert [line.split()[1] for line in last] == ["bread", "sea"]
    stdin({"id": "x", "text": "good"}, {"id": "no text"})
    assert main(["--folder", str(tmp_path), "add", "notes"], Words()) == 1
    assert "error: line 2" in capsys.readouterr().err
    command("delete", "notes")
    assert command("list") == ""
