"""`python -m gateway`: run a gateway."""

from __future__ import annotations

import asyncio
import logging
import sys

import uvloop

from gateway.app import build
from gateway.serving import serve
from gateway.settings import Settings, SettingsError, load


def main() -> int:
    """Read the settings and serve until interrupted. Returns the exit code."""
    try:
        settings = _read()
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s %(message)s",
        )
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        asyncio.run(serve(build(settings, read_again=_read)))
    except (SettingsError, OSError) as e:
        print(f"gateway: {e}", file=sys.stderr)
        return 2
    return 0


def _read() -> Settings:
    settings = load(sys.argv[1:])
    if not settings.engine and not settings.plain_engine:
        raise SettingsError("engine", "name at least one, e.g. --engine http://127.0.0.1:8100")
    return settings


if __name__ == "__main__":
    sys.exit(main())
