"""What `make bench-ann` says of orderings, and the passages it searches."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.orderings import cost, costs, synthetic
from loadtest.passages import passages
from retrieval.ordering import Documents
from retrieval.source import Passage


def ranking(ids: str) -> Documents:
    return tuple(Passage(each, each) for each in ids)


def ten(passage: Passage) -> int:
    return 10


def test_the_cost_of_a_change_at_the_top() -> None:
    # d gives way to x, which comes first
    rankings = [ranking("abcd"), ranking("xabc"), ranking("xabc")]
    rank, stable = (cost(name, [rankings], ten) for name in ("rank", "stable"))
    assert (rank.first, rank.invalidated, rank.late, rank.final) == (40, 40, 0, 40)
    # a b; then x too, of which the first two places are safe; then c
    assert (stable.first, stable.invalidated, stable.late, stable.final) == (20, 0, 10, 40)
    assert rank.same_documents
    assert stable.same_documents


def test_means_are_over_queries() -> None:
    changing = [ranking("ab"), ranking("ba")]
    constant = [ranking("ab"), ranking("ab")]
    both = cost("rank", [changing, constant, constant], ten)
    assert both.invalidated == pytest.approx(20 / 3)
    assert both.late == pytest.approx(20 / 3)
    assert both.late_p50 == 0


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_stable_throws_away_less_than_rank_on_the_synthetic_workload(share: float) -> None:
    found = costs(synthetic(100, share, seed=1), lambda passage: len(passage.text))
    assert found["stable"].invalidated < 0.6 * found["rank"].invalidated
    assert found["settled"].invalidated < 0.8 * found["rank"].invalidated
    assert all(each.same_documents for each in found.values())


def test_passages_are_docstrings_and_sections_each_once(tmp_path: Path) -> None:
    said = "Says something that is long enough to be worth finding, and says it well."
    (tmp_path / "a.py").write_text(
        f'def speak():\n    """{said}"""\n\ndef hush():\n    """No."""\n'
    )
    (tmp_path / "broken.py").write_text("def :")
    (tmp_path / "b.md").write_text(f"# One\n{said}\n# Two\n{said} Again.\n# Three\nshort\n")
    (tmp_path / "copy.md").write_text(f"# One\n{said}\n")
    found = passages(10, [tmp_path])
    assert sorted(p.text for p in found) == [
        f"# One\n{said}",
        f"# Two\n{said} Again.",
        f"speak: {said}",
    ]
    assert len({p.id for p in found}) == 3
    assert passages(2, [tmp_path]) == found[:2]
