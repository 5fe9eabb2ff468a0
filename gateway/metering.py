"""The tokens of an answer that only passes through, as far as they can be told from its bytes."""

from __future__ import annotations

import re

import msgspec

BYTES_PER_TOKEN = 4
"""Where the engine does not say."""
BORDER_BYTES = 128
"""Of an answer, kept for what is cut in two by its parts."""

_EVENT = b"data: {"
_USAGE = re.compile(rb'"(prompt|completion)_tokens"\s*:\s*(\d+)')


class _Asked(msgspec.Struct):
    stream: bool | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class PassedTokens:
    """Counts as the answer comes. Usage may stand anywhere in it, and the newest counts: an engine
    may tell it with each event. Without it an event of a stream is taken for a token; an engine
    that is behind puts several into one."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._answer_bytes = 0
        self._events = 0
        self._unseen = 0
        self._said: dict[bytes, int] = {}
        self._border = b""

    def see(self, part: bytes) -> None:
        """The answer goes on with this."""
        # An event that is cut in two is counted with its second part, and only there.
        event_border = self._border[-len(_EVENT) + 1 :] if self._border else b""
        self._events += (event_border + part).count(_EVENT)
        seen = self._border + part
        self._said |= {kind: int(count) for kind, count in _USAGE.findall(seen)}
        self._border = seen[-BORDER_BYTES:]
        self._answer_bytes += len(part)

    def hung_up(self, room_tokens: int) -> None:
        """The client is gone. Of an answer that was to come as one body nothing may have come, and
        nobody knows how far the engine was: it counts as long as it might have become.

        Args:
            room_tokens: that the model takes, of prompt and answer.
        """
        if not self._answer_bytes:
            self._unseen = _most_tokens(self._body, room_tokens)

    @property
    def total(self) -> int:
        """Tokens of prompt and answer so far."""
        prompt = self._said.get(b"prompt", len(self._body) // BYTES_PER_TOKEN)
        told = self._events or self._answer_bytes // BYTES_PER_TOKEN
        return prompt + self._said.get(b"completion", told) + self._unseen


def _most_tokens(body: bytes, room_tokens: int) -> int:
    """Of the answer that a request asks for as one body; 0 if it asks for a stream or for none."""
    try:
        asked = msgspec.json.decode(body, type=_Asked)
    except msgspec.DecodeError:  # then the engine has refused it too
        return 0
    most = asked.max_completion_tokens or asked.max_tokens or room_tokens
    return 0 if asked.stream else max(min(most, room_tokens), 0) * max(asked.n or 1, 1)
