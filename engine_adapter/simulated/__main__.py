"""`python -m engine_adapter.simulated`: serve a simulated engine."""

from __future__ import annotations

import argparse
import logging
import os
import sys

import uvloop
from aiohttp import web

from engine_adapter.scheduling.policies import DEFAULT_POLICY, POLICIES
from engine_adapter.sessions import DEFAULT_OPEN_PROMPTS
from engine_adapter.simulated.answers import ANSWERS
from engine_adapter.simulated.hardware import H100, H100X2, H200X2, LLAMA_3_1_8B

HARDWARE = {"h100x2": H100X2, "h200x2": H200X2, "h100": H100}

SHUTDOWN_S = 1.0
"""Answers under way get this long when the server is told to stop."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m engine_adapter.simulated",
        description="An engine whose steps take as long as those of Llama-3.1-8B are estimated to; "
        "its answers mean nothing, or can be checked.",
    )
    parser.add_argument("--port", type=int, default=8100, help="port to listen on")
    parser.add_argument("--hardware", choices=HARDWARE, default="h100x2")
    parser.add_argument("--policy", choices=POLICIES, default=DEFAULT_POLICY)
    parser.add_argument("--step-tokens", type=int, default=8192, help="most tokens in a step")
    parser.add_argument("--speed", type=float, default=1.0, help="simulated seconds in a real one")
    parser.add_argument("--model-name", default="simulated", help="the name it is served by")
    parser.add_argument("--kv-tokens", type=int, help="size of the KV pool (default: what fits)")
    parser.add_argument(
        "--max-prompts", type=int, default=DEFAULT_OPEN_PROMPTS, help="open prompts, and answers"
    )
    parser.add_argument(
        "--answers",
        choices=ANSWERS,
        default="words",
        help="words, or tokens chained to all before them, for tests",
    )
    options = parser.parse_args()
    for name in ("step_tokens", "speed", "kv_tokens", "max_prompts"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    return options


def main() -> int:
    """Serve until interrupted, or until the engine fails. Returns the exit code."""
    options = arguments()
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM takes seconds to load: not before the command line is known to be right
    from engine_adapter.simulated.app import LOOP, build
    from engine_adapter.simulated.engine import SimulatedEngine

    engine = SimulatedEngine(
        HARDWARE[options.hardware],
        LLAMA_3_1_8B,
        policy=options.policy,
        step_tokens=options.step_tokens,
        max_requests=options.max_prompts,
        kv_tokens=options.kv_tokens,
        answers=ANSWERS[options.answers],
    )
    app = build(engine, options.model_name, options.speed, options.max_prompts)
    web.run_app(
        app,
        loop=uvloop.new_event_loop(),
        host="127.0.0.1",
        port=options.port,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S,
        access_log=None,
        print=lambda *_: print(f"engine on http://127.0.0.1:{options.port}", flush=True),
    )
    return 0 if app[LOOP].cancelled() else 1


if __name__ == "__main__":
    sys.exit(main())
