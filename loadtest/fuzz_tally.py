"""What a fuzzing run has sent, what came back, and what should not have."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import requests

SHOWN_CHARS = 300
KEPT_FAULTS = 20
LATER = 503
SILENT = 504
TIMEOUT_S = 30.0
"""No request hangs: one that takes longer is a fault."""


@dataclass
class Tally:
    """Counts of one run."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By operation and status; 0: the server closed the connection, as it may when it was sent no
    HTTP or the half of a request."""
    faults: Counter[str] = field(default_factory=Counter)
    """By what was wrong where, so that one fault found often is one line."""
    examples: dict[str, str] = field(default_factory=dict)
    """What was sent, the first time."""

    @property
    def sent(self) -> int:
        """How many requests."""
        return self.answers.total()

    def fault(self, what: str, sent: Any) -> None:
        """Something was not as promised."""
        self.faults[what] += 1
        if len(self.examples) < KEPT_FAULTS:
            self.examples.setdefault(what, repr(sent)[:SHOWN_CHARS])

    def answered(self, operation: str, response: requests.Response, sent: Any) -> None:
        """Count a response, and see that a server's error is one of those that there may be."""
        status = response.status_code
        self.answers[operation, status] += 1
        if status < 500:
            return
        allowed = (status == LATER and "Retry-After" in response.headers) or (
            status == SILENT and code_of(response) == "engine_timeout"
        )
        if not allowed:
            self.fault(f"{operation}: {status} {response.text[:80]}", sent)

    def hung(self, operation: str, error: Exception, sent: Any) -> None:
        """Nothing came back."""
        self.answers[operation, 0] += 1
        self.fault(f"{operation}: {type(error).__name__}", sent)

    def lines(self) -> list[str]:
        """The table of what came back, then the faults."""
        found: dict[str, dict[int, int]] = {}
        for (operation, status), count in self.answers.items():
            found.setdefault(operation, {})[status] = count
        table = [
            f"{operation:44} {sum(by_status.values()):7,}  "
            + "  ".join(f"{status}: {count:,}" for status, count in sorted(by_status.items()))
            for operation, by_status in sorted(found.items())
        ]
        faults = [
            f"FAULT {count:,}x {what}\n      sent: {self.examples.get(what, '')}"
            for what, count in self.faults.most_common()
        ]
        return table + faults


def code_of(response: requests.Response) -> str | None:
    """The code of an error."""
    try:
        code = response.json()["error"]["code"]
    except (requests.JSONDecodeError, KeyError, TypeError):
        return None
    return code if isinstance(code, str) else None


def session(key: str | None = None) -> requests.Session:
    """A client without a proxy."""
    client = requests.Session()
    client.trust_env = False
    if key is not None:
        client.headers["Authorization"] = f"Bearer {key}"
    return client
