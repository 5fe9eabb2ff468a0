"""A request as policies and the planner see it."""

from __future__ import annotations

import msgspec


class View(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One unfinished request. Immutable; what has changed is another view."""

    request_id: str
    full: bool
    """Its input is complete; False while chunks may still come (a partial request)."""
    arrival_s: float
    """When its first input arrived. Any clock, the same for all views."""
    last_input_s: float
    """When its newest input arrived."""
    computed_tokens: int
    """In whole blocks once it is decoding: nothing depends on more, and it rests for longer."""
    remaining_tokens: int
    """Tokens it could compute now; 0 for a partial request that is idle."""
    held_blocks: int
    """KV blocks it holds, shared ones included."""
    needed_blocks: int
    """KV blocks it must hold before it may compute anything in this step."""
    decoding: bool = False
    """Its prompt is computed and it produces output."""
    running: bool = False
    """It is in the running batch already: it needs no admission."""
    divisible: bool = False
    """Its tail blocks can be taken alone; otherwise a victim loses everything."""
    priority: int = 0
    """The engine's own request priority: lower goes first."""
    tenant: str = ""
    """Whose it is; tenants that compete take turns."""
    step_tokens: int = 1
    """Tokens that the engine computes in one full step."""
