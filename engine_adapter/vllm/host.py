"""KV in host memory: what vLLM's offloading connector keeps, and when it is worth fetching.

The connector copies blocks to host memory as they are computed, as far as its room goes (the
least recently used make way), and offers them to requests that have no KV. So swapping out costs
a victim nothing when it is evicted; what is decided here is whether its KV comes back from there
or is computed again. Checked against vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.request import Request, RequestStatus

from engine_adapter.scheduling.cost import CostModel, Way


def loading(request: Request) -> bool:
    """Its KV is being fetched; until then it computes nothing and keeps its blocks."""
    return bool(request.status == RequestStatus.WAITING_FOR_REMOTE_KVS)


class HostMemory:
    """Whether KV is fetched from host memory; never, on an engine without the connector."""

    def __init__(self, connector: object, cost: CostModel | None) -> None:
        self._cost = cost
        self._requests: dict[str, Any] = {}
        self.room_tokens = 0
        """For how many tokens host memory has room, what is in it included."""
        if isinstance(connector, OffloadingConnector):
            scheduler = connector.connector_scheduler
            self._requests = scheduler._req_status
            chunk_tokens = max(g.tokens_per_chunk for g in scheduler.config.kv_group_configs)
            self.room_tokens = scheduler.manager._num_chunks * chunk_tokens

    def restore(self, computed_tokens: int, keep_tokens: int) -> tuple[Way, float]:
        """The cheaper way to give a request back what is behind its first tokens, and its cost.

        In seconds; without a cost model only tokens are counted, and nothing is fetched.
        """
        if self._cost is None:
            return "recompute", float(max(computed_tokens - keep_tokens, 0))
        return self._cost.restore_s(computed_tokens, keep_tokens, self.room_tokens)

    def forbid(self, request: Request, *, store: bool = False) -> None:
        """Have the connector fetch nothing for a request, nor copy what it computes."""
        if (known := self._requests.get(request.request_id)) is not None:
            known.max_load_tokens = 0
            if store:
                known.max_offload_tokens = 0
