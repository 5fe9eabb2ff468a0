"""Servers on this machine in a fraction of the time: forked from a process that has imported what
they need.

`python -m vllm...` imports PyTorch and vLLM three times, one process after the other: 40 of the 47
seconds that a small model takes to start. Whoever kills engines by the dozen can't wait for that. A
nursery imports once; each engine is a fork of it, with a session, an environment and a log of its
own, and so is each process that the engine makes. It computes on one core: vLLM itself would spawn
its processes, so that the OpenMP of each binds its threads; a fork is bound by the kernel. Other
servers that are run by `python -m` can be forked too.

`python -m deploy.nursery MODULE...` imports the modules, reads a line of JSON for each server, and
answers its id on a line:

    {"arguments": [...], "env": {...}, "log": "/path", "core": 0}  ->  {"pid": 123}
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from deploy.local import EngineOptions, Process, Server, engine

IMPORTED_FIRST = (
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
)


class Nursery:
    """The process, as its user sees it. Use as a context manager."""

    def __init__(
        self, modules: Sequence[str] = IMPORTED_FIRST, env: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            modules: to import; those of real engines, unless others are named.
            env: added to the environment of the process.
        """
        self._modules = modules
        self._env = env or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._one = Lock()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.nursery", *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "", **self._env},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None

    def engine(self, options: EngineOptions, core: int) -> Server:
        """An engine that computes on a core, not started yet."""
        return _ForkedServer(self, engine(options), core)

    def server(self, server: Server) -> Server:
        """A server that would be run by `python -m`, forked instead, not started yet."""
        return _ForkedServer(self, server, None)

    def fork(
        self, arguments: Sequence[str], env: Mapping[str, str], log: Path, core: int | None
    ) -> int:
        """Start a server; returns the id of its process, which leads a session of its own.

        Args:
            arguments: module and flags, as behind `python -m`.
            log: what it says is added there.
            core: to compute on; None for any.

        Raises:
            OSError: the nursery has died.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": arguments, "env": dict(env), "log": str(log), "core": core}
        with self._one:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise OSError("the nursery has died")
        pid: int = json.loads(line)["pid"]
        return pid


class _ForkedServer(Server):
    """A server that a nursery forks instead of one that is run from its command."""

    def __init__(self, nursery: Nursery, server: Server, core: int | None) -> None:
        vars(self).update(vars(server))
        self._nursery, self._core = nursery, core

    def _spawn(self) -> Process:
        module_and_flags = self._command[2:]  # behind `python -m`
        return _Forked(self._nursery.fork(module_and_flags, self._env, self.log_path, self._core))


class _Forked:
    """A process that is not a child of this one, with the methods of `subprocess.Popen` that
    `deploy.local.Server` uses."""

    stdin = None

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """None while it runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return -1
        return None

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._send(signal.SIGKILL)

    def wait(self) -> int:
        """Nothing to wait for: the nursery's kernel reaps it."""
        return -1

    def _send(self, number: signal.Signals) -> None:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # engines that end leave no zombie
    for module in sys.argv[1:]:
        import_module(module)
    _always_fork()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
        print(json.dumps({"pid": pid}), flush=True)


def _always_fork() -> None:
    """vLLM asks for `spawn` on a CPU."""
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context("fork")  # type: ignore[assignment]


def _become(order: Mapping[str, Any]) -> None:
    """Be the server that was ordered; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, copy in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, copy)
        os.environ.update(order["env"], VLLM_CPU_OMP_THREADS_BIND="nobind")
        if order["core"] is not None:
            os.sched_setaffinity(0, {order["core"]})
        sys.argv = list(order["arguments"])
        runpy.run_module(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
