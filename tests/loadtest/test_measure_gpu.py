"""Measuring a GPU: the timed model is a transformer, copies arrive, tables say what was seen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine_adapter.cost_files import file_name, find
from engine_adapter.cost_files import read as read_cost
from engine_adapter.scheduling.cost import Setup
from engine_adapter.simulated.hardware import H100, H100X2, LLAMA_3_1_8B, Model
from loadtest import measure_gpu
from loadtest.gpu_copies import Copies
from loadtest.gpu_measure import Grid, Measurement
from loadtest.gpu_model import Batch, RandomModel, Shape, Work, dense_attention
from loadtest.gpu_raw import Copy, Prompt, Raw, Step, read, write
from loadtest.gpu_report import FITTED, cost_model, fitted

MEASURED = Path(measure_gpu.__file__).parent / "measured"

TINY = Shape(Model("tiny", 1e4, 2, 4, 2, 8), ffn=64, vocabulary=101, dtype=torch.float32)


def of_step(model: RandomModel, cached: int, batch: Batch) -> torch.Tensor:
    """Logits behind tokens that the cache holds from an earlier step."""
    work = Work(cached, batch.work.new - cached)
    rest = model.batch(work, scattered=False)
    rest.token_ids.copy_(batch.token_ids[cached:])
    return model.logits(rest)


@pytest.mark.parametrize("cached", [1, 16, 37, 49])
def test_a_prompt_in_two_steps_gives_the_logits_of_one(cached: int) -> None:
    model = RandomModel(TINY, "cpu", 160)
    whole = model.batch(Work(0, 50), scattered=False)
    expected = model.logits(whole)
    model.cache[:, 50 // 16 + 1 :].fill_(math.nan)
    assert torch.allclose(of_step(model, cached, whole), expected, atol=1e-4)


def test_requests_of_a_batch_do_not_see_each_other() -> None:
    model = RandomModel(TINY, "cpu", 320)
    both = model.batch(Work(0, 20, requests=2), scattered=False)
    logits = model.logits(both)
    one = model.batch(Work(0, 20), scattered=False)
    for i in range(2):
        one.token_ids.copy_(both.token_ids[20 * i : 20 * (i + 1)])
        assert torch.allclose(model.logits(one)[0], logits[i], atol=1e-4)


@pytest.mark.parametrize("moving", ["gathered", "blocks"])
def test_blocks_anywhere_in_the_cache_come_back_as_they_were(moving: str) -> None:
    model = RandomModel(TINY, "cpu", 320)
    before = model.cache.clone()
    copies = Copies(model.cache, 160, seed=3)
    ways = {key: run for key, run in copies.ways(160).items() if key[0] == moving}
    out, back = ways[moving, "out"], ways[moving, "in"]  # type: ignore[index]
    out()
    model.cache.zero_()
    back()
    there = (model.cache == before).flatten(2).all(-1)
    assert there.sum(1).tolist() == [10, 10]
    assert not model.cache[~there].any()


def test_all_of_it_runs_and_is_kept(tmp_path: Path) -> None:
    grid = Grid(
        new=(1, 16), cached=(0, 32), decodes=(2,), decode_contexts=(16,), prompts=(16, 32, 64),
        copies=(16, 32), step_tokens=32, kv_tokens=160, repeats=3,
    )  # fmt: skip
    raw = Measurement(TINY, "cpu", grid, seed=1).run("2026-01-31")
    assert {(s.requests, s.cached, s.new) for s in raw.steps} == {
        (1, 0, 1), (1, 32, 1), (1, 0, 16), (1, 32, 16), (2, 15, 1)
    }  # fmt: skip
    assert all(len(one.seconds) == 3 for one in (*raw.steps, *raw.prompts, *raw.copies))
    write(raw, tmp_path / "raw.json")
    kept = read(tmp_path / "raw.json")
    assert [s.new for s in kept.steps] == [s.new for s in raw.steps]
    assert kept.steps[0].median_s == pytest.approx(raw.steps[0].median_s, abs=1e-7)


def test_what_does_not_fit_into_the_cache_is_told_and_not_measured() -> None:
    grid = Grid(
        new=(16,), cached=(0, 320), decodes=(), prompts=(16,), copies=(16, 640), kv_tokens=160,
        repeats=3,
    )  # fmt: skip
    raw = Measurement(TINY, "cpu", grid, seed=1).run("")
    assert [s.cached for s in raw.steps] == [0]
    assert {c.tokens for c in raw.copies} == {16}
    assert len(raw.skipped) == 1
    assert "does not fit" in raw.skipped[0]


def as_if_measured() -> Raw:
    """A card that does just what `hardware.py` says of one with other constants."""
    card = H100X2.__class__(
        "x", 1, 989e12, 3.35e12, 80e9, efficiency=0.7, attention_efficiency=0.5,
        step_overhead_s=0.002,
    )  # fmt: skip
    works = [(c, n, 1) for c in (0, 2048, 65536) for n in (1, 128, 1024, 8192)]
    works += [(1023, 1, 32), (8191, 1, 32)]
    sizes = [1 << i for i in range(7, 18)]
    return Raw(
        card="NVIDIA H100", host="h", versions={"torch": "2"}, date="2026-01-31", seed=1,
        model=LLAMA_3_1_8B.name, attention="a", step_tokens=8192,
        steps=tuple(
            Step(cached=c, new=n, requests=r, seconds=(card.step_s(LLAMA_3_1_8B, [(c, n)] * r),))
            for c, n, r in works
        ),
        prompts=tuple(
            Prompt(tokens=n, seconds=(card.prefill_s(LLAMA_3_1_8B, n, 8192),)) for n in sizes
        ),
        copies=tuple(
            Copy(
                moving="gathered", direction=way, tokens=n, call_s=0.0,
                seconds=(1e-4 + n * 131072 / 50e9,),
            )
            for n in sizes for way in ("out", "in")
        ),
        overlaps=(), clocks=(),
    )  # fmt: skip


def test_the_constants_of_a_card_are_found_from_its_steps() -> None:
    found = fitted(as_if_measured())
    assert found.efficiency == pytest.approx(0.7, rel=0.03)
    assert found.attention_efficiency == pytest.approx(0.5, rel=0.03)
    assert found.step_overhead_s == pytest.approx(0.002, rel=0.2)
    assert found.host_bytes_per_s * found.host_efficiency == pytest.approx(50e9, rel=0.01)


def test_tables_and_a_cost_model_that_engines_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = as_if_measured()
    write(raw, tmp_path / "raw.json")
    assert measure_gpu.main(["--raw", str(tmp_path / "raw.json"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "estimated over measured" in printed
    assert "R^2 1.00000" in printed
    (path,) = tmp_path.glob("llama-3-1-8b--nvidia-h100--*.json")
    kept, wanted = read_cost(path), cost_model(raw)
    assert kept == cost_model(read(tmp_path / "raw.json"))
    assert kept.source == "measured"
    assert kept.swap_s(4096) == pytest.approx(wanted.swap_s(4096), rel=1e-3)
    assert kept.swap_s(4096) == pytest.approx(2 * (1e-4 + 4096 * 131072 / 50e9), rel=0.01)


def test_the_kept_measurement_gives_the_kept_cost_model_and_constants() -> None:
    raw = read(MEASURED / "h100.json")
    path = MEASURED / file_name(cost_model(raw).setup)
    kept, now = read_cost(path), cost_model(raw)
    for tokens in (128, 5000, 100_000):
        assert kept.recompute_s(tokens) == pytest.approx(now.recompute_s(tokens), rel=1e-3)
        assert kept.swap_s(tokens) == pytest.approx(now.swap_s(tokens), rel=1e-3)
    found = fitted(raw)
    for name in FITTED:
        assert getattr(H100, name) == pytest.approx(getattr(found, name), rel=0.02), name
    assert all(
        kept.recompute_s(p.tokens) == pytest.approx(p.median_s, rel=0.15) for p in raw.prompts
    )


def test_of_the_same_card_the_engines_own_cost_model_is_kept() -> None:
    raw = read(MEASURED / "h100.json")
    alone = cost_model(raw)
    setup = Setup(
        model=alone.setup.model,
        hardware=alone.setup.hardware,
        settings="bfloat16 tp1 step8192 block16",
    )
    engine = find(MEASURED, setup)
    assert engine is not None
    for tokens in (1024, 8192, 65536):
        assert engine.recompute_s(tokens) == pytest.approx(alone.recompute_s(tokens), rel=0.25)
        assert 2 * H100.transfer_s(LLAMA_3_1_8B, tokens) == pytest.approx(
            engine.swap_s(tokens), rel=0.1
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_gpu.main([]) == 1
    assert "PyTorch finds no GPU here" in capsys.readouterr().err


def test_the_model_is_the_one_that_the_estimates_are_of() -> None:
    model = RandomModel(TINY, "cpu", 160)
    assert dense_attention is model.attention
    assert model.cache[:, 0, 0].numel() * 4 == 2 * TINY.model.kv_bytes_per_token
