"""The shipping scheduler with a worker that knows what every KV slot holds.

The worker stands in for the model: a slot stores a digest of all tokens up to its position,
and before a request computes anything, every slot of its prefix must hold the digest of *its*
tokens. A block that was freed too early, handed to the wrong request, written while shared,
or resumed with stale tokens shows up as a wrong digest. The next token is a function of the
digest, so the answer to a prompt is known without running it.
"""

from __future__ import annotations

import functools
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
    TransferJob,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine_adapter.scheduling.cost import CostModel, Curve, Point, Setup
from engine_adapter.vllm.handing_over import first_token_only
from engine_adapter.vllm.open_prompts import ADOPT, VERSION
from engine_adapter.vllm.scheduler import StreamScheduler

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96
SMALL_POOL_BLOCKS = 1 + MAX_MODEL_LEN // BLOCK_SIZE + 8
"""Room for one longest prompt and a little more, plus vLLM's null block."""
VOCABULARY = 50
HOST_BLOCK_BYTES = CPUOffloadingSpec.BLOCK_SIZE_ALIGNMENT
"""What a block takes of host memory: those of the harness are smaller than the least."""


def _line(s_per_token: float) -> Curve:
    points = (Point(tokens=1, seconds=s_per_token),)
    return Curve(fixed_s=0, s_per_token=s_per_token, s_per_token2=0, r2=1, points=points)


SWAP_IS_CHEAP = CostModel(
    setup=Setup(model="digests", hardware="harness", settings=""),
    source="estimated",
    recompute=_line(1.0),
    swap_out=_line(0.1),
    swap_in=_line(0.1),
)


def digest(prefix: int, token: int) -> int:
    return hash((prefix, token))


def digests(tokens: list[int]) -> list[int]:
    chain = [0]
    for token in tokens:
        chain.append(digest(chain[-1], token))
    return chain[1:]


def expected_answer(tokens: list[int], max_tokens: int) -> list[int]:
    """What the worker's 'model' says to a prompt."""
    last, answer = digests(tokens)[-1], []
    for _ in range(max_tokens):
        answer.append(last % VOCABULARY)
        last = digest(last, answer[-1])
    return answer


@dataclass
class WorkerRequest:
    tokens: list[int]
    blocks: list[int]


@dataclass
class HostCopies:
    """Copies of KV blocks to host memory and back, each as late as vLLM allows it to be.

    A copy out reads its blocks when it ends: whoever wrote to them before without waiting for it
    has spoiled it. A copy in writes to its blocks when it ends.
    """

    slots: dict[tuple[int, int], int]
    random: random.Random
    host: dict[int, list[int | None]] = field(default_factory=dict)
    out: dict[int, TransferJob] = field(default_factory=dict)
    back: dict[int, TransferJob] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    received: set[str] = field(default_factory=set)
    fetched_blocks: int = 0

    def begin(self, asked: OffloadingConnectorMetadata) -> None:
        """At the beginning of a step: end some copies, those it waits for among them."""
        flushed = asked.jobs_to_flush or set()
        for job_id in [i for i in asked.store_jobs if i in flushed]:
            self.out[job_id] = asked.store_jobs.pop(job_id)
        for job_id in [i for i in self.out if i in flushed or self.random.random() < 0.4]:
            self._store(self.out.pop(job_id))
            self.ended.append(job_id)
        for job_id in [i for i in self.back if self.random.random() < 0.4]:
            self._load(self.back.pop(job_id))
            self.ended.append(job_id)
        self.out |= asked.store_jobs
        self.back |= asked.load_jobs

    def report(self) -> KVConnectorOutput | None:
        if not self.ended:
            return None
        meta = OffloadingWorkerMetadata()
        for job_id in self.ended:
            meta.mark_completed(job_id)
        output = KVConnectorOutput(
            finished_recving=set(self.received), kv_connector_worker_meta=meta
        )
        self.ended.clear()
        self.received.clear()
        return output

    def _store(self, job: TransferJob) -> None:
        for block, chunk in zip(job.src_spec.block_ids, job.dst_spec.block_ids, strict=True):
            self.host[int(chunk)] = [self.slots.get((int(block), i)) for i in range(BLOCK_SIZE)]

    def _load(self, job: TransferJob) -> None:
        self.received.add(job.req_id)
        for chunk, block in zip(job.src_spec.block_ids, job.dst_spec.block_ids, strict=True):
            self.fetched_blocks += 1
            for i, held in enumerate(self.host[int(chunk)]):
                if held is None:
                    self.slots.pop((int(block), i), None)
                else:
                    self.slots[int(block), i] = held


@dataclass
class Sends:
    """KV that waits for another engine, as the workers of NIXL's connector keep track."""

    now_s: Callable[[], float] = time.perf_counter
    known: set[str] = field(default_factory=set)
    until_s: dict[str, float] = field(default_factory=dict)
    fetched: set[str] = field(default_factory=set)

    def follow(self, meta: NixlConnectorMetadata) -> None:
        self.known |= meta.reqs_in_batch
        for request_id in meta.reqs_not_processed:
            self.known.discard(request_id)
            assert request_id not in self.until_s, "taken back under a lease"
        self.until_s |= {i: s for i, s in meta.reqs_to_send.items() if i in self.known}

    def report(self) -> KVConnectorOutput | None:
        late = {i for i, s in self.until_s.items() if s <= self.now_s()}
        done = late | (self.fetched & self.until_s.keys())
        for request_id in done:
            self.known.remove(request_id)
            del self.until_s[request_id]
        return KVConnectorOutput(finished_sending=done) if done else None


@dataclass
class Worker:
    """Follows scheduler outputs as vLLM's model runner does, and checks them."""

    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    requests: dict[str, WorkerRequest] = field(default_factory=dict)
    copies: HostCopies = field(init=False)
    sends: Sends = field(default_factory=Sends)

    def __post_init__(self) -> None:
        self.copies = HostCopies(self.slots, random.Random(0))

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        if isinstance(output.kv_connector_metadata, NixlConnectorMetadata):
            self.sends.follow(output.kv_connector_metadata)
        elif output.kv_connector_metadata is not None:
            self.copies.begin(output.kv_connector_metadata)
        for request_id in output.finished_req_ids:
            self.requests.pop(request_id, None)
        starts: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.requests, "a request is new twice"
            assert new.prompt_token_ids is not None
            self.requests[new.req_id] = WorkerRequest(
                list(new.prompt_token_ids), list(new.block_ids[0])
            )
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            request = self.requests[request_id]
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                assert blocks is not None
                request.blocks = list(blocks[0])
            elif blocks is not None:
                request.blocks += blocks[0]
            starts[request_id] = cached.num_computed_tokens[i]
        sampled = [
            self._compute(request_id, starts[request_id], count)
            for request_id, count in output.num_scheduled_tokens.items()
        ]
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=self.copies.report() or self.sends.report(),
        )

    def _compute(self, request_id: str, start: int, count: int) -> list[int]:
        request = self.requests[request_id]
        end = start + count
        assert end <= len(request.tokens), f"{request_id} computes tokens it does not have"
        chain = digests(request.tokens[:end])
        for position in range(start):
            found = self.slots.get(self._slot(request, position))
            assert found == chain[position], f"{request_id} reads wrong KV at {position}"
        for position in range(start, end):
            self.slots[self._slot(request, position)] = chain[position]
        if end < len(request.tokens):
            return []
        token = chain[-1] % VOCABULARY
        request.tokens.append(token)
        return [token]

    @staticmethod
    def _slot(request: WorkerRequest, position: int) -> tuple[int, int]:
        return request.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE


def _connector(host_blocks: int, hands_over: bool) -> KVTransferConfig | None:
    if hands_over:
        return KVTransferConfig(
            kv_connector="NixlConnector", kv_role="kv_producer", kv_buffer_device="cpu"
        )
    if not host_blocks:
        return None
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": host_blocks * HOST_BLOCK_BYTES},
    )


@functools.cache
def _engine_config(model: Path, host_blocks: int, hands_over: bool) -> Any:
    config = EngineArgs(
        model=str(model),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_MODEL_LEN,
        max_num_seqs=8,
        block_size=32,
        enforce_eager=True,
        dtype="float32",
        kv_transfer_config=_connector(host_blocks, hands_over),
    ).create_engine_config()
    config.cache_config.block_size = BLOCK_SIZE
    return config


class Engine:
    """vLLM's engine loop without processes: two steps in flight, as under async scheduling."""

    def __init__(
        self,
        model: Path,
        blocks: int,
        step_tokens: int = 24,
        host_blocks: int = 0,
        hands_over: bool = False,
    ) -> None:
        config = _engine_config(model, host_blocks, hands_over)
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        self.hasher = get_request_block_hasher(BLOCK_SIZE, hash_fn)
        self.scheduler = StreamScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )
        if host_blocks:
            self.scheduler.set_cost(SWAP_IS_CHEAP)
        self.scheduler._check = True
        self.scheduler.max_num_scheduled_tokens = step_tokens
        self.worker = Worker()
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.answers: dict[str, list[int]] = {}
        self.finished: set[str] = set()
        self.on_output: Callable[[EngineCoreOutput], None] = lambda output: None
        self.idle_blocks = self.free_blocks

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    @property
    def fetching(self) -> int:
        """Requests of which vLLM's statistics say that their KV is to come or has come."""
        return sum(self.scheduler.make_stats().num_kv_fetch_reqs_by_stage.values())

    def request(
        self,
        request_id: str,
        tokens: list[int],
        max_tokens: int,
        prompt_id: str | None = None,
        version: int = 0,
        hand_over: bool = False,
        cache_salt: str | None = None,
    ) -> None:
        """Send an ordinary request, or the end of an open prompt."""
        extra = None if prompt_id is None else {ADOPT: prompt_id, VERSION: version}
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=extra
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(tokens),
            sampling_params=first_token_only(params) if hand_over else params,
            pooling_params=None,
            cache_salt=cache_salt,
            block_hasher=self.hasher,
        )
        self.answers[request_id] = []
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.answers.pop(request_id, None)

    def step(self) -> bool:
        """One turn of the loop; False if there was nothing to do."""
        progressed = False
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.in_flight.append((output, self.worker.execute(output)))
            progressed = output.total_num_scheduled_tokens > 0
        if self.in_flight and (len(self.in_flight) == 2 or not progressed):
            self._finish_step()
            progressed = True
        return progressed or bool(self.worker.copies.out or self.worker.copies.back)

    def _finish_step(self) -> None:
        output, result = self.in_flight.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                if one.request_id in self.answers:
                    self.answers[one.request_id] += one.new_token_ids
                if one.finish_reason is not None:
                    self.finished.add(one.request_id)
                self.on_output(one)

    def drain(self, limit_steps: int = 3000) -> None:
        """Run until nothing is left to do; a loop that never ends is an error."""
        for _ in range(limit_steps):
            if not self.step() and not self.in_flight:
                return
        raise AssertionError(f"still busy after {limit_steps} steps")
