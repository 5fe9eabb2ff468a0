"""The soak against a gateway that stands still for a while: streams come back, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_a_gateway_that_stood_still_has_its_streams_back_and_nothing_left() -> None:
    options = ["--minutes", "1.5", "--streams", "60", "--rate", "30", "--chunks", "6"]
    line = [sys.executable, "-m", "loadtest.soak", *options, "--stop", "10"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=500, check=False)
    figures = json.loads(done.stdout.splitlines()[-1])
    troubles = [trouble for trouble in figures["troubles"] if "memory" not in trouble]
    assert not troubles, done.stdout  # memory is for a longer run to tell
    assert sum(sample["streams"] for sample in figures["samples"][-3:]) > 90
