"""All streams of one gateway: made, found, kept alive, forgotten."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator

from gateway.errors import EngineFailed, Overloaded, StreamNotFound
from gateway.placement import Engine
from gateway.prompt import Prompt
from gateway.requests import Options
from gateway.settings import Settings
from gateway.stream import Stream
from gateway.telemetry import Metrics

SWEEP_S = 0.5
ENDED = ("done", "failed", "cancelled", "expired")


class Streams:
    """The streams by id, and the task that looks after the silent ones."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._streams: dict[str, Stream] = {}
        self._alive = 0
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look after the streams."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Cancel every stream and end all tasks."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams.values()))

    def create(self, model: str, prompt: Prompt, engine: Engine, options: Options) -> Stream:
        """A new stream on an engine.

        Raises:
            Overloaded
        """
        if self._alive >= self._settings.max_streams:
            raise Overloaded(f"{self._alive} streams are open")
        stream = Stream(
            f"st-{uuid.uuid4().hex}",
            model,
            prompt,
            engine,
            options=options,
            lease_s=self._settings.lease_s,
            metrics=self._metrics,
            ended=self._ended,
        )
        self._streams[stream.id] = stream
        self._alive += 1
        self._metrics.open_streams.set(self._alive)
        return stream

    def get(self, stream_id: str) -> Stream:
        """The stream of an id.

        Raises:
            StreamNotFound
        """
        try:
            return self._streams[stream_id]
        except KeyError:
            raise StreamNotFound(f"no stream {stream_id!r}") from None

    def engine_lost(self, engine: Engine) -> None:
        """Fail the streams of an engine that is gone."""
        for stream in self._of(engine):
            stream.fail(EngineFailed("the engine of this stream died"))

    def _of(self, engine: Engine) -> Iterator[Stream]:
        yield from [s for s in self._streams.values() if s.engine is engine]

    def _ended(self, stream: Stream) -> None:
        self._alive -= 1
        self._metrics.open_streams.set(self._alive)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            await asyncio.gather(*self._due(time.monotonic()))

    def _due(self, now_s: float) -> list[asyncio.Future[None] | asyncio.Task[None]]:
        """What has to be done for silent streams now; forgets the long ended ones."""
        work: list[asyncio.Future[None] | asyncio.Task[None]] = []
        for stream in list(self._streams.values()):
            silent_s = now_s - stream.touched_s
            if stream.state in ENDED:
                if silent_s > self._settings.keep_finished_s:
                    del self._streams[stream.id]
            elif stream.state == "open" and silent_s > self._settings.idle_timeout_s:
                work.append(asyncio.create_task(stream.cancel("expired")))
            elif (
                stream.state == "open"
                and now_s - stream.engine_touched_s > self._settings.lease_s / 3
            ):
                work.append(asyncio.create_task(stream.renew_lease()))
        return work
