"""The demo, as a user runs it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.engine

MARK = "STREAM2LLM_TEST_MARK"
ROOT = Path(__file__).resolve().parent.parent.parent


def left_behind(mark: str) -> list[str]:
    """Names of living processes that were started by the marked demo."""
    found = []
    for process in psutil.process_iter(["name", "status"]):
        try:  # not psutil's environ: vLLM's processes rename themselves, which confuses it
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue
        marked = f"{MARK}={mark}".encode() in environment.split(b"\0")
        if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["name"])
    return found


def family_of(demo: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """What it has started, by name and id. (A process that renames itself may lose its mark.)"""
    found = {}
    for process in psutil.Process(demo.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[f"{process.name()} {process.pid}"] = process
    return found


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.demo"],
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_the_demo_ends_with_its_result_and_leaves_no_process(model_dir: Path) -> None:
    demo = start("whole")
    output, _ = demo.communicate(timeout=360)
    assert demo.returncode == 0, output
    last = output.splitlines()[-1]
    assert re.fullmatch(r"TTFT streamed \d+\.\d\d s, sent whole \d+\.\d\d s: \d+\.\dx", last)
    assert not left_behind("whole")


def test_ctrl_c_leaves_no_process(model_dir: Path) -> None:
    demo = start("interrupted")
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith("starting vLLM"):
            break
    deadline_s = time.monotonic() + 120
    family: dict[str, psutil.Process] = {}
    while not any("EngineCor" in name for name in family):
        assert time.monotonic() < deadline_s, "the engine's processes do not come up"
        time.sleep(0.5)
        family = family_of(demo)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 130, output
    assert not [name for name, process in family.items() if lives(process)]
    assert not left_behind("interrupted")
