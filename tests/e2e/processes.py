"""Starts the real controller and model workers as child processes and talks to them over HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import requests

from registry.paths import default_cache_dir
from tests.fakes.ports import free_port

MODEL = "smollm2-135m-instruct"
START_TIMEOUT_S = 120.0


def wait_until(ready: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Poll `ready` until it is true.

    Raises:
        AssertionError: it is not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)


def run_module(*arguments: str, timeout_s: float = 900.0) -> str:
    """Run `python -m MODULE ...` to its end. -> what it printed

    Raises:
        AssertionError: it failed.
    """
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=_environment({}), capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", **more}


def cache_environment(directory: Path) -> dict[str, str]:
    """The environment of processes that keep in `directory` what they keep, but for the kernels, which all share."""
    environment = {"XDG_CACHE_HOME": str(directory)}
    kernels = default_cache_dir(os.environ) / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    link = default_cache_dir(environment) / "kernels"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(kernels)
    return environment


class Process:
    """One child process whose output goes to a log file."""

    def __init__(self, log: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(environment or {}),
            )

    def kill(self) -> None:
        """kill -9."""
        self.popen.kill()
        self.popen.wait()

    def wait(self, timeout_s: float = 600.0) -> tuple[int, str]:
        """To its end. -> the exit status, and all that it has printed"""
        return self.popen.wait(timeout_s), self.text()

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, then wait; returns the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Cluster:
    """A controller and its workers, all on loopback; what they keep is in `directory`, but for the kernels."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory = directory
        self.model = model
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{directory / 'catalog.sqlite3'}"
        self.controller: Process | None = None
        self.workers: list[Process] = []
        self._environment = {**cache_environment(directory / "cache"), "XDG_STATE_HOME": str(directory / "state")}

    def start_controller(self, *arguments: str) -> Process:
        self.controller = Process(
            self.directory / "controller.log",
            "controller", "--port", str(self.port), "--database", self.database, *arguments,
            environment=self._environment,
        )  # fmt: skip
        wait_until(lambda: self.get("/health") is not None, START_TIMEOUT_S, "controller")
        return self.controller

    def start_worker(
        self, *arguments: str, wait: bool = True, cache: Path | None = None, number: int | None = None
    ) -> Process:
        """Args:
        cache: of this worker's own, as if it ran on another machine; None: that of `directory`.
        number: which of them to start again; None: it is another one.
        """
        number = len(self.workers) if number is None else number
        worker = Process(
            self.directory / f"worker-{number}.log",
            "model_worker", "--model-path", str(self.model), "--model-name", MODEL, "--port", "0",
            "--dtype", "float32", "--controller", self.url, *arguments,
            environment=self._environment if cache is None else self._environment | cache_environment(cache),
        )  # fmt: skip
        self.workers[number : number + 1] = [worker]
        if wait:
            self.wait_for_workers(number + 1)
        return worker

    def wait_for_workers(self, count: int, timeout_s: float = START_TIMEOUT_S) -> None:
        try:
            wait_until(lambda: self.num_workers() == count, timeout_s, f"{count} workers")
        except AssertionError as error:
            raise AssertionError(f"{error}\n" + "\n".join(worker.text() for worker in self.workers)) from None

    def num_workers(self) -> int:
        reply = self.get("/health")
        return -1 if reply is None else int(reply.json()["workers"])

    def get(self, path: str) -> requests.Response | None:
        try:
            return requests.get(self.url + path, timeout=30)
        except requests.ConnectionError:
            return None

    def metric(self, name: str) -> float:
        """Sum of a metric over all its labels."""
        reply = self.get("/metrics")
        assert reply is not None
        assert reply.status_code == 200
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", reply.text, flags=re.MULTILINE)
        assert values, f"{name} is not in /metrics"
        return sum(float(value) for value in values)

    def stop(self) -> None:
        for process in [*self.workers, self.controller]:
            if process is not None and process.popen.poll() is None:
                process.kill()
