"""vLLM's scheduler, taught to prefill prompts that are still growing.

For `--scheduler-cls engine_adapter.vllm.scheduler.StreamScheduler`.

An open prompt is not one long-lived vLLM request. Each version of it is a new, ordinary
request that inherits the KV blocks of its predecessor, and the request that finally answers
is the last successor. The workers see nothing but finished requests and new ones with a
cached prefix, so every feature of vLLM stays on and no worker code is touched.

A version lives in vLLM's queues only while it computes; between its chunks it is *parked*:
it holds blocks, but no slot and no time of the step loop, and its blocks can be taken back,
from the tail on. While open, a prompt's last token is held back: the request stays a partial
prefill for vLLM, which therefore samples nothing.

Each step is decided by `plan` (grants and evictions), carried out here, and then delegated
to vLLM's own `schedule`. With no prompt open this is vLLM's scheduler, unchanged.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from engine_adapter.scheduling import policies
from engine_adapter.scheduling.order import Order
from engine_adapter.scheduling.plan import Plan, plan
from engine_adapter.scheduling.policies import DEFAULT_POLICY
from engine_adapter.scheduling.view import View
from engine_adapter.vllm.kv import BlockTables

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput

    BlockHasher = Callable[[Request], list[BlockHash]]

ADOPT = "stream2llm_prompt"
"""Key in `SamplingParams.extra_args`: the open prompt that a request is the end of."""

DEBUG_CHECKS = "STREAM2LLM_DEBUG_CHECKS"
"""Environment: if `1`, block accounts are checked after each step (slow; for tests)."""


@dataclass(slots=True)
class OpenPrompt:
    """A prompt whose input is not closed, and the request that stands for its version."""

    prompt_id: str
    request: Request
    opened_s: float
    last_input_s: float
    scheduled: bool = False
    """The request is in vLLM's queues; otherwise it is parked."""

    @property
    def remaining_tokens(self) -> int:
        """What it may compute now: everything but the token that is held back."""
        remaining: int = self.request.num_tokens - 1 - self.request.num_computed_tokens
        return max(remaining, 0)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many first elements two lists share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    differs: int = next(i for i in range(n) if a[i] != b[i])
    return differs


def _settings(config: Any) -> dict[str, str]:
    """What vLLM's `--additional-config` has for this plug-in, under `stream2llm`."""
    given = config.additional_config
    settings: dict[str, str] = given.get("stream2llm", {}) if isinstance(given, dict) else {}
    return settings


class StreamScheduler(AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler with open prompts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tables = BlockTables(self.kv_cache_manager)
        self._prompts: dict[str, OpenPrompt] = {}
        self._partial: dict[str, OpenPrompt] = {}  # by request id, those in vLLM's queues
        self._grants: dict[str, int] | None = None  # None: vLLM decides alone
        self._numbers = itertools.count()
        self._replan = False
        self._preemptions = 0
        self._invalidated_tokens = 0
        self._check = os.environ.get(DEBUG_CHECKS) == "1"
        self._last_input_s: dict[str, float] = {}  # of the answers to open prompts
        self._clock: Callable[[], float] = time.time
        policy = _settings(self.vllm_config).get("policy", DEFAULT_POLICY)
        self._order = Order(policies.named(policy))
        self._by_request: dict[str, OpenPrompt] = {}
        self._touched: dict[str, None] = {}  # request ids whose views may be out of date
        self._deferred: dict[str, None] = {}  # those that vLLM kept back a step ago
        self._steady: dict[str, range] = {}
        """Of answers: the computed tokens for which the view of a request stands."""

    # Operations. Called between steps, on the thread of the engine's loop.

    def open_prompt(
        self, prompt_id: str, tokens: list[int], cache_salt: str | None, hasher: BlockHasher | None
    ) -> dict[str, int | str]:
        """Begin a prompt; the caller has checked that the id is free."""
        now = self._clock()
        request = self._version(prompt_id, tokens, now, cache_salt, hasher)
        prompt = self._prompts[prompt_id] = OpenPrompt(prompt_id, request, now, now)
        self._know(prompt)
        self._replan = True
        return self.status(prompt_id)

    def extend_prompt(self, prompt_id: str, keep: int, tokens: list[int]) -> dict[str, int | str]:
        """Keep the first tokens of a prompt and put others behind them.

        Answers the status, with `invalidated`: computed tokens that were given back, and
        `freed_blocks`: how many more KV blocks nobody holds now.
        """
        prompt = self._prompts[prompt_id]
        before = prompt.request.num_computed_tokens
        pool = self.kv_cache_manager.block_pool
        free_before = pool.get_num_free_blocks()
        self._renew(prompt, prompt.request.prompt_token_ids[:keep] + tokens, keep)
        prompt.last_input_s = self._clock()  # its new request is touched already
        self._replan = True
        given_back = max(before - prompt.request.num_computed_tokens, 0)
        self._invalidated_tokens += given_back
        freed = max(pool.get_num_free_blocks() - free_before, 0)
        return self.status(prompt_id) | {"invalidated": given_back, "freed_blocks": freed}

    def close_prompt(self, prompt_id: str) -> None:
        """Forget a prompt and free its blocks; an unknown one is no error."""
        if (prompt := self._prompts.pop(prompt_id, None)) is not None:
            self._withdraw(prompt)
            self._forget(prompt)
            self._free_request_blocks(prompt.request)
            self._replan = True

    def status(self, prompt_id: str) -> dict[str, int | str]:
        """State, length and computed tokens of an open prompt."""
        prompt = self._prompts[prompt_id]
        request = prompt.request
        running = request.status == RequestStatus.RUNNING
        state = "running" if running else "waiting" if prompt.remaining_tokens else "idle"
        return {
            "state": state,
            "length": request.num_tokens,
            "computed": request.num_computed_tokens,
        }

    def set_policy(self, policy: str) -> None:
        """Order by another policy from the next step on.

        Raises:
            ValueError: there is none of that name.
        """
        self._order = Order(policies.named(policy), self._order.views())
        self._replan = True

    def load(self) -> dict[str, int | str]:
        """The policy, and how busy the engine is, in requests and KV blocks."""
        running, waiting = self.get_request_counts()
        pool = self.kv_cache_manager.block_pool
        return {
            "kv_blocks_total": pool.num_gpu_blocks - 1,  # one is vLLM's null block
            "kv_blocks_free": pool.get_num_free_blocks(),
            "running": running,
            "waiting": waiting,
            "open_prompts": len(self._prompts),
            "preemptions": self._preemptions,
            "invalidated_tokens": self._invalidated_tokens,
            "policy": self._order.policy.name,
        }

    # What vLLM calls.

    def add_request(self, request: Request) -> None:
        """Take in a request; one that ends an open prompt inherits what that has computed."""
        extra = (request.sampling_params and request.sampling_params.extra_args) or {}
        prompt = self._prompts.pop(extra.get(ADOPT, ""), None)
        if prompt is not None:
            self._withdraw(prompt)
            self._forget(prompt)
            before = prompt.request.num_computed_tokens
            self._inherit(prompt.request, request, request.num_tokens)
            self._invalidated_tokens += max(before - request.num_computed_tokens, 0)
            request.arrival_time = prompt.opened_s
            self._last_input_s[request.request_id] = self._clock()
            if request.num_computed_tokens and request.prefill_stats is not None:
                request.prefill_stats.set(
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_local_cached_tokens=request.num_computed_tokens,
                    num_external_cached_tokens=0,
                )
        self._touched[request.request_id] = None
        super().add_request(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._last_input_s.pop(request.request_id, None)
        self._steady.pop(request.request_id, None)
        self._touched.pop(request.request_id, None)
        self._order.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def has_requests(self) -> bool:
        """Also true when an operation has given an open prompt something to compute."""
        return self._replan or super().has_requests()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: decide, make room, delegate to vLLM."""
        self._replan = False
        # Waiting requests that hold blocks must be governed even with no prompt open:
        # vLLM alone never takes blocks from them, and they could wait for each other.
        if not self._prompts and not self.kv_holding_waiting:
            return super().schedule(throttle_prefills)
        hidden = self._carry_out(self.decide())
        try:
            return super().schedule(throttle_prefills)
        finally:
            self._grants = None
            for request in hidden:
                self._enqueue_waiting_request(request)
            if self._check:
                self.check_blocks()
                self.check_order()

    def check_order(self) -> None:
        """Raise RuntimeError if the order does not show all requests as they are now."""
        self._refresh()
        prompts = (self._view_of_prompt(prompt) for prompt in self._prompts.values())
        requests = itertools.chain(self.running, self.kv_holding_waiting, self.waiting)
        others = (
            self._view_of_request(r) for r in requests if r.request_id not in self._by_request
        )
        now = {view.request_id: view for view in itertools.chain(prompts, others)}
        known = {view.request_id: view for view in self._order.views()}
        if now != known:
            raise RuntimeError(f"requests are {now}, planned would be {known}")

    def check_blocks(self) -> None:
        """Raise RuntimeError if the block accounts do not balance."""
        parked = (p.request.request_id for p in self._prompts.values())
        deferred = sum(len(blocks) for _, blocks in self.deferred_frees)
        self._tables.check(itertools.chain(self.requests, parked), deferred)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """vLLM asks here, in both its loops, how much of a request to compute."""
        granted: int = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if self._grants is not None:
            granted = min(granted, self._grants.get(request.request_id, 0))
        if request.request_id in self._partial:
            granted = min(granted, request.num_tokens - 1 - num_computed_tokens)
        return max(granted, 0)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            if (prompt := self._partial.get(request_id)) is not None:
                self._touched[request_id] = None
                if not prompt.remaining_tokens:
                    self._withdraw(prompt)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._touched[request.request_id] = None
        self._preemptions += 1

    # Decide.

    def decide(self) -> Plan:
        """What the next step is to compute, and whose KV goes for it; changes nothing."""
        self._refresh()
        partial = sum(
            prompt.request.status == RequestStatus.RUNNING for prompt in self._partial.values()
        )
        return plan(
            self._order,
            budget_tokens=self._step_tokens,
            free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
            slots=self.max_num_active_reqs - (len(self.running) - partial),
            watermark_blocks=self.kv_cache_manager.watermark_blocks if self.running else 0,
            freeable_blocks=self._freeable_blocks,
        )

    @property
    def _step_tokens(self) -> int:
        tokens: int = min(
            self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens
        )
        return tokens

    def _freeable_blocks(self, view: View) -> int:
        """Blocks that come free if everything is taken from a request."""
        request = self.requests.get(view.request_id)
        if request is not None and (
            request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            or not self._request_blocks_can_be_freed(request)
        ):
            return 0
        return self._tables.exclusive(view.request_id)

    def _refresh(self) -> None:
        """Bring the order up to date: what was touched, what runs, what vLLM holds back."""
        steady = self._steady
        for request in self.running:
            request_id = request.request_id
            stands = steady.get(request_id)
            if stands is None or request.num_computed_tokens not in stands:
                self._touched[request_id] = None
        deferred = {request.request_id: None for request in self.deferred_waiting}
        for request_id in self._touched | deferred | self._deferred:
            if (prompt := self._by_request.get(request_id)) is not None:
                self._order.put(self._view_of_prompt(prompt))
            elif (request := self.requests.get(request_id)) is not None:
                self._order.put(self._view_of_request(request))
        self._touched.clear()
        self._deferred = deferred

    def _know(self, prompt: OpenPrompt) -> None:
        request_id = prompt.request.request_id
        self._by_request[request_id] = prompt
        self._touched[request_id] = None

    def _forget(self, prompt: OpenPrompt) -> None:
        request_id = prompt.request.request_id
        del self._by_request[request_id]
        self._order.discard(request_id)

    def _view_of_prompt(self, prompt: OpenPrompt) -> View:
        request = prompt.request
        running = request.status == RequestStatus.RUNNING
        remaining, step_tokens = prompt.remaining_tokens, self._step_tokens
        step = remaining if remaining < step_tokens else step_tokens
        tokens = request.num_computed_tokens + step if running else request.num_tokens
        return View(
            request_id=request.request_id,
            full=False,
            arrival_s=prompt.opened_s,
            last_input_s=prompt.last_input_s,
            computed_tokens=request.num_computed_tokens,
            remaining_tokens=remaining,
            held_blocks=self._tables.held(request.request_id),
            needed_blocks=self._tables.needed(tokens),
            running=running,
            divisible=self._tables.can_inherit,
            step_tokens=step_tokens,
        )

    def _view_of_request(self, request: Request) -> View:
        request_id = request.request_id
        running = request.status == RequestStatus.RUNNING
        decoding = running and not request.is_prefill_chunk
        computed = request.num_computed_tokens
        remaining = request.num_tokens_with_spec + request.num_output_placeholders - computed
        step_tokens = self._step_tokens
        step = min(remaining, step_tokens) + self.num_lookahead_tokens
        # vLLM admits a waiting request only if its whole sequence fits.
        tokens = computed + step if running else request.num_tokens
        held = self._tables.held(request_id)
        needed = self._tables.needed(min(tokens, self.max_model_len))
        self._steady.pop(request_id, None)
        if decoding:
            block = self._tables.smallest_block
            computed -= computed % block
            if remaining == 1 and needed <= held:  # until a token begins a block
                self._steady[request_id] = range(computed, computed + block - step)
        return View(
            request_id=request_id,
            full=True,
            arrival_s=request.arrival_time,
            last_input_s=self._last_input_s.get(request_id, request.arrival_time),
            computed_tokens=computed,
            remaining_tokens=remaining,
            held_blocks=held,
            needed_blocks=needed,
            decoding=decoding,
            running=running,
            priority=request.priority,
            step_tokens=step_tokens,
        )

    # Make room, and show vLLM what it may schedule.

    def _carry_out(self, decided: Plan) -> list[Request]:
        """Evict, bring the granted prompts into vLLM's queues, park the others.

        Returns the waiting requests that were not granted. They are taken out of the queues
        for this step, because vLLM stops at the first waiting request it can't schedule.
        """
        self._grants = dict(decided.grants)
        for eviction in decided.evictions:
            prompt = self._by_request.get(eviction.request_id)
            if prompt is None:
                self._evict_request(self.requests[eviction.request_id])
            else:
                self._evict_prompt(prompt, eviction.keep_blocks)
        for prompt in [p for i in self._grants if (p := self._by_request.get(i)) is not None]:
            self._activate(prompt)
        for prompt in [p for i, p in self._partial.items() if i not in self._grants]:
            self._renew(prompt, prompt.request.prompt_token_ids, prompt.request.num_tokens)
        rank = {request_id: i for i, request_id in enumerate(self._grants)}
        self.running.sort(key=lambda r: rank.get(r.request_id, len(rank)))
        return self._hide_waiting(rank)

    def _hide_waiting(self, rank: dict[str, int]) -> list[Request]:
        waiting = [*self.kv_holding_waiting, *self.waiting]
        self.kv_holding_waiting.remove_requests(waiting)
        self.waiting.remove_requests(waiting)
        granted = [r for r in waiting if r.request_id in rank]
        for request in sorted(granted, key=lambda r: rank[r.request_id]):
            self._enqueue_waiting_request(request)
        return [r for r in waiting if r.request_id not in rank]

    def _evict_request(self, request: Request) -> None:
        """Take everything from an ordinary request, as vLLM's preemption does."""
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
            return
        self.kv_holding_waiting.remove_requests([request])
        self._free_request_blocks(request)
        self._touched[request.request_id] = None
        request.num_computed_tokens = 0
        self._preemptions += 1
        self._enqueue_waiting_request(request)

    def _evict_prompt(self, prompt: OpenPrompt, keep_blocks: int) -> None:
        """Take the tail blocks of an open prompt and park it."""
        keep = min(keep_blocks * self._tables.block_size, prompt.request.num_computed_tokens)
        self._renew(prompt, prompt.request.prompt_token_ids, keep)
        self._preemptions += 1

    def _activate(self, prompt: OpenPrompt) -> None:
        if self._covered_by_cache(prompt.request):
            self._withdraw(prompt)
        elif not prompt.scheduled:
            prompt.scheduled = True
            self._partial[prompt.request.request_id] = prompt
            super().add_request(prompt.request)

    def _covered_by_cache(self, request: Request) -> bool:
        """Take the prefix-cache hits of a fresh request if they leave nothing to compute.

        vLLM looks them up itself when it schedules a request, but can't schedule one that
        has no token to compute.
        """
        if request.num_computed_tokens or request.num_tokens == 1:
            return False
        blocks, hit_tokens, *_ = self.kv_cache_manager.get_computed_blocks(request)
        if hit_tokens < request.num_tokens - 1:
            return False
        taken = self.kv_cache_manager.allocate_slots(
            request, 0, num_new_computed_tokens=hit_tokens, new_computed_blocks=blocks
        )
        if taken is not None:
            request.num_computed_tokens = hit_tokens
            self._touched[request.request_id] = None
        return taken is not None

    # Versions.

    def _version(
        self,
        prompt_id: str,
        tokens: list[int],
        arrival_s: float,
        cache_salt: str | None,
        hasher: BlockHasher | None,
        block_hashes: list[BlockHash] | None = None,
    ) -> Request:
        """A request that stands for one version of an open prompt."""
        request = Request(
            request_id=f"{prompt_id}@{next(self._numbers)}",
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            pooling_params=None,
            arrival_time=arrival_s,
            cache_salt=cache_salt,
        )
        request._block_hasher = hasher
        request.block_hashes = block_hashes or []
        request.update_block_hashes()
        return request

    def _renew(self, prompt: OpenPrompt, tokens: list[int], keep: int) -> None:
        """Replace an open prompt's request by one with these tokens, and park it.

        `keep`: first tokens that are the same in both and whose KV shall stay.
        """
        old = prompt.request
        self._withdraw(prompt)
        self._forget(prompt)
        same = min(keep, len(tokens)) // self.hash_block_size
        prompt.request = self._version(
            prompt.prompt_id,
            tokens,
            prompt.opened_s,
            old.cache_salt,
            old._block_hasher,
            old.block_hashes[:same],
        )
        self._know(prompt)
        self._inherit(old, prompt.request, keep)

    def _inherit(self, old: Request, new: Request, keep: int) -> None:
        """Hand the KV of a withdrawn request to its successor, as far as their tokens agree.

        A step may still be computing the old request's newest tokens: workers run steps in
        order, so what the successor's step reads is written by then.
        """
        keep = min(keep, common_prefix(old.prompt_token_ids, new.prompt_token_ids))
        computed = min(keep, new.num_tokens - 1, old.num_computed_tokens)
        shorter = computed < old.num_computed_tokens
        if not self._tables.can_inherit or (shorter and not self._request_blocks_can_be_freed(old)):
            self._free_request_blocks(old)  # the prefix cache still finds them
            return
        if shorter:
            # Never into a block that is full: it is hashed and may be shared.
            computed -= computed % self._tables.block_size
            self._tables.cut(old.request_id, computed, self._free_blocks_of_tail)
        self._tables.hand_over(old.request_id, new.request_id)
        new.num_computed_tokens = computed

    def _free_blocks_of_tail(self, blocks: list[KVCacheBlock]) -> None:
        self.kv_cache_manager.block_pool.free_blocks(reversed(blocks))

    def _withdraw(self, prompt: OpenPrompt) -> None:
        """Take a prompt's request out of vLLM's queues and the workers, blocks untouched."""
        if not prompt.scheduled:
            return
        request = prompt.request
        prompt.scheduled = False
        self._touched[request.request_id] = None
        del self._partial[request.request_id]
        del self.requests[request.request_id]
        self._inflight_prefills.discard(request)
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove_requests([request])
            self.kv_holding_waiting.remove_requests([request])
            self.deferred_waiting.discard(request)
        if self.aux_output_connector is not None:
            self.aux_output_connector.request_finished(request)
        request.status = RequestStatus.WAITING
        self.finished_req_ids.add(request.request_id)
