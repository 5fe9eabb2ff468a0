"""A bound on a process's share of a core, by a control group of Linux (either version).

With one it can be seen on a small machine how more processes help: each is given a part of a core,
and what they share with the rest of the machine is no longer what bounds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

ROOT = Path("/sys/fs/cgroup")
PERIOD_US = 10_000
"""A process that has used its share waits no longer than this for the next."""
EMPTY_S = 5.0
"""Longest wait for the end of what was in a group."""


class NoQuota(Exception):
    """This machine, or this user, has no groups for it."""


@contextmanager
def at_most(cores: float, pids: Sequence[int]) -> Iterator[None]:
    """Each of these processes, with those it starts from now on, has so much of a core and no more.

    Raises:
        NoQuota: it can't be done here.
    """
    groups = list[Path]()
    try:
        try:
            for pid in pids:
                groups.append(_group())
                _bound(groups[-1], cores)
                (groups[-1] / "cgroup.procs").write_text(str(pid))
        except OSError as e:
            raise NoQuota(f"no control group for a share of a core: {e}") from e
        yield
    finally:
        for group in groups:
            _remove(group)


def _group() -> Path:
    first = ROOT / "cpu" if (ROOT / "cpu").is_dir() else ROOT
    group = first / f"stream2llm-{uuid4().hex[:8]}"
    group.mkdir()
    return group


def _bound(group: Path, cores: float) -> None:
    quota_us = round(cores * PERIOD_US)
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))


def _remove(group: Path) -> None:
    """Who is still in it goes back to the group above."""
    until_s = time.monotonic() + EMPTY_S
    while True:
        try:
            for pid in (group / "cgroup.procs").read_text().split():
                (group.parent / "cgroup.procs").write_text(pid)
            return group.rmdir()
        except OSError:  # ended in between, or not gone yet
            if time.monotonic() > until_s:
                raise
            time.sleep(0.05)
