"""Collections: what was added is found, after a restart and after a crash too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retrieval.collections.store import (
    BadName,
    CollectionExists,
    CollectionMissing,
    Collections,
    CollectionUnreadable,
    CollectionUnwritable,
)
from retrieval.source import Passage
from tests.retrieval.words import Words, files_no_longer_than

FRUIT = [
    Passage("a", "apple pear", "Apples"),
    Passage("p", "plum cherry", "Plums"),
    Passage("g", "grape fig", "Grapes"),
]


@pytest.fixture
def collections(tmp_path: Path) -> Collections:
    return Collections(tmp_path / "all", Words())


def reopened(collections: Collections) -> Collections:
    """As another process sees them."""
    return Collections(collections._folder, Words())


def search(collections: Collections, text: str, places: int = 1) -> list[Passage]:
    (vector,) = collections.embedder.embed([text])
    return list(collections.open("fruit").search(vector, places, effort=20))


def ids(passages: list[Passage]) -> list[str]:
    return [passage.id for passage in passages]


def test_what_was_added_is_found_by_every_process(collections: Collections) -> None:
    collections.create("fruit")
    assert collections.add("fruit", FRUIT) == 3
    for each in (collections, reopened(collections)):
        (found,) = search(each, "plum cherry")
        assert (found.id, found.text, found.title) == ("p", "plum cherry", "Plums")
        assert found.score == pytest.approx(1, abs=1e-5)
        assert [(info.name, info.passages) for info in each.list()] == [("fruit", 3)]


def test_a_change_by_another_process_is_seen(collections: Collections) -> None:
    collections.create("fruit")
    assert search(collections, "kiwi") == []
    reopened(collections).add("fruit", [Passage("k", "kiwi")])
    assert ids(search(collections, "kiwi")) == ["k"]
    other = reopened(collections)
    other.delete("fruit")
    other.create("fruit")
    assert search(collections, "kiwi") == []


def test_an_id_that_is_added_again_replaces_the_old_passage(collections: Collections) -> None:
    collections.create("fruit")
    collections.add("fruit", FRUIT)
    # often enough that the index is built again without the replaced ones
    for text in ("lime", "lemon", "quince", "medlar", "melon"):
        assert collections.add("fruit", [Passage("a", text)]) == 3
        for each in (collections, reopened(collections)):
            assert search(each, text)[0].text == text
            assert sorted(ids(search(each, text, places=9))) == ["a", "g", "p"]
    assert len(collections.open("fruit").rows) < 3 + 5


def test_a_search_goes_on_in_what_it_has_opened(collections: Collections) -> None:
    collections.create("fruit")
    collections.add("fruit", FRUIT)
    opened = collections.open("fruit")
    collections.delete("fruit")
    (vector,) = Words().embed(["grape fig"])
    assert opened.search(vector, 1, effort=20)[0].id == "g"


def test_deleted_is_gone(collections: Collections) -> None:
    collections.create("fruit")
    collections.delete("fruit")
    assert collections.list() == []
    for ask in (collections.open, collections.delete, lambda name: collections.add(name, FRUIT)):
        with pytest.raises(CollectionMissing, match="no collection fruit"):
            ask("fruit")


ADDING = """
import sys
from pathlib import Path
from retrieval.collections.store import Collections
from retrieval.source import Passage
from tests.retrieval.words import Words
collections = Collections(Path(sys.argv[1]), Words())
for n in range(0, 10**6, 7):
    passages = [Passage(str(i), f"word{i}") for i in range(n, n + 7)]
    print(collections.add("fruit", passages), flush=True)
"""


@pytest.mark.engine
@pytest.mark.parametrize("after", [1, 2, 9, 20])
def test_killed_at_any_moment_it_keeps_what_was_acknowledged(
    collections: Collections, after: int
) -> None:
    collections.create("fruit")
    command = [sys.executable, "-c", ADDING, str(collections._folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(after):
            acknowledged = int(process.stdout.readline())
        time.sleep(0.001 * after)  # somewhere in the next write
        process.kill()
    opened = reopened(collections).open("fruit")
    assert len(opened) >= acknowledged
    assert len(opened) % 7 == 0
    assert search(reopened(collections), "word3")[0].id == "3"


@pytest.mark.parametrize("dies_in", ["index", "fsync", "replace"])
def test_a_crash_in_the_middle_of_a_write_leaves_the_old_state(
    collections: Collections, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    collections.create("fruit")
    collections.add("fruit", FRUIT[:1])

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if dies_in == "index":
            patch.setattr("retrieval.collections.collection.faiss.write_index", dies)
        else:
            patch.setattr(os, dies_in, dies)
        with pytest.raises(KeyboardInterrupt):
            collections.add("fruit", FRUIT[1:])
    after = reopened(collections)
    assert ids(search(after, "plum cherry", places=9)) == ["a"]
    after.add("fruit", FRUIT[1:])
    assert ids(search(after, "plum cherry")) == ["p"]
    assert len(list(collections._folder.glob("fruit/state-*"))) == 1


def test_a_full_disk_changes_nothing_and_leaves_nothing(collections: Collections) -> None:
    collections.create("fruit")
    collections.add("fruit", FRUIT[:1])
    there = sorted(collections._folder.rglob("*"))
    with files_no_longer_than(100):
        with pytest.raises(CollectionUnwritable):
            collections.add("fruit", FRUIT[1:])
        assert sorted(collections._folder.rglob("*")) == there
        assert search(reopened(collections), "apple")[0].id == "a"
        with pytest.raises(CollectionUnwritable):
            collections.create("more")
    assert [info.name for info in collections.list()] == ["fruit"]
    assert collections.add("fruit", FRUIT[1:]) == 3


def test_a_name_is_taken_once(collections: Collections) -> None:
    collections.create("fruit")
    with pytest.raises(CollectionExists, match="fruit"):
        collections.create("fruit")


@pytest.mark.parametrize("name", ["", "../up", "Upper", "-x", "a" * 65, "a/b", ".lock"])
def test_bad_names_are_refused(collections: Collections, name: str) -> None:
    for ask in (collections.create, collections.open, collections.delete):
        with pytest.raises(BadName):
            ask(name)


def test_damage_and_another_embedder_are_said(collections: Collections) -> None:
    collections.create("fruit")
    collections.add("fruit", FRUIT)
    with pytest.raises(CollectionUnreadable, match="made with words, not with other"):
        Collections(collections._folder, Words("other")).open("fruit")
    (index,) = collections._folder.glob("fruit/state-*/index.faiss")
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(CollectionUnreadable, match="damaged"):
        reopened(collections).open("fruit")
