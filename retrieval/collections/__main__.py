"""Collections from the command line: python -m retrieval.collections create|add|search|..."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from itertools import islice
from pathlib import Path

import msgspec

from retrieval.ann import AnnSearch
from retrieval.collections.collection import Row
from retrieval.collections.store import CollectionError, Collections
from retrieval.embedding import Embedder, EmbedderMissing, MiniLm
from retrieval.source import Passage, Query, SourceFailed

ADD_AT_ONCE = 10_000
"""Passages that are kept, or lost in a crash, together."""


class BadLine(Exception):
    """A line is not a passage."""


def main(arguments: Sequence[str], embedder: Embedder) -> int:
    """Do what the command line says; 1 if it can't be done."""
    options = _parser().parse_args(arguments)
    collections = Collections(options.folder, embedder)
    try:
        options.run(collections, options)
    except (BadLine, CollectionError, EmbedderMissing, SourceFailed) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


def _create(collections: Collections, options: argparse.Namespace) -> None:
    collections.create(options.name)


def _add(collections: Collections, options: argparse.Namespace) -> None:
    passages = _passages(sys.stdin.buffer)
    while batch := list(islice(passages, ADD_AT_ONCE)):
        print(f"{options.name}: {collections.add(options.name, batch)} passages", flush=True)


def _search(collections: Collections, options: argparse.Namespace) -> None:
    asyncio.run(_print_rankings(collections, options))


async def _print_rankings(collections: Collections, options: argparse.Namespace) -> None:
    """The last ranking, after a line for each one before."""
    source = AnnSearch(collections, options.name, places=options.places)
    ranked: tuple[Passage, ...] = ()
    async with aclosing(source.search(Query(options.query))) as events:
        async for event in events:
            new = len({p.id for p in event.passages} - {p.id for p in ranked})
            print(f"ranking of {len(event.passages)} passages, {new} new")
            ranked = event.passages
    for passage in ranked:
        print(f"{passage.score:.3f}  {passage.id}  {passage.text[:100]!r}")


def _delete(collections: Collections, options: argparse.Namespace) -> None:
    collections.delete(options.name)


def _list(collections: Collections, options: argparse.Namespace) -> None:
    for info in collections.list():
        print(f"{info.name}  {info.passages} passages  {info.embedder}")


def _passages(lines: Iterator[bytes]) -> Iterator[Passage]:
    for number, line in enumerate(lines, 1):
        try:
            row = msgspec.json.decode(line, type=Row)
        except msgspec.MsgspecError as exc:
            raise BadLine(f"line {number}: {exc}") from exc
        yield Passage(row.id, row.text, row.title)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="retrieval.collections", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the collections are")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, help in (
        ("create", _create, "make an empty collection"),
        ("add", _add, 'add passages from standard input, lines of {"id", "text", "title"?}'),
        ("search", _search, "print the passages nearest to a text"),
        ("delete", _delete, "remove a collection"),
        ("list", _list, "name all collections"),
    ):
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        if name != "list":
            command.add_argument("name")
        if name == "search":
            command.add_argument("query")
            command.add_argument("--places", type=int, default=10, help="how many passages")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], MiniLm()))
