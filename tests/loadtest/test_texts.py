"""Texts of the sizes that a trace asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.texts import CHARS_PER_TOKEN, ExactTexts, RealTexts, counter
from loadtest.workload import Document


@pytest.fixture(scope="module")
def exact(model_dir: Path) -> ExactTexts:
    return ExactTexts(str(model_dir))


def test_exact_texts_have_as_many_tokens_as_asked_for(exact: ExactTexts, model_dir: Path) -> None:
    count = counter(str(model_dir))
    for doc_id, tokens in enumerate((2, 3, 17, 400, 5000)):
        document = Document(doc_id, tokens)
        assert len(exact.tokens_of(document)) == tokens
        assert count(exact.of(document) + "\n") == tokens
    assert exact.of(Document(7, 40)) == exact.of(Document(7, 40)) != exact.of(Document(8, 40))
    assert len(exact.tokens_of(Document(1, 1))) == 2


def test_real_texts_are_documentation_of_about_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.texts.PASSAGES", 20)
    texts = RealTexts()
    text = texts.of(Document(3, 500))
    assert len(text) == 500 * CHARS_PER_TOKEN
    assert text == texts.of(Document(3, 500))
    assert texts.of(Document(3, 500, "its own")) == "its own"


def test_without_a_tokenizer_tokens_are_guessed() -> None:
    assert [counter(None)(text) for text in ("", "abcd", "abcde")] == [0, 1, 2]
