"""Names are what vLLM's own code makes of the same tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils

from cache_index.names import Hashing, name, packed

algorithms = st.sampled_from(["sha256", "sha256_cbor"])
token = st.integers(0, 300_000) | st.sampled_from([23, 24, 255, 256, 65535, 65536, 2**31, 2**32])
tokens = st.lists(token, max_size=70)
salts = st.none() | st.text()


def of_vllm(hashing: Hashing, prompt: list[int], salt: str | None, seed: str | None) -> list[bytes]:
    digest = get_hash_fn_by_name(hashing.algorithm)
    with pytest.MonkeyPatch.context() as env:
        env.delenv("PYTHONHASHSEED", raising=False)
        if seed is not None:
            env.setenv("PYTHONHASHSEED", seed)
        kv_cache_utils.init_none_hash(digest)
    request: Any = SimpleNamespace(
        block_hashes=[], num_tokens=len(prompt), all_token_ids=prompt, cache_salt=salt,
        mm_features=[], lora_request=None, prompt_embeds=None,
    )  # fmt: skip
    hasher = kv_cache_utils.get_request_block_hasher(hashing.block_size, digest)
    return [bytes(block) for block in hasher(request)]


@given(algorithms, st.sampled_from([1, 4, 16]), tokens, salts, st.none() | st.just("0"))
def test_hashes_are_those_of_vllm(
    algorithm: str, block_size: int, prompt: list[int], salt: str | None, seed: str | None
) -> None:
    seeds = {} if seed is None else {"seed": seed}
    hashing = Hashing.of(algorithm, block_size, **seeds)
    assert hashing.chain(prompt, salt=salt) == of_vllm(hashing, prompt, salt, seed)


@given(algorithms, tokens, salts, st.data())
def test_a_chain_goes_on_from_any_block(
    algorithm: str, prompt: list[int], salt: str | None, data: st.DataObject
) -> None:
    hashing = Hashing.of(algorithm, 4)
    whole = hashing.chain(prompt, salt=salt)
    done = data.draw(st.integers(0, len(whole)))
    parent = whole[done - 1] if done else None
    assert whole[:done] + hashing.chain(prompt[4 * done :], parent, salt) == whole


@given(st.lists(st.binary(min_size=32, max_size=32)))
def test_a_name_is_what_kv_events_call_the_block(hashes: list[bytes]) -> None:
    published = [kv_cache_utils.maybe_convert_block_hash(block) for block in hashes]
    assert [name(block) for block in published] == [name(block) for block in hashes]
    assert packed(published) == packed(hashes)
    assert len(packed(hashes)) == 8 * len(hashes)


def test_salted_prompts_share_no_name() -> None:
    hashing = Hashing.of("sha256", 4)
    prompt = list(range(40))
    ours, theirs = hashing.chain(prompt, salt="ours"), hashing.chain(prompt, salt="theirs")
    assert not set(ours) & set(theirs)


def test_families_differ_by_all_that_names_depend_on() -> None:
    ways = [
        Hashing.of("sha256", 16),
        Hashing.of("sha256_cbor", 16),
        Hashing.of("sha256", 32),
        Hashing.of("sha256", 16, seed="0"),
    ]
    assert len({way.family for way in ways}) == len(ways)
    assert Hashing.of("sha256", 16).family == ways[0].family


def test_hashes_that_cannot_be_foretold_are_refused() -> None:
    with pytest.raises(ValueError, match="xxhash"):
        Hashing.of("xxhash", 16)
