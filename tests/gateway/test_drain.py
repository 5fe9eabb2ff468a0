"""Gateways as processes that are told to end, or to read their settings again, under load."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.local import Server, command, free_port, gateway, redis_server
from gateway.client import Client
from tests.conftest import until
from tests.fake_engine import MODEL
from tests.gateway.replicas import MESSAGES, Caller, answered, fake_engine, replicas

pytestmark = pytest.mark.engine

DRAIN_S = 20


@asynccontextmanager
async def started(context: Any) -> AsyncIterator[Any]:
    """What another thread starts and ends."""
    loop = asyncio.get_running_loop()
    value = await loop.run_in_executor(None, context.__enter__)
    try:
        yield value
    finally:
        await loop.run_in_executor(None, context.__exit__, None, None, None)


@contextmanager
def two_with_redis(engines: Sequence[str]) -> Iterator[list[Server]]:
    with redis_server() as redis:
        redis.start().wait_ready(20)
        flags = ["--drain-timeout-s", str(DRAIN_S)]
        with replicas(2, engines, redis.url, flags) as servers:
            yield servers


async def ended(server: Server, within_s: float) -> float:
    """Wait until a process has ended; returns how long it took."""

    async def gone() -> bool:
        assert server._process is not None
        return server._process.poll() is not None

    return await until(gone, within_s=within_s)


async def test_one_of_two_replicas_is_drained_under_load_and_no_request_fails() -> None:
    rng = random.Random(8)
    failed: list[str] = []
    async with (
        fake_engine() as (engine, url),
        started(two_with_redis([url])) as servers,
        httpx.AsyncClient(timeout=30, trust_env=False) as http,
    ):
        engine.core.delay_s = lambda: rng.uniform(0, 0.02)
        engine.core.prefill_s = lambda tokens: rng.uniform(0, 0.5)
        urls = [server.url for server in servers]
        opener = Caller(http, urls)
        done = 0
        over = asyncio.Event()

        async def one(n: int) -> None:
            """Only the opening is tried again; all else is asked once, of a replica that lives."""
            stream = await opener.open(n)

            async def ask(method: str, path: str, body: Any) -> httpx.Response:
                for where in (n, n + 1):  # again only where nobody listens
                    try:
                        response = await http.request(
                            method, f"{urls[where % 2]}/v1/streams/{stream}{path}", json=body
                        )
                    except httpx.ConnectError:
                        continue
                    if response.status_code >= 400:
                        failed.append(f"{path}: {response.status_code} {response.text}")
                    return response
                raise AssertionError("nobody listens")

            for seq in range(6):
                await ask("POST", "/chunks", {"text": f"{n} {seq} word", "seq": seq})
                await asyncio.sleep(rng.uniform(0, 0.1))
            answer = await ask("POST", "/finish", {"stream": False})
            if answer.json()["choices"][0]["message"]["content"] != "answer":
                failed.append(answer.text)
            if len(answered(engine, stream)) < 1:
                failed.append("no engine was asked")

        async def load(n: int) -> None:
            nonlocal done
            while not over.is_set():
                try:
                    await one(n)
                except (AssertionError, httpx.HTTPError, KeyError, TimeoutError) as e:
                    failed.append(repr(e))
                done += 1

        clients = [asyncio.create_task(load(n)) for n in range(24)]

        def reached(n: int) -> Callable[[], Awaitable[bool]]:
            async def so() -> bool:
                return done >= n

            return so

        await until(reached(48), within_s=60)
        before = done
        os.kill(servers[0].pid, signal.SIGTERM)
        took_s = await ended(servers[0], within_s=2 * DRAIN_S)
        after = done
        await until(reached(after + 48), within_s=60)
        over.set()
        await asyncio.gather(*clients)
        print(f"{done} streams, {done - before} after the signal; drained in {took_s:.2f} s; "
              f"{opener.refusals} refused and {opener.broken} not connected at opening; "
              f"{len(failed)} failed")  # fmt: skip
        assert not failed, failed[:5]


async def test_clients_of_both_replicas_notice_nothing_when_one_ends_under_load() -> None:
    rng = random.Random(9)
    async with fake_engine() as (engine, url), started(two_with_redis([url])) as servers:
        engine.core.delay_s = lambda: rng.uniform(0, 0.02)
        engine.core.prefill_s = lambda tokens: 0.3
        urls = [server.url for server in servers]
        over, done = asyncio.Event(), 0

        async def load(number: int) -> None:
            nonlocal done
            mine = urls[number % 2 :] + urls[: number % 2]
            async with Client(*mine) as client:
                while not over.is_set():
                    async with client.stream(MODEL, MESSAGES) as stream:
                        for piece in range(4):
                            await stream.send(f"{number} {piece} word")
                            await asyncio.sleep(rng.uniform(0, 0.2))
                        answer = "".join([text async for text in stream.answer()])
                        assert answer == "answer"
                    done += 1

        async def more(count: int) -> None:
            async def so() -> bool:
                return done >= wanted

            wanted = done + count
            await until(so, within_s=60)

        async with asyncio.TaskGroup() as clients:
            for number in range(8):  # fewer than are ever refused as a crowd
                clients.create_task(load(number))
            await more(16)
            os.kill(servers[0].pid, signal.SIGTERM)
            took_s = await ended(servers[0], within_s=2 * DRAIN_S)
            before = done
            await more(16)
            over.set()
        print(f"{done} streams, {done - before} after the end, which took {took_s:.2f} s; 0 failed")


async def test_a_gateway_without_others_waits_for_its_streams_and_a_second_signal_ends_it() -> None:
    async with (
        fake_engine() as (_, url),
        started(gateway([url])) as server,
        httpx.AsyncClient(timeout=30, trust_env=False) as http,
    ):
        for twice in (False, True):
            server.start()
            await asyncio.get_running_loop().run_in_executor(None, server.wait_ready, 60)
            body = {"model": MODEL, "messages": MESSAGES}
            created = (await http.post(server.url + "/v1/streams", json=body)).json()
            path = f"{server.url}/v1/streams/{created['id']}"
            os.kill(server.pid, signal.SIGTERM)

            async def draining() -> bool:
                return (await http.get(server.url + "/ready")).status_code == 503

            await until(draining, within_s=30)
            assert (await http.post(path + "/chunks", json={"text": "late"})).status_code == 202
            if twice:
                os.kill(server.pid, signal.SIGTERM)
                assert await ended(server, within_s=30) < DRAIN_S / 2
            else:
                answer = await http.post(path + "/finish", json={"stream": False})
                assert answer.json()["choices"][0]["message"]["content"] == "answer"
                await ended(server, within_s=30)
            server.kill()


async def test_settings_are_read_again_when_the_process_is_told_to(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text("max_streams = 0\n")
    port = free_port()
    admin_port = free_port()
    flags = ["--config", str(file), "--admin-port", str(admin_port)]
    async with (
        fake_engine() as (_, url),
        started(gateway([url], flags, port=port)) as server,
        httpx.AsyncClient(timeout=30, trust_env=False) as http,
    ):
        file.write_text("max_streams = 5\n")
        server.start()
        await asyncio.get_running_loop().run_in_executor(None, server.wait_ready, 60)

        async def most() -> int:
            config = (await http.get(f"http://127.0.0.1:{admin_port}/admin/config")).json()
            return int(config["max_streams"])

        assert await most() == 5
        for text, wanted in (("max_streams = 6\n", 6), ("max_streams = 0\n", 6)):
            file.write_text(text)
            os.kill(server.pid, signal.SIGHUP)

            async def so(wanted: int = wanted) -> bool:
                return await most() == wanted

            await until(so, within_s=30)

        async def told() -> bool:
            return "settings are as they were: max_streams" in server.log_tail()

        await until(told, within_s=30)


async def test_streams_leave_an_engine_process_that_is_stopped() -> None:
    program = [sys.executable, "-m", "tests.fake_engine", "--port", "{port}"]
    ready = "/stream2llm/info"
    with (
        command("engine", program, ready_path=ready) as stuck,
        command("engine", program, ready_path=ready) as other,
        gateway([], ["--engine", stuck.url, "--engine", other.url, "--poll-timeout-s", "0.5"]) as g,
    ):
        for server in (stuck, other):
            server.start()
        for server in (stuck, other):
            server.wait_ready(30)
        g.start().wait_ready(60)
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            body = {"model": MODEL, "messages": MESSAGES}
            streams = []
            for _ in range(8):
                created = (await http.post(g.url + "/v1/streams", json=body)).json()
                path = f"{g.url}/v1/streams/{created['id']}"
                await http.post(path + "/chunks", json={"text": "before"})
                streams.append(path)
            os.kill(stuck.pid, signal.SIGSTOP)
            try:
                begun_s = time.monotonic()
                answers = await asyncio.gather(
                    *(http.post(path + "/finish", json={"stream": False}) for path in streams)
                )
                assert time.monotonic() - begun_s < 5
            finally:
                os.kill(stuck.pid, signal.SIGCONT)
            texts = [a.json()["choices"][0]["message"]["content"] for a in answers]
            assert texts == ["answer"] * 8

            async def back() -> bool:
                standing = (await http.get(g.url + "/ready")).json()["standing"]
                return set(standing.values()) == {"healthy"}

            await until(back, within_s=30)
