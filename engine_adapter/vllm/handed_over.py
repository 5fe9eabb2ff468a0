"""Prompts whose KV waits for another engine to fetch it, by vLLM's NixlConnector.

vLLM holds the blocks of a request that hands over until the other engine says that it has them, or
until a lease ends that the other engine renews. Two things are missing there, and added here. A
client may go away before anybody fetches: `release` gives the blocks back at once. And the other
engine reads memory without asking: if it is late, it reads what others have written there since,
and nobody notices. `state` tells whether the lease held until the KV was fetched. Checked against
vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from vllm.v1.request import Request, RequestStatus

from engine_adapter.vllm.open_prompts import ended_prompt

if TYPE_CHECKING:
    from vllm.v1.outputs import KVConnectorOutput

State = Literal["handed_over", "fetched", "expired"]

FOR_ANOTHER_ENGINE: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""The `kv_transfer_params` of a request whose KV is to wait."""

EXPIRED = "num_kv_expired_reqs"
"""What the connector counts in a step: requests whose lease has ended."""


def can_hand_over(config: Any) -> bool:
    """Whether an engine with this `VllmConfig` has a connector by which others get its KV."""
    transfer = config.kv_transfer_config
    return bool(
        transfer is not None
        and transfer.kv_connector == "NixlConnector"
        and transfer.is_kv_producer
    )


class HandedOver:
    """The requests that are over but for their KV."""

    def __init__(self, free: Callable[[Request], None]) -> None:
        """
        Args:
            free: frees the blocks of a finished request, and forgets it.
        """
        self._free = free
        self._waiting: dict[str, Request] = {}  # by prompt id
        self._states: dict[str, State] = {}
        self._released: set[str] = set()  # request ids of which the connector still has to hear

    def put(self, request: Request) -> None:
        """Take in a request that is over and whose blocks the connector holds.

        If its answer is complete nobody will fetch them, and they are freed."""
        prompt_id = ended_prompt(request)
        if prompt_id is None:
            return
        if request.status == RequestStatus.FINISHED_STOPPED:
            self._give_back(request)
        else:
            self._waiting[prompt_id], self._states[prompt_id] = request, "handed_over"

    def state(self, prompt_id: str) -> State | None:
        """What has become of the KV of a prompt; None if it was not handed over."""
        return self._states.get(prompt_id)

    def release(self, prompt_id: str) -> None:
        """Free the KV if it still waits, and forget the prompt."""
        self._states.pop(prompt_id, None)
        if (request := self._waiting.pop(prompt_id, None)) is not None:
            self._give_back(request)

    def _give_back(self, request: Request) -> None:
        self._released.add(request.request_id)
        self._free(request)

    def take_in(self, output: KVConnectorOutput) -> None:
        """Learn from the connector whose KV does not wait any more, and keep from vLLM what it
        does not know any more.

        The connector only counts the leases that have ended in a step. Where one has, none of the
        step's requests counts as fetched: at worst a prompt is computed again for nothing.
        """
        sent = output.finished_sending
        if not sent:
            return
        stats = output.kv_connector_stats
        expired = stats is not None and bool(stats.data.get(EXPIRED))
        for prompt_id in [p for p, r in self._waiting.items() if r.request_id in sent]:
            del self._waiting[prompt_id]
            self._states[prompt_id] = "expired" if expired else "fetched"
        output.finished_sending = sent - self._released
        self._released -= sent
