"""The runner: the services of a compose file as processes, from the file and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy import stack
from deploy.compose import read
from deploy.places import Places, places
from deploy.processes import Report

COMPOSE = """
name: small
services:
  once:
    image: "none:1"
    entrypoint: [python3, -c]
    command: ["import os, sys; open('/data/index.html', 'w').write(str(sorted(os.environ)))"]
    environment: {WANTED: "${WANTED:-yes}"}
    volumes: ["shared:/data"]
  site:
    image: "none:1"
    entrypoint: [python3, -m, http.server]
    command: ["8000", --bind, 0.0.0.0, --directory, /data]
    restart: always
    volumes: ["shared:/data"]
    ports: ["127.0.0.1:80:8000"]
    networks: {default: {aliases: [alias], ipv4_address: 10.9.8.7}}
    depends_on: {once: {condition: service_completed_successfully}}
    healthcheck:
      test: [CMD, python3, -c, "import urllib.request as r; r.urlopen('http://localhost:8000')"]
      start_period: 20s
      start_interval: 100ms
  twin:
    image: "none:1"
    entrypoint: [python3, -m, http.server]
    command: ["8000", --bind, 0.0.0.0, --directory, /etc/twin]
    restart: always
    volumes: ["./conf:/etc/twin:ro"]
  reader:
    image: "none:1"
    entrypoint: [python3, -c]
    command: ["import urllib.request as r; print(r.urlopen('http://alias:8000/').read())"]
    depends_on: {site: {condition: service_healthy}, twin: {condition: service_started}}
  broken:
    image: "none:1"
    entrypoint: [python3, -c]
    command: ["raise SystemExit(3)"]
  missing:
    image: "none:1"
    entrypoint: [a-program-nobody-has]
  behind:
    image: "none:1"
    entrypoint: [python3]
    depends_on: {missing: {condition: service_started}}
  beside:
    image: "none:1"
    entrypoint: [python3, -c, pass]
    depends_on: {missing: {condition: service_started, required: false}}
  of-another-profile:
    profiles: [gpu]
    image: "none:1"
    entrypoint: [a-program-nobody-has]
networks: {default: {}}
volumes: {shared: {}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    (folder / "conf").mkdir()
    (folder / "conf" / "settings").write_text("upstream site:8000 and twin; listen 0.0.0.0:8000\n")
    path = folder / "compose.yml"
    path.write_text(COMPOSE)
    return path


@pytest.fixture(scope="module")
def report(file: Path, folder: Path) -> Iterator[Report]:
    """Everything started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOT_OF_THE_FILE", "1")
        try:
            yield stack.up(folder / "run", file, "cpu", free_ports=True)
        finally:
            stack.down(folder / "run")


def test_services_come_up_or_say_why_not(report: Report) -> None:
    states = {name: status.state for name, status in report.services.items()}
    assert states == {
        "once": "completed",
        "site": "healthy",
        "twin": "running",
        "reader": "completed",
        "broken": "failed",
        "missing": "not started",
        "behind": "not started",
        "beside": "completed",
    }
    assert "a-program-nobody-has" in report.services["missing"].why
    assert "missing" in report.services["behind"].why
    assert report.services["broken"].why == "ended with 3"


def test_a_service_finds_another_by_its_alias_and_what_it_wrote_in_a_volume(
    report: Report,
) -> None:
    assert "WANTED" in Path(report.services["reader"].log).read_text()


def test_a_process_has_the_environment_of_the_file_and_nothing_else(report: Report) -> None:
    seen = Path(report.services["reader"].log).read_text()
    assert "WANTED" in seen
    assert "NOT_OF_THE_FILE" not in seen
    assert "STREAM2LLM_CACHE" not in seen


def test_two_services_listen_on_the_same_port_each_at_its_own_address(report: Report) -> None:
    with httpx.Client(trust_env=False) as http:
        for name in ("site", "twin"):
            url = f"http://{report.services[name].address}:8000/"
            assert http.get(url).status_code == 200


def test_a_published_port_leads_to_the_service(report: Report) -> None:
    answer = httpx.get(f"http://{report.published['site:8000']}/index.html", trust_env=False)
    assert "WANTED" in answer.text


def test_mounted_configuration_names_the_addresses_here(report: Report) -> None:
    site, twin = (report.services[name].address for name in ("site", "twin"))
    answer = httpx.get(f"http://{twin}:8000/settings", trust_env=False)
    assert answer.text == f"upstream {site}:8000 and twin; listen {twin}:8000\n"


def test_nothing_is_started_twice(report: Report, file: Path, folder: Path) -> None:
    with pytest.raises(stack.StackError, match="up already"):
        stack.up(folder / "run", file, "cpu", free_ports=True)


def test_the_command_line_shows_everything_and_down_ends_it(report: Report, folder: Path) -> None:
    pids = [s.pid for s in report.services.values() if s.state in ("healthy", "running")]
    assert len(pids) == 2
    command = [sys.executable, "-m", "deploy.stack", "--processes", "--folder", str(folder / "run")]
    shown = subprocess.run([*command, "status"], capture_output=True, text=True, check=True).stdout
    assert all(f"\n{name} " in "\n" + shown for name in report.services)
    assert stack.down(folder / "run")
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)
    assert not stack.down(folder / "run")
    assert Path(report.services["reader"].log).exists()


@pytest.fixture
def here(file: Path, tmp_path: Path) -> Places:
    return places(read(file, set(), {}), tmp_path, tmp_path, "127.77.9")


@pytest.mark.parametrize(
    ("text", "localized"),
    [
        ("http://twin:8000/x", "http://127.77.9.12:8000/x"),
        ("tcp://alias:5,site:6", "tcp://127.77.9.11:5,127.77.9.11:6"),
        ("10.9.8.7", "127.77.9.11"),
        ("10.9.8.70 110.9.8.7 my-site:80 site: siteb:80", None),
        ("0.0.0.0:1 localhost:2 127.0.0.1", "127.77.9.10:1 127.77.9.10:2 127.77.9.10"),
        ("localhost.example 127.0.0.10", None),
        ("--dir=/data/x /data:/data", "--dir=/here/x /here:/here"),
        ("/database /my/data", None),
    ],
)
def test_names_addresses_and_paths_become_those_of_this_machine(
    here: Places, text: str, localized: str | None
) -> None:
    expected = text if localized is None else localized
    assert here.localized(text, "once", {"/data": Path("/here")}) == expected
