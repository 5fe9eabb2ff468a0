"""The answer of a stream, resumed and asked for again until it is whole."""

from __future__ import annotations

import asyncio
import time

import orjson

from loadtest.chaos.calls import BROKEN, PATIENCE_S, REQUEST_S, Caller, Refused, code_of, parsed
from loadtest.chaos.history import Json

DONE = b"[DONE]"
PASSING = frozenset(
    {
        "broken", "engine_unavailable", "index_unavailable", "overloaded", "draining",
        "idempotency_key_in_use",
    }
)  # fmt: skip
"""Errors after which the answer may still be had."""
MAX_ERRORS = 4
"""Error events after which a client gives up."""


class Answer:
    """One client's view of one answer."""

    def __init__(self, call: Caller, path: str, body: Json, key: str | None) -> None:
        """
        Args:
            path: of the stream.
            body: of its finish.
            key: None: what breaks off can't be gone on with.
        """
        self._call = call
        self._path = path
        self._body = body
        self._key = key
        self._last = -1
        """The number of the last event."""

    async def whole(self) -> None:
        """Read it to its end, over as many connections as that takes.

        Raises:
            Refused: it can't be had.
        """
        begun_s, errors, last = time.monotonic(), 0, "broken"
        while time.monotonic() < begun_s + PATIENCE_S and errors < MAX_ERRORS:
            try:
                await self.read(None)
            except Refused as e:
                last = e.code
                if e.code in ("answer_gone", "conflict"):
                    self._from_the_beginning()
                elif e.code not in PASSING:
                    raise
                elif e.error.get("event"):  # in place of the rest: the next telling is another one
                    errors += 1
                    self._from_the_beginning()
            if self._call.history.complete:
                return
            await self._call.elsewhere()
        raise Refused(last, {})

    def _from_the_beginning(self) -> None:
        history = self._call.history
        history.retellings += bool(history.text)
        self._last, history.text = -1, ""

    async def read(self, parts: int | None) -> None:
        """Over one connection; all of it, or so many of its parts.

        Raises:
            Refused: with the code of the error, or `broken`.
        """
        begun_s, outcome = time.monotonic(), "broken"
        try:
            outcome = await self._read(parts)
        except TimeoutError:
            outcome = "hung"
        except BROKEN:
            pass
        except Refused as e:
            outcome = e.code
            raise
        finally:
            self._call.note("answer", outcome, begun_s)
        if outcome != "ok":
            raise Refused("broken", {})

    async def _read(self, parts: int | None) -> str:
        headers = {} if self._key is None else {"Idempotency-Key": self._key}
        method, path, body = "POST", self._path + "/finish", self._body
        if self._last >= 0:
            headers["Last-Event-ID"] = str(self._last)
            if self._call.rng.random() < 0.5:
                method, path, body = "GET", self._path + "/answer", {}
        url, data = self._call.url + path, orjson.dumps(body) if body else None
        async with asyncio.timeout(REQUEST_S) as limit:
            loop = asyncio.get_running_loop()
            async with self._call.http.request(method, url, data=data, headers=headers) as response:
                if response.status != 200:
                    answer = parsed(await response.read())
                    raise Refused(code_of(answer, response.status), answer.get("error") or {})
                number: int | None = None
                async for line in response.content:
                    limit.reschedule(loop.time() + REQUEST_S)
                    if line.startswith(b"id: "):
                        number = int(line[4:])
                    elif line.startswith(b"data: "):
                        if self._take(line[6:].strip(), number):
                            return "ok"
                        if parts is not None and (parts := parts - 1) <= 0:
                            return "ok"
        return "broken"

    def _take(self, data: bytes, number: int | None) -> bool:
        """One event; whether it is the last."""
        history = self._call.history
        if data == DONE:
            history.complete = True
            return True
        event = orjson.loads(data)
        if "error" in event:
            raise Refused(str(event["error"].get("code")), {"event": True})
        if number is not None:
            if number != self._last + 1:
                history.odd.append(f"event {number} came behind event {self._last}")
            self._last = number
        for choice in event["choices"]:
            history.text += choice["delta"].get("content") or ""
        return False
