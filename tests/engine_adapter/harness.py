"""The shipping scheduler with a worker that knows what every KV slot holds.

The worker stands in for the model: a slot stores a digest of all tokens up to its position,
and before a request computes anything, every slot of its prefix must hold the digest of *its*
tokens. A block that was freed too early, handed to the wrong request, written while shared,
or resumed with stale tokens shows up as a wrong digest. The next token is a function of the
digest, so the answer to a prompt is known without running it.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine_adapter.vllm.prompts import ADOPT, VERSION
from engine_adapter.vllm.scheduler import StreamScheduler

BLOCK_SIZE = 4
MAX_MODEL_LEN = 96
VOCABULARY = 50


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
class Worker:
    """Follows scheduler outputs as vLLM's model runner does, and checks them."""

    slots: dict[tuple[int, int], int] = field(default_factory=dict)
    requests: dict[str, WorkerRequest] = field(default_factory=dict)

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
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


@functools.cache
def _engine_config(model: Path) -> Any:
    return EngineArgs(
        model=str(model),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_MODEL_LEN,
        max_num_seqs=8,
        block_size=32,
        enforce_eager=True,
        dtype="float32",
    ).create_engine_config()


class Engine:
    """vLLM's engine loop without processes: two steps in flight, as under async scheduling."""

    def __init__(self, model: Path, blocks: int, step_tokens: int = 24) -> None:
        config = _engine_config(model)
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
            log_stats=False,
        )
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

    def request(
        self,
        request_id: str,
        tokens: list[int],
        max_tokens: int,
        prompt_id: str | None = None,
        version: int = 0,
    ) -> None:
        """Send an ordinary request, or the end of an open prompt."""
        extra = None if prompt_id is None else {ADOPT: prompt_id, VERSION: version}
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(
                max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=extra
            ),
            pooling_params=None,
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
        return progressed

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
