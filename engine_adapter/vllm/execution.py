"""A plan carried out: room is made, and vLLM is shown only what it may schedule.

The plan says who computes and whose KV goes. Here open prompts come into vLLM's queues or are
parked, victims lose their blocks, what the prefix cache has is taken, and requests that were not
granted are hidden for a step.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vllm.v1.request import Request, RequestStatus

from engine_adapter.scheduling.plan import Plan
from engine_adapter.vllm.host import loading
from engine_adapter.vllm.kv import BlockTables
from engine_adapter.vllm.open_prompts import OpenPrompt
from engine_adapter.vllm.views import Views

if TYPE_CHECKING:
    from engine_adapter.vllm.scheduler import StreamScheduler


class Execution:
    """Carries out the plans of one scheduler, between its deciding and vLLM's own scheduling."""

    def __init__(self, scheduler: StreamScheduler, tables: BlockTables, views: Views) -> None:
        self._scheduler = scheduler
        self._tables = tables
        self._views = views

    def carry_out(self, decided: Plan) -> list[Request]:
        """Evict, bring the granted prompts into vLLM's queues, park the others.

        Returns the waiting requests that were not granted. They are taken out of the queues
        for this step, because vLLM stops at the first waiting request it can't schedule.
        """
        scheduler, grants = self._scheduler, decided.grants
        for eviction in decided.evictions:
            prompt = self._views.prompts.get(eviction.request_id)
            if prompt is None:
                self._evict_request(scheduler.requests[eviction.request_id])
            else:
                self._evict_prompt(prompt, eviction.keep_blocks)
        granted_blocks = sum(self._tables.needed(tokens) + 1 for tokens in grants.values())
        for prompt in [p for i in grants if (p := self._views.prompts.get(i)) is not None]:
            free_blocks = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
            self._activate(prompt, free_blocks - granted_blocks)
        idle = [p for i, p in scheduler.partial.items() if i not in grants]
        for prompt in [p for p in idle if not loading(p.request)]:
            scheduler.renew(prompt, prompt.request.prompt_token_ids, prompt.request.num_tokens)
        rank = {request_id: i for i, request_id in enumerate(grants)}
        scheduler.running.sort(key=lambda r: rank.get(r.request_id, len(rank)))
        return self._hide_waiting(rank)

    def _hide_waiting(self, rank: dict[str, int]) -> list[Request]:
        scheduler = self._scheduler
        waiting = [*scheduler.kv_holding_waiting, *scheduler.waiting]
        scheduler.kv_holding_waiting.remove_requests(waiting)
        scheduler.waiting.remove_requests(waiting)
        shown = [r for r in waiting if r.request_id in rank or loading(r)]
        for request in sorted(shown, key=lambda r: rank.get(r.request_id, len(rank))):
            scheduler._enqueue_waiting_request(request)
        return [r for r in waiting if r.request_id not in rank and not loading(r)]

    def _evict_request(self, request: Request) -> None:
        """Take everything from an ordinary request, as vLLM's preemption does."""
        scheduler = self._scheduler
        if request.status == RequestStatus.RUNNING:
            scheduler.running.remove(request)
            scheduler._preempt_request(request, time.monotonic())
            return
        scheduler.kv_holding_waiting.remove_requests([request])
        scheduler._free_request_blocks(request)
        self._views.touch(request)
        request.num_computed_tokens = 0
        scheduler.preemptions += 1
        scheduler._enqueue_waiting_request(request)

    def _evict_prompt(self, prompt: OpenPrompt, keep_blocks: int) -> None:
        """Take the tail blocks of an open prompt and park it."""
        keep = min(keep_blocks * self._tables.block_size, prompt.request.num_computed_tokens)
        prompt.lost_tokens = max(prompt.lost_tokens, prompt.request.num_computed_tokens)
        self._scheduler.renew(prompt, prompt.request.prompt_token_ids, keep)
        self._scheduler.preemptions += 1

    def _activate(self, prompt: OpenPrompt, room_blocks: int) -> None:
        if not prompt.scheduled:
            self.take_cached(prompt.request, room_blocks)
        if self._covered_by_cache(prompt.request) or not prompt.remaining_tokens:
            self._scheduler.withdraw(prompt)
        elif not prompt.scheduled:
            self._scheduler.admit(prompt)

    def take_cached(self, request: Request, room_blocks: int) -> None:
        """Take what the prefix cache has behind the KV of a request that is about to be queued.

        vLLM looks only for requests without any. A stream that grows through documents which
        others have brought too would compute all but the first of them again.

        Args:
            room_blocks: how many free blocks may be taken for it.
        """
        scheduler = self._scheduler
        if (
            request.num_computed_tokens
            and self._tables.plain
            and scheduler.kv_cache_manager.prefix_cache_lookup_enabled(request)
            and scheduler._request_blocks_can_be_freed(request)
        ):
            computed = self._tables.take_cached(request, room_blocks, scheduler.free_tail)
            if computed:
                request.num_computed_tokens = computed
                self._views.touch(request)

    def _covered_by_cache(self, request: Request) -> bool:
        """Take the prefix-cache hits of a fresh request if they leave nothing to compute.

        vLLM looks them up itself when it schedules a request, but can't schedule one that
        has no token to compute.
        """
        if request.num_computed_tokens or request.num_tokens == 1:
            return False
        manager = self._scheduler.kv_cache_manager
        blocks, hit_tokens, *_ = manager.get_computed_blocks(request)
        if hit_tokens < request.num_tokens - 1:
            return False
        taken = manager.allocate_slots(
            request, 0, num_new_computed_tokens=hit_tokens, new_computed_blocks=blocks
        )
        if taken is not None:
            request.num_computed_tokens = hit_tokens
            self._views.touch(request)
        return taken is not None
