"""The real model: likeness of meaning, whatever the batch a text is in."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.embedding import MiniLm

TEXTS = [
    "How do I make a loaf of bread?",
    "Dough is kneaded and baked in a hot oven.",
    "Ships sail on the ocean. " * 100,
    "",
]


@pytest.mark.engine
def test_likeness_of_meaning_and_independence_of_the_batch() -> None:
    model = MiniLm()
    vectors = model.embed(TEXTS)
    assert vectors.shape == (4, model.dimensions)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-3)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    alone = np.concatenate([model.embed([text]) for text in TEXTS])
    assert (vectors * alone).sum(1) == pytest.approx(np.ones(4), abs=2e-3)
    assert model.embed([]).shape == (0, model.dimensions)
