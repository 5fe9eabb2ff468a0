"""Requests to one of several gateways, tried again where that is worth it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence

import aiohttp
import orjson

from loadtest.chaos.history import History, Json, Request

REQUEST_S = 40.0
"""The deadline of every request; of an answer that is streamed, of each of its parts. Longer than
any wait of a gateway, which is 30 s for a replica that nobody can say is alive."""
PATIENCE_S = 60.0
"""So long a client tries again."""
PAUSES_S = (0.05, 0.2)
LONGEST_PAUSE_S = 2.0
AGAIN = frozenset({"idempotency_key_in_use"})
"""Codes, besides all of status 503, that go away."""
BROKEN = (aiohttp.ClientError, ConnectionError)


class Refused(Exception):
    """A request has failed for good; its text is the code of the error."""

    def __init__(self, code: str, error: Json) -> None:
        super().__init__(code)
        self.code, self.error = code, error


class Caller:
    """One client's way to the gateways: at random, and to another one after a failure."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        urls: Sequence[str],
        history: History,
        rng: random.Random,
    ) -> None:
        self.http = http
        self.rng = rng
        self.history = history
        self._urls = urls
        self._at = rng.randrange(len(urls))
        self._failures = 0
        """In a row."""

    @property
    def url(self) -> str:
        return self._urls[self._at % len(self._urls)]

    async def asked(
        self, what: str, method: str, path: str, body: Json | bytes | None, key: str | None = None
    ) -> Json:
        """The answer of the first gateway that gives one.

        Raises:
            Refused: also if none has answered in time.
        """
        headers = {} if key is None else {"Idempotency-Key": key}
        begun_s, last = time.monotonic(), "broken"
        while time.monotonic() < begun_s + PATIENCE_S:
            status, answer = await self._once(what, method, path, body, headers)
            if status is not None and status < 400:
                self._failures = 0
                return answer
            error = answer.get("error", {})
            last = str(error.get("code") or "broken")
            if status is not None and status != 503 and last not in AGAIN:
                raise Refused(last, error)
            await self.elsewhere()
        raise Refused(last, {})

    async def elsewhere(self) -> None:
        """Go to another gateway, after a pause that is longer each time."""
        self._at += 1
        pause_s = self.rng.uniform(*PAUSES_S) * 2 ** min(self._failures, 10)
        self._failures += 1
        await asyncio.sleep(min(pause_s, LONGEST_PAUSE_S))

    async def _once(
        self,
        what: str,
        method: str,
        path: str,
        body: Json | bytes | None,
        headers: Mapping[str, str],
    ) -> tuple[int | None, Json]:
        """Status, None if there was none, and what was answered."""
        data = orjson.dumps(body) if isinstance(body, dict) else body
        begun_s, outcome, status, answer = time.monotonic(), "broken", None, Json()
        try:
            async with (
                asyncio.timeout(REQUEST_S),
                self.http.request(method, self.url + path, data=data, headers=headers) as response,
            ):
                answer, status = parsed(await response.read()), response.status
                outcome = "ok" if status < 400 else code_of(answer, status)
        except TimeoutError:
            outcome = "hung"
        except BROKEN:
            pass
        self.note(what, outcome, begun_s)
        return status, answer

    def note(self, what: str, outcome: str, begun_s: float) -> None:
        """A request has ended."""
        now_s, gateway = time.monotonic(), self._at % len(self._urls) + 1
        self.history.requests.append(Request(what, outcome, now_s - begun_s, gateway, now_s))


def parsed(raw: bytes) -> Json:
    """A body; empty if it is none of ours."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def code_of(body: Json, status: int) -> str:
    """The code of an error."""
    error = body.get("error")
    return str((error or {}).get("code") or f"status_{status}")
