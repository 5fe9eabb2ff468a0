"""Gateways before a simulated engine in real time, and the flood that they are given.

The first gateway has a core of its own. The engine, the load, Redis and further gateways share the
others; gateways that have a part of a core each share the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.local import Server, free_port, gateway, redis_server
from loadtest.bench_gateway import pin
from loadtest.quota import at_most
from loadtest.report import machine

MODEL = "simulated"
SPARE_PROMPTS = 1000
"""More than the streams that are to be open: some are being answered or freed."""
END_S = 10.0
SILENCE_S = 60.0
"""After which a gateway ends a stream: of one whose opening got no answer in time nobody knows."""


@dataclass(frozen=True, slots=True)
class Stand:
    """What a load runs against."""

    fronts: list[Server]
    engine: Server


@contextmanager
def stand(
    gateways: int, streams: int, *, shared: bool, share: float | None = None
) -> Iterator[Stand]:
    """Start everything and end it.

    Args:
        streams: open at once.
        shared: an index in Redis, as several gateways need it.
        share: of a core, that each gateway may use once it is ready.

    Raises:
        NoQuota: with a share, where it can't be seen to.
    """
    port, prompts = free_port(), str(streams + SPARE_PROMPTS)
    command = [sys.executable, "-m", "engine_adapter.simulated", "--port", str(port)]
    command += ["--model-name", MODEL, "--max-prompts", prompts]
    engine = Server("simulated", command, port=port, ready_path="/health")
    with ExitStack() as running:
        running.enter_context(engine).start()
        extra = ["--max-streams", prompts, "--idle-timeout-s", str(SILENCE_S)]
        own, *others = sorted(os.sched_getaffinity(0))
        if shared:
            redis = running.enter_context(redis_server()).start().wait_ready(20)
            pin(redis.pid, others or [own])
            extra += ["--index", redis.url]
        engine.wait_ready(120)
        pin(engine.pid, others or [own])
        fronts = [running.enter_context(gateway([engine.url], extra)) for _ in range(gateways)]
        for front in fronts:
            front.start()
        for i, front in enumerate(fronts):
            front.wait_ready(60)
            pin(front.pid, [own] if i == 0 or share is not None else others or [own])
        if share is not None:
            running.enter_context(at_most(share, [front.pid for front in fronts]))
        yield Stand(fronts, engine)
        for server in (*fronts, engine):
            server.kill()  # thousands of streams would be ended one by one


@contextmanager
def flood(stand: Stand, arguments: list[str]) -> Iterator[Iterator[dict[str, Any]]]:
    """Run `loadtest.flood` against the gateways; what it says, as it says it."""
    command = [sys.executable, "-m", "loadtest.flood", "--model", MODEL, *arguments]
    for front in stand.fronts:
        command += ["--url", front.url]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    try:
        own, *others = sorted(os.sched_getaffinity(0))
        pin(process.pid, others or [own])
        assert process.stdout is not None
        yield (json.loads(line) for line in process.stdout)
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        finally:
            process.kill()
            process.wait()


def about() -> str:
    """Machine and versions."""
    names = ("aiohttp", "uvloop", "redis", "tokenizers")
    return ", ".join([machine(), *(f"{name} {version(name)}" for name in names)])
