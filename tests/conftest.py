"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The model, unpacked: weights, tokenizer and chat template."""
    if (given := os.environ.get("STREAM2LLM_MODEL_DIR")) is not None:
        return Path(given)
    from deploy.model import model_dir

    return model_dir()
