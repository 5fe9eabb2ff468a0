"""Published ports: what comes to one address of this machine goes to another.

`python -m deploy.forward HOST:PORT TO_HOST:TO_PORT ...`
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Sequence

CHUNK_BYTES = 1 << 16

Forward = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def serve(pairs: Sequence[str]) -> None:
    """Forward until cancelled.

    Args:
        pairs: an address to listen on and the one to connect to, by turns.
    """
    async with contextlib.AsyncExitStack() as servers:
        for here, there in zip(pairs[::2], pairs[1::2], strict=True):
            host, port = here.rsplit(":", 1)
            server = await asyncio.start_server(_forwarder(there), host, int(port))
            await servers.enter_async_context(server)
        await asyncio.Event().wait()


def _forwarder(address: str) -> Forward:
    host, port = address.rsplit(":", 1)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pipe(reader, far_writer), _pipe(far_reader, writer))

    return forward


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while part := await reader.read(CHUNK_BYTES):
            writer.write(part)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
