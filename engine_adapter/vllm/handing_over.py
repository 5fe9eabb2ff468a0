"""KV of finished prompts that waits for another engine to fetch it, under a lease.

vLLM's NIXL connector keeps the blocks of a request that ends with the transfer parameters below,
and its worker says when they were fetched or when the lease has ended. Two things are added here.
A lease can be ended early. And it is told whether it held until the KV was fetched: the other
engine reads memory without asking, and if it is late it reads what others have written there
since, unnoticed. Checked against vLLM 0.32.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector

from engine_adapter.vllm.open_prompts import ended_prompt

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

CONNECTORS = ("NixlConnector", "NixlPullConnector")

State = Literal["handed_over", "fetched", "expired"]

EXPIRED = "num_kv_expired_reqs"
"""What the connector counts in each step: the leases that have ended."""

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

    def __init__(self, connector: object, workers: int) -> None:
        """
        Args:
            workers: each has a part of the KV, and a lease of its own on it.
        """
        self._connector: Any = (
            connector.connector_scheduler if isinstance(connector, NixlPullConnector) else None
        )
        self._requests: dict[str, Request] = {}
        self._workers = workers
        self._doubtful: set[str] = set()  # request ids
        self._states: dict[str, State] = {}  # by prompt id, until `end`

    def put(self, request: Request) -> None:
        """Take in a request that has ended and keeps its blocks, if it hands over."""
        prompt_id = ended_prompt(request)
        if self._connector is not None and prompt_id is not None and request.kv_transfer_params:
            self._requests[prompt_id] = request
            self._states[prompt_id] = "handed_over"

    def state(self, prompt_id: str) -> State | None:
        """What has become of the KV of a prompt; None if it was not handed over."""
        return self._states.get(prompt_id)

    def take_in(self, output: KVConnectorOutput) -> None:
        """Learn whose KV does not wait any more.

        The connector only counts the leases that have ended in a step. Where one has, none of the
        step's requests counts as fetched: at worst a prompt is computed again for nothing. Of
        several workers one may count long before the last of them is through with the request,
        which then ends: there it may be any request that waits.
        """
        sent = output.finished_sending or set()
        stats = output.kv_connector_stats
        if stats is not None and stats.data.get(EXPIRED):
            waiting = {request.request_id for request in self._requests.values()}
            self._doubtful |= waiting if self._workers > 1 else waiting & sent
        for prompt_id, request in self._requests.items():
            if request.request_id in sent and prompt_id in self._states:
                doubtful = request.request_id in self._doubtful
                self._states[prompt_id] = "expired" if doubtful else "fetched"

    def discard(self, request: Request) -> None:
        """Its blocks were freed."""
        self._doubtful.discard(request.request_id)
        prompt_id = ended_prompt(request)
        if prompt_id is not None and self._requests.get(prompt_id) is request:
            del self._requests[prompt_id]

    def forget(self, prompt_id: str) -> None:
        """Nobody will ask what has become of the KV."""
        self._states.pop(prompt_id, None)

    def end(self, prompt_id: str) -> bool:
        """End the lease of a prompt's KV with the next step, and forget the prompt; an unknown
        one is no error.

        Nobody may be about to fetch it: who still reads may get what others have written there.

        Returns:
            Whether there was one.
        """
        self.forget(prompt_id)
        request = self._requests.get(prompt_id)
        if request is not None:
            self._connector._reqs_need_send[request.request_id] = time.perf_counter()
        return request is not None
