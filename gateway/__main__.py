"""`python -m gateway`: run a gateway."""

from __future__ import annotations

import asyncio
import logging
import sys

import uvloop
from aiohttp import web

from gateway.app import build
from gateway.settings import SettingsError, load
from gateway.tenants import TenantsError

SHUTDOWN_S = 5.0
"""Answers under way get this long when the gateway is told to stop."""


def main() -> int:
    """Read the settings and serve until interrupted. Returns the exit code."""
    try:
        settings = load(sys.argv[1:])
        if not settings.engine and not settings.plain_engine:
            raise SettingsError("engine", "name at least one, e.g. --engine http://127.0.0.1:8100")
    except SettingsError as e:
        print(f"gateway: {e}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    try:
        app = build(settings)
    except TenantsError as e:
        print(f"gateway: {e}", file=sys.stderr)
        return 2
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    web.run_app(
        app,
        host=settings.host,
        port=settings.port,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S,
        access_log=None,
        print=lambda *_: print(f"gateway on http://{settings.host}:{settings.port}", flush=True),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
