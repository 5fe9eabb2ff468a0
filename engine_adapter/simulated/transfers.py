"""Copies between the accelerators' memory and the host's, on the virtual clock.

vLLM's offloading connector decides what is copied; its worker is replaced by what the copies would
take. Each direction does one copy after the other, beside the computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import BlockIDsLoadStoreSpec
from vllm.v1.outputs import KVConnectorOutput


@dataclass(frozen=True, slots=True)
class _Copy:
    job_id: int
    request_id: str
    ends_s: float


@dataclass(slots=True)
class _Line:
    """One direction."""

    copies: deque[_Copy] = field(default_factory=deque)
    free_s: float = 0.0

    def add(self, job_id: int, job: TransferJob, copy_s: float, now_s: float) -> None:
        self.free_s = max(self.free_s, now_s) + copy_s
        self.copies.append(_Copy(job_id, job.req_id, self.free_s))

    def take_ended(self, now_s: float) -> list[_Copy]:
        ended = []
        while self.copies and self.copies[0].ends_s <= now_s:
            ended.append(self.copies.popleft())
        return ended


class Transfers:
    """All copies under way."""

    def __init__(self, block_s: float) -> None:
        """
        Args:
            block_s: seconds to copy one block.
        """
        self._block_s = block_s
        self._out, self._in = _Line(), _Line()
        self.blocks_out = 0
        self.blocks_in = 0

    def begin(self, asked: OffloadingConnectorMetadata, now_s: float) -> float:
        """Begin what a step asks for; returns when the step itself can begin.

        It waits for copies out of blocks that it is going to write.
        """
        for job_id, job in asked.store_jobs.items():
            self.blocks_out += (blocks := _blocks(job))
            self._out.add(job_id, job, blocks * self._block_s, now_s)
        for job_id, job in asked.load_jobs.items():
            self.blocks_in += (blocks := _blocks(job))
            self._in.add(job_id, job, blocks * self._block_s, now_s)
        flushed = asked.jobs_to_flush or ()
        return max((c.ends_s for c in self._out.copies if c.job_id in flushed), default=now_s)

    def ended(self, now_s: float) -> KVConnectorOutput | None:
        """What has been copied by now, once, as vLLM's worker reports it."""
        stored, loaded = self._out.take_ended(now_s), self._in.take_ended(now_s)
        if not stored and not loaded:
            return None
        return KVConnectorOutput(
            finished_recving={copy.request_id for copy in loaded},
            kv_connector_worker_meta=_completed((*stored, *loaded)),
        )

    @property
    def next_load_s(self) -> float | None:
        """When the next request gets its KV back."""
        return self._in.copies[0].ends_s if self._in.copies else None


def _blocks(job: TransferJob) -> int:
    assert isinstance(job.src_spec, BlockIDsLoadStoreSpec)
    return len(job.src_spec.block_ids)


def _completed(copies: Iterable[_Copy]) -> OffloadingWorkerMetadata:
    meta = OffloadingWorkerMetadata()
    for copy in copies:
        meta.mark_completed(copy.job_id)
    return meta
