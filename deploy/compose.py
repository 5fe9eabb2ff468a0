"""What a compose file says, as values: variables filled in, services of chosen profiles.

Only what this project's file uses is read. An unknown key is an error, so that the file can't say
something that a run without containers would pass over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

Condition = Literal["service_started", "service_healthy", "service_completed_successfully"]


class ComposeError(Exception):
    """The file can't be used. Says why."""


class Dependency(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What has to be true of another service before this one starts."""

    condition: Condition
    required: bool = True
    """False: only if that service is started at all."""


class Health(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How a service is found to be healthy."""

    test: list[str]
    interval: str = "30s"
    timeout: str = "30s"
    retries: int = 3
    start_period: str = "0s"
    start_interval: str = "5s"

    @property
    def patience_s(self) -> float:
        """From the start to the last moment at which it may become healthy."""
        return seconds(self.start_period) + self.retries * seconds(self.interval)


class Attachment(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How a service is part of a network."""

    aliases: list[str] = []
    ipv4_address: str | None = None


class Service(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One service."""

    image: str
    entrypoint: list[str]
    command: list[str] = []
    environment: dict[str, str] = {}
    depends_on: dict[str, Dependency] = {}
    healthcheck: Health | None = None
    profiles: list[str] = []
    networks: list[str] | dict[str, Attachment] = []
    volumes: list[str] = []
    ports: list[str] = []
    # What only containers have.
    build: Any = None
    cap_drop: Any = None
    deploy: Any = None
    init: bool = False
    ipc: str | None = None
    read_only: bool = False
    restart: str = "no"
    security_opt: Any = None
    tmpfs: Any = None
    user: str | None = None

    @property
    def attachments(self) -> list[Attachment]:
        return list(self.networks.values()) if isinstance(self.networks, dict) else []

    @property
    def mounts(self) -> list[Mount]:
        return [Mount.read(text) for text in self.volumes]

    @property
    def published(self) -> list[Published]:
        return [Published.read(text) for text in self.ports]


class Mount(msgspec.Struct, frozen=True):
    """A volume or a path of the machine, at a path of the container."""

    source: str
    target: str

    @classmethod
    def read(cls, text: str) -> Mount:
        source, target, *_ = text.split(":")
        return cls(source, target)

    @property
    def is_volume(self) -> bool:
        return not self.source.startswith((".", "/"))


class Published(msgspec.Struct, frozen=True):
    """A port of a container that the machine listens on."""

    host: str
    port: int
    target: int

    @classmethod
    def read(cls, text: str) -> Published:
        host, port, target = text.rsplit(":", 2)
        return cls(host, int(port), int(target))


class Volume(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A named volume."""

    local: str | None = msgspec.field(default=None, name="x-local")
    """The folder that it is where there are no containers; None for one of the run's own."""


class Project(msgspec.Struct, frozen=True):
    """The file, with the services of the chosen profiles."""

    name: str
    services: dict[str, Service]
    volumes: dict[str, Volume | None] = {}
    networks: dict[str, Any] = {}

    def names(self) -> Iterator[tuple[str, str]]:
        """Every name and address of a service, and the service."""
        for name, service in self.services.items():
            yield name, name
            for attachment in service.attachments:
                yield from ((alias, name) for alias in attachment.aliases)
                if attachment.ipv4_address is not None:
                    yield attachment.ipv4_address, name


def read(path: Path, profiles: set[str], environ: Mapping[str, str]) -> Project:
    """Read a compose file.

    Args:
        profiles: services of others are left out.
        environ: the variables that the file may name.

    Raises:
        ComposeError
    """
    try:
        raw = yaml.safe_load(path.read_text())
        project = msgspec.convert(fill(raw, environ), Project, strict=False)
    except (OSError, yaml.YAMLError, msgspec.ValidationError, AttributeError) as e:
        raise ComposeError(f"{path}: {e}") from e
    chosen = {
        name: service
        for name, service in project.services.items()
        if not service.profiles or profiles & set(service.profiles)
    }
    _check(chosen, set(project.services))
    return msgspec.structs.replace(project, services=chosen)


def _check(chosen: Mapping[str, Service], known: set[str]) -> None:
    for name, service in chosen.items():
        for other, dependency in service.depends_on.items():
            if other not in known:
                raise ComposeError(f"{name} depends on {other}, which is no service")
            if dependency.required and other not in chosen:
                raise ComposeError(f"{name} depends on {other}, which no chosen profile has")


def env_file(path: Path) -> dict[str, str]:
    """The variables of a file of `NAME=value` lines."""
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


# Variables.

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<bare>\w+)|\{(?P<name>\w+))")


def fill(value: Any, environ: Mapping[str, str]) -> Any:
    """A value of the file, its texts with the variables filled in."""
    match value:
        case str():
            return interpolate(value, environ)
        case list():
            return [fill(item, environ) for item in value]
        case dict():
            return {key: fill(item, environ) for key, item in value.items()}
    return value


def interpolate(text: str, environ: Mapping[str, str]) -> str:
    """A text with `$X`, `${X}`, `${X:-default}`, `${X-default}`, `${X:?why}` filled in; `$$` is a
    dollar. Defaults may hold variables again.

    Raises:
        ComposeError: a variable that must be set is not, or a brace is not closed.
    """
    parts, position = [], 0
    while (found := _VARIABLE.search(text, position)) is not None:
        parts.append(text[position : found.start()])
        position = found.end()
        if found["dollar"]:
            parts.append("$")
        elif found["bare"]:
            parts.append(environ.get(found["bare"], ""))
        else:
            end = _closing(text, position)
            parts.append(_braced(found["name"], text[position:end], environ))
            position = end + 1
    return "".join([*parts, text[position:]])


def _closing(text: str, position: int) -> int:
    depth = 1
    for at in range(position, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return at
    raise ComposeError(f"a brace is not closed in {text!r}")


def _braced(name: str, rest: str, environ: Mapping[str, str]) -> str:
    """What stands for `${name rest}`."""
    empty_counts = rest.startswith(":")
    kind, other = rest[empty_counts : empty_counts + 1], rest[empty_counts + 1 :]
    value = environ.get(name)
    is_set = bool(value) if empty_counts else value is not None
    match kind:
        case "":
            return value or ""
        case "-":
            return str(value) if is_set else interpolate(other, environ)
        case "+":
            return interpolate(other, environ) if is_set else ""
        case "?" if is_set:
            return str(value)
        case "?":
            raise ComposeError(f"{name}: {interpolate(other, environ) or 'must be set'}")
    raise ComposeError(f"${{{name}{rest}}} can't be read")


_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s|m|h)")


def seconds(duration: str) -> float:
    """A duration as compose writes it, e.g. `1m30s`.

    Raises:
        ComposeError
    """
    parts = list(_PART.finditer(duration))
    if not parts or "".join(part[0] for part in parts) != duration:
        raise ComposeError(f"{duration!r} is no duration")
    return sum(float(part[1]) * _UNITS_S[part[2]] for part in parts)
