"""A chat completion that is read as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


class AnswerBroken(Exception):
    """It ended with an error, or without its end."""


@dataclass(slots=True)
class Answer:
    """When its pieces came."""

    pieces_s: list[float] = field(default_factory=list)
    text: str = ""


def read_answer(lines: Iterable[bytes], clock_s: Callable[[], float]) -> Answer:
    """Read server-sent events to `[DONE]`.

    Raises:
        AnswerBroken: an error event came, or none of the events was the last.
    """
    answer = Answer()
    for line in lines:
        if not line.startswith(b"data:"):
            continue  # a heartbeat, or the blank line behind an event
        data = line[5:].strip()
        if data == b"[DONE]":
            return answer
        event = json.loads(data)
        if "error" in event:
            raise AnswerBroken(event["error"]["message"])
        piece = "".join(c["delta"].get("content") or "" for c in event["choices"])
        if piece:
            answer.text += piece
            answer.pieces_s.append(clock_s())
    raise AnswerBroken("the answer broke off")
