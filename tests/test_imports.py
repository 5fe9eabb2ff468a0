"""The arrows between packages: who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"cache_index", "deploy", "engine_adapter", "gateway", "loadtest", "retrieval"}
OPEN_ENGINE_MODULES = {"client", "messages", "errors"}
"""Modules of `engine_adapter` that speak to engines over HTTP: all the gateway may know."""

FORBIDDEN = {
    "engine_adapter": OURS - {"engine_adapter"},
    "retrieval": OURS - {"retrieval"},
    "cache_index": OURS - {"cache_index"},
    "gateway": {"deploy", "loadtest"},
    "loadtest": {"engine_adapter", "gateway"},
}


def imported(file: Path) -> Iterator[str]:
    """Dotted names a file imports, also inside functions and under `TYPE_CHECKING`.

    `from a import b` gives `a` and `a.b`: `b` may be a module.
    """
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            for alias in node.names:
                yield f"{base}.{alias.name}"


def imports_of(package: str) -> set[tuple[str, str]]:
    """(file, imported name) of a whole package."""
    return {
        (str(file.relative_to(ROOT)), name)
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in imported(file)
    }


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_package_imports_no_forbidden_package(package: str) -> None:
    wrong = {
        (file, name)
        for file, name in imports_of(package)
        if name.split(".")[0] in FORBIDDEN[package]
    }
    assert not wrong


@pytest.mark.parametrize("package", sorted(OURS))
def test_only_the_plugin_imports_vllm(package: str) -> None:
    wrong = {
        (file, name)
        for file, name in imports_of(package)
        if name.split(".")[0] == "vllm" and not file.startswith("engine_adapter/vllm/")
    }
    assert not wrong


def test_gateway_knows_only_the_protocol_of_the_engine() -> None:
    wrong = {
        (file, name)
        for file, name in imports_of("gateway")
        if name.startswith("engine_adapter.") and name.split(".")[1] not in OPEN_ENGINE_MODULES
    }
    assert not wrong


def test_all_packages_are_covered() -> None:
    """A new top-level package must be given its place here."""
    found = {init.parent.name for init in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found <= OURS
