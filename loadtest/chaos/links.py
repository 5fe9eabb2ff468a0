"""A TCP connection's way between two processes, which can be made slow, cut or silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

PART_BYTES = 1 << 16
TRICKLE_BYTES = 40
TRICKLE_S = 0.02


class Link:
    """Listens on a port of its own and passes on what comes to another one."""

    def __init__(self, name: str, port: int) -> None:
        """
        Args:
            port: where it leads to.
        """
        self.name = name
        self.delay_s = 0.0
        """Of each part that passes."""
        self.trickles = False
        """A few bytes at a time."""
        self.port = 0
        self._to = port
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Begin to listen."""
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End every connection."""
        assert self._server is not None
        self._server.close()
        self._open.set()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        """Break every connection that there is."""
        for writer in list(self._writers):
            writer.transport.abort()

    def swallow(self) -> None:
        """Let nothing pass, in either direction, and tell nobody."""
        self._open.clear()

    def release(self, *, cut: bool) -> None:
        """Let what was held pass; or break the connections, and with them what was held."""
        if cut:
            self.cut()
        self._open.set()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._owned(writer):
            with suppress(OSError):
                await self._open.wait()
                there, out = await asyncio.open_connection("127.0.0.1", self._to)
                async with self._owned(out):
                    await self._both(reader, out, there, writer)

    async def _both(
        self,
        reader: asyncio.StreamReader,
        out: asyncio.StreamWriter,
        there: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Until both directions have ended, or one is broken."""
        ways = [asyncio.create_task(self._pass(*way)) for way in ((reader, out), (there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(PART_BYTES):
            await asyncio.sleep(self.delay_s)
            step = TRICKLE_BYTES if self.trickles else PART_BYTES
            for begin in range(0, len(part), step):
                if self.trickles:
                    await asyncio.sleep(TRICKLE_S)
                await self._open.wait()
                writer.write(part[begin : begin + step])
                await writer.drain()
        await self._open.wait()
        writer.close()  # HTTP and Redis have no use for half of a connection

    @asynccontextmanager
    async def _owned(self, writer: asyncio.StreamWriter) -> AsyncIterator[None]:
        self._writers.add(writer)
        try:
            yield
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            self._writers.discard(writer)
