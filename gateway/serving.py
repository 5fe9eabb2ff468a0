"""A gateway as a process: its ports, and the signals it hears.

SIGTERM  drain, then end; a second one ends it at once
SIGINT   end
SIGHUP   read the settings again
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import AsyncExitStack

from aiohttp import web

from gateway import garbage
from gateway.keys import KEEPER, LIFECYCLE, METRICS, RELOADER, SETTINGS, STREAMS
from gateway.ports import Port, listen
from gateway.routes_admin import admin
from gateway.settings import SettingsError
from gateway.tasks import again_and_again, begin

logger = logging.getLogger(__name__)

SHUTDOWN_S = 1.0
"""What is still under way when the gateway ends gets this long."""


async def serve(app: web.Application) -> None:
    """Serve until a signal ends it.

    Raises:
        SettingsError: the admin key can't be used.
        OSError: a port is taken.
    """
    settings, loop, ended = app[SETTINGS].now, asyncio.get_running_loop(), asyncio.Event()
    admins = admin(app, settings.admin_key_file) if settings.admin_port else None
    loop.add_signal_handler(signal.SIGINT, ended.set)
    async with AsyncExitStack() as running:
        door = await _listening(running, app, app, settings.host, settings.port)
        if admins is not None:
            await _listening(running, admins, app, settings.admin_host, settings.admin_port)
            print(f"admin routes on http://{settings.admin_host}:{settings.admin_port}", flush=True)
        app[LIFECYCLE].close_door = door.close
        loop.add_signal_handler(signal.SIGTERM, _drain, app, loop, ended)
        loop.add_signal_handler(signal.SIGHUP, _reload, app)
        garbage.make_rare()
        searching = again_and_again(
            garbage.search_all, lambda: garbage.EVERY_S, "the search for garbage"
        )
        running.callback(begin(searching, "the search for garbage").cancel)
        print(f"gateway on http://{settings.host}:{settings.port}", flush=True)
        await ended.wait()
        if app[LIFECYCLE].draining:
            door.close()  # whoever comes now goes elsewhere at once
        if app[LIFECYCLE].drained:
            await app[LIFECYCLE].quiet()


async def _listening(
    running: AsyncExitStack, app: web.Application, gateway: web.Application, host: str, port: int
) -> Port:
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
    running.push_async_callback(runner.cleanup)
    await runner.setup()
    door = await listen(runner, host, port, gateway[SETTINGS], gateway[METRICS])
    running.callback(door.close)
    return door


def _drain(app: web.Application, loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    loop.remove_signal_handler(signal.SIGTERM)  # the next one has its usual effect
    drain = app[LIFECYCLE].begin_drain(app[SETTINGS], app[STREAMS], app[KEEPER])
    drain.add_done_callback(lambda _: ended.set())


def _reload(app: web.Application) -> None:
    try:
        app[RELOADER].reload()
    except SettingsError as e:
        logger.error("settings are as they were: %s", e)
