"""Who may know whom: the arrows between the packages, and the only place of vLLM."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gateway", "engine_adapter", "retrieval", "cache_index", "deploy", "loadtest")

ALLOWED = {
    "gateway": {"engine_adapter.client", "engine_adapter.plain_client", "engine_adapter.operations",
                "engine_adapter.decode_client", "engine_adapter.messages", "engine_adapter.errors",
                "retrieval", "cache_index"},
    "engine_adapter": set[str](),
    "retrieval": set[str](),
    "cache_index": set[str](),
    "deploy": {"gateway.client", "retrieval"},
    # HTTP only, but where there is nobody to speak HTTP to: the simulation, the planner, the index,
    # and sources, which are a library too
    "loadtest": {"deploy", "engine_adapter.client", "engine_adapter.messages",
                 "engine_adapter.operations", "engine_adapter.plain_client",
                 "engine_adapter.errors", "engine_adapter.simulated", "engine_adapter.scheduling",
                 "engine_adapter.cost_files",
                 "cache_index", "retrieval", "gateway.client"},
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from engine_adapter import errors` is an import of engine_adapter.errors
            bare = node.module in PACKAGES
            yield from (f"{node.module}.{a.name}" if bare else node.module for a in node.names)


def modules(package: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in imports(path):
            yield path.relative_to(ROOT), name


def test_packages_know_only_those_below_them() -> None:
    wrong = []
    for package in PACKAGES:
        for path, name in modules(package):
            top = name.split(".")[0]
            if top not in PACKAGES or top == package:
                continue
            if not any(name == ok or name.startswith(ok + ".") for ok in ALLOWED[package]):
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_only_the_plug_in_imports_vllm_and_only_the_side_of_it_that_must() -> None:
    allowed = (
        "engine_adapter/vllm/",
        "engine_adapter/simulated/",
        "loadtest/stock_streaming.py",  # vLLM without the plug-in, to compare with
        "loadtest/gpu_model.py",  # vLLM's kernels, to time them
        "loadtest/gpu_copies.py",
    )
    pure = (
        "engine_adapter/simulated/hardware.py",
        "engine_adapter/simulated/routes.py",
        "engine_adapter/scheduling",
    )
    for package in PACKAGES:
        for path, name in modules(package):
            if name.split(".")[0] == "vllm":
                assert str(path).startswith(allowed), f"{path} imports {name}"
                assert not str(path).startswith(pure), f"{path} imports {name}"
