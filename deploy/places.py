"""Where a service of a compose file is when it runs as a process of this machine.

Every service gets a loopback address of its own, so that ports stay as the file has them, and every
mount a folder. In commands, environments and mounted configuration

    name:port          of a service            becomes   its address and the port
    0.0.0.0, localhost, 127.0.0.1              become    the service's own address
    /path/in/container of one of its mounts    becomes   the folder here
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.compose import Project, Service

SUBNETS = range(64, 255)
FIRST_HOST = 10


@dataclass(frozen=True, slots=True)
class Places:
    """The addresses of the services, and the folders of the volumes."""

    addresses: Mapping[str, str]
    """By service."""
    names: Mapping[str, str]
    """The address by every name and address that the file has for a service."""
    volumes: Mapping[str, Path]

    def localized(self, text: str, service: str, mounts: Mapping[str, Path]) -> str:
        """A text of the file, or of a file that it mounts, as it has to be here.

        Args:
            service: whose text it is.
            mounts: folders and files here by the paths that they have in its container.
        """
        own = self.addresses[service]
        text = re.sub(r"(?<![\w.-])(?:0\.0\.0\.0|127\.0\.0\.1|localhost)(?![\w.-])", own, text)
        for name in sorted(self.names, key=len, reverse=True):
            behind = r"(?![\w.])" if name[0].isdigit() else r"(?=:\d)"
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}{behind}", self.names[name], text)
        for target in sorted(mounts, key=len, reverse=True):
            text = re.sub(rf"(?<![\w./-]){re.escape(target)}(?![\w.-])", str(mounts[target]), text)
        return text


def places(project: Project, volumes: Path, root: Path, subnet: str) -> Places:
    """Where everything is.

    Args:
        volumes: folder of the volumes that have none of their own.
        root: folder of the compose file.
        subnet: the first three numbers of the addresses.
    """
    addresses = {
        name: f"{subnet}.{FIRST_HOST + number}" for number, name in enumerate(project.services)
    }
    names = {name: addresses[service] for name, service in project.names()}
    folders = {}
    for name, volume in project.volumes.items():
        local = None if volume is None else volume.local
        folders[name] = volumes / name if local is None else (root / local).resolve()
    return Places(addresses, names, folders)


def free_subnet() -> str:
    """The front of loopback addresses that no other stack uses."""
    for number in SUBNETS:
        subnet = f"127.77.{number}"
        if not _in_use(subnet):
            return subnet
    raise RuntimeError("all loopback subnets from 127.77.64 on are in use")


def _in_use(subnet: str) -> bool:
    """Whether a stack's supervisor holds the subnet: see `hold`."""
    try:
        hold(subnet).close()
    except OSError:
        return True
    return False


def hold(subnet: str) -> socket.socket:
    """Take a subnet, until the socket is closed or this process ends.

    Raises:
        OSError: another process has it.
    """
    held = socket.socket()
    try:
        held.bind((f"{subnet}.1", 1 << 15))
        held.listen()
    except OSError:
        held.close()
        raise
    return held


def mounted(
    places: Places, name: str, service: Service, root: Path, copies: Path
) -> dict[str, Path]:
    """The folders and files of a service here, by their paths in its container. What is mounted out
    of the project is configuration: it is copied, and localized on the way.

    Args:
        copies: folder for the copies.
    """
    found = {}
    for mount in service.mounts:
        if mount.is_volume:
            found[mount.target] = places.volumes[mount.source]
            found[mount.target].mkdir(parents=True, exist_ok=True)
        else:
            found[mount.target] = copies / name / mount.target.strip("/").replace("/", "-")
    for mount in service.mounts:
        if not mount.is_volume:
            _copy(places, name, found, root / mount.source, found[mount.target])
    return found


def _copy(
    places: Places, service: str, mounts: Mapping[str, Path], source: Path, target: Path
) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for child in source.iterdir():
            _copy(places, service, mounts, child, target / child.name)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(places.localized(source.read_text(), service, mounts))
