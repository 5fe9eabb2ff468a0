"""The shipping scheduler on a virtual clock: the model is replaced by what a step would cost.

Nothing of the scheduler is simulated: `StreamScheduler`, vLLM's KV cache manager and its
prefix cache run as they ship, and so does its offloading connector where the engine is given
host memory. What a step takes comes from `hardware.py`; operations take effect between steps, as
in the real engine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.config import KVTransferConfig
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

from engine_adapter.scheduling import policies
from engine_adapter.sessions import Status
from engine_adapter.simulated.answers import ANSWERS, Answers
from engine_adapter.simulated.hardware import Hardware, Model, estimated_cost
from engine_adapter.simulated.transfers import Transfers
from engine_adapter.vllm.open_prompts import ADOPT
from engine_adapter.vllm.scheduler import StreamScheduler

BLOCK_TOKENS = 16
MAX_MODEL_LEN = 131_072


@dataclass(slots=True)
class Counters:
    """What a run did, all of it in tokens but the steps and seconds."""

    steps: int = 0
    busy_s: float = 0.0
    computed_tokens: int = 0
    invalidated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """What one request got from a step."""

    request_id: str
    token_ids: list[int]
    cached_tokens: int | None
    """Prompt tokens that it did not have to compute; comes with its first token."""
    finished: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What a step produced."""

    outputs: list[Output]

    @property
    def finished(self) -> list[str]:
        """Requests whose answer is complete."""
        return [output.request_id for output in self.outputs if output.finished]


@dataclass(slots=True)
class SimulatedEngine:
    """One engine in virtual time. The caller delivers operations and turns the loop."""

    hardware: Hardware
    model: Model
    policy: str = policies.DEFAULT_POLICY
    step_tokens: int = 8192
    max_requests: int = 1024
    kv_tokens: int | None = None
    """Size of the KV pool; None for what the hardware holds beside the model."""
    host_bytes: float = 0.0
    """Host memory for KV that is swapped out; without any, what is evicted is recomputed."""
    answers: Answers = ANSWERS["words"]
    now_s: float = 0.0
    counters: Counters = field(default_factory=Counters)
    scheduler: StreamScheduler = field(init=False)
    transfers: Transfers = field(init=False)
    _hasher: Any = field(init=False)

    def __post_init__(self) -> None:
        blocks = (self.kv_tokens or self.hardware.kv_tokens(self.model)) // BLOCK_TOKENS
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, hash_fn)
        self.scheduler = _scheduler(
            self.model, blocks, self.step_tokens, self.max_requests, self.host_bytes
        )
        self.scheduler.set_policy(self.policy)
        self.scheduler.set_cost(estimated_cost(self.hardware, self.model, self.step_tokens))
        self.transfers = Transfers(self.hardware.transfer_s(self.model, BLOCK_TOKENS))
        self.scheduler._clock = lambda: self.now_s

    def open(
        self,
        prompt_id: str,
        tokens: list[int],
        cache_salt: str | None = None,
        weight: float | None = None,
    ) -> Status:
        """Begin a prompt."""
        return self.scheduler.open_prompt(prompt_id, tokens, cache_salt, self._hasher, weight)

    def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> Status:
        """Replace what is behind the first `keep` tokens."""
        answer = self.scheduler.extend_prompt(prompt_id, keep, tokens)
        self.counters.invalidated_tokens += int(answer["invalidated"])
        return answer

    def finish(
        self,
        request_id: str,
        tokens: list[int],
        prompt_id: str | None,
        max_tokens: int = 1,
        cache_salt: str | None = None,
    ) -> None:
        """Ask for an answer to the whole prompt, which an open prompt may have begun."""
        extra_args = None if prompt_id is None else {ADOPT: prompt_id}
        self.ask(request_id, tokens, max_tokens, extra_args, cache_salt)

    def ask(
        self,
        request_id: str,
        tokens: list[int],
        max_tokens: int,
        extra_args: dict[str, Any] | None,
        cache_salt: str | None = None,
    ) -> None:
        """Ask for an answer; `extra_args` say of which open prompt the request is the end."""
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=extra_args
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=tokens,
            sampling_params=params,
            pooling_params=None,
            arrival_time=self.now_s,
            cache_salt=cache_salt,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        """Stop an answer and free its blocks; no effect on one that is complete."""
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> Step | None:
        """Compute one step; `now_s` moves to its end.

        Returns:
            What it produced, or None if there was nothing to compute.
        """
        if not self.scheduler.has_requests():
            return None
        output = self.scheduler.schedule()
        computed = output.total_num_scheduled_tokens
        if (copies := output.kv_connector_metadata) is not None:
            self.now_s = self.transfers.begin(copies, self.now_s)
        loading = self.transfers.next_load_s is not None
        if computed:
            step_s = self.hardware.step_s(self.model, _work(output))
            self.now_s += step_s
            self.counters.steps += 1
            self.counters.busy_s += step_s
            self.counters.computed_tokens += computed
        elif (load_s := self.transfers.next_load_s) is not None:
            self.now_s = max(self.now_s, load_s)
        answers = self.scheduler.update_from_output(output, self._result(output))
        produced = [_output(one) for outputs in answers.values() for one in outputs.outputs]
        return Step(produced) if computed or loading else None

    def _result(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """A token for each request whose prompt is complete, none for the others."""
        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        sampled = [
            [self.answers.next_token(r.all_token_ids)]
            if (r := requests.get(i)) is not None and r.num_output_placeholders
            else []
            for i in ids
        ]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=self.transfers.ended(self.now_s),
        )


def _output(one: EngineCoreOutput) -> Output:
    return Output(
        request_id=one.request_id,
        token_ids=one.new_token_ids,
        cached_tokens=one.prefill_stats and one.prefill_stats.num_cached_tokens,
        finished=one.finish_reason is not None,
    )


def _work(output: SchedulerOutput) -> Iterator[tuple[int, int]]:
    """(cached tokens, new tokens) of each request in a step."""
    counts = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield new.num_computed_tokens, counts[new.req_id]
    cached = output.scheduled_cached_reqs
    for request_id, start in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield start, counts[request_id]


def _scheduler(
    model: Model, blocks: int, step_tokens: int, max_requests: int, host_bytes: float
) -> StreamScheduler:
    """The shipping scheduler for a model of which only the shape is known."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_shape(model)))
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=step_tokens,
            max_num_seqs=max_requests,
            block_size=32,  # of the platform this runs on; the scheduler is given its own
            enforce_eager=True,
            dtype="bfloat16",
            kv_transfer_config=_swapping(host_bytes) if host_bytes else None,
        ).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    config.cache_config.block_size = BLOCK_TOKENS
    spec = FullAttentionSpec(  # one layer as wide as all of the model's
        block_size=BLOCK_TOKENS,
        num_kv_heads=model.layers * model.kv_heads,
        head_size=model.head_size,
        dtype=torch.bfloat16,
    )
    return StreamScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
        hash_block_size=BLOCK_TOKENS,
        log_stats=False,
    )


def _swapping(host_bytes: float) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": int(host_bytes)},
    )


def _shape(model: Model) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.heads * model.head_size,
        "intermediate_size": 14336,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": 128256,
        "max_position_embeddings": MAX_MODEL_LEN,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
