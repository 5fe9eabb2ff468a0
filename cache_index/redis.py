"""The index in Redis 7 or later, or Valkey: one for many gateways.

Every operation is one round trip. Nothing is tried again here: whoever asks knows what is worth
waiting for. Keys in braces share a slot of a Cluster: a stream's record with nothing else, the
blocks of all engines of one family with each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from cache_index.index import Change, IndexUnavailable, OutOfOrder, Splice, Stale, StreamRecord
from cache_index.scripts import (
    ALIVE,
    APPLY,
    BEAT,
    CHANGE,
    CLAIM,
    DELETE,
    LONGEST,
    PUT,
    REBUILD,
    Script,
)

REPLICAS = "s2l:replicas"
FIELDS = StreamRecord.__struct_fields__
REPLACED = ("engine", "state", "about")
SPLICED = ("posts", "documents", "tail", "names")

Client: TypeAlias = "Redis | RedisCluster"
Argument: TypeAlias = str | bytes | int


class RedisIndex:
    """`StreamIndex`, `ReplicaIndex` and `BlockIndex` in Redis. `close` it at the end."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 0.25,
        connect_timeout_s: float = 0.25,
        connections: int = 16,
    ) -> None:
        """
        Args:
            url: `redis://` or `rediss://` as redis-py takes them, or
                `redis+sentinel://host:port,host:port/service/db`, or
                `redis+cluster://host:port,host:port`; with `user:password@` before the hosts.
            timeout_s: for an answer; for an operation as a whole together with the next.
            connect_timeout_s: for a new connection.
            connections: open at most, to each server. Further operations wait, within their time.
        """
        self._client = connect(url, timeout_s, connect_timeout_s)
        self._timeout_s = timeout_s + connect_timeout_s
        self._places = asyncio.Semaphore(connections)

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, stream_id: str) -> StreamRecord | None:
        values = await self._ask("HMGET", record_key(stream_id), *FIELDS)
        return None if values[0] is None else record_of(values)

    async def put(self, stream_id: str, record: StreamRecord, lease_s: float) -> None:
        others = [part for name in FIELDS[2:] for part in (name, getattr(record, name))]
        raise_if_stale(
            await self._run(
                PUT, [record_key(stream_id)], ms(lease_s), record.epoch, record.version, *others
            )
        )

    async def change(
        self, stream_id: str, epoch: int, version: int, change: Change, lease_s: float
    ) -> None:
        splices = [part for name, s in splices_of(change) for part in (name, *drop_keep_add(s))]
        raise_if_stale(
            await self._run(CHANGE, [record_key(stream_id)], epoch, version, ms(lease_s), *splices)
        )

    async def claim(self, stream_id: str, epoch: int, holder: str, lease_s: float) -> StreamRecord:
        values = await self._run(
            CLAIM, [record_key(stream_id)], epoch, holder, ms(lease_s), *FIELDS
        )
        if len(values) != len(FIELDS):
            raise_if_stale(values)
        return record_of(values)

    async def delete(self, stream_id: str, epoch: int) -> None:
        await self._run(DELETE, [record_key(stream_id)], epoch)

    async def beat(self, replica: str, lease_s: float) -> bool:
        return bool(await self._run(BEAT, [REPLICAS], replica, ms(lease_s)))

    async def replicas(self) -> set[str]:
        return {url.decode() for url in await self._run(ALIVE, [REPLICAS])}

    async def longest(self, family: str, names: bytes, engines: Sequence[str]) -> Mapping[str, int]:
        if not engines:
            return {}
        keys = [blocks_key(family, engine) for engine in engines]
        return dict(zip(engines, await self._run(LONGEST, keys, names), strict=True))

    async def apply(
        self,
        family: str,
        engine: str,
        instance: str,
        first: int,
        after: int,
        stored: bytes,
        removed: bytes,
        lease_s: float,
    ) -> None:
        expected = await self._run(
            APPLY, engine_keys(family, engine),
            instance, first, after, stored, removed, ms(lease_s),
        )  # fmt: skip
        if expected is not None:
            raise OutOfOrder(None if expected < 0 else expected)

    async def rebuild(
        self, family: str, engine: str, instance: str, after: int, names: bytes, lease_s: float
    ) -> None:
        keys = engine_keys(family, engine)
        await self._run(REBUILD, keys, instance, after, names, ms(lease_s))

    async def drop(self, family: str, engine: str) -> None:
        await self._ask("UNLINK", *engine_keys(family, engine))

    async def _run(self, script: Script, keys: Sequence[str], *arguments: Argument) -> Any:
        """What a script answers. It is sent in full only to a server that has not seen it."""
        rest = (len(keys), *keys, *arguments)
        try:
            return await self._ask("EVALSHA", script.sha, *rest)
        except NoScriptError:
            return await self._ask("EVAL", script.text, *rest)

    async def _ask(self, command: str, *arguments: Argument) -> Any:
        """What Redis answers.

        Raises:
            IndexUnavailable: nothing, or not in time, or that it cannot.
            NoScriptError
        """
        try:
            async with asyncio.timeout(self._timeout_s), self._places:
                return await self._client.execute_command(command, *arguments)
        except NoScriptError:
            raise
        except (RedisError, RedisClusterException, OSError) as exc:  # also TimeoutError
            raise IndexUnavailable(f"{command}: {exc or type(exc).__name__}") from exc


def connect(url: str, timeout_s: float, connect_timeout_s: float) -> Client:
    """A client that tries everything once. Nothing is sent yet.

    Raises:
        ValueError: this is no such URL.
    """
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": connect_timeout_s,
        "retry": Retry(NoBackoff(), 0),
        # A connection that begins without talking about itself is one round trip sooner ready.
        "driver_info": None,
        "protocol": 2,
    }
    parts = urlsplit(url)
    if parts.scheme == "redis+cluster":
        nodes = [ClusterNode(host, port) for host, port in hosts(parts, 6379)]
        return RedisCluster(startup_nodes=nodes, **options, **credentials(parts))
    if parts.scheme == "redis+sentinel":
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise ValueError(f"no service in {url!r}: redis+sentinel://host:port/service/db")
        sentinels = Sentinel(hosts(parts, 26379), **options)  # type: ignore[no-untyped-call]
        primary: Redis = sentinels.master_for(service, db=int(db or 0), **credentials(parts))
        return primary
    return Redis.from_url(url, **options)


def hosts(parts: SplitResult, default_port: int) -> list[tuple[str, int]]:
    """The hosts of a URL that may name several."""
    found = []
    for one in parts.netloc.rpartition("@")[2].split(","):
        host = urlsplit(f"//{one}")
        if not host.hostname:
            raise ValueError(f"no host in {parts.scheme}://{one}")
        found.append((host.hostname, host.port or default_port))
    return found


def credentials(parts: SplitResult) -> dict[str, Any]:
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    given = {"username": unquote(user), "password": unquote(password)}
    return {name: value for name, value in given.items() if value}


def record_key(stream_id: str) -> str:
    return f"s2l:{{{stream_id}}}"


def blocks_key(family: str, engine: str) -> str:
    return f"s2l:{{{family}}}:blocks:{engine}"


def engine_keys(family: str, engine: str) -> list[str]:
    """Of an engine's blocks, and of what is known about them."""
    return [blocks_key(family, engine), f"s2l:{{{family}}}:engine:{engine}"]


def ms(lease_s: float) -> int:
    return max(1, round(1000 * lease_s))


def splices_of(change: Change) -> Iterator[tuple[str, Splice]]:
    """The fields that change, and how; one that is replaced keeps nothing."""
    for name in REPLACED:
        value = getattr(change, name)
        if value is not None:
            yield name, Splice(keep=0, add=value.encode() if isinstance(value, str) else value)
    for name in SPLICED:
        splice = getattr(change, name)
        if splice != Splice():
            yield name, splice


def drop_keep_add(splice: Splice) -> tuple[int, int | str, bytes]:
    return splice.drop, "" if splice.keep is None else splice.keep, splice.add


def record_of(values: Sequence[bytes]) -> StreamRecord:
    """A record from the values of all its fields, in order."""
    epoch, version, holder, engine, state, *rest = values
    return StreamRecord(
        epoch=int(epoch),
        version=int(version),
        holder=holder.decode(),
        engine=engine.decode(),
        state=state.decode(),
        **dict(zip(FIELDS[5:], rest, strict=True)),
    )


def raise_if_stale(answer: Sequence[bytes] | None) -> None:
    if answer is not None:
        epoch, version, holder = answer
        raise Stale(int(epoch), int(version), holder.decode())
