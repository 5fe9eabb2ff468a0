"""Servers as child processes on this machine: engines, gateways, anything with a URL.

Every child is the leader of a session of its own, dies with its parent, writes to a log file,
and is stopped by its process group, so that none of its descendants survives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

from deploy.model import MODEL_NAME, model_dir

PR_SET_PDEATHSIG = 1
STOP_GRACE_S = 10.0
LOG_TAIL_LINES = 30


class ServerFailed(Exception):
    """A server ended, or was not ready in time. Says what its log says."""


def free_port() -> int:
    """A port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Server:
    """One child process that serves HTTP. Use as a context manager, or `start` and `stop`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        ready_path: str,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            ready_path: answers 200 when the server is ready.
            env: added to the environment of this process.
        """
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._command = list(command)
        self._ready_url = self.url + ready_path
        self._env = dict(env or {})
        descriptor, path = tempfile.mkstemp(prefix=f"stream2llm-{name}-", suffix=".log")
        os.close(descriptor)
        self.log_path = Path(path)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Self:
        """Start the process; does not wait until it is ready.

        It dies with the *thread* that calls this: call it where the caller lives.
        """
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,  # kept open: some servers end when it closes
                stdout=log,
                stderr=log,
                env=os.environ | self._env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return self

    def wait_ready(
        self, timeout_s: float = 180.0, waiting: Callable[[float], None] = lambda seconds: None
    ) -> Self:
        """Wait until the server answers.

        Args:
            waiting: called every now and then with the seconds waited so far.

        Raises:
            ServerFailed: it ended, or is not ready in time.
        """
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < timeout_s:
            if self._process is None or self._process.poll() is not None:
                raise ServerFailed(f"{self.name} ended while starting:\n{self.log_tail()}")
            try:
                if httpx.get(self._ready_url, timeout=5.0, trust_env=False).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            waiting(time.monotonic() - begun_s)
            time.sleep(0.2)
        self.stop()
        raise ServerFailed(f"{self.name} not ready after {timeout_s:g} s:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of its output."""
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def kill(self) -> None:
        """End it at once, with everything it has started, as a crash would."""
        self._end([signal.SIGKILL])

    def stop(self) -> None:
        """End it, politely first, with everything it has started. No error if it has ended."""
        self._end([signal.SIGINT, signal.SIGKILL])
        self.log_path.unlink(missing_ok=True)

    def _end(self, signals: Sequence[signal.Signals]) -> None:
        if self._process is None:
            return
        family = self._family()
        for number in signals:
            if self._process.poll() is None or number == signal.SIGKILL:
                for member in family:
                    if number == signal.SIGKILL or member.pid == self._process.pid:
                        _signal(member, number)
            psutil.wait_procs(family, timeout=STOP_GRACE_S)
            family = [member for member in family if _alive(member)]
        self._process.wait()
        self._process = None

    def _family(self) -> list[psutil.Process]:
        """The process, its descendants, and whoever else is in its session."""
        leader = self.pid
        found = {}
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == leader:
                    found[process.pid] = process
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        try:
            for process in psutil.Process(leader).children(recursive=True):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            pass
        return list(found.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """A vLLM engine with the plug-in."""

    model: str | Path | None = None
    """Folder or name; None for the small model that comes with the project."""
    served_name: str = MODEL_NAME
    max_model_len: int = 8192
    kv_blocks: int | None = None
    """Size of the KV pool in blocks; None leaves it to vLLM."""
    step_tokens: int = 128
    """Tokens in one step. Operations take effect between steps: short ones react sooner."""
    dtype: str | None = None
    """None for what the CPU computes fastest."""
    cores: str | None = None
    """Cores to compute on, e.g. `0-1`; None for all."""
    debug_checks: bool = False


def engine(options: EngineOptions) -> Server:
    """An engine on this machine's CPU, not started yet."""
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(options.model or model_dir()),
        "--served-model-name", options.served_name,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", options.dtype or cpu_dtype(),
        "--max-model-len", str(options.max_model_len),
        "--max-num-batched-tokens", str(options.step_tokens),
        "--block-size", "32",
        "--enforce-eager",
        "--scheduler-cls", "engine_adapter.vllm.scheduler.StreamScheduler",
    ]  # fmt: skip
    if options.kv_blocks is not None:
        command += ["--num-gpu-blocks-override", str(options.kv_blocks)]
    env = {
        "VLLM_PLUGINS": "stream2llm",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": options.cores or f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "STREAM2LLM_DEBUG_CHECKS": "1" if options.debug_checks else "0",
    }
    return Server("engine", command, port=port, ready_path="/health", env=env)


def cpu_dtype() -> str:
    """`bfloat16` where the CPU multiplies it, else `float32`, which is then far faster."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def gateway(engines: Sequence[str], *extra: str) -> Server:
    """A gateway in front of engines, not started yet.

    Args:
        engines: their URLs.
        extra: further flags.
    """
    port = free_port()
    command = [sys.executable, "-m", "gateway", "--port", str(port)]
    command += ["--tokenizer", str(model_dir()), *extra]
    for url in engines:
        command += ["--engine", url]
    env = {"HF_HUB_OFFLINE": "1"}
    return Server("gateway", command, port=port, ready_path="/health", env=env)
