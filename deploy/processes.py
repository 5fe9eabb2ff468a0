"""The services of a compose file as processes of this machine.

`python -m deploy.processes FOLDER` is the supervisor that `deploy.stack` starts: it reads what to
do from FOLDER/plan.json, owns every process, writes FOLDER/state.json whenever something changes,
and ends everything when it is told to end, or dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import msgspec

from deploy.compose import Health, Project, Service, read, seconds
from deploy.local import Server, free_port
from deploy.places import Places, hold, mounted, places
from deploy.programs import ProgramMissing, program

State = Literal["waiting", "starting", "running", "healthy", "completed", "failed", "not started"]
"""`running`: started, and the file has no health check for it."""

SETTLED = ("running", "healthy", "completed", "failed", "not started")
KEPT_VARIABLES = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "STREAM2LLM_TEST_MARK")
"""Of this process's environment; all others are the file's, as in a container."""
TICK_S = 0.1


class Plan(msgspec.Struct, frozen=True):
    """What the supervisor is to do."""

    file: str
    profiles: list[str]
    environ: dict[str, str]
    subnet: str
    free_ports: bool


class Status(msgspec.Struct):
    """How a service does."""

    state: State = "waiting"
    address: str = ""
    pid: int | None = None
    log: str = ""
    why: str = ""
    """It failed, or was not started."""


class Report(msgspec.Struct):
    """What the supervisor says of everything."""

    pid: int
    started_s: float
    services: dict[str, Status]
    published: dict[str, str] = {}
    """Addresses here by `service:port`."""

    @property
    def settled(self) -> bool:
        return all(status.state in SETTLED for status in self.services.values())


class Local:
    """One service here."""

    def __init__(self, name: str, service: Service, here: Places, root: Path, folder: Path) -> None:
        """
        Args:
            root: of the project.
            folder: of this run.
        """
        self.name = name
        self.service = service
        mounts = mounted(here, name, service, root, folder / "config")

        def localized(text: str) -> str:
            return here.localized(text, name, mounts)

        self.environment = {k: localized(v) for k, v in service.environment.items()}
        self.command = [*service.entrypoint[:1], *map(localized, [*service.entrypoint[1:],
                        *service.command])]  # fmt: skip
        self.health = [localized(part) for part in service.healthcheck.test] \
            if service.healthcheck else []  # fmt: skip
        self.log = folder / "logs" / f"{name}.log"
        self.server: Server | None = None
        self.begun_s = 0.0

    @property
    def variables(self) -> dict[str, str]:
        """Its whole environment."""
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
        return kept | self.environment

    def start(self) -> Server:
        """Start it.

        Raises:
            ProgramMissing
        """
        line = [*program(self.command[0]), *self.command[1:]]
        self.begun_s = time.monotonic()
        self.server = Server(
            self.name, line, port=0, env=self.variables, log_path=self.log, inherits=False
        )
        return self.server.start()


def healthy(health: Health, command: list[str], variables: Mapping[str, str]) -> bool:
    """Run a health check once."""
    kind, *rest = command
    line = ["/bin/sh", "-c", *rest] if kind == "CMD-SHELL" else [*program(rest[0]), *rest[1:]]
    with suppress(subprocess.TimeoutExpired, OSError):
        done = subprocess.run(
            line,
            env=dict(variables),
            timeout=seconds(health.timeout),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        return done.returncode == 0
    return False


class Supervisor:
    """Starts the services in the order that their dependencies allow, and ends them."""

    def __init__(self, project: Project, here: Places, root: Path, folder: Path) -> None:
        self.report = Report(os.getpid(), time.time(), {})
        self._folder = folder
        self._running = ExitStack()
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._locals = {
            name: Local(name, service, here, root, folder)
            for name, service in project.services.items()
        }
        for name, local in self._locals.items():
            self.report.services[name] = Status(address=here.addresses[name], log=str(local.log))

    def up(self, stop: threading.Event) -> None:
        """Start everything; returns when nothing is left to wait for, or at `stop`."""
        checked_s = dict.fromkeys(self._locals, 0.0)
        while not (self.report.settled or stop.is_set()):
            for name, local in self._locals.items():
                status = self.report.services[name]
                if status.state == "waiting":
                    self._maybe_start(local, status)
                elif status.state == "starting":
                    self._look(local, status, checked_s)
            stop.wait(TICK_S)

    def watch(self, stop: threading.Event) -> None:
        """Until `stop`: notice what ends."""
        while not stop.wait(1.0):
            for name, local in self._locals.items():
                status = self.report.services[name]
                if status.state in ("running", "healthy") and _ended(local) is not None:
                    self._set(status, "failed", f"ended with {_ended(local)}")

    def down(self) -> None:
        """End everything, in the reverse order of the starts."""
        self._running.close()

    def _maybe_start(self, local: Local, status: Status) -> None:
        for name, dependency in local.service.depends_on.items():
            other = self.report.services.get(name)
            if other is None:
                continue  # of a profile that was not chosen
            if other.state in ("failed", "not started") and dependency.required:
                self._set(status, "not started", f"needs {name}, which is {other.state}")
                return
            if other.state not in SETTLED and not _fulfilled(dependency.condition, other.state):
                return
        try:
            server = local.start()
        except ProgramMissing as e:
            self._set(status, "not started", str(e))
            return
        self._running.callback(server.stop)
        status.pid = server.pid
        self._set(status, "starting")

    def _look(self, local: Local, status: Status, checked_s: dict[str, float]) -> None:
        """Whether a service has come up, or ended."""
        code = _ended(local)
        if code is not None:
            once = code == 0 and local.service.restart == "no"
            self._set(status, *(("completed", "") if once else ("failed", f"ended with {code}")))
            return
        health = local.service.healthcheck
        if health is None:
            if local.service.restart != "no":  # not one that does its work and ends
                self._set(status, "running")
            return
        now_s = time.monotonic()
        if now_s < checked_s[local.name] + seconds(health.start_interval):
            return
        checked_s[local.name] = now_s
        try:
            if healthy(health, local.health, local.variables):
                self._set(status, "healthy")
            elif now_s > local.begun_s + health.patience_s:
                self._set(status, "failed", f"not healthy after {health.patience_s:g} s")
        except ProgramMissing as e:
            self._set(status, "failed", f"its health can't be checked: {e}")

    def _set(self, status: Status, state: State, why: str = "") -> None:
        status.state, status.why = state, why
        self.write()

    def write(self) -> None:
        """Let the report be read."""
        unfinished = self._folder / "state.json.new"
        unfinished.write_bytes(msgspec.json.encode(self.report))
        unfinished.rename(self._folder / "state.json")

    def publish(self, project: Project, here: Places, *, free_ports: bool) -> None:
        """Listen on the ports that the file publishes."""
        pairs = []
        for name, service in project.services.items():
            for published in service.published:
                port = free_port() if free_ports else published.port
                at = f"{published.host}:{port}"
                pairs += [at, f"{here.addresses[name]}:{published.target}"]
                self.report.published[f"{name}:{published.target}"] = at
        if pairs:
            line = [sys.executable, "-m", "deploy.forward", *pairs]
            log = self._folder / "logs" / "published.log"
            server = Server("published", line, port=0, log_path=log)
            self._running.callback(server.stop)
            server.start()


def _ended(local: Local) -> int | None:
    return None if local.server is None else local.server.exit_code


def _fulfilled(condition: str, state: State) -> bool:
    match condition:
        case "service_started":
            return state in ("starting", "running", "healthy", "completed")
        case "service_healthy":
            return state == "healthy"
    return state == "completed"


def main() -> int:
    """Do what the plan in the folder says, until told to end."""
    folder = Path(sys.argv[1])
    plan = msgspec.json.decode((folder / "plan.json").read_bytes(), type=Plan)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    root = Path(plan.file).parent
    project = read(Path(plan.file), set(plan.profiles), plan.environ)
    with hold(plan.subnet):
        here = places(project, folder / "volumes", root, plan.subnet)
        supervisor = Supervisor(project, here, root, folder)
        supervisor.write()
        try:
            supervisor.publish(project, here, free_ports=plan.free_ports)
            supervisor.up(stop)
            supervisor.watch(stop)
        finally:
            supervisor.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
