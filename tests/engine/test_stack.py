"""The whole stack from docker-compose.yml, on real engines, as far as this machine has programs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy import stack
from deploy.check import check, runs, tell
from deploy.processes import Report
from deploy.programs import OTHER_NAMES

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def report(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Report, Path]]:
    """The stack, started, and its folder."""
    folder = tmp_path_factory.mktemp("stack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAM2LLM_CACHE", str(model_dir.parent))
        try:
            yield stack.up(folder, stack.FILE, "cpu", free_ports=True), folder
        finally:
            stack.down(folder)


def missing(report: Report) -> dict[str, str]:
    """Services that were not started for want of a program, and the program."""
    sign = " is not installed"
    found = {n: s.why.removesuffix(sign) for n, s in report.services.items() if sign in s.why}
    return {name: why.removeprefix("the program ") for name, why in found.items()}


def test_what_this_machine_has_is_up_and_the_rest_says_what_it_lacks(
    report: tuple[Report, Path],
) -> None:
    stack_report, _ = report
    lacking = missing(stack_report)
    for program in lacking.values():
        assert not any(map(shutil.which, (program, *OTHER_NAMES.get(program, ()))))
    for name, status in stack_report.services.items():
        needs = any(f"needs {other}," in status.why for other in stack_report.services)
        up = status.state in ("healthy", "running", "completed")
        assert up or name in lacking or needs, (name, status)
    for name in ("model", "prefill-cpu", "decode-cpu", "redis", "gateway-1", "gateway-2"):
        assert stack_report.services[name].state in ("healthy", "completed")


@pytest.mark.timeout(600)
def test_streams_are_answered_and_everything_that_the_dashboard_shows_is_there(
    report: tuple[Report, Path],
) -> None:
    stack_report, _ = report
    gateway = f"http://{stack_report.services['gateway-1'].address}:8000"
    ready = httpx.get(f"{gateway}/ready", trust_env=False)
    assert ready.json()["ready"]
    needed = ("proxy", "prometheus", "redis-exporter", "locust")
    lacking = [name for name in needed if not runs(stack_report, name)]
    if lacking:
        pytest.skip(f"this machine has no {', '.join(lacking)}")
    found = check(stack_report, users=6, seconds=120, gap_s=1.0)
    tell(found)
    assert found.requests > 0
    assert not found.failures
    assert not found.unreached
    assert not found.empty


def test_down_leaves_no_process(report: tuple[Report, Path]) -> None:
    stack_report, folder = report
    assert stack.down(folder)
    pids = [status.pid for status in stack_report.services.values() if status.pid is not None]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
