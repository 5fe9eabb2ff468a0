"""`python -m deploy.stack up|down|status`: everything in docker-compose.yml, on this machine.

In containers where a container engine works; otherwise every service as a process, started from the
same file (`deploy.processes`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from deploy.compose import ComposeError, env_file, read
from deploy.local import STOP_GRACE_S
from deploy.model import cache_dir
from deploy.places import free_subnet
from deploy.processes import Plan, Report

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker-compose.yml"
COMPOSES = (["docker", "compose"], ["podman", "compose"], ["podman-compose"])
UP_S = 900.0
STARTING_S = 30.0


class StackError(Exception):
    """It can't be done. Says why."""


def container_compose() -> list[str] | None:
    """The command of a compose that has a working engine behind it; None where there is none."""
    return next((command for command in COMPOSES if _works(command)), None)


def _works(command: list[str]) -> bool:
    for arguments in ([*command, "version"], [command[0].removesuffix("-compose"), "info"]):
        try:
            subprocess.run(arguments, capture_output=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return False
    return True


def variables(file: Path, profile: str) -> dict[str, str]:
    """What the compose file may name: those of the profile, and above them the environment's."""
    chosen = file.parent / "deploy" / f"{profile}.env"
    return (env_file(chosen) if chosen.exists() else {}) | dict(os.environ)


# As processes.


def up(folder: Path, file: Path, profile: str, *, free_ports: bool) -> Report:
    """Start everything, and wait until all services are settled.

    Raises:
        StackError: it runs already, or its supervisor does not come up.
        ComposeError
    """
    if running(folder) is not None:
        raise StackError(f"it is up already; its folder is {folder}")
    environ = variables(file, profile)
    read(file, {profile}, environ)  # so that errors are told here
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "state.json").unlink(missing_ok=True)
    plan = Plan(str(file), [profile], environ, free_subnet(), free_ports)
    private = os.open(folder / "plan.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(private, "wb") as target:  # it may hold a token for the model hub
        target.write(msgspec.json.encode(plan))
    with (folder / "logs" / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.processes", str(folder)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return _settled(folder, process)


def _settled(folder: Path, process: subprocess.Popen[bytes]) -> Report:
    told: dict[str, str] = {}
    begun_s = time.monotonic()
    while True:
        waited_s = time.monotonic() - begun_s
        if process.poll() is not None:
            raise StackError(f"its supervisor ended: see {folder}/logs/supervisor.log")
        report = report_of(folder)
        if (report is None and waited_s > STARTING_S) or waited_s > UP_S:
            raise StackError(f"it does not come up: see {folder}/logs")
        if report is not None:
            _tell(report, told, waited_s)
            if report.settled:
                return report
        time.sleep(0.1)


def _tell(report: Report, told: dict[str, str], waited_s: float) -> None:
    for name, status in report.services.items():
        if told.get(name) != status.state and status.state != "waiting":
            told[name] = status.state
            why = f" ({status.why})" if status.why else ""
            print(f"{waited_s:6.1f} s  {name:16} {status.state}{why}", flush=True)


def report_of(folder: Path) -> Report | None:
    """What the supervisor said last."""
    with suppress(FileNotFoundError):
        return msgspec.json.decode((folder / "state.json").read_bytes(), type=Report)
    return None


def running(folder: Path) -> psutil.Process | None:
    """The supervisor of a folder, if it lives."""
    report = report_of(folder)
    if report is None:
        return None
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(report.pid)
        if str(folder) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def down(folder: Path) -> bool:
    """End everything. Returns whether anything ran."""
    supervisor = running(folder)
    if supervisor is None:
        return False
    supervisor.terminate()
    report = report_of(folder)
    count = 1 if report is None else len(report.services) + 1
    supervisor.wait(timeout=count * (STOP_GRACE_S + 5.0))
    return True


def show(report: Report) -> None:
    """Print a report."""
    published = {name: [] for name in report.services}  # type: dict[str, list[str]]
    for place, address in report.published.items():
        published[place.split(":")[0]].append(f"http://{address}")
    for name, status in report.services.items():
        where = " ".join(published[name]) or status.address
        why = f" ({status.why}; {status.log})" if status.why else ""
        print(f"{name:16} {status.state:12} {where}{why}")


def main() -> int:
    """Do what the command line says. Returns the exit code."""
    options = _arguments()
    compose = None if options.processes else container_compose()
    try:
        if compose is not None:
            return _in_containers(compose, options)
        return _as_processes(options)
    except (StackError, ComposeError) as e:
        print(f"stack: {e}", file=sys.stderr)
        return 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deploy.stack", description=__doc__)
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument("--file", type=Path, default=FILE, help="the compose file")
    parser.add_argument("--profile", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--processes", action="store_true", help="no containers in any case")
    parser.add_argument(
        "--free-ports", action="store_true", help="without containers: any ports, not the file's"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=cache_dir() / "stack",
        help="without containers: where logs, volumes and the state are (default: %(default)s)",
    )
    options = parser.parse_args()
    options.folder, options.file = options.folder.resolve(), options.file.resolve()
    return options


def _in_containers(compose: list[str], options: argparse.Namespace) -> int:
    environment = ["--env-file", str(ROOT / "deploy" / f"{options.profile}.env")]
    line = [*compose, "--file", str(options.file), *environment, "--profile", options.profile]
    arguments = {"up": ["up", "--build", "--detach", "--wait"], "down": ["down"], "status": ["ps"]}
    return subprocess.run([*line, *arguments[options.command]], check=False).returncode


def _as_processes(options: argparse.Namespace) -> int:
    match options.command:
        case "up":
            print(f"no container engine works here: processes, logs in {options.folder}/logs")
            report = up(
                options.folder, options.file, options.profile, free_ports=options.free_ports
            )
            show(report)
            return int(any(status.state == "failed" for status in report.services.values()))
        case "down":
            print("stopped" if down(options.folder) else "nothing runs")
            return 0
    found = report_of(options.folder)
    if found is None or running(options.folder) is None:
        print("nothing runs")
        return 1
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
