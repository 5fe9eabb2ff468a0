"""Token prefixes that share what they have in common."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.prefix import Prefix

tokens = st.lists(st.integers(0, 3), max_size=30)


@given(held=tokens, wanted=tokens)
def test_a_difference_leads_from_one_prefix_to_the_other(
    held: list[int], wanted: list[int]
) -> None:
    keep, behind = Prefix.of(held).difference(Prefix.of(wanted))
    assert held[:keep] + behind == wanted
    assert keep == len(held) or keep == len(wanted) or held[keep] != wanted[keep]


@given(
    begin=tokens,
    steps=st.lists(st.tuples(st.integers(0, 100), tokens), max_size=20),
    data=st.data(),
)
def test_what_is_put_behind_one_prefix_is_not_seen_in_another(
    begin: list[int], steps: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    prefixes, should = [Prefix.of(begin)], [begin]
    for which, more in steps:  # any that was made before is gone on with
        which %= len(prefixes)
        prefixes.append(prefixes[which].extended(more))
        should.append(should[which] + more)
    assert [p.all() for p in prefixes] == should
    assert [len(p) for p in prefixes] == [len(t) for t in should]
    one, other = (data.draw(st.sampled_from(range(len(prefixes)))) for _ in range(2))
    keep, behind = prefixes[one].difference(prefixes[other])
    assert should[one][:keep] + behind == should[other]
    ends = (len(should[one]), len(should[other]))
    assert keep in ends or should[one][keep] != should[other][keep]
    assert prefixes[one].behind(keep) == should[one][keep:]
