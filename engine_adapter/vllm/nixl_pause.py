"""Entry of `vllm.general_plugins`: let NIXL's progress thread pause between its looks.

NIXL 1.5 has that thread poll its sockets without a pause, whatever vLLM is told: on a machine with
few cores each engine then takes one of them for nothing. Only for vLLM on CPUs; named
`stream2llm_nixl_pause` in `VLLM_PLUGINS`, also on engines without any other plug-in.
"""

from __future__ import annotations

from typing import Any

PAUSE_US = 1000
"""Longest wait of the thread; what arrives wakes it before."""


def install() -> None:
    """Pause from the next agent on. vLLM calls it in each of its processes."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        from nixl._api import nixlBind
    except ImportError:
        return  # no NIXL, nothing to pause
    make_agent = nixlBind.nixlAgent

    def paused_agent(name: str, config: Any) -> Any:
        config.pthrDelay = PAUSE_US
        return make_agent(name, config)

    if not hasattr(make_agent, "__wrapped__"):
        paused_agent.__wrapped__ = make_agent  # type: ignore[attr-defined]
        nixlBind.nixlAgent = paused_agent
