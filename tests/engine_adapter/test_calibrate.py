"""`calibrate` as users run it, against an engine whose times are known."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine_adapter import transfers
from engine_adapter.calibrate import CannotCalibrate, Options, calibrate
from engine_adapter.cost_files import find
from engine_adapter.scheduling.cost import Setup
from engine_adapter.transfers import Counters, read_counters
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.slow

SETUP = Setup(model="fake", hardware="2x Fake", settings="none")

BYTES_PER_TOKEN = 1000
OUT_S, IN_S = 2e-6, 3e-6
"""Per token, added up over the two accelerators of the fake, as vLLM does."""


class SwappingEngine(FakeEngine):
    """Counts transfers: out when it computes a prompt, back when it has forgotten it since."""

    def __init__(self) -> None:
        super().__init__()
        self.core.prefill_s = self._prefill_s
        names = ("store_bytes", "store_time", "load_bytes", "load_time")
        self.moved: dict[str, float] = dict.fromkeys(names, 0.0)
        self.on_gpu: set[tuple[int, ...]] = set()
        self.on_host: set[tuple[int, ...]] = set()
        self.host_tokens = 1_000_000

    def app(self) -> web.Application:
        app = super().app()
        app.add_routes(
            [web.get("/metrics", self._metrics), web.post("/reset_prefix_cache", self._reset)]
        )
        return app

    def _prefill_s(self, tokens: list[int]) -> float:
        prompt = tuple(tokens)
        if prompt not in self.on_gpu and prompt in self.on_host:
            self._move("load", len(tokens), IN_S)
        elif prompt not in self.on_host and len(tokens) <= self.host_tokens:
            self._move("store", len(tokens), OUT_S)
            self.on_host.add(prompt)
        self.on_gpu.add(prompt)
        return 0.002 + 1e-5 * len(tokens)

    def _move(self, way: str, tokens: int, s_per_token: float) -> None:
        self.moved[f"{way}_bytes"] += tokens * BYTES_PER_TOKEN
        self.moved[f"{way}_time"] += tokens * s_per_token

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [
            f"# TYPE vllm:kv_offload_{name}_total counter\n"
            f'vllm:kv_offload_{name}_total{{engine="0"}} {value}\n'
            for name, value in self.moved.items()
        ]
        return web.Response(text="".join(lines))

    async def _reset(self, request: web.Request) -> web.Response:
        self.on_gpu.clear()
        return web.json_response({"success": True})


Serve = Callable[[FakeEngine], Awaitable[str]]


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    servers = []

    async def start(engine: FakeEngine) -> str:
        server = TestServer(engine.app())
        servers.append(server)
        await server.start_server()
        return str(server.make_url("")).rstrip("/")

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "SETTLE_S", 0.05)
    monkeypatch.setattr(transfers, "POLL_S", 0.01)


async def command_line(*arguments: str) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "engine_adapter.calibrate", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()


async def test_the_command_measures_prints_and_writes_a_file_that_loads(
    serve: Serve, tmp_path: Path
) -> None:
    engine = FakeEngine(max_model_len=6001)
    engine.core.prefill_s = lambda tokens: 0.005 + 1e-5 * len(tokens)
    url = await serve(engine)
    code, out, err = await command_line("--engine", url, "--out", str(tmp_path), "--repeats", "3")
    assert (code, err) == (0, "")
    cost = find(tmp_path, SETUP)
    assert cost is not None
    assert (cost.source, cost.setup, cost.swap_out) == ("measured", SETUP, None)
    assert cost.versions["engine"] == "fake"
    measured = [point.tokens for point in cost.recompute.points]
    assert measured == [128, 256, 512, 1024, 2048, 4096]
    for point in cost.recompute.points:  # never less than the engine takes
        assert point.seconds > 0.8 * (0.005 + 1e-5 * point.tokens)
    assert "no swapping on this engine: recompute only" in out
    assert f"R^2 {cost.recompute.r2:.4f}" in out
    assert str(tmp_path / "fake--2x-fake--none.json") in out


async def test_times_that_differ_too_much_are_warned_of(serve: Serve) -> None:
    engine = FakeEngine()
    calls = itertools.count()
    engine.core.prefill_s = lambda tokens: 0.2 if next(calls) == 4 else 0.02
    said: list[str] = []
    await calibrate(await serve(engine), Options((40, 50, 60), 2), said.append)
    assert any("WARNING: times of one size differ by up to" in text for text in said)


async def test_no_prompt_has_a_prefix_of_another(serve: Serve) -> None:
    engine = FakeEngine()
    engine.core.prefill_s = lambda tokens: 0.002
    await calibrate(await serve(engine), Options((40, 50, 60), 4), print)
    prompts = [tuple(tokens[:8]) for tokens in engine.finished.values()]
    assert len(prompts) == len(set(prompts)) == 3 * 5  # a warm-up and four rounds


async def test_swapping_is_measured_from_the_engines_own_counters(
    serve: Serve, quick: None
) -> None:
    said: list[str] = []
    url = await serve(SwappingEngine())
    cost = await calibrate(url, Options((500, 1000, 2000), 2), said.append)
    assert cost.swap_out is not None
    assert cost.swap_in is not None
    assert cost.swap_out.seconds(1500) == pytest.approx(1500 * OUT_S / 2, rel=1e-3)
    assert cost.swap_in.seconds(1500) == pytest.approx(1500 * IN_S / 2, rel=1e-3)
    assert cost.restore_s(1500, 0, 1500)[0] == "swap"
    assert any("swap in" in text for text in said)


async def test_what_does_not_come_back_from_host_memory_is_not_taken_for_fast(
    serve: Serve, quick: None
) -> None:
    engine = SwappingEngine()
    engine.host_tokens = 1500
    said: list[str] = []
    cost = await calibrate(await serve(engine), Options((500, 1000, 2000), 1), said.append)
    assert cost.swap_out is None
    assert any("recompute only: 0 bytes went to host memory" in text for text in said)


async def test_without_a_way_to_drop_the_prefix_cache_swapping_is_left_out(
    serve: Serve, quick: None
) -> None:
    class Closed(SwappingEngine):
        async def _reset(self, request: web.Request) -> web.Response:
            raise web.HTTPNotFound

    said: list[str] = []
    cost = await calibrate(await serve(Closed()), Options((500, 1000, 2000), 1), said.append)
    assert cost.swap_in is None
    assert any("VLLM_SERVER_DEV_MODE=1" in text for text in said)


async def test_an_engine_in_use_is_not_calibrated(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine_adapter.calibrate.IDLE_WITHIN_S", 0.1)
    engine = FakeEngine()
    await engine.core.open("somebody's", [1, 2, 3], None, 1.0)
    with pytest.raises(CannotCalibrate, match="in use: 0 running, 0 waiting, 1 open"):
        await calibrate(await serve(engine), Options(), print)


@pytest.mark.parametrize(
    ("tokens", "reason"), [("128,256,9999", "takes prompts of 2 to 4000"), ("128,256", "three")]
)
async def test_sizes_that_can_not_be_measured_are_refused(
    serve: Serve, tmp_path: Path, tokens: str, reason: str
) -> None:
    url = await serve(FakeEngine(max_model_len=4001))
    code, _, err = await command_line(
        "--engine", url, "--out", str(tmp_path / "costs"), "--tokens", tokens
    )
    assert code == 1
    assert err.startswith("not calibrated: ")
    assert reason in err
    assert not (tmp_path / "costs").exists()


async def test_an_engine_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    code, _, err = await command_line("--engine", "http://127.0.0.1:9", "--out", str(tmp_path))
    assert code == 1
    assert err.startswith("not calibrated: the engine can't be reached")
    assert err.count("\n") == 1


def test_the_counters_are_those_of_vllm_and_added_up_over_its_engines() -> None:
    metrics = pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics")
    registry = CollectorRegistry()
    connector = SimpleNamespace(kv_connector_extra_config={})
    published = metrics.OffloadPromMetrics(
        SimpleNamespace(kv_transfer_config=connector),
        {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)},
        ["model_name", "engine"],
        {number: ["m", str(number)] for number in range(2)},
    )
    assert read_counters(generate_latest(registry).decode()) == Counters(0, 0, 0, 0)
    stats = metrics.OffloadingConnectorStats()
    for name, value in zip(transfers.COUNTERS.values(), (5, 0.5, 3, 0.25), strict=True):
        stats.increase_counter(name, value)
    for number in range(2):
        published.observe(stats.data, number)
    assert read_counters(generate_latest(registry).decode()) == Counters(10, 1, 6, 0.5)


def test_an_engine_without_the_counters_does_not_swap() -> None:
    registry = CollectorRegistry()
    Counter("vllm:generation_tokens", "Tokens.", registry=registry).inc()
    assert read_counters(generate_latest(registry).decode()) is None
