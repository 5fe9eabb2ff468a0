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

Each step is decided by `plan` (grants and evictions), carried out by `Execution`, and then
delegated to vLLM's own `schedule`. With no prompt open this is vLLM's scheduler, unchanged.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from engine_adapter.errors import PromptFinished
from engine_adapter.scheduling import policies
from engine_adapter.scheduling.cost import CostModel
from engine_adapter.scheduling.fairness import Present, Shares
from engine_adapter.scheduling.plan import Plan, plan
from engine_adapter.scheduling.policies import DEFAULT_POLICY
from engine_adapter.scheduling.view import View
from engine_adapter.vllm.execution import Execution
from engine_adapter.vllm.handing_over import Leases, hands_over
from engine_adapter.vllm.host import HostMemory, loading
from engine_adapter.vllm.kv import BlockTables
from engine_adapter.vllm.open_prompts import (
    Endings,
    OpenPrompt,
    answers_version_before,
    common_prefix,
    ended_prompt,
)
from engine_adapter.vllm.prefix_cache import PrefixCache
from engine_adapter.vllm.setup import cost_model, setup_of
from engine_adapter.vllm.views import Views

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput

    BlockHasher = Callable[[Request], list[BlockHash]]

DEBUG_CHECKS = "STREAM2LLM_DEBUG_CHECKS"
"""Environment: if `1`, block accounts are checked after each step (slow; for tests)."""


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
        self.partial: dict[str, OpenPrompt] = {}
        """The open prompts that are in vLLM's queues, by request id."""
        self._grants: dict[str, int] | None = None  # None: vLLM decides alone
        self._numbers = itertools.count()
        self._replan = False
        self.preemptions = 0
        """How often KV was taken from a request or an open prompt."""
        self._invalidated_tokens = 0
        self._abandoned_tokens = 0
        self._check = os.environ.get(DEBUG_CHECKS) == "1"
        self._endings = Endings()
        self._shares = Shares()
        self._present = Present()
        self._clock: Callable[[], float] = time.time
        settings = _settings(self.vllm_config)
        policy = policies.named(settings.get("policy", DEFAULT_POLICY))
        self._views = Views(self, self._tables, policy, self._shares)
        self._execution = Execution(self, self._tables, self._views)
        self.setup = setup_of(self.vllm_config)
        self.cost = cost_model(settings.get("cost_model"), self.setup)
        """What bringing back a victim's KV costs; None if nobody has measured it."""
        self._host = HostMemory(self.connector, self.cost)
        self._leases = Leases(self.connector, self.parallel_config.world_size)
        self.prefix_cache = PrefixCache(self, self._tables)

    # Operations. Called between steps, on the thread of the engine's loop.

    def open_prompt(
        self,
        prompt_id: str,
        tokens: list[int],
        cache_salt: str | None,
        hasher: BlockHasher | None,
        weight: float | None = None,
    ) -> dict[str, int | str]:
        """Begin a prompt; the caller has checked that the id is free. The weight is that of all
        requests with this salt."""
        if weight is not None and self._shares.weigh(cache_salt or "", weight):
            self._know_tenant(cache_salt)
        now = self._clock()
        request = self._version(prompt_id, tokens, now, cache_salt, hasher)
        prompt = self._prompts[prompt_id] = OpenPrompt(prompt_id, request, now, now)
        self._present.put(prompt_id, self._shares.tenant_of(cache_salt))
        self._views.put_prompt(prompt)
        self._replan = True
        return self.status(prompt_id)

    def _know_tenant(self, cache_salt: str | None) -> None:
        """Requests and prompts that have come with this salt are a tenant's from now on."""
        tenant = self._shares.tenant_of(cache_salt)
        prompts = {p.prompt_id: p.request for p in self._prompts.values()}
        partial = {request.request_id for request in prompts.values()}
        others = {i: r for i, r in self.requests.items() if i not in partial}
        for name, request in (prompts | others).items():
            if request.cache_salt == cache_salt:
                self._present.put(name, tenant)
                self._views.touch(request)

    def extend_prompt(self, prompt_id: str, keep: int, tokens: list[int]) -> dict[str, int | str]:
        """Keep the first tokens of a prompt and put others behind them.

        Answers the status, with `invalidated`: computed tokens that were given back, and
        `freed_blocks`: how many more KV blocks nobody holds now.
        """
        prompt = self._prompts[prompt_id]
        before = prompt.request.num_computed_tokens
        pool = self.kv_cache_manager.block_pool
        free_before = pool.get_num_free_blocks()
        self.renew(prompt, prompt.request.prompt_token_ids[:keep] + tokens, keep)
        prompt.lost_tokens = min(prompt.lost_tokens, keep)
        prompt.last_input_s = self._clock()  # its new request is touched already
        self._replan = True
        given_back = max(before - prompt.request.num_computed_tokens, 0)
        self._invalidated_tokens += given_back
        freed = max(pool.get_num_free_blocks() - free_before, 0)
        return self.status(prompt_id) | {"invalidated": given_back, "freed_blocks": freed}

    def reopen_prompt(
        self, prompt_id: str, version: int, tokens: list[int]
    ) -> dict[str, int | str]:
        """Replace a prompt whose input is closed, as long as its answer has no token yet.

        The prompt is open again, and its answer is given up without a word. The request that
        ends it may also be on its way still: then the prompt is open anyhow, and that request
        is dropped when it arrives. Answers as `extend_prompt` does.

        Raises:
            PromptFinished: the answer has begun, or is over.
        """
        prompt = self._prompts.get(prompt_id) or self._take_back(prompt_id)
        prompt.reopened_version = version
        keep = common_prefix(prompt.request.prompt_token_ids, tokens)
        return self.extend_prompt(prompt_id, keep, tokens[keep:])

    def close_prompt(self, prompt_id: str) -> None:
        """Forget a prompt and free its blocks, also those that wait for another engine; an unknown
        one is no error."""
        self._replan |= self._leases.end(prompt_id)
        if (prompt := self._prompts.pop(prompt_id, None)) is not None:
            self.withdraw(prompt)
            self._present.discard(prompt_id)
            self._views.drop_prompt(prompt)
            self._abandoned_tokens += prompt.request.num_computed_tokens
            self._release(prompt.request)
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

    def handed_over(self, prompt_id: str, forget: bool) -> dict[str, int | str]:
        """What has become of the KV of a prompt that another engine is to fetch, as `state`; empty
        if nothing is known of it.

        A step follows: an idle engine hears from its connector only then.

        Args:
            forget: nobody will ask again. The lease goes on.
        """
        state = self._leases.state(prompt_id)
        self._replan |= state == "handed_over"
        if forget:
            self._leases.forget(prompt_id)
        return {} if state is None else {"state": state}

    def set_policy(self, policy: str) -> None:
        """Order by another policy from the next step on.

        Raises:
            ValueError: there is none of that name.
        """
        self._views.set_policy(policies.named(policy))
        self._replan = True

    def set_cost(self, cost: CostModel) -> None:
        """Reckon by these costs from the next step on what bringing KV back costs."""
        self.cost = cost
        self._host = HostMemory(self.connector, cost)

    def load(self) -> dict[str, int | str]:
        """Policy, hardware, cost model, and how busy the engine is, in requests and KV blocks."""
        running, waiting = self.get_request_counts()
        pool = self.kv_cache_manager.block_pool
        self._views.refresh()
        return {
            "kv_blocks_total": pool.num_gpu_blocks - 1,  # one is vLLM's null block
            "kv_blocks_free": pool.get_num_free_blocks(),
            "running": running,
            "waiting": waiting,
            "waiting_tokens": self._views.order.waiting_tokens(),
            "open_prompts": len(self._prompts),
            "preemptions": self.preemptions,
            "invalidated_tokens": self._invalidated_tokens,
            "abandoned_tokens": self._abandoned_tokens,
            "policy": self._views.order.policy.name,
            "hardware": self.setup.hardware,
            "accelerators": self.vllm_config.parallel_config.world_size,
            "settings": self.setup.settings,
            "hands_over": hands_over(self.vllm_config.kv_transfer_config),
            "cost_model": "" if self.cost is None else str(self.cost),
        }

    # What vLLM calls.

    def add_request(self, request: Request) -> None:
        """Take in a request; one that ends an open prompt inherits what that has computed."""
        prompt = self._prompts.get(ended_prompt(request) or "")
        if prompt is not None:
            if answers_version_before(request, prompt.reopened_version):
                return  # nobody waits for it: its prompt was replaced while it was on its way
            del self._prompts[prompt.prompt_id]
            self._present.discard(prompt.prompt_id)
            self.withdraw(prompt)
            self._views.drop_prompt(prompt)
            before = prompt.request.num_computed_tokens
            self._inherit(prompt.request, request, request.num_tokens)
            self._execution.take_cached(
                request, self.kv_cache_manager.block_pool.get_num_free_blocks()
            )
            self._invalidated_tokens += max(before - request.num_computed_tokens, 0)
            request.arrival_time = prompt.opened_s
            self._views.last_input_s[request.request_id] = self._clock()
            if request.num_computed_tokens and request.prefill_stats is not None:
                request.prefill_stats.set(
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_local_cached_tokens=request.num_computed_tokens,
                    num_external_cached_tokens=0,
                )
        self._endings.put(request)
        self._present.put(request.request_id, self._shares.tenant_of(request.cache_salt))
        self._views.touch(request)
        fetches = self._fetches(request, 0 if prompt is None else prompt.lost_tokens)
        super().add_request(request)
        if not fetches and self.cost is not None:  # otherwise the connector does as configured
            self._host.forbid(request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._endings.discard(request)
        self._views.drop(request)
        self._present.discard(request.request_id)
        params = super()._free_request(request, *args, **kwargs)
        if request.request_id in self.requests:
            self._leases.put(request)
        return params

    def _free_blocks(self, request: Request) -> None:
        self._leases.discard(request)
        super()._free_blocks(request)

    def _update_from_kv_xfer_finished(self, kv_connector_output: KVConnectorOutput) -> None:
        self._leases.take_in(kv_connector_output)
        super()._update_from_kv_xfer_finished(kv_connector_output)

    def has_requests(self) -> bool:
        """Also true when an operation has given an open prompt something to compute."""
        return self._replan or super().has_requests()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step: decide, make room, delegate to vLLM."""
        self._replan = False
        self._take_in_loads()
        # Waiting requests that hold blocks must be governed even with no prompt open:
        # vLLM alone never takes blocks from them, and they could wait for each other. So must those
        # of several tenants, among whom vLLM knows no turns.
        if not self._prompts and not self.kv_holding_waiting and not self._present.compete:
            return super().schedule(throttle_prefills)
        decided = self.decide()
        self._grants = dict(decided.grants)
        hidden = self._execution.carry_out(decided)
        try:
            return super().schedule(throttle_prefills)
        finally:
            self._settle_for_computing()
            self._grants = None
            for request in hidden:
                self._enqueue_waiting_request(request)
            if self._check:
                self.check_blocks()
                self._views.check(self._prompts.values())

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
        if request.request_id in self.partial:
            granted = min(granted, request.num_tokens - 1 - num_computed_tokens)
        return max(granted, 0)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            if (prompt := self.partial.get(request_id)) is not None:
                self._views.touch(prompt.request)
                if not prompt.remaining_tokens:
                    self.withdraw(prompt)

    def _update_request_with_output(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if request.status != RequestStatus.RUNNING:  # a token from before it was preempted
            self._views.touch(request)
        return super()._update_request_with_output(request, *args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self._views.touch(request)
        self.preemptions += 1

    # Decide.

    def decide(self) -> Plan:
        """What the next step is to compute, and whose KV goes for it."""
        self._views.refresh()
        partial = sum(
            prompt.request.status == RequestStatus.RUNNING for prompt in self.partial.values()
        )
        turns = self._shares.turns(self._views.order, self._present.tenants)
        decided = plan(
            self._views.order,
            budget_tokens=self._views.step_tokens,
            free_blocks=self.kv_cache_manager.block_pool.get_num_free_blocks(),
            slots=self.max_num_active_reqs - (len(self.running) - partial),
            watermark_blocks=self.kv_cache_manager.watermark_blocks if self.running else 0,
            freeable_blocks=self._freeable_blocks,
            restore_s=self._restore_s,
            turns=turns,
        )
        if turns is not None:
            self._shares.settle(turns)
        return decided

    def _freeable_blocks(self, view: View) -> int:
        """Blocks that come free if everything is taken from a request."""
        request = self.requests.get(view.request_id)
        if request is not None and (
            loading(request) or not self._request_blocks_can_be_freed(request)
        ):
            return 0
        return self._tables.exclusive(view.request_id)

    def _restore_s(self, view: View, keep_blocks: int) -> float:
        """What it costs to give a request back what it holds behind its first blocks."""
        keep_tokens = keep_blocks * self._tables.block_size
        return self._host.restore(view.computed_tokens, keep_tokens)[1]

    def admit(self, prompt: OpenPrompt) -> None:
        """Bring a prompt that is parked into vLLM's queues."""
        prompt.scheduled = True
        self.partial[prompt.request.request_id] = prompt
        fetches = self._fetches(prompt.request, prompt.lost_tokens)
        prompt.lost_tokens = 0
        super().add_request(prompt.request)
        if not fetches:
            self._host.forbid(prompt.request, store=self.cost is None)

    # Host memory.

    def _fetches(self, request: Request, lost_tokens: int) -> bool:
        """Choose whether a request's KV comes from host memory, as far as that has it.

        vLLM asks its connector only for a request that has no KV. One that has kept some gives
        it up for that: the prefix cache finds it again in the same step.

        Args:
            lost_tokens: how many of its first tokens had been computed before they were taken.
        """
        computed = request.num_computed_tokens
        had_tokens = max(lost_tokens, 0 if computed else request.num_tokens)
        if had_tokens <= computed or self._host.restore(had_tokens, computed)[0] == "recompute":
            return False
        if computed:
            self._free_request_blocks(request)
            request.num_computed_tokens = 0
            self._views.touch(request)
        return True

    def _take_in_loads(self) -> None:
        """Requests whose KV has come from host memory can be scheduled again, or parked."""
        if not self.finished_recving_kv_req_ids:
            return
        for request in [r for r in self.kv_holding_waiting if loading(r)]:
            if self._handle_blocked_waiting_request(request):
                self.deferred_waiting.discard(request)
                self._views.touch(request)
                prompt = self.partial.get(request.request_id)
                if prompt is not None and not prompt.remaining_tokens:
                    self.withdraw(prompt)

    def _settle_for_computing(self) -> None:
        """The request that vLLM stopped at, though it was granted tokens, fetches no KV.

        vLLM admits a fetch only when it fits beside all that prefills under way still need. The
        request would keep its grant from them meanwhile, and nobody would get on.
        """
        if self.connector is None:
            return
        queue = itertools.chain(self.kv_holding_waiting, self.waiting)
        stopped_at = next((r for r in queue if r not in self.deferred_waiting), None)
        if stopped_at is not None and stopped_at.request_id in (self._grants or {}):
            self._host.forbid(stopped_at)

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

    def renew(self, prompt: OpenPrompt, tokens: list[int], keep: int) -> None:
        """Replace an open prompt's request by one with these tokens, and park it.

        `keep`: first tokens that are the same in both and whose KV shall stay.
        """
        old = prompt.request
        self.withdraw(prompt)
        self._views.drop_prompt(prompt)
        same = min(keep, len(tokens)) // self.hash_block_size
        prompt.request = self._version(
            prompt.prompt_id,
            tokens,
            prompt.opened_s,
            old.cache_salt,
            old._block_hasher,
            old.block_hashes[:same],
        )
        self._views.put_prompt(prompt)
        self._inherit(old, prompt.request, keep)

    def _inherit(self, old: Request, new: Request, keep: int) -> None:
        """Hand the KV of a withdrawn request to its successor, as far as their tokens agree.

        A step may still be computing the old request's newest tokens: workers run steps in
        order, so what the successor's step reads is written by then.
        """
        if old.request_id in self.requests:
            return  # vLLM frees its blocks when what is being fetched into them has come
        keep = min(keep, common_prefix(old.prompt_token_ids, new.prompt_token_ids))
        computed = min(keep, new.num_tokens - 1, old.num_computed_tokens)
        # A prompt that came whole from host memory has a full block of which vLLM computes the last
        # token again: the same one only.
        hashed = self._tables.hashed_tokens(old.request_id)
        shorter = computed < old.num_computed_tokens or keep < hashed
        if not self._tables.can_inherit or (shorter and not self._request_blocks_can_be_freed(old)):
            self._free_request_blocks(old)  # the prefix cache still finds them
            return
        if shorter:
            # Never into a block that is full: it is hashed and may be shared.
            computed -= computed % self._tables.block_size
            self._tables.cut(old.request_id, computed, self.free_tail)
        self._tables.hand_over(old.request_id, new.request_id)
        # What a step in flight still writes to is fenced by the number of that step.
        new.last_sched_seq = max(new.last_sched_seq, old.last_sched_seq)
        new.num_computed_tokens = computed

    def _release(self, request: Request) -> None:
        """Free the blocks of a withdrawn request."""
        if request.request_id not in self.requests:
            self._free_request_blocks(request)

    def free_tail(self, blocks: list[KVCacheBlock]) -> None:
        """Give back blocks that were cut off a request, the last of them first."""
        self.kv_cache_manager.block_pool.free_blocks(reversed(blocks))

    def _take_back(self, prompt_id: str) -> OpenPrompt:
        """Make the request that answers a prompt the request of an open prompt again.

        A step in flight may already be sampling the first token. Its output will find no
        request, and what it writes behind the prompt is written over by the successor.

        Raises:
            PromptFinished: the request has a token, or is over.
        """
        request = self._endings.without_token(prompt_id)
        if request is None:
            raise PromptFinished(f"the answer to prompt {prompt_id!r} has begun")
        self._endings.discard(request)
        self._present.discard(request.request_id)
        self._views.drop(request)
        request.num_computed_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        prompt = OpenPrompt(prompt_id, request, request.arrival_time, self._clock(), scheduled=True)
        self._prompts[prompt_id] = self.partial[request.request_id] = prompt
        self._present.put(prompt_id, self._shares.tenant_of(request.cache_salt))
        self._views.put_prompt(prompt)
        return prompt

    def withdraw(self, prompt: OpenPrompt) -> None:
        """Take a prompt's request out of vLLM's queues and the workers, blocks untouched."""
        if not prompt.scheduled:
            return
        request = prompt.request
        prompt.scheduled = False
        self._views.touch(request)
        del self.partial[request.request_id]
        if loading(request):
            super().finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
            request.num_computed_tokens = 0
            return
        del self.requests[request.request_id]
        self._inflight_prefills.discard(request)
        self._set_kv_fetch_stage(request, None)  # else vLLM's statistics keep it for ever
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove_requests([request])
            self.kv_holding_waiting.remove_requests([request])
            self.deferred_waiting.discard(request)
        if self.aux_output_connector is not None:
            self.aux_output_connector.request_finished(request)
        request.status = RequestStatus.FINISHED_ABORTED
        self._connector_finished(request)
        self.finished_req_ids.add(request.request_id)
