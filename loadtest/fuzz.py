"""Requests by the thousand that nobody would write, against a gateway process and its engine.

A gateway with a tenant, in front of the simulated engine, is sent: requests made from its own
description, as it allows and as it does not, and walks along the description's links
(`fuzz_described.py`); NDJSON in all states of disrepair and operations of the engine protocol
(`fuzz_bodies.py`). Nothing but what is described may come back, no 5xx but a 503 with Retry-After
and a 504 of a silent engine, and every request within its deadline. When all streams have had their
idle time none may be open, at the gateway or at the engine, and no log may have an error or a
traceback.

    make fuzz OPTIONS="--requests 20000 --seed 1"

The seed repeats what is generated, up to ids that servers choose. Exit code 1: something was found.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import requests
from hypothesis import given, seed
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from deploy.local import Server, command, gateway
from loadtest.fuzz_bodies import SAMPLING, Lines, Operations, ndjson, operations
from loadtest.fuzz_described import Described, generating
from loadtest.fuzz_tally import Tally, session
from loadtest.report import machine

MODEL = "simulated"
DESCRIBED, LINES = 0.45, 0.25
"""Shares of the requests; the rest are operations of the engine protocol."""
IDLE_S = 3.0
SETTLED_WITHIN_S = 30.0
KV_TOKENS = 4096
"""Of the engine, and so the longest answer."""
SPEED = 1000.0
TROUBLE = re.compile(r"Traceback|\b(ERROR|CRITICAL)\b|never (retrieved|awaited)")
GATEWAY = [
    "--idle-timeout-s", f"{IDLE_S:g}", "--keep-finished-s", "5", "--resume-s", "2",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fuzzed:
    """What is fuzzed."""

    gateway: Server
    engine: Server
    client: requests.Session
    """With the tenant's key."""


@contextmanager
def servers() -> Iterator[Fuzzed]:
    """Start an engine and a gateway with a tenant; end them."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
        made = subprocess.run(
            [sys.executable, "-m", "gateway.tenants", "new", "fuzz"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        (folder / "tenants.toml").write_text(made.stdout)
        key = made.stderr.rsplit(maxsplit=1)[-1]
        line = [sys.executable, "-m", "engine_adapter.simulated", "--port", "{port}"]
        line += ["--model-name", MODEL, "--speed", f"{SPEED:g}", "--kv-tokens", str(KV_TOKENS)]
        engine = running.enter_context(command("simulated", line, ready_path="/health"))
        engine.start()
        front = gateway([engine.url], [*GATEWAY, "--tenants", str(folder / "tenants.toml")])
        running.enter_context(front).start()
        engine.wait_ready()
        front.wait_ready()
        client = running.enter_context(session(key))
        _until(lambda: client.get(front.url + "/ready", timeout=10).ok, "the gateway is not ready")
        yield Fuzzed(front, engine, client)


def fuzz(at: Fuzzed, count: int, number: int, told: Callable[[str], None]) -> Tally:
    """Send so many requests, and see what is left of them.

    Args:
        number: the seed.
        told: hears of each part's end.
    """
    tally = Tally()
    described, lines = round(DESCRIBED * count), round(LINES * count)
    cases = st.tuples(operations(), SAMPLING)
    to_gateway, engine = Lines(at.client, at.gateway.url, tally), session()
    to_engine = Operations(engine, at.engine.url, tally)
    parts: list[tuple[str, Callable[[], None]]] = [
        ("described", lambda: Described(at.client, at.gateway.url, MODEL, tally).run(
            described, number)),
        ("NDJSON", lambda: _send(ndjson(MODEL), to_gateway.send, lines, number)),
        ("operations", lambda: _send(
            cases, lambda case: to_engine.send(*case), count - tally.sent, number)),
    ]  # fmt: skip
    for name, part in parts:
        before, begun_s = tally.sent, time.monotonic()
        part()
        sent, took_s = tally.sent - before, time.monotonic() - begun_s
        told(f"{name}: {sent:,} requests in {took_s:.0f} s")
    _settled(at, tally)
    for server in (at.gateway, at.engine):
        for found in _trouble(server):
            tally.fault(f"log of the {server.name}: {found}", "")
    return tally


def _send(cases: SearchStrategy[Any], send: Callable[[Any], None], count: int, number: int) -> None:
    @seed(number)
    @generating(count)
    @given(cases)
    def one(case: Any) -> None:
        send(case)

    one()


def _settled(at: Fuzzed, tally: Tally) -> None:
    """Wait until nothing is open any more."""

    def settled() -> bool:
        return _open_streams(at) == 0 and _open_prompts(at) == 0

    try:
        _until(settled, "")
    except TimeoutError:
        left = f"{_open_streams(at)} streams, {_open_prompts(at)} prompts"
        tally.fault(f"open {SETTLED_WITHIN_S:g} s after the last request: {left}", "")


def _until(condition: Callable[[], bool], message: str) -> None:
    deadline_s = time.monotonic() + SETTLED_WITHIN_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(message)
        time.sleep(0.2)


def _open_streams(at: Fuzzed) -> int:
    text = at.client.get(at.gateway.url + "/metrics", timeout=10).text
    found = re.search(r"^stream2llm_open_streams (\S+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def _open_prompts(at: Fuzzed) -> int:
    info = requests.get(at.engine.url + "/stream2llm/info", timeout=10).json()
    return int(info["open_prompts"]) + int(info["running"])


def _trouble(server: Server) -> list[str]:
    lines = server.log_path.read_text(errors="replace").splitlines()
    return [line[:200] for line in lines if TROUBLE.search(line)]


def main() -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    options = parser.parse_args()
    names = ("schemathesis", "hypothesis", "aiohttp", "msgspec")
    print(machine() + "; " + ", ".join(f"{name} {version(name)}" for name in names))
    print(f"seed {options.seed}", flush=True)
    with servers() as at:
        process = psutil.Process(at.gateway.pid)
        before_mb, begun_s = process.memory_info().rss / 1e6, time.monotonic()
        tally = fuzz(at, options.requests, options.seed, lambda line: print(line, flush=True))
        took_s, after_mb = time.monotonic() - begun_s, process.memory_info().rss / 1e6
    print("\n".join(["", *tally.lines(), ""]))
    print(f"{tally.sent:,} requests in {took_s:.0f} s, {len(tally.faults)} kinds of faults")
    print(f"gateway: {before_mb:.0f} MB before, {after_mb:.0f} MB after")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
