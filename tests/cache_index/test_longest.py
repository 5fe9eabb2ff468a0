"""The longest prefix of long prompts, with gaps: both implementations give the same."""

from __future__ import annotations

import uuid

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_index.index import EXACT_NAMES, NAME_BYTES
from cache_index.memory import MemoryIndex
from cache_index.redis import RedisIndex

ENGINES = ["e1", "e2"]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    length=st.integers(0, 400),
    ends=st.tuples(st.integers(0, 420), st.integers(0, 420)),
    gaps=st.sets(st.integers(0, 399), max_size=4),
    more=st.sets(st.integers(0, 399), max_size=4),
)
async def test_both_find_the_same_end(
    redis_url: str, length: int, ends: tuple[int, int], gaps: set[int], more: set[int]
) -> None:
    names = [n.to_bytes(NAME_BYTES, "big") for n in range(length)]
    family = uuid.uuid4().hex
    remote = RedisIndex(redis_url, timeout_s=10, connect_timeout_s=10)
    try:
        found = []
        for index in (remote, MemoryIndex()):
            for engine, end in zip(ENGINES, ends, strict=True):
                held = {i for i in range(length) if i < end and i not in gaps} | more
                packed = b"".join(i.to_bytes(NAME_BYTES, "big") for i in sorted(held))
                await index.rebuild(family, engine, "i", 0, packed, 60)
            found.append(await index.longest(family, b"".join(names), ENGINES))
    finally:
        await remote.close()
    assert found[0] == found[1]
    for engine, end in zip(ENGINES, ends, strict=True):
        held = {i for i in range(length) if i < end and i not in gaps} | more
        exact = next((i for i in range(length) if i not in held), length)
        count = found[0][engine]
        assert count >= exact
        if exact < EXACT_NAMES or held <= set(range(exact)) | {*range(length, 400)}:
            assert count == exact
        assert count == 0 or count - 1 in held
