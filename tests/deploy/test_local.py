"""The runner: ready or a clear failure, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from redis import Redis

from deploy.local import Server, ServerFailed, command, redis_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent

SITE = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"]

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for own_session in (False, True):
    child = subprocess.Popen(["sleep", "600"], start_new_session=own_session)
    print(child.pid, flush=True)
time.sleep(600)
"""
"""A server that ignores SIGTERM, with a child in its session and one that left it."""


def script(code: str) -> Server:
    return command("script", [sys.executable, "-c", code])


def lines(log: Path, count: int) -> list[str]:
    """The first lines of a log, once they are there."""
    deadline_s = time.monotonic() + 10
    while len(found := log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline_s, "no output"
        time.sleep(0.02)
    return found[:count]


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_serves_until_stopped_and_can_be_started_again_after_a_kill() -> None:
    with command("site", SITE) as server:
        server.start().wait_ready(20)
        server.kill()
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url, trust_env=False)
        server.start().wait_ready(20)
        pid = server.pid
    assert not alive(pid)
    assert not server.log_path.exists()


def test_a_redis_answers_when_it_is_ready_and_forgets_all_when_it_ends() -> None:
    with redis_server() as server:
        for _ in range(2):
            server.start().wait_ready(10)
            with Redis.from_url(server.url) as client:
                assert client.dbsize() == 0
                client.set("key", "value")
            server.kill()


def test_stop_ends_all_descendants_of_a_server_that_ignores_it() -> None:
    server = script(STUBBORN).start()
    family = [server.pid, *(int(line) for line in lines(server.log_path, 2))]
    assert all(map(alive, family))
    server.stop(grace_s=0.3)
    assert not any(map(alive, family))


def test_a_server_that_ends_while_starting_fails_with_its_log() -> None:
    server = script("import sys; sys.exit('no such model')").start()
    with pytest.raises(ServerFailed, match="script ended while starting:\nno such model"):
        server.wait_ready(20)
    server.stop()


def test_a_server_that_is_never_ready_fails_with_its_log_and_is_ended() -> None:
    server = script("import time; print('loading', flush=True); time.sleep(600)").start()
    pid = server.pid
    lines(server.log_path, 1)
    with pytest.raises(ServerFailed, match=r"not ready after 0\.5 s:\nloading"):
        server.wait_ready(0.5)
    assert not alive(pid)
    server.stop()


def test_a_stubborn_server_dies_with_its_parent() -> None:
    code = (
        "import sys, time\n"
        "from deploy.local import command\n"
        f"server = command('child', [sys.executable, '-c', {STUBBORN!r}])\n"
        "print(server.start().pid, server.log_path, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid, log = parent.stdout.readline().split()
    child, elsewhere = lines(Path(log), 2)
    family = [int(pid), int(child)]
    assert all(map(alive, family))
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline_s = time.monotonic() + 20
    while any(map(alive, family)):
        assert time.monotonic() < deadline_s, "still there"
        time.sleep(0.02)
    os.kill(int(elsewhere), signal.SIGKILL)  # left the group: beyond the guard
    Path(log).unlink()
