"""The cost model of the real engine: measured, written, and one that this engine takes."""

from __future__ import annotations

from pathlib import Path

from deploy.local import Server
from engine_adapter.calibrate import Options, calibrate
from engine_adapter.client import EngineClient
from engine_adapter.cost_files import find, save
from engine_adapter.scheduling.cost import Setup
from tests.conftest import until
from tests.engine.conftest import MODEL


async def test_calibrating_gives_a_cost_model_for_this_engine(
    engine_client: EngineClient, engine_server: Server, tmp_path: Path
) -> None:
    async def idle() -> bool:
        info = await engine_client.info()
        return not (info.running or info.waiting or info.open_prompts)

    await until(idle, within_s=90)  # leases of other tests
    said: list[str] = []
    measured = await calibrate(engine_server.url, Options((128, 512, 1024), 3), said.append)
    save(measured, tmp_path)
    info = await engine_client.info()
    setup = Setup(model=MODEL, hardware=info.hardware, settings=info.settings)
    assert info.settings == "float32 tp1 step128 block32"
    cost = find(tmp_path, setup)
    assert cost == measured
    assert cost.swap_out is None
    assert cost.recompute_s(1024) > cost.recompute_s(1024, 512) > cost.recompute_s(128) > 0
    assert any("no swapping on this engine: recompute only" in text for text in said)
    await until(idle, within_s=5)
