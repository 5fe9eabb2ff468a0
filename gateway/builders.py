"""The prompt builder of each model, made once, off the event loop."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway.errors import EngineFailed
from gateway.keys import BUILDERS, EXECUTOR, SETTINGS
from gateway.prompt import PromptBuilder


async def builder_for(app: web.Application, model: str) -> PromptBuilder:
    """The builder of a model an engine serves.

    Raises:
        EngineFailed: its tokenizer can't be loaded.
    """
    builders = app[BUILDERS]
    if model not in builders:
        settings = app[SETTINGS].now
        make = lambda: PromptBuilder(  # noqa: E731
            settings.tokenizer or model, app[EXECUTOR], settings.token_cache
        )
        builders[model] = asyncio.get_running_loop().run_in_executor(app[EXECUTOR], make)
    making = builders[model]
    try:
        return making.result() if making.done() else await asyncio.shield(making)
    except Exception as e:  # libraries raise whatever they like
        if builders.get(model) is making:  # else somebody tries again already
            del builders[model]
        raise EngineFailed(
            f"no tokenizer for {model!r}: {e}. Set --tokenizer to its folder or name"
        ) from e
