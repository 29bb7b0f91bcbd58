"""Processes that a benchmark starts for itself, and stops."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import aiohttp
from openai_client import RequestFailed

LOG_NAME = "processes.log"
START_TIMEOUT_S = 120.0


@contextmanager
def started(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child process of this Python, stopped at the end; its output is added to the file `log`."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, cwd=root, env=environment
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()


async def ready(
    session: aiohttp.ClientSession, url: str, num_workers: int, processes: Sequence[subprocess.Popen[bytes]]
) -> None:
    """Wait until the controller answers and has so many workers.

    Raises:
        RequestFailed: it does not within START_TIMEOUT_S, or a process has ended.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        try:
            async with session.get(url + "/health") as response:
                if (await response.json())["workers"] == num_workers:
                    return
        except aiohttp.ClientError:
            pass  # it does not listen yet
        await asyncio.sleep(0.1)
    raise RequestFailed(f"{url} does not have {num_workers} workers")


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
