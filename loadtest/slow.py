"""Clients that are slow on purpose, as `loadtest.bench_slowloris` lets them loose on a gateway.

    heads    send the head of a request byte by byte
    bodies   send a body byte by byte behind a head
    readers  ask for a long answer and do not read it
    halves   send half of a head, and then nothing more

Whoever is cut off comes back. A process of its own, so that it is not in others' way; it runs until
it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import orjson
import uvloop

SMALL_BUFFER_BYTES = 4096
LONG_TOKENS = 1000
PAUSE_S = 0.2
"""Before somebody who was cut off comes back."""
STARTING_S = 10.0
"""They do not all come in the same moment."""
REQUEST = b"POST %b HTTP/1.1\r\nHost: gateway\r\nContent-Length: %d\r\n\r\n%b"


@dataclass(frozen=True, slots=True)
class Slow:
    """One client that is slow, again and again."""

    port: int
    model: str
    every_s: float
    """From one byte to the next."""
    starting_s: float = STARTING_S

    async def run(self, kind: Callable[[Slow, socket.socket], Awaitable[None]]) -> None:
        """Be slow in one way."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(random.uniform(0, self.starting_s))
        while True:
            with suppress(OSError), socket.socket() as link:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
                link.setblocking(False)
                await loop.sock_connect(link, ("127.0.0.1", self.port))
                await kind(self, link)
            await asyncio.sleep(PAUSE_S)

    async def heads(self, link: socket.socket) -> None:
        head = b"POST /v1/streams HTTP/1.1\r\nHost: gateway\r\nX-Slow: " + b"s" * 8000
        await self._drip(link, head)

    async def bodies(self, link: socket.socket) -> None:
        body = self._create(1)
        whole = REQUEST % (b"/v1/streams", len(body), body)
        at = len(whole) - len(body)
        await asyncio.get_running_loop().sock_sendall(link, whole[:at])
        await self._drip(link, whole[at:])

    async def readers(self, link: socket.socket) -> None:
        loop, body = asyncio.get_running_loop(), self._create(LONG_TOKENS)
        await loop.sock_sendall(link, REQUEST % (b"/v1/streams", len(body), body))
        answer = await loop.sock_recv(link, SMALL_BUFFER_BYTES)
        if b"201" not in answer.partition(b"\r\n")[0]:
            return
        stream = orjson.loads(answer.partition(b"\r\n\r\n")[2])["id"].encode()
        path = b"/v1/streams/%b/finish" % stream
        await loop.sock_sendall(link, REQUEST % (path, 2, b"{}"))
        while True:  # a send is how it is noticed that the other side has hung up
            await asyncio.sleep(self.every_s)
            await loop.sock_sendall(link, b"\r\n")

    async def halves(self, link: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(link, b"POST /v1/streams HTTP/1.1\r\nHost: gat")
        await loop.sock_recv(link, SMALL_BUFFER_BYTES)

    async def _drip(self, link: socket.socket, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        for byte in data:
            await loop.sock_sendall(link, bytes([byte]))
            await asyncio.sleep(self.every_s)

    def _create(self, max_tokens: int) -> bytes:
        messages = [{"role": "user", "content": "Why?"}]
        return orjson.dumps({"model": self.model, "messages": messages, "max_tokens": max_tokens})


KINDS = (Slow.heads, Slow.bodies, Slow.readers, Slow.halves)


async def run(options: argparse.Namespace) -> None:
    """All of them, in equal parts."""
    slow = Slow(options.port, options.model, options.every_s)
    kinds = itertools.islice(itertools.cycle(KINDS), options.connections)
    await asyncio.gather(*(slow.run(kind) for kind in kinds))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.slow", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="of a gateway on this machine")
    parser.add_argument("--model", required=True)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--every-s", type=float, default=1.0, help="from one byte to the next")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with suppress(KeyboardInterrupt):
        uvloop.run(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
