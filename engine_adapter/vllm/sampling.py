"""vLLM's form of a `Sampling`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from engine_adapter.errors import BadOperation
from engine_adapter.messages import Sampling
from engine_adapter.vllm.open_prompts import ADOPT, VERSION

KNOWN = frozenset(inspect.signature(SamplingParams).parameters)
"""What this vLLM can be told; a model's defaults may have more."""


def sampling_params(
    sampling: Sampling, prompt_id: str, version: int, room: int, defaults: Mapping[str, Any]
) -> SamplingParams:
    """Parameters of the request that ends an open prompt.

    Args:
        prompt_id, version: what is answered.
        room: tokens that the answer may have at most.
        defaults: of the model, for what `sampling` leaves open.

    Raises:
        BadOperation: vLLM refuses a value.
    """
    given = {k: v for k, v in msgspec.structs.asdict(sampling).items() if v is not None}
    values = {k: v for k, v in defaults.items() if k in KNOWN} | given
    values["max_tokens"] = min(values.get("max_tokens") or room, room)
    try:
        return SamplingParams(
            **values,
            output_kind=RequestOutputKind.DELTA,
            extra_args={ADOPT: prompt_id, VERSION: version},
        )
    except (VLLMValidationError, ValueError, TypeError) as e:
        raise BadOperation(str(e)) from e
