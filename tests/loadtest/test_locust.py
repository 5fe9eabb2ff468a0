"""Locust's users, headless, at a gateway with an engine without a model."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from gateway.app import build
from gateway.keys import METRICS
from gateway.settings import Settings
from loadtest.sse import AnswerBroken, read_answer
from tests.conftest import until
from tests.fake_engine import MODEL, FakeEngine
from tests.gateway.tenancy import tenants_file

ROOT = Path(__file__).resolve().parent.parent.parent


async def locust(
    url: str, *arguments: str, enough: Callable[[], Awaitable[bool]]
) -> tuple[int | None, list[dict[str, Any]]]:
    """A headless run until it has done enough: its exit code and the rows of its statistics."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "locust", "--locustfile", "loadtest/locustfile.py", "--host", url,
        "--headless", "--json", "--skip-log-setup", *arguments,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    reading = asyncio.ensure_future(process.communicate())
    try:
        await until(enough, within_s=60)
        process.terminate()
        output, _ = await reading
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, json.loads(output)


@pytest.mark.parametrize("with_tenants", [False, True])
async def test_its_statistics_have_what_users_of_a_gateway_feel(
    model_dir: Path, tmp_path: Path, with_tenants: bool
) -> None:
    file = tmp_path / "tenants.toml"
    keys = tenants_file(file, acme="")
    named = ("--api-key", keys["acme"]) if with_tenants else ("--model", MODEL)
    engine = TestServer(FakeEngine().app())
    await engine.start_server()
    url = str(engine.make_url("")).rstrip("/")
    settings = Settings(
        engine=(url,), tokenizer=str(model_dir), tenants=str(file) if with_tenants else None
    )
    gateway = TestServer(build(settings))
    await gateway.start_server()
    metrics = gateway.app[METRICS].registry

    def ended(end: str) -> float:
        return metrics.get_sample_value("stream2llm_streams_total", {"end": end}) or 0

    async def enough() -> bool:
        return ended("done") >= 10 and ended("cancelled") >= 2

    code, rows = await locust(
        str(gateway.make_url("")).rstrip("/"),
        *named,
        *("--gap-s", "0.01", "--chunks", "3"),
        *("--users", "7", "--spawn-rate", "100"),
        *("Appending", "Ranking", "GivingUp"),
        enough=enough,
    )
    await gateway.close()
    await engine.close()
    assert code == 0
    assert sum(row["num_failures"] for row in rows) == 0
    count = {(row["method"], row["name"]): row["num_requests"] for row in rows}
    for name in ("chunk acknowledgement", "time to first token", "time between tokens",
                 "tokens invalidated"):  # fmt: skip
        assert count["metric", name] > 0
    assert count["metric", "chunk acknowledgement"] == count["POST", "/v1/streams/{id}/chunks"]
    assert count["DELETE", "/v1/streams/{id}"] > 0


def lines(*events: str) -> list[bytes]:
    return [f"data: {event}".encode() for event in events]


PIECE = '{"choices": [{"delta": {"content": "x"}}]}'


def test_an_answer_is_read_to_its_end() -> None:
    times = iter(range(10))
    answer = read_answer([b": waiting", b"", *lines(PIECE, PIECE, "[DONE]")], lambda: next(times))
    assert (answer.text, answer.pieces_s) == ("xx", [0, 1])


@pytest.mark.parametrize("events", [[PIECE], [PIECE, '{"error": {"message": "it broke"}}'], []])
def test_an_answer_that_ends_before_is_broken(events: list[str]) -> None:
    with pytest.raises(AnswerBroken):
        read_answer(lines(*events), lambda: 0.0)
