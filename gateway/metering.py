"""The tokens of an answer that only passes through, as far as they can be told from its bytes."""

from __future__ import annotations

import re

BYTES_PER_TOKEN = 4
"""Of a prompt, where the engine does not say."""
TAIL_BYTES = 8192
"""Usage stands at the end."""

_EVENT = b"data: {"
_USAGE = re.compile(rb'"(prompt|completion)_tokens"\s*:\s*(\d+)')


class PassedTokens:
    """Counts as the answer comes. Without usage in it, an event of a stream is taken for a token;
    an engine that is behind puts several into one."""

    def __init__(self, body: bytes) -> None:
        self._prompt_tokens = len(body) // BYTES_PER_TOKEN
        self._events = 0
        self._tail = b""

    def see(self, part: bytes) -> None:
        """The answer goes on with this."""
        # An event that is cut in two is counted with its second part, and only there.
        border = self._tail[-len(_EVENT) + 1 :] if self._tail else b""
        self._events += (border + part).count(_EVENT)
        self._tail = (self._tail + part)[-TAIL_BYTES:]

    @property
    def total(self) -> int:
        """Tokens of prompt and answer so far."""
        said = {kind: int(count) for kind, count in _USAGE.findall(self._tail)}
        return said.get(b"prompt", self._prompt_tokens) + said.get(b"completion", self._events)
