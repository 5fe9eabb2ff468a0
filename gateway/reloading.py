"""New settings for a gateway that runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from gateway.engines import Role
from gateway.errors import EngineThere
from gateway.pool import Pool, configured
from gateway.settings import AT_RUN_TIME, Current, Settings
from gateway.tenants import Tenants

logger = logging.getLogger(__name__)

ENGINES = frozenset({"engine", "plain_engine", "decode_engine"})


@dataclass(frozen=True, slots=True)
class Difference:
    """What a change of settings means for a gateway that runs."""

    added: Mapping[str, Role]
    """Engines, by URL."""
    removed: tuple[str, ...]
    changed: Mapping[str, Role]
    """Engines that are to have another role."""
    applied: tuple[str, ...]
    """Other settings that have changed and take effect now."""
    restart: tuple[str, ...]
    """Settings that have changed and take effect when the gateway is started anew."""

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def difference(now: Settings, wanted: Settings) -> Difference:
    """From the settings in force to others."""
    before, after = configured(now), configured(wanted)
    changed = [f.name for f in fields(Settings) if getattr(now, f.name) != getattr(wanted, f.name)]
    return Difference(
        added={url: role for url, role in after.items() if url not in before},
        removed=tuple(url for url in before if url not in after),
        changed={u: r for u, r in after.items() if u in before and before[u] != r},
        applied=tuple(n for n in changed if n in AT_RUN_TIME and n not in ENGINES),
        restart=tuple(n for n in changed if n not in AT_RUN_TIME),
    )


def in_force(now: Settings, wanted: Settings) -> Settings:
    """The settings after a reload: what needs a restart is as before."""
    return replace(now, **{name: getattr(wanted, name) for name in AT_RUN_TIME})


class Reloader:
    """Reads the settings again and puts what has changed into force."""

    def __init__(
        self,
        current: Current,
        pool: Pool,
        tenants: Tenants,
        read: Callable[[], Settings],
        use: Callable[[Settings], None],
    ) -> None:
        """
        Args:
            read: reads the settings as at the start; raises SettingsError.
            use: hands new ones to whoever keeps settings.
        """
        self._current = current
        self._pool = pool
        self._tenants = tenants
        self._read = read
        self._use = use

    def reload(self) -> Difference:
        """Put what has changed into force, in the file of tenants too. Engines that an operator has
        added stay.

        Raises:
            SettingsError: nothing has changed.
        """
        now, wanted = self._current.now, self._read()
        self._tenants.reload()
        found = difference(now, wanted)
        self._current.now = in_force(now, wanted)
        self._use(self._current.now)
        self._move_engines(found)
        logger.warning("settings were read again: %s", found.to_json())
        return found

    def _move_engines(self, found: Difference) -> None:
        there = {engine.url: engine for engine in self._pool.members}
        for url in found.removed:
            if url in there:
                self._pool.drain(there[url], remove=True)
        for url, role in found.changed.items():
            if url in there:
                self._pool.drain(there[url], remove=True, then=role)
        for url, role in found.added.items():
            try:
                self._pool.add(url, role)
            except EngineThere as e:
                logger.info("%s", e)


def shown(settings: Settings) -> dict[str, Any]:
    """Settings as operators may see them: without what URLs carry of secrets."""
    return {f.name: _redacted(getattr(settings, f.name)) for f in fields(Settings)}


def _redacted(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_redacted(part) for part in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    url = urlsplit(value)
    place = url.netloc.rpartition("@")
    netloc = f"***@{place[2]}" if place[1] else url.netloc
    query = "***" if url.query else ""
    return urlunsplit((url.scheme, netloc, url.path, query, url.fragment))
