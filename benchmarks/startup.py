"""How long a worker takes from its command to its first token: a cold process, the files already in the page cache.

    python benchmarks/startup.py --model-path smollm2-135m-instruct --gguf-path SmolLM2-135M-Instruct.Q4_1.gguf \\
        --json results.json

Starts a worker without a controller for each case and sends it a greedy request as soon as /health answers. Both times
count from before the process exists. One run of each case before the measured ones, with --warm-up, fills the page
cache and the caches of digests and kernels. Peak memory is that of the whole process, up to its first token.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from arguments import new_file
from report import describe_run, now, write_report

_NAME = "measured"
_PROMPT = "The capital of France is"
_POLL_S = 0.01
_LOG_NAME = "worker.log"


class StartFailed(Exception):
    """The worker ended, refused the request or took too long; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Case:
    """A worker's model and the flags that say how it is loaded."""

    name: str
    model: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """One start.

    Attributes:
        health_s: until /health said that it serves.
        first_token_s: until the first text of an answer.
        cpu_s: of all its threads until then, which other work on the machine disturbs less.
        peak_mib: most resident memory until then; None where the system does not tell.
    """

    health_s: float
    first_token_s: float
    cpu_s: float
    peak_mib: float | None


def cases(model: str, gguf: str | None) -> list[Case]:
    found = [
        Case("bf16", model, ("--dtype", "bfloat16", "--quantization", "none")),
        Case("int8", model, ("--quantization", "int8")),
        Case("int4", model, ("--quantization", "int4")),
    ]
    return found if gguf is None else [*found, Case("gguf", gguf, ())]


def measure(case: Case, timeout_s: float) -> Start:
    """Start a worker, ask it one thing, and end it.

    Raises:
        StartFailed: there was no answer.
    """
    port = _free_port()
    command = [sys.executable, "-m", "model_worker", "--model-path", case.model, "--model-name", _NAME]
    command += ["--no-controller", "--port", str(port), *case.flags]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / _LOG_NAME
        with log.open("wb") as output:
            start_s = time.perf_counter()
            worker = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            _wait_for_health(worker, port, start_s + timeout_s)
            health_s = time.perf_counter() - start_s
            _first_token(port, timeout_s)
            first_token_s = time.perf_counter() - start_s
            used = psutil.Process(worker.pid).cpu_times()
            cpu_s = used.user + used.system
            return Start(round(health_s, 3), round(first_token_s, 3), round(cpu_s, 2), _peak_mib(worker.pid))
        except (OSError, http.client.HTTPException, StartFailed) as error:
            raise StartFailed(f"{case.name}: {error}\n{log.read_text(errors='replace')[-2000:]}") from error
        finally:
            worker.terminate()
            worker.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _wait_for_health(worker: subprocess.Popen[bytes], port: int, deadline_s: float) -> None:
    while True:
        left_s = deadline_s - time.perf_counter()
        if left_s <= 0:
            raise StartFailed("it does not serve in time")
        if worker.poll() is not None:
            raise StartFailed(f"the worker ended with status {worker.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=left_s)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except ConnectionError:  # it does not listen yet
            time.sleep(_POLL_S)
        finally:
            connection.close()


def _first_token(port: int, timeout_s: float) -> None:
    """Wait for the first text of an answer."""
    body = {
        "request_id": "first",
        "model": _NAME,
        "prompt": {"kind": "text", "text": _PROMPT},
        "sampling": {"temperature": 0.0, "max_tokens": 4},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", "/internal/generate", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise StartFailed(f"HTTP {response.status}: {response.read().decode(errors='replace')[:300]}")
        for line in response:
            if line.strip() and json.loads(line).get("text"):
                return
        raise StartFailed("the answer ended without text")
    finally:
        connection.close()


def _peak_mib(pid: int) -> float | None:
    if not psutil.LINUX:
        return None
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]  # in KiB
    return round(peaks[0] / 1024, 1) if peaks else None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="startup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="safetensors directory or known model")
    parser.add_argument("--gguf-path", help="GGUF file, served from its own blocks")
    parser.add_argument("--cases", help="of bf16,int8,int4,gguf (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="measured starts of each case")
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True, help="one start before them")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="after which a start counts as failed")
    parser.add_argument("--json", type=new_file, help="file for settings, machine and results")
    options = parser.parse_args(arguments)
    chosen = cases(options.model_path, options.gguf_path)
    if options.cases is not None:
        names = options.cases.split(",")
        if unknown := sorted(set(names) - {case.name for case in chosen}):
            parser.error(f"--cases: {', '.join(unknown)} are none of {', '.join(case.name for case in chosen)}")
        chosen = [case for case in chosen if case.name in names]
    started_at = now()
    results = []
    try:
        for case in chosen:
            if options.warm_up:
                measure(case, options.timeout_s)
            starts = [measure(case, options.timeout_s) for _ in range(options.repeats)]
            result = {
                "case": case.name,
                "health_s": statistics.median(start.health_s for start in starts),
                "first_token_s": statistics.median(start.first_token_s for start in starts),
                "starts": [asdict(start) for start in starts],
            }
            print(json.dumps(result), flush=True)
            results.append(result)
    except StartFailed as error:
        print(f"startup.py: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        report = {
            **describe_run("startup.py", arguments, started_at),
            "cases": results,
        }
        write_report(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
