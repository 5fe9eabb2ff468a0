"""A Redis Cluster and a primary with Sentinel, on this machine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cache_index.index import Change, IndexUnavailable, Splice, StreamRecord
from cache_index.redis import RedisIndex
from deploy.local import Server, answers_ping, free_port, redis_program, redis_server
from tests.conftest import until

pytestmark = pytest.mark.engine

RECORD = StreamRecord(epoch=0, version=0, holder="g1", engine="", state="open", about=b"a")
SLOTS = 16384


def tell(server: Server, *words: str) -> str:
    """What a server answers to a command, as it comes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(" ".join(words).encode() + b"\r\n")
        return link.recv(1 << 16).decode()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Server]]:
    """Three primaries that share the slots."""
    with ExitStack() as stack:
        nodes, bus = [], []
        for n in range(3):
            (home := tmp_path / str(n)).mkdir()
            bus.append(free_port())
            flags = ["--cluster-enabled", "yes", "--cluster-port", str(bus[n])]
            flags += ["--cluster-node-timeout", "1000", "--dir", str(home)]
            flags += ["--cluster-require-full-coverage", "no"]
            nodes.append(stack.enter_context(redis_server(flags)))
            nodes[n].start().wait_ready(10)
        cuts = [SLOTS * n // 3 for n in range(4)]
        for n, node in enumerate(nodes):
            first, last = cuts[n], cuts[n + 1] - 1
            assert "OK" in tell(node, "CLUSTER ADDSLOTSRANGE", str(first), str(last))
            if n > 0:
                meet = ("CLUSTER MEET 127.0.0.1", str(node.port), str(bus[n]))
                assert "OK" in tell(nodes[0], *meet)
        yield nodes


async def whole(nodes: list[Server]) -> bool:
    views = [tell(node, "CLUSTER INFO") for node in nodes]
    return all(f"cluster_slots_ok:{SLOTS}" in v and "cluster_size:3" in v for v in views)


async def put_or_why(index: RedisIndex, stream: str, record: StreamRecord) -> str:
    try:
        await index.put(stream, record, 60)
    except IndexUnavailable:
        return "unavailable"
    return "put"


async def test_a_cluster_and_one_of_its_servers_dying(cluster: list[Server]) -> None:
    await until(lambda: whole(cluster), within_s=20)
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in cluster[:2])
    index = RedisIndex(f"redis+cluster://{hosts}", timeout_s=10, connect_timeout_s=10)
    streams = [f"s{n}" for n in range(30)]
    for stream in streams:
        await index.put(stream, RECORD, 60)
        await index.change(stream, 0, 0, Change(tail=Splice(add=b"t")), 60)
        assert (await index.claim(stream, 0, "g2", 60)).tail == b"t"
    names, engines = bytes(range(80)), [f"http://engine-{n}" for n in range(64)]
    for family in ("f1", "f2", "f3"):
        for n, engine in enumerate(engines):
            await index.rebuild(family, engine, "i", 0, names[: 8 * (n % 11)], 60)
            await index.apply(family, engine, "i", 0, 1, b"", b"", 60)
        held = await index.longest(family, names, engines)
        assert held == {engine: n % 11 for n, engine in enumerate(engines)}
        await index.drop(family, engines[1])
    await index.beat("g1", 60)
    assert "g1" in await index.replicas()

    cluster[2].kill()
    news = StreamRecord(epoch=2, version=3, holder="g3", engine="", state="open")
    outcomes = [await put_or_why(index, stream, news) for stream in streams]
    assert set(outcomes) == {"put", "unavailable"}
    for stream, outcome in zip(streams, outcomes, strict=True):
        if outcome == "put":
            assert await index.get(stream) == news
    await index.close()


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    """A Sentinel, and the primary that it watches beside a replica."""
    port, settings = free_port(), tmp_path / "sentinel.conf"
    with redis_server(["--dir", str(tmp_path)]) as primary:
        primary.start().wait_ready(10)
        settings.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\n"
            f"sentinel monitor index 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds index 500\n"
            "sentinel failover-timeout index 3000\n"
        )
        flags = ["--replicaof", "127.0.0.1", str(primary.port), "--repl-diskless-sync-delay", "0"]
        command = [redis_program(), str(settings), "--sentinel"]
        watch = Server("sentinel", command, port=port, scheme="redis", is_ready=answers_ping)
        with redis_server([*flags, "--dir", str(tmp_path)]) as replica, watch:
            replica.start().wait_ready(10)
            watch.start().wait_ready(10)
            yield watch, primary


async def test_sentinel_names_the_primary_also_after_a_failover(
    sentinel: tuple[Server, Server],
) -> None:
    watch, primary = sentinel

    async def replica_follows() -> bool:
        known = "num-slaves\r\n$1\r\n1" in tell(watch, "SENTINEL MASTER index")
        return known and "state=online" in tell(primary, "INFO replication")

    await until(replica_follows, within_s=30)
    url = f"redis+sentinel://127.0.0.1:{watch.port}/index/0"
    index = RedisIndex(url, timeout_s=10, connect_timeout_s=10)
    await index.put("s", RECORD, 60)
    assert "1" in tell(primary, "WAIT 1 5000")
    primary.kill()
    assert await put_or_why(index, "s", RECORD) == "unavailable"

    async def serves_again() -> bool:
        try:
            return await index.get("s") == RECORD
        except IndexUnavailable:
            await asyncio.sleep(0.1)
            return False

    await until(serves_again, within_s=30)
    await index.change("s", 0, 0, Change(state="finished"), 60)
    await index.close()
