"""Clients that come together, at a port of the event loop that gateways run on."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable

import httpx
import pytest
import uvloop
from aiohttp import web

from gateway import ports
from gateway.ports import Port, listen
from gateway.settings import Current, Settings
from gateway.telemetry import Metrics

TURNS = 10


async def at_a_port(check: Callable[[Port, Metrics], Awaitable[None]], **given: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(text="here")

    app, metrics = web.Application(), Metrics()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    settings = Settings(engine=("http://127.0.0.1:1",), **given)  # type: ignore[arg-type]
    port = await listen(runner, "localhost", 0, Current(settings), metrics)
    try:
        await check(port, metrics)
    finally:
        port.close()
        await runner.cleanup()


def come(port: Port, clients: int) -> list[socket.socket]:
    """So many connections, which the system holds until the gateway takes them."""
    address = port.sockets[0].getsockname()
    return [socket.create_connection(address[:2], timeout=10) for _ in range(clients)]


async def run_here(check: Callable[[Port, Metrics], Awaitable[None]], **given: int) -> None:
    await asyncio.to_thread(uvloop.run, at_a_port(check, **given))


async def test_many_that_come_together_are_taken_at_once() -> None:
    async def check(port: Port, metrics: Metrics) -> None:
        clients = come(port, 3 * TURNS)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        assert metrics.registry.get_sample_value("stream2llm_connections") == 3 * TURNS
        for client in clients:
            client.close()

    await run_here(check)


async def test_the_bound_holds_for_them_too() -> None:
    async def check(port: Port, metrics: Metrics) -> None:
        clients = come(port, 3 * TURNS)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        assert metrics.registry.get_sample_value("stream2llm_connections") == TURNS
        for client in clients:
            client.close()

    await run_here(check, max_connections=TURNS)


async def test_they_are_taken_again_once_there_are_files_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ports, "PAUSE_S", 0.1)
    failures = [OSError(errno.EMFILE, "Too many open files")]

    class Full(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return super().accept()

    async def check(port: Port, metrics: Metrics) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
            where = "http://{}:{}/".format(*port.sockets[0].getsockname())
            assert (await http.get(where)).text == "here"
            assert not failures

    monkeypatch.setattr(socket, "socket", Full)
    await run_here(check)
