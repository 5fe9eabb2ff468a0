"""The simulated engine as an HTTP server that a gateway takes for vLLM with the plug-in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from aiohttp import web

from engine_adapter.prompts import StreamingPrompts
from engine_adapter.sessions import DEFAULT_OPEN_PROMPTS, Limits
from engine_adapter.simulated.engine import BLOCK_TOKENS, MAX_MODEL_LEN, SimulatedEngine
from engine_adapter.simulated.openai import PlainRequests
from engine_adapter.simulated.realtime import RealTimeEngine
from engine_adapter.simulated.routes import PROMPTS, errors, routes

logger = logging.getLogger(__name__)

ENGINE: web.AppKey[RealTimeEngine] = web.AppKey("engine", RealTimeEngine)
LOOP: web.AppKey[asyncio.Task[None]] = web.AppKey("loop", asyncio.Task)

MAX_BODY_BYTES = 64 << 20

VOCAB_SIZE = 1 << 31
"""Tokens mean nothing here: those of any tokenizer will do."""


def build(
    engine: SimulatedEngine,
    model: str,
    speed: float = 1.0,
    max_prompts: int = DEFAULT_OPEN_PROMPTS,
) -> web.Application:
    """A server of an engine, not started yet.

    Args:
        model: the name it is served by.
        speed: simulated seconds in a real one. Leases are in real seconds.
        max_prompts: that may be open at once.
    """
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[errors])
    kv_blocks = int(engine.scheduler.load()["kv_blocks_total"])
    max_model_len = min(MAX_MODEL_LEN, kv_blocks * BLOCK_TOKENS)
    running = app[ENGINE] = RealTimeEngine(engine, speed)
    app[PROMPTS] = StreamingPrompts(
        running,
        Limits(max_model_len, VOCAB_SIZE, max_prompts),
        name=f"simulated {engine.hardware.name}",
        model=model,
        block_size=BLOCK_TOKENS,
    )
    app.add_routes([*routes, *PlainRequests(running, model, max_model_len).routes()])
    app.add_routes([web.get("/health", _health)])
    app.cleanup_ctx.append(_running)
    return app


async def _health(request: web.Request) -> web.Response:
    return web.Response()


async def _running(app: web.Application) -> AsyncIterator[None]:
    app[LOOP] = asyncio.create_task(_loop(app[ENGINE]))
    app[PROMPTS].start()
    yield
    await app[PROMPTS].stop()
    app[LOOP].cancel()
    await asyncio.gather(app[LOOP], return_exceptions=True)
    logger.info("steps took %.3f s longer than estimated", app[ENGINE].late_s)


async def _loop(engine: RealTimeEngine) -> None:
    """A server whose engine has died ends, as vLLM's does."""
    try:
        await engine.run()
    except Exception as e:
        logger.exception("the engine's loop failed")
        raise web.GracefulExit from e
