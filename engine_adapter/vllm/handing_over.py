"""KV of finished prompts that waits for another engine to fetch it, under a lease.

vLLM's NIXL connector keeps the blocks of a request that ends with the transfer parameters below,
and its worker says when they were fetched or when the lease has ended. What is added here is that
a lease can be ended early. Checked against vLLM 0.32.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector

from engine_adapter.vllm.open_prompts import ended_prompt

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

CONNECTORS = ("NixlConnector", "NixlPullConnector")

KV_TRANSFER = "kv_transfer_params"
"""Key in `SamplingParams.extra_args`, vLLM's own."""


def hands_over(config: KVTransferConfig | None) -> bool:
    """Whether another engine can fetch the KV of an engine that is configured so."""
    return config is not None and config.is_kv_producer and config.kv_connector in CONNECTORS


def first_token_only(params: SamplingParams) -> SamplingParams:
    """The same answer, cut behind its first token, with its KV kept for another engine.

    An answer that has one token anyhow stays as it is.
    """
    if params.max_tokens == 1:
        return params
    cut = params.clone()
    cut.max_tokens = 1
    cut.min_tokens = min(cut.min_tokens, 1)
    cut.extra_args = (params.extra_args or {}) | {
        KV_TRANSFER: {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
    }
    return cut


class Leases:
    """The ended requests whose KV waits for another engine, by the prompts they have ended."""

    def __init__(self, connector: object) -> None:
        self._connector: Any = (
            connector.connector_scheduler if isinstance(connector, NixlPullConnector) else None
        )
        self._requests: dict[str, Request] = {}

    def put(self, request: Request) -> None:
        """Take in a request that has ended and keeps its blocks, if it hands over."""
        prompt_id = ended_prompt(request)
        if self._connector is not None and prompt_id is not None and request.kv_transfer_params:
            self._requests[prompt_id] = request

    def discard(self, request: Request) -> None:
        """Its blocks were freed."""
        prompt_id = ended_prompt(request)
        if prompt_id is not None and self._requests.get(prompt_id) is request:
            del self._requests[prompt_id]

    def end(self, prompt_id: str) -> None:
        """End the lease of a prompt's KV with the next step; an unknown one is no error.

        Nobody may be about to fetch it: who still reads may get what others have written there.
        """
        if (request := self._requests.get(prompt_id)) is not None:
            self._connector._reqs_need_send[request.request_id] = time.perf_counter()
