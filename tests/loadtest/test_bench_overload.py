"""The benchmark of overload: its arithmetic, and all of it in a short form."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loadtest.bench_overload import rate_in


def test_the_capacity_is_what_is_answered_while_more_come() -> None:
    at_s = [0.5, 20.0, 20.1, 25.0, 39.9, 40.0, 41.0]  # 4 from 20 to 40, whatever was before
    assert rate_in(at_s, 20.0, 40.0) == 4 / 20


@pytest.mark.engine
def test_under_overload_some_are_refused_at_once_and_the_others_answered() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "loadtest.bench_overload", "--minutes", "0.4", "--ramp-s", "40"],
        capture_output=True, text=True, timeout=390, check=False,
    )  # fmt: skip
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1: a goal was missed
    found = json.loads(run.stdout.splitlines()[-1])
    flood = found["3x"]
    assert found["capacity"] > 0
    assert found["80%"]["answered"] > 0
    assert flood["answered"] > 0
    assert flood["refused"] > 0
    assert set(flood["errors"]) == {"overloaded"}
