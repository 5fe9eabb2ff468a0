"""Cost models as files: found under the name of their set-up, refused where they do not belong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.cost_files import BadCostModel, file_name, find, read, save
from engine_adapter.scheduling.cost import CostModel, Point, Setup, fit

SETUP = Setup(
    model="meta-llama/Llama-3.1-8B-Instruct",
    hardware="2x NVIDIA H100 80GB HBM3",
    settings="bfloat16 tp2 step8192 block16",
)


def cost_of(setup: Setup) -> CostModel:
    curve = fit([Point(tokens=n, seconds=n / 1000) for n in (1, 2, 3)])
    return CostModel(setup=setup, source="measured", recompute=curve, versions={"engine": "1"})


def test_the_name_says_model_hardware_and_settings() -> None:
    assert file_name(SETUP) == (
        "meta-llama-llama-3-1-8b-instruct--2x-nvidia-h100-80gb-hbm3--bfloat16-tp2-step8192-block16.json"
    )


@given(st.text(), st.text(), st.text())
def test_a_name_is_one_file_in_three_parts_whatever_the_set_up(a: str, b: str, c: str) -> None:
    name = file_name(Setup(model=a, hardware=b, settings=c))
    assert Path(name).name == name
    assert len(name.removesuffix(".json").split("--")) == 3


def test_what_was_saved_is_found_by_folder_and_by_file(tmp_path: Path) -> None:
    cost = cost_of(SETUP)
    path = save(cost, tmp_path / "costs")
    assert path == tmp_path / "costs" / file_name(SETUP)
    assert [*path.parent.iterdir()] == [path]
    assert read(path) == find(path, SETUP) == find(path.parent, SETUP) == cost


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(cost_of(SETUP), tmp_path)
    newer = msgspec.structs.replace(cost_of(SETUP), date="2026-01-31")
    assert read(save(newer, tmp_path)).date == "2026-01-31"


def test_a_folder_without_one_for_this_set_up_has_none(tmp_path: Path) -> None:
    save(cost_of(SETUP), tmp_path)
    other = msgspec.structs.replace(SETUP, settings="float32 tp2 step8192 block16")
    assert find(tmp_path, other) is None


def test_a_file_of_other_settings_is_taken_and_one_of_another_model_refused(tmp_path: Path) -> None:
    path = save(cost_of(SETUP), tmp_path)
    assert find(path, msgspec.structs.replace(SETUP, settings="other")) == cost_of(SETUP)
    with pytest.raises(BadCostModel, match=r"is of 'meta-llama.*this engine serves 'other'"):
        find(path, msgspec.structs.replace(SETUP, model="other"))


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff", b"[1]", b'{"setup": 1}'],
)
def test_a_file_that_is_no_cost_model_is_an_error_that_names_it(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "cost.json"
    path.write_bytes(content)
    with pytest.raises(BadCostModel, match=r"no cost model in .*cost\.json"):
        find(path, SETUP)


def test_a_curve_that_falls_is_no_cost_model(tmp_path: Path) -> None:
    path = save(cost_of(SETUP), tmp_path)
    tampered = msgspec.json.decode(path.read_bytes())
    tampered["recompute"]["s_per_token"] = -1.0
    path.write_bytes(msgspec.json.encode(tampered))
    with pytest.raises(BadCostModel, match=r"Expected `float` >= 0"):
        read(path)


def test_a_path_where_nothing_is_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BadCostModel, match="No such file"):
        find(tmp_path / "missing.json", SETUP)
