"""The benchmark of slow clients, in a short form, and what its clients do to a gateway."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from functools import partial

import pytest

from loadtest.bench_slowloris import STREAM_S, honest
from loadtest.slow import KINDS, Slow
from tests.conftest import until


def test_honest_streams_come_at_their_rate_and_are_the_same_for_a_seed() -> None:
    queries = honest(50, 100.0, 7)
    assert queries == honest(50, 100.0, 7)
    assert 0.8 < len(queries) / (100.0 * 50 / STREAM_S) < 1.2
    assert all(query.inputs[-1].at_s == STREAM_S for query in queries)


async def test_slow_clients_of_every_kind_come_back_when_they_are_cut_off() -> None:
    began = [0] * len(KINDS)
    heard = [b""] * len(KINDS)
    kind = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine = kind
        heard[mine] += await reader.read(1)
        began[mine] += 1
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    slow = Slow(port, "fake", every_s=0.01, starting_s=0.0)
    for kind, one in enumerate(KINDS):
        task = asyncio.create_task(slow.run(one))
        await until(partial(_twice, began, kind), within_s=5)
        task.cancel()
    server.close()
    assert heard == [b"P" * count for count in began]


async def _twice(began: list[int], kind: int) -> bool:
    return began[kind] >= 2


@pytest.mark.engine
def test_honest_streams_are_unharmed() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "loadtest.bench_slowloris", "--connections", "300",
         "--streams", "20", "--seconds", "8", "--every-s", "0.3"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    alone, among, _ = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert among["connections"] >= 285
    assert among["errors"] == alone["errors"] == {}
    assert among["streams"] == alone["streams"] > 10
