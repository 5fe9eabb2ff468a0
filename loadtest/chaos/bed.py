"""The processes of a chaos run, the links between them, and what they leave.

    clients --link--> gateway 1 --link--> engine 1     gateways reach each other by links of
            --link--> gateway 2 --link--> engine 2     their own, and Redis by one each
                          |--link--> Redis

The engines are simulated, in real time, with answers that can be checked. The second gateway has
collections, on a small file system of its own where this process may mount one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.local import Server, answers_http, answers_ping, free_port, redis_program
from deploy.model import model_dir
from deploy.nursery import Nursery
from loadtest.chaos.links import Link

MODEL = "simulated"
KV_TOKENS = 60_000
SPEED = 0.5
RESUME_S, HEARTBEAT_S = 8.0, 2.0
POLL_TIMEOUT_S, DRAIN_S = 3.0, 3.0
DISK_BYTES = 8 << 20
START_S = 240.0
"""A vLLM takes its time to load on a busy machine."""
FAKETIME = ("usr/lib/*/faketime/libfaketimeMT.so.1", "usr/lib*/faketime/libfaketimeMT.so.1")
"""Where the packages of Linux distributions put it, below the root."""
CLOCK = "FAKETIME_TIMESTAMP_FILE"
IMPORTED_FIRST = ("engine_adapter.simulated.app", "gateway.app", "gateway.serving", "faiss")


@dataclass
class Node:
    """One process, with the clock it believes in."""

    name: str
    server: Server
    clock: Path | None
    """The file by which its clock is set; None: it has the machine's."""
    admin_port: int = 0
    front: Link | None = None
    """By which clients reach it."""

    @property
    def pid(self) -> int:
        return self.server.pid

    async def start(self) -> None:
        """Start it and wait until it answers."""
        await asyncio.to_thread(self.server.start)
        await asyncio.to_thread(self.server.wait_ready, START_S)

    async def kill(self) -> None:
        """As a crash."""
        await asyncio.to_thread(self.server.kill)

    async def terminate(self) -> None:
        """As an operator does it."""
        await asyncio.to_thread(self.server.stop)

    def signal(self, number: int) -> None:
        """Tell the process."""
        os.kill(self.pid, number)

    def set_clock(self, offset_s: int) -> None:
        """Let its wall clock differ from the machine's."""
        assert self.clock is not None
        self.clock.write_text(f"{offset_s:+d}\n")


@dataclass
class Bed:
    """Everything that runs."""

    gateways: list[Node]
    engines: list[Node]
    redis: Node
    links: list[Link]
    folder: Path
    lease_s: float
    """Of what engines and Redis have; a stream is idle for so long and known half as long after its
    end."""
    disk: Path | None
    """A small file system with the collections; None: it could not be mounted."""

    @property
    def nodes(self) -> list[Node]:
        return [*self.gateways, *self.engines, self.redis]

    def group(self, target: str) -> str:
        """What a node has in common with those that do the same; of anything else its name."""
        for kind, nodes in (("gateways", self.gateways), ("engines", self.engines)):
            if target in (node.name for node in nodes):
                return kind
        return target

    @property
    def fronts(self) -> list[str]:
        """Where clients reach the gateways."""
        return [node.front.url for node in self.gateways if node.front is not None]

    @property
    def logs(self) -> list[Path]:
        return [node.server.log_path for node in self.nodes]


class _Maker:
    """Makes nodes and links."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self._folder = folder
        self._nursery = nursery
        self.links: list[Link] = []

    def node(
        self, name: str, line: Sequence[str], port: int, ready: str = "/health", admin_port: int = 0
    ) -> Node:
        """A process that is not started yet."""
        env, is_redis = _env(self._folder, name), not ready
        clock = Path(env[CLOCK]) if CLOCK in env else None
        server = Server(
            name,
            line,
            port=port,
            ready_path=ready,
            env=env,
            scheme="redis" if is_redis else "http",
            is_ready=answers_ping if is_redis else answers_http,
            log_path=self._folder / f"{name}.log",
        )
        if not is_redis:
            server = self._nursery.server(server)
        return Node(name, server, clock, admin_port=admin_port)

    async def link(self, name: str, port: int) -> Link:
        """A way to a port, which begins to listen."""
        link = Link(name, port)
        await link.start()
        self.links.append(link)
        return link


def _env(folder: Path, name: str) -> dict[str, str]:
    """Of the process of this name. Where there is libfaketime, it believes the wall clock of a
    file; other clocks stay."""
    env = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    libraries = (path for place in FAKETIME for path in sorted(Path("/").glob(place)))
    if (library := next(libraries, None)) is None:
        return env
    clock = folder / f"{name}.clock"
    clock.write_text("+0\n")
    return env | {
        "LD_PRELOAD": str(library),
        CLOCK: str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
        "NO_FAKE_STAT": "1",
    }


@asynccontextmanager
async def bed(folder: Path, *, lease_s: float, collections: bool) -> AsyncIterator[Bed]:
    """Started, ready, and ended.

    Args:
        folder: for logs, clocks and collections.
        lease_s: see `Bed`.
        collections: the second gateway has some, which it takes longer to start with.
    """
    # What is killed by the dozen has to start quickly.
    with Nursery(IMPORTED_FIRST, _env(folder, "nursery")) as nursery:
        make = _Maker(folder, nursery)
        disk = _mounted(folder / "disk") if collections else None
        made = await _made(make, folder, disk, lease_s, collections=collections)
        try:
            async with asyncio.TaskGroup() as starting:
                for node in (*made.engines, made.redis):
                    starting.create_task(node.start())
            for gateway in made.gateways:
                await gateway.start()
            yield made
        finally:
            for node in made.nodes:
                await asyncio.to_thread(node.server.stop, 2.0)
            for link in make.links:
                await link.stop()
            if disk is not None:
                await asyncio.to_thread(subprocess.run, ["umount", str(disk)], check=False)


async def _made(
    make: _Maker, folder: Path, disk: Path | None, lease_s: float, *, collections: bool
) -> Bed:
    """Everything, with links that listen; no process is started yet."""
    redis = make.node("redis", _redis(port := free_port()), port, ready="")
    engines = [make.node(f"engine-{i}", _engine(port := free_port()), port) for i in (1, 2)]
    urls = [(await make.link(f"to {e.name}", e.server.port)).url for e in engines]
    gateways = []
    for i in (1, 2):
        name, port, admin_port = f"gateway-{i}", free_port(), free_port()
        index = await make.link(f"{name} to redis", redis.server.port)
        among = await make.link(f"{name} among gateways", port)
        line = _gateway(port, admin_port, urls, index, among, lease_s)
        if collections and i == 2:
            line += ["--collections", str(folder / "disk")]
        gateway = make.node(name, line, port, ready="/ready", admin_port=admin_port)
        gateway.front = await make.link(f"clients to {name}", port)
        gateways.append(gateway)
    return Bed(gateways, engines, redis, make.links, folder, lease_s, disk)


def _redis(port: int) -> list[str]:
    quiet = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    return [redis_program(), "--port", str(port), *quiet]


def _engine(port: int) -> list[str]:
    line = [sys.executable, "-m", "engine_adapter.simulated", "--port", str(port)]
    line += ["--model-name", MODEL, "--kv-tokens", str(KV_TOKENS), "--speed", str(SPEED)]
    return [*line, "--answers", "chained"]


def _gateway(
    port: int,
    admin_port: int,
    engines: Sequence[str],
    index: Link,
    among: Link,
    lease_s: float,
) -> list[str]:
    line = [sys.executable, "-m", "gateway", "--port", str(port), "--admin-port", str(admin_port)]
    line += ["--tokenizer", str(model_dir()), "--advertise", among.url]
    line += ["--index", f"redis://127.0.0.1:{index.port}/0"]
    for url in engines:
        line += ["--engine", url]
    seconds = {
        "lease": lease_s, "idle-timeout": lease_s, "keep-finished": lease_s / 2, "resume": RESUME_S,
        "heartbeat": HEARTBEAT_S, "poll-timeout": POLL_TIMEOUT_S, "drain-timeout": DRAIN_S,
    }  # fmt: skip
    for name, value in seconds.items():
        line += [f"--{name}-s", str(value)]
    return line


def _mounted(folder: Path) -> Path | None:
    """A small file system, or None where this process may not mount one: then it is a folder."""
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        return None
    line = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(folder)]
    return folder if subprocess.run(line, check=False).returncode == 0 else None
