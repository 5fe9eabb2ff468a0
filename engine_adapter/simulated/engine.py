"""The shipping scheduler on a virtual clock: the model is replaced by what a step would cost.

Nothing of the scheduler is simulated: `StreamScheduler`, vLLM's KV cache manager and its
prefix cache run as they ship. What a step takes comes from `hardware.py`; operations take
effect between steps, as in the real engine.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from engine_adapter.scheduling import policies
from engine_adapter.simulated.hardware import Hardware, Model
from engine_adapter.vllm.prompts import ADOPT
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


@dataclass(slots=True)
class SimulatedEngine:
    """One engine in virtual time. The caller delivers operations and turns the loop."""

    hardware: Hardware
    model: Model
    policy: str = policies.DEFAULT_POLICY
    step_tokens: int = 8192
    max_requests: int = 1024
    now_s: float = 0.0
    counters: Counters = field(default_factory=Counters)
    scheduler: StreamScheduler = field(init=False)
    _hasher: Any = field(init=False)

    def __post_init__(self) -> None:
        blocks = self.hardware.kv_tokens(self.model) // BLOCK_TOKENS
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, hash_fn)
        self.scheduler = _scheduler(self.model, blocks, self.step_tokens, self.max_requests)
        self.scheduler.set_policy(self.policy)
        self.scheduler._clock = lambda: self.now_s

    def open(self, prompt_id: str, tokens: list[int]) -> None:
        """Begin a prompt."""
        self.scheduler.open_prompt(prompt_id, tokens, None, self._hasher)

    def extend(self, prompt_id: str, keep: int, tokens: list[int]) -> None:
        """Replace what is behind the first `keep` tokens."""
        answer = self.scheduler.extend_prompt(prompt_id, keep, tokens)
        self.counters.invalidated_tokens += int(answer["invalidated"])

    def finish(
        self, request_id: str, tokens: list[int], prompt_id: str | None, max_tokens: int = 1
    ) -> None:
        """Ask for an answer to the whole prompt, which an open prompt may have begun."""
        extra = None if prompt_id is None else {ADOPT: prompt_id}
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=extra
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=tokens,
            sampling_params=params,
            pooling_params=None,
            arrival_time=self.now_s,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)

    def step(self) -> list[str] | None:
        """Compute one step; `now_s` moves to its end.

        Returns:
            Requests that got their token, or None if there was nothing to compute.
        """
        if not self.scheduler.has_requests():
            return None
        output = self.scheduler.schedule()
        computed = output.total_num_scheduled_tokens
        if computed:
            step_s = self.hardware.step_s(self.model, _work(output))
            self.now_s += step_s
            self.counters.steps += 1
            self.counters.busy_s += step_s
            self.counters.computed_tokens += computed
        answers = self.scheduler.update_from_output(output, self._result(output))
        answered = [
            one.request_id
            for outputs in answers.values()
            for one in outputs.outputs
            if one.finish_reason is not None
        ]
        return answered if computed else None

    def _result(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """A token for each request whose prompt is complete, none for the others."""
        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        sampled = [
            [1] if (r := requests.get(i)) is not None and r.num_output_placeholders else []
            for i in ids
        ]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
        )


def _work(output: SchedulerOutput) -> Iterator[tuple[int, int]]:
    """(cached tokens, new tokens) of each request in a step."""
    counts = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield new.num_computed_tokens, counts[new.req_id]
    cached = output.scheduled_cached_reqs
    for request_id, start in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield start, counts[request_id]


def _scheduler(model: Model, blocks: int, step_tokens: int, max_requests: int) -> StreamScheduler:
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
        ).create_engine_config()
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.bfloat16
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
