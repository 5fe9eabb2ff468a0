"""Real passages to search: the documentation of whatever Python packages are installed here."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from retrieval.source import Passage

MIN_CHARS = 60
MAX_CHARS = 1200


def installed() -> list[Path]:
    """The folders of the standard library and of the packages."""
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def passages(count: int, folders: Sequence[Path]) -> list[Passage]:
    """Up to `count` different ones: docstrings and the sections of .rst and .md files.

    The same files give the same passages, in the same order.
    """
    return list(islice(_distinct(_all(folders)), count))


def _distinct(found: Iterator[Passage]) -> Iterator[Passage]:
    seen = set[bytes]()
    for passage in found:
        digest = hashlib.blake2b(passage.text.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield passage


def _all(folders: Sequence[Path]) -> Iterator[Passage]:
    for root in folders:
        # by a hash of their names: any number of passages is a sample of all packages
        files = sorted(_files(root), key=lambda name: hashlib.md5(name.encode()).digest())
        for name in files:
            yield from _in_file(root, name)


def _files(root: Path) -> Iterator[str]:
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.suffix in (".py", ".rst", ".md") and "site-packages/" not in name:
            yield name


def _in_file(root: Path, name: str) -> Iterator[Passage]:
    text = (root / name).read_text(errors="replace")
    pieces = _docstrings(text) if name.endswith(".py") else _sections(text)
    for title, piece in pieces:
        cleaned = re.sub(r"[ \t]+", " ", piece).strip()[:MAX_CHARS]
        if len(cleaned) >= MIN_CHARS and "\0" not in cleaned:
            yield Passage(f"{root.name}/{name}#{title}", cleaned, title)


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            doc = ast.get_docstring(node)
            if doc:
                yield f"{node.name}:{node.lineno}", f"{node.name}: {doc}"


def _sections(text: str) -> Iterator[tuple[str, str]]:
    for number, section in enumerate(re.split(r"\n(?=#+ |[^\n]+\n[=~-]{4,}\n)", text)):
        yield f"section-{number}", section
