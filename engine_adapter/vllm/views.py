"""vLLM's requests as policies see them, kept in the order of the policy between steps.

A view is built anew only when its request may have changed: it computed, an operation touched it,
or vLLM kept it back. The largest part of deciding a step would be looking at all the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.request import Request, RequestStatus

from engine_adapter.scheduling.fairness import Shares
from engine_adapter.scheduling.order import Order
from engine_adapter.scheduling.policies import Policy
from engine_adapter.scheduling.view import View
from engine_adapter.vllm.host import loading
from engine_adapter.vllm.kv import BlockTables
from engine_adapter.vllm.open_prompts import OpenPrompt

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class Views:
    """All unfinished requests of a scheduler."""

    def __init__(
        self, scheduler: Scheduler, tables: BlockTables, policy: Policy, shares: Shares
    ) -> None:
        self.order = Order(policy)
        """As of the last `refresh`."""
        self.prompts: dict[str, OpenPrompt] = {}
        """The open prompts, by the id of the request that stands for each."""
        self.last_input_s: dict[str, float] = {}
        """When the input of a request was closed, where that was not when it arrived."""
        self._scheduler = scheduler
        self._tables = tables
        self._shares = shares
        self._touched: dict[str, None] = {}  # request ids whose views may be out of date
        self._deferred: dict[str, None] = {}  # those that vLLM kept back a step ago
        self._steady: dict[str, range] = {}
        """Of answers: the computed tokens for which the view of a request stands."""

    @property
    def step_tokens(self) -> int:
        """Tokens that one step can compute."""
        scheduler = self._scheduler
        tokens: int = min(
            scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.max_num_batched_tokens
        )
        return tokens

    def set_policy(self, policy: Policy) -> None:
        """Order by another policy."""
        self.order = Order(policy, self.order.views())

    def touch(self, request: Request) -> None:
        """The request may have changed, or is new."""
        self._touched[request.request_id] = None

    def drop(self, request: Request) -> None:
        """The request is over; an unknown one is no error."""
        request_id = request.request_id
        self.last_input_s.pop(request_id, None)
        self._steady.pop(request_id, None)
        self._touched.pop(request_id, None)
        self.order.discard(request_id)

    def put_prompt(self, prompt: OpenPrompt) -> None:
        """The prompt's request stands for it."""
        self.prompts[prompt.request.request_id] = prompt
        self.touch(prompt.request)

    def drop_prompt(self, prompt: OpenPrompt) -> None:
        """The prompt's request stands for it no more."""
        del self.prompts[prompt.request.request_id]
        self.order.discard(prompt.request.request_id)

    def refresh(self) -> None:
        """Bring the order up to date: what was touched, what runs, what vLLM holds back."""
        steady, requests = self._steady, self._scheduler.requests
        for request in self._scheduler.running:
            request_id = request.request_id
            stands = steady.get(request_id)
            if stands is None or request.num_computed_tokens not in stands:
                self._touched[request_id] = None
        deferred = {request.request_id: None for request in self._scheduler.deferred_waiting}
        for request_id in self._touched | deferred | self._deferred:
            if (prompt := self.prompts.get(request_id)) is not None:
                self.order.put(self._view_of_prompt(prompt))
            elif (r := requests.get(request_id)) is not None and not r.is_finished():
                self.order.put(self._view_of_request(r))
        self._touched.clear()
        self._deferred = deferred

    def check(self, prompts: Iterable[OpenPrompt]) -> None:
        """Compare the order with what all requests are now.

        Args:
            prompts: all that are open.

        Raises:
            RuntimeError: a change was missed.
        """
        self.refresh()
        scheduler = self._scheduler
        requests = itertools.chain(
            scheduler.running, scheduler.kv_holding_waiting, scheduler.waiting
        )
        others = [r for r in requests if r.request_id not in self.prompts]
        views = [*map(self._view_of_prompt, prompts), *map(self._view_of_request, others)]
        now = {view.request_id: view for view in views}
        known = {view.request_id: view for view in self.order.views()}
        if now != known:
            raise RuntimeError(f"requests are {now}, planned would be {known}")

    def _view_of_prompt(self, prompt: OpenPrompt) -> View:
        request = prompt.request
        running = request.status == RequestStatus.RUNNING
        remaining = 0 if loading(request) else prompt.remaining_tokens
        step_tokens = self.step_tokens
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
            tenant=self._shares.tenant_of(request.cache_salt),
            step_tokens=step_tokens,
        )

    def _view_of_request(self, request: Request) -> View:
        request_id = request.request_id
        running = request.status == RequestStatus.RUNNING
        decoding = running and not request.is_prefill_chunk
        computed = request.num_computed_tokens
        remaining = request.num_tokens_with_spec + request.num_output_placeholders - computed
        if loading(request):
            remaining = 0
        step_tokens = self.step_tokens
        step = min(remaining, step_tokens) + self._scheduler.num_lookahead_tokens
        # vLLM admits a waiting request only if its whole sequence fits.
        tokens = computed + step if running else request.num_tokens
        held = self._tables.held(request_id)
        needed = self._tables.needed(min(tokens, self._scheduler.max_model_len))
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
            last_input_s=self.last_input_s.get(request_id, request.arrival_time),
            computed_tokens=computed,
            remaining_tokens=remaining,
            held_blocks=held,
            needed_blocks=needed,
            decoding=decoding,
            running=running,
            priority=request.priority,
            tenant=self._shares.tenant_of(request.cache_salt),
            step_tokens=step_tokens,
        )
