"""An engine knows what it runs on, and takes the cost model that was measured there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from engine_adapter.cost_files import BadCostModel, save
from engine_adapter.scheduling.cost import CostModel, Point, Setup, fit
from engine_adapter.vllm.scheduler import StreamScheduler
from engine_adapter.vllm.setup import cost_model
from tests.engine_adapter.harness import Engine, _engine_config

LOGGER = "vllm.stream2llm"
Start = Callable[..., StreamScheduler]


def cost_of(setup: Setup) -> CostModel:
    curve = fit([Point(tokens=n, seconds=n / 1000) for n in (1, 2, 3)])
    return CostModel(setup=setup, source="measured", recompute=curve)


@pytest.fixture
def started(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(**settings: str) -> StreamScheduler:
        config = _engine_config(model_dir, 0, False)
        monkeypatch.setattr(config, "additional_config", {"stream2llm": settings})
        return Engine(model_dir, 20).scheduler

    return start


def test_an_engine_starts_with_the_cost_model_of_its_set_up(started: Start, tmp_path: Path) -> None:
    plain = started()
    assert plain.cost is None
    assert plain.load()["cost_model"] == ""
    cost = cost_of(plain.setup)
    path = save(cost, tmp_path)
    for place in (path, tmp_path):
        scheduler = started(cost_model=str(place), policy="fcfs")
        assert scheduler.cost == cost
        assert scheduler.load()["cost_model"] == str(cost)
        assert scheduler.load()["policy"] == "fcfs"


def test_a_cost_model_of_another_model_ends_the_start(started: Start, tmp_path: Path) -> None:
    path = save(cost_of(Setup(model="other", hardware="h", settings="s")), tmp_path)
    with pytest.raises(BadCostModel, match="is of 'other'"):
        started(cost_model=str(path))
    with pytest.raises(BadCostModel, match="no cost model in"):
        started(cost_model=str(tmp_path / "missing.json"))


def test_the_set_up_names_number_format_parallelism_step_and_block(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-2,5")
    setup = started().setup
    assert setup.settings == "float32 tp1 step96 block4"
    assert setup.hardware.endswith(", 4 cores")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    assert started().setup.hardware.endswith(f", {os.cpu_count()} cores")


def test_the_log_says_which_cost_model_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    setup = Setup(model="m", hardware="h", settings="s")
    assert cost_model(None, setup) is None
    assert cost_model(str(tmp_path), setup) is None
    path = save(cost_of(setup), tmp_path)
    cost_model(str(tmp_path), setup)
    cost_model(str(path), Setup(model="m", hardware="other", settings="s"))
    assert [record.getMessage() for record in caplog.records][:3] == [
        "no cost model: recompute only",
        f"no cost model: recompute only (m--h--s.json is not in {tmp_path})",
        "cost model: measured, m on h (R^2 1.0000), recompute only",
    ]
    assert caplog.records[-1].levelname == "WARNING"
    assert caplog.records[-1].getMessage().endswith("is of h (s), this engine is on other (s)")
