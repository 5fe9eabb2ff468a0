"""Entry points: how vLLM finds this plug-in. Named `stream2llm` in `VLLM_PLUGINS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


def install() -> None:
    """Entry of `vllm.general_plugins`: add the one method that the operations travel by, and on
    CPUs what vLLM lacks there.

    vLLM calls it in each of its processes, possibly more than once.
    """
    from vllm.v1.engine.core import EngineCore

    from engine_adapter.vllm import cpu
    from engine_adapter.vllm.engine import stream2llm

    EngineCore.stream2llm = stream2llm
    cpu.install()


class EndpointPlugin:
    """Entry of `vllm.endpoint_plugins`: the routes of the engine operations."""

    name = "stream2llm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        from engine_adapter.vllm.routes import router

        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        from engine_adapter.vllm.routes import streaming_prompts

        config: Any = engine_client.vllm_config  # type: ignore[union-attr]
        served = config.model_config.served_model_name
        name = served if isinstance(served, str) else served[0]
        state.stream2llm = streaming_prompts(engine_client, name)


def endpoint_plugin() -> EndpointPlugin:
    """What the entry point resolves to: called with no arguments, answers the plug-in."""
    return EndpointPlugin()
